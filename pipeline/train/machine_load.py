"""Measures what other processes take of the machine while a speed is measured."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import psutil


class Moment(NamedTuple):
    """Seconds since some start: by the clock, worked by the cores that this process may use, and by itself."""

    clock: float
    worked: float
    own: float


def now() -> Moment:
    worked = 0.0
    times = psutil.cpu_times(percpu=True)
    for place in _cores(len(times)):
        fields = times[place]._asdict()
        # `guest` is part of `user`; `steal` is work of others that share the real cores.
        idle = sum(fields.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        worked += sum(fields.values()) - idle
    own = psutil.Process().cpu_times()
    return Moment(time.perf_counter(), worked, own.user + own.system)


def since(before: Moment) -> dict[str, Any]:
    """`cores` that this process may use, how many of them `others` kept busy on average, and the `seconds` that were
    looked at."""
    after = now()
    seconds = after.clock - before.clock
    others = max(0.0, (after.worked - before.worked) - (after.own - before.own)) / max(seconds, 1e-9)
    cores = len(_cores(psutil.cpu_count() or 1))
    return {"cores": cores, "others": round(min(others, cores), 2), "seconds": round(seconds, 2)}


def _cores(count: int) -> list[int]:
    """The numbers of the cores that this process may use, of `count`."""
    if not hasattr(os, "sched_getaffinity"):  # outside Linux
        return list(range(count))
    return [number for number in sorted(os.sched_getaffinity(0)) if number < count] or list(range(count))
