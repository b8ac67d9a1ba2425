"""How many processes load images for a training worker."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from pipeline.cluster.world import World
from pipeline.train.feeding import SHARED_MEMORY, loading_processes
from tests.train.tiny import CLASSES, SIZE, make_spec

GPU, CPU = (World(0, 4, torch.device(kind)) for kind in ("cuda", "cpu"))


def test_what_a_job_says_counts(data, tmp_path):
    assert [loading_processes(make_spec(data, tmp_path, workers=3), world) for world in (GPU, CPU)] == [3, 3]


@pytest.mark.parametrize(("cores", "processes", "expected"), [(16, "4", 3), (2, "4", 1), (128, "8", 8)])
def test_a_gpu_gets_its_share_of_the_cores(data, tmp_path, monkeypatch, cores, processes, expected):
    spec = make_spec(data, tmp_path, workers=None)
    assert loading_processes(spec, CPU) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert loading_processes(spec, GPU) == expected


@pytest.mark.parametrize(("batches", "expected"), [(1000, 7), (13, 4), (5, 1), (2, 0)])
def test_their_batches_fit_into_shared_memory(data, tmp_path, monkeypatch, batches, expected):
    """Three batches each, of four images: 13 for four workers' processes."""
    spec = make_spec(data, tmp_path, workers=None)
    free = batches * 4 * (3 * SIZE**2 + 4 * CLASSES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free) if path == SHARED_MEMORY else None
    )
    assert loading_processes(spec, GPU) == expected
