"""Measures times taken in turns, peak memory, and the largest batch that is still worth its size.

Running out of memory is a result here, not a failure: an infinite time, or a batch of 0.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Device = torch.device | str
Step = Callable[[], object]
T = TypeVar("T")

PAYS = 1.05  # a doubled batch is kept if the rate grows by at least this factor
MEMORY_EVENT = "[memory]"  # the profiler's name of an allocation (bytes > 0) or a release (bytes < 0)


def alternate(
    candidates: Mapping[str, Step], *, rounds: int = 7, seconds: float = 0.2, device: Device = "cpu"
) -> dict[str, float]:
    """Median seconds per call of each candidate over `rounds` rounds in which all take turns.

    A turn lasts about `seconds` and at least one call. Turns spread a busy or slow phase of the machine over all
    candidates. Each candidate is called before the first round, so compiling, choosing and caching at first use do not
    count. A candidate that runs out of memory takes no further turns and gets infinity; other errors are raised.
    """
    found = turns(candidates, rounds=rounds, seconds=seconds, device=device)
    return {name: math.inf if math.inf in times else statistics.median(times) for name, times in found.items()}


def turns(
    candidates: Mapping[str, Step], *, rounds: int = 7, seconds: float = 0.2, device: Device = "cpu"
) -> dict[str, list[float]]:
    """What `alternate` takes the medians of: seconds per call of each candidate's turns, round after round; infinity is
    the last one of a candidate that ran out of memory."""
    calls = {name: _calls_in(seconds, call, device) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] if calls[name] else [math.inf] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            if math.inf not in times[name]:
                times[name].append(_turn(call, calls[name], device))
    return times


def _calls_in(seconds: float, call: Step, device: Device) -> int:
    """The number of calls that fill a turn, found after a warm-up; 0 if memory runs out."""
    # On a GPU, clocks rise during the first calls, and the second and third record CUDA graphs.
    for _ in range(3 if _is_cuda(device) else 1):
        if _turn(call, 1, device) == math.inf:
            return 0
    once = _turn(call, 1, device)
    return 0 if once == math.inf else max(1, math.ceil(seconds / max(once, 1e-9)))


def _turn(call: Step, calls: int, device: Device) -> float:
    """Seconds per call; infinity if memory runs out."""

    def turn() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        return (time.perf_counter() - start) / calls

    return if_it_fits(turn, math.inf, device)


def peak_bytes(fn: Step, device: Device = "cpu") -> int:
    """The most bytes allocated at a time during `fn()`, beyond those allocated before it.

    This counts what torch's allocators give out, not scratch space that libraries take elsewhere. On a CPU, memory that
    was allocated before and is released during the call is not subtracted.
    """
    if _is_cuda(device):
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints lines at every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def best_batch(rate: Callable[[int], float], *, first: int = 1, most: float = 1024) -> int:
    """Doubles the batch from `first` while it fits, pays and stays within `most`; returns the last one, 0 if none fits.

    `rate(batch)` is in images per second, 0 if the batch does not fit: see `rate_at`.
    """
    best, fastest, batch = 0, 0.0, first
    while batch <= most:
        found = rate(batch)
        if found < PAYS * fastest or found == 0:
            break
        best, fastest, batch = batch, found, 2 * batch
    return best


def rate_at(make: Callable[[int], Step], batch: int, *, seconds: float = 0.2, device: Device = "cpu") -> float:
    """Images per second of `make(batch)()`, 0 if it does not fit.

    It takes the fastest of three turns of `seconds` in all, because other work on the machine only makes turns slower.
    """

    def fastest() -> float:
        call = make(batch)
        calls = _calls_in(seconds / 3, call, device)
        return max(batch / _turn(call, calls, device) for _ in range(3)) if calls else 0.0

    return if_it_fits(fastest, 0.0, device)


def most_that_fits(make: Callable[[int], Step], memory: int, *, first: int = 1, device: Device = "cpu") -> int:
    """A batch that is sure to fit in `memory` bytes, by the peak of batch `first`; 0 if `first` itself does not fit.

    This is for the CPU: the system may kill a process that asks for too much memory, while a GPU raises an error.
    """

    def peak() -> float:
        call = make(first)
        call()  # what the first call makes and keeps does not count as peak
        return max(1, peak_bytes(call, device))

    return int(first * memory / if_it_fits(peak, math.inf, device))


def if_it_fits(work: Callable[[], T], otherwise: T, device: Device = "cpu") -> T:
    """Returns `work()`, or `otherwise` if memory runs out, on any device and in any library."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(s in str(error) for s in signs):
            raise
    if _is_cuda(device):  # after the handler: the exception's traceback keeps tensors alive
        torch.cuda.empty_cache()
    return otherwise


def wait(device: Device) -> None:
    """Waits until the device has finished all its work."""
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def device_name(device: Device) -> str:
    """Names the device that speeds were measured on: the GPU, or the CPU with its number of threads."""
    return torch.cuda.get_device_name(device) if _is_cuda(device) else _cpu()


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _is_cuda(device: Device) -> bool:
    return torch.device(device).type == "cuda"
