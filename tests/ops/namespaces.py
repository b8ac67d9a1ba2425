"""Several machines on one, as root: each has a network, mounts, a host name and processes of its own.

They hang on a bridge in a network of its own, so nothing of the host's network is touched, and end with the test.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

NEEDED = ("ip", "unshare", "nsenter", "mount")
ISOLATED = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
BIN = Path(sys.executable).parent


@functools.cache
def impossible() -> str:
    """Why this machine cannot do it; "": it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        return f"{', '.join(missing)} missing"
    tried = subprocess.run(
        [*ISOLATED, "--net", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return tried.stderr.strip()


@dataclass
class Machine:
    """One of them. `log` gets what its commands print; `environment` is all of theirs."""

    name: str
    address: str
    namespace: str
    folder: Path
    environment: dict[str, str]
    hosts: str = ""
    hidden: Sequence[str | Path] = ()  # folders that are empty there
    read_only: Sequence[str | Path] = ()  # of those
    binds: Mapping[str, str] = field(default_factory=dict)
    shm: str = "1g"
    outer: subprocess.Popen[bytes] | None = None
    init: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, command: str = "", cwd: str = "/") -> None:
        """Switch it on; `command`, of bash, runs in the background of all that `call` does there."""
        home = self.folder / "home"
        for made in (home, self.folder / "ray"):
            made.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(self.hosts)
        # A name server that refuses at once: gRPC waits for one that cannot be reached.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        script = [
            f"hostname {self.name}",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf",
            f"mkdir -p /tmp/ray && mount --bind {self.folder}/ray /tmp/ray",
            f"mount -t tmpfs -o size={self.shm} tmpfs /dev/shm",
            *(f"mkdir -p {to} && mount --bind {what} {to}" for to, what in self.binds.items()),
            *(f"mount -t tmpfs tmpfs {path}" for path in self.hidden),
            *(f"mount -o remount,ro {path}" for path in self.read_only),
            f"cd {shlex.quote(cwd)}",
            f"{command or ':'}",
            "sleep infinity",
        ]
        path = self.folder / "start.sh"
        path.write_text("\n".join(script) + "\n")
        with self.log.open("ab") as log:
            self.outer = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *ISOLATED, "bash", str(path)],
                env={**self.environment, "HOME": str(home)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        wait_until(lambda: bool(children.read_text().split()), 10, self.name)
        self.init = int(children.read_text().split()[0])

    def enter(self, *words: str, **environment: str) -> list[str]:
        """The command that runs these words there."""
        env = {**self.environment, "HOME": str(self.folder / "home"), **environment}
        inside = ["nsenter", "-t", str(self.init), "-m", "-u", "-n", "-p"]
        return [*inside, "env", "-i", *(f"{name}={value}" for name, value in env.items()), *words]

    def call(
        self, *words: str, cwd: str | Path = "/", seconds: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = ["env", "-C", str(cwd), *words]
        return subprocess.run(
            self.enter(*command, **environment), capture_output=True, text=True, check=False, timeout=seconds
        )

    def lose(self) -> None:
        """As when its power is cut: every process of it at once."""
        if self.init:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
            assert self.outer is not None
            self.outer.wait(timeout=30)
            self.init = 0


class Network:
    """Machines by name, each with an address, none of them switched on."""

    def __init__(self, folder: Path, names: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.tag = f"nl{secrets.token_hex(2)}"
        inherited = {name: os.environ[name] for name in ("LANG", "OMP_NUM_THREADS") if name in os.environ}
        base = {**inherited, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **(environment or {})}
        self.machines = {
            name: Machine(name, f"10.78.0.{10 + n}", f"{self.tag}{n}", folder / name, dict(base))
            for n, name in enumerate(names)
        }
        everybody = "".join(f"{one.address} {one.name}\n" for one in self.machines.values())
        for one in self.machines.values():
            one.hosts = f"127.0.0.1 localhost\n{everybody}"

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def __enter__(self) -> Network:
        switch = f"{self.tag}sw"
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "br0", "type", "bridge")
            ip("-n", switch, "link", "set", "br0", "up")
            for n, one in enumerate(self.machines.values()):
                here, cable = one.namespace, f"v{self.tag}{n}"
                ip("netns", "add", here)
                ip("link", "add", cable, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", here)
                ip("-n", switch, "link", "set", cable, "master", "br0", "up")
                ip("-n", here, "link", "set", "lo", "up")
                ip("-n", here, "addr", "add", f"{one.address}/24", "dev", "eth0")
                ip("-n", here, "link", "set", "eth0", "up")
                # Ray finds its machine's address by the way to the outside; this one leads nowhere.
                ip("-n", here, "route", "add", "default", "via", "10.78.0.254", "dev", "eth0", "onlink")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.machines.values():
            one.lose()
        for name in (*(one.namespace for one in self.machines.values()), f"{self.tag}sw"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:.0f} s still waiting for {what}")
        time.sleep(0.1)
