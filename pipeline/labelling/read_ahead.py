"""Works ahead of consumers: threads read items and work on them, in order and in bounded memory.

An `Ahead` serves several streams of items at once, and the threads are theirs together. A stream is read once those
that began before it have been read to their end: the next one fills up what room the current one leaves, so that
between two streams nobody waits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

LOOK_SECONDS = 0.1  # how often a reader that waits looks whether its stream was closed


class Ahead:
    """`threads` do the work. At most `ahead` results of all streams wait to be asked for, and at most 4 x `threads`
    items to be worked on."""

    def __init__(self, threads: int, ahead: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "work")
        self._room = threading.Semaphore(ahead)
        self._raw = threading.Semaphore(4 * threads)
        self._turn = threading.Lock()

    def run(self, items: Iterable[Item], work: Callable[[Item], Value], seconds: dict[str, float]) -> Generator[Value]:
        """work(item) of every item, in order. An exception of reading or of the work is raised here.

        Closing the generator ends the reading. Adds to `seconds`: `read`, `decode` (the work, summed over the
        threads) and `wait`, the time spent here for results.
        """
        results: queue.SimpleQueue[Future[tuple[Value, float]] | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()
        seconds.update({part: seconds.get(part, 0.0) for part in ("read", "decode", "wait")})

        def timed(item: Item) -> tuple[Value, float]:
            start = time.perf_counter()
            return work(item), time.perf_counter() - start

        def submit(item: Item) -> bool:
            if not _acquire(self._room, closed):
                return False
            if not _acquire(self._raw, closed):
                self._room.release()
                return False
            future = self._pool.submit(timed, item)
            future.add_done_callback(lambda _: self._raw.release())
            results.put(future)
            return True

        def read() -> None:
            if not _acquire(self._turn, closed):
                return
            try:
                start = time.perf_counter()
                for item in items:
                    seconds["read"] += time.perf_counter() - start
                    if not submit(item):
                        return
                    start = time.perf_counter()
                seconds["read"] += time.perf_counter() - start
                results.put(None)
            except BaseException as error:
                results.put(error)
            finally:
                self._turn.release()

        reader = threading.Thread(target=read, name="read", daemon=True)
        reader.start()
        try:
            start = time.perf_counter()
            while (found := results.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                try:
                    value, worked = found.result()
                finally:
                    self._room.release()
                seconds["wait"] += time.perf_counter() - start
                seconds["decode"] += worked
                yield value
                start = time.perf_counter()
        finally:
            closed.set()
            reader.join()
            while not results.empty():
                left = results.get()
                if isinstance(left, Future):
                    left.cancel()
                    self._room.release()

    def close(self) -> None:
        """End the threads; no stream may be open."""
        self._pool.shutdown(cancel_futures=True)


def _acquire(what: threading.Semaphore | threading.Lock, closed: threading.Event) -> bool:
    """Wait for it, or for the stream to be closed."""
    while not closed.is_set():
        if what.acquire(timeout=LOOK_SECONDS):
            return True
    return False
