"""Memory that was freed is used again: counted in pages that the kernel had to hand out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline import malloc

ARRAYS = """
import resource, sys, threading
if "keep" in sys.argv:
    from pipeline.malloc import keep_memory
    keep_memory()
import numpy
def faults():
    for turn in range(12):
        if turn == 6:  # by now the heap has grown to what it needs
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        numpy.ones(10_000_000)  # 80 MB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""
PAGES = 6 * 80_000_000 // 4096


def faults(*arguments: str, **variables: str) -> list[int]:
    """Of six arrays of 80 MB, after six: on the main thread, on another one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {"NUMPY_MADVISE_HUGEPAGE": "0", **variables}
    command = [sys.executable, "-c", ARRAYS, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ, reason="glibc's malloc only")
def test_an_array_takes_the_memory_of_the_one_before() -> None:
    if min(faults()) < PAGES // 2:
        pytest.skip("this C library, or its pages, make no difference")
    assert max(faults("keep")) < PAGES // 50
    assert max(faults(**malloc.environment())) < PAGES // 50
    assert min(faults("keep", MALLOC_MMAP_MAX_="65536")) > PAGES // 2  # what the user says stays


def test_the_environment_adds_only_what_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert "MALLOC_ARENA_MAX" not in malloc.environment()
