"""Counts what code does instead of how long it takes: the lines of Python that run, the same on any machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines(work: Callable[[], object], *where: str) -> int:
    """How many lines `work` runs of files whose path has one of `where` in it (none: of all files), every iteration of
    a comprehension among them; not what C code does."""
    count = 0

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return inside

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        return inside if not where or any(part in path for part in where) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
