"""Measures models by turns in one worker: speed, latency and memory, as columns of a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import timm
import torch

from models.measure import device_name
from models.measure_model import CLASSES, Figures, Setup, measure_models
from models.precision import has_bfloat16
from pipeline import weights
from pipeline.cluster.world import join
from pipeline.config.settings import Measure, Measured
from pipeline.tracking.journal import Journal

CGROUP = Path("/sys/fs/cgroup")  # what limits the memory of a container
MEMORY_SHARE = 0.8  # of the free main memory that a step may take


def make_worker(folder: str, settings: Measure) -> Callable[[Sequence[Measured]], list[dict[str, Any]]]:
    """The function that measures models; its journal is that of the stage in `folder`."""

    def measure(models: Sequence[Measured]) -> list[dict[str, Any]]:
        """The measured columns of each model's row."""
        with join() as world, contextlib.closing(Journal(folder)) as log:
            built = {m.name: (weights.build_model(m.model, CLASSES, m.overrides), m.size) for m in models}
            setup = _setup(world.device, settings)
            found = measure_models(built, setup, log.log)
        return [_columns(found[m.name]) | _conditions(setup, m.model) for m in models]

    return measure


def _setup(device: torch.device, settings: Measure) -> Setup:
    on_gpu = device.type == "cuda"
    bfloat16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and has_bfloat16(device))
    return Setup(
        device=device,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        compile=settings.compile,
        batch=settings.batch,
        most=settings.max_batch,
        rounds=settings.rounds,
        seconds=settings.seconds,
        memory=None if on_gpu else int(MEMORY_SHARE * _free_memory()),
    )


def _free_memory() -> int:
    """Bytes of main memory that this process may still take."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit on this process
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


def _columns(found: Figures) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    problems = []
    for name, use in (("inference", found.inference), ("training", found.training)):
        columns |= {
            f"{name}_batch": use.batch,
            f"{name}_images_per_second": use.images_per_second,
            f"{name}_peak_bytes": use.peak_bytes,
        }
        if use.images_per_second is None:
            problems.append(f"{name}: out of memory at batch {use.batch}")
    latency = None if found.latency is None else 1000 * found.latency
    return columns | {"latency_ms": latency, "problem": "; ".join(problems)}


def _conditions(setup: Setup, model: str) -> dict[str, str]:
    return {
        "device": device_name(setup.device),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "compile": setup.compile or "eager",
        "versions": f"torch {torch.__version__}" + (f", timm {timm.__version__}" if model.startswith("timm/") else ""),
    }
