"""A real `ray start --head` for tests, on free ports, ended for sure and touching no other Ray of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Head:
    address: str  # HOST:PORT of the cluster, for RAY_ADDRESS
    dashboard: str  # http://HOST:PORT, for RAY_API_SERVER_ADDRESS
    env: dict[str, str]  # for a command that shall talk to it: addresses, PATH with this Python, no token


@contextlib.contextmanager
def ray_head(cwd: str | Path, *, cpus: int = 2, path: str | Path = "") -> Iterator[Head]:
    """A head started in `cwd` (the folder in which jobs submitted without a working directory run); `path`: what comes
    first on its PATH."""
    scratch = tempfile.mkdtemp(prefix="nlhead-", dir="/tmp")  # short: Ray's socket lies below it
    ports = _free_ports(4)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "PATH": os.pathsep.join([*([str(path)] if path else []), str(Path(sys.executable).parent), env["PATH"]]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": scratch,
    }
    env.pop("PYTHONPATH", None)
    command = [
        "ray", "start", "--head", "--block", "--disable-usage-stats",
        "--port", str(ports[0]), "--ray-client-server-port", str(ports[1]),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports[2]),
        "--dashboard-agent-listen-port", str(ports[3]),
        "--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus),
        "--object-store-memory", "200000000", "--temp-dir", scratch,
    ]  # fmt: skip
    with Path(scratch, "start.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for_port(ports[2], process, log.name)
            address, dashboard = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}"
            yield Head(address, dashboard, {**env, "RAY_API_SERVER_ADDRESS": dashboard})
        finally:
            _end(process)
            shutil.rmtree(scratch, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the head did not start:\n{Path(log).read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head and every process below it (jobs and workers too), by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for signum, patience in ((signal.SIGTERM, 1), (signal.SIGKILL, 5)):  # some of them take no SIGTERM
            for each in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signum)
            psutil.wait_procs(tree, timeout=patience)
    process.wait(timeout=10)
