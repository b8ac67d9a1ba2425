"""Further machines for a head of tests/cluster/head.py: raylets of their own on this machine, that can be lost."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from tests.cluster.head import Head


@dataclass(frozen=True)
class Machine:
    process: subprocess.Popen[bytes]

    def lose(self) -> None:
        """As when its power is cut: every process of it at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            for each in [top, *top.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait(timeout=30)


@contextlib.contextmanager
def machine(head: Head, cpus: int = 1) -> Iterator[Machine]:
    command = [
        "ray", "start", "--block", "--disable-usage-stats", "--address", head.address, "--node-ip-address", "127.0.0.1",
        "--num-cpus", str(cpus), "--object-store-memory", "100000000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=head.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    found = Machine(process)
    try:
        yield found
    finally:
        found.lose()
