"""Makes loading processes give way to training, and leave when training tells them to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def begin(nice: int, trainer: int, _worker: int) -> None:
    """In a loading process, where SIGTERM is blocked; `trainer`: the process that reads from it."""
    os.nice(nice)
    threading.Thread(target=_end_when_told, args=(trainer,), name="sigterm", daemon=True).start()


def _end_when_told(trainer: int) -> None:
    """Obey the SIGTERM of one process alone. torchrun, systemd and Slurm send it to all processes of a job: the
    training process then saves, and a loading process that died would be an error in the middle of that."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def started(loader: Iterable[Item]) -> Iterator[Item]:
    """`iter(loader)`, which starts its processes: with SIGTERM blocked there for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
