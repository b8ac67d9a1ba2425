"""Turns SIGTERM into an event that the training loop looks at."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (not under Ray Train: outside the main thread no handler can be set)."""
    stopping, owner = threading.Event(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that has just been forked inherited this: end as if it had not
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stopping.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
