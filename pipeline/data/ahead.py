"""Work ahead of a consumer: one thread reads items, some work on them; in order and in bounded memory."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def run_ahead(
    items: Iterable[Item], work: Callable[[Item], Value], threads: int, ahead: int, seconds: dict[str, float]
) -> Generator[Value]:
    """work(item) of every item, in order. An exception of reading or of the work is raised here.

    At most `ahead` results wait to be asked for, at most 4 x `threads` items to be worked on. Closing the
    generator ends the threads. Adds to `seconds`: `read`, `decode` (the work, summed over the threads) and
    `wait`, the time spent here for results.
    """
    results: queue.Queue[Future[tuple[Value, float]] | None] = queue.Queue(ahead)
    room = threading.Semaphore(4 * threads)
    closed = threading.Event()
    seconds.update({part: seconds.get(part, 0.0) for part in ("read", "decode", "wait")})

    def timed(item: Item) -> tuple[Value, float]:
        start = time.perf_counter()
        try:
            return work(item), time.perf_counter() - start
        finally:
            room.release()

    def read(pool: ThreadPoolExecutor) -> None:
        start = time.perf_counter()
        try:
            for item in items:
                seconds["read"] += time.perf_counter() - start
                room.acquire()
                if closed.is_set():
                    return
                results.put(pool.submit(timed, item))
                start = time.perf_counter()
        except BaseException as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)

    with ThreadPoolExecutor(threads, "work") as pool:
        reader = threading.Thread(target=read, args=(pool,), name="read", daemon=True)
        reader.start()
        try:
            start = time.perf_counter()
            while (future := results.get()) is not None:
                value, worked = future.result()
                seconds["wait"] += time.perf_counter() - start
                seconds["decode"] += worked
                yield value
                start = time.perf_counter()
        finally:
            closed.set()
            while reader.is_alive():  # it may be waiting for room in the queue
                with contextlib.suppress(queue.Empty):
                    results.get(timeout=0.02)
