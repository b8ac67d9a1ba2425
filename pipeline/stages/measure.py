"""Measure models side by side: speed, latency and memory here, parameters and FLOPs on paper, accuracy with its source.

    measure-1a2b3c4d/speed_accuracy.csv   a row per model, see measure_table
    measure-1a2b3c4d/speed_accuracy.md    the same for people
    measure-1a2b3c4d/speed_accuracy.png   speed against accuracy, a curve per family, where accuracies are known
    measure-1a2b3c4d/summary.json         {"job", "rows": [{column: value}, …], "report"}

Figures belong to the machine: on another machine, name another `output`. Out of memory is a row that says so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import timm
import torch

from models.measure import device_name
from models.measure_model import CLASSES, Figures, Setup, measure_models
from models.precision import has_bfloat16
from pipeline import storage, weights
from pipeline.config.settings import Measure, Measured
from pipeline.errors import ClusterError
from pipeline.plan.context import Context, Result
from pipeline.report import measured_plot, measured_table
from pipeline.report.costs_on_paper import on_paper
from pipeline.report.known_accuracy import accuracy_of, known_accuracies
from pipeline.tracking.journal import Journal
from pipeline.train.dist import join

NAME, SUMMARY = "speed_accuracy", "summary.json"
METRICS = ("inference_images_per_second", "training_images_per_second", "latency_ms", "top1")
CGROUP = Path("/sys/fs/cgroup")  # what limits the memory of a container
MEMORY_SHARE = 0.8  # of the free main memory that a step may take


def run(context: Context) -> Result:
    settings, models = context.job.measure, context.job.measure.models
    known = known_accuracies(settings)
    papers = [on_paper(f"measure.models[{i}]", measured, settings.map_batch) for i, measured in enumerate(models)]
    # All in one worker and by turns: figures of speed are worth something only side by side.
    worker = functools.partial(_worker, context.folder, settings)
    [outcome] = context.map(worker, [("models", models)], workers=1)
    if outcome.value is None:
        raise ClusterError(f"cannot measure the models: {outcome.error}")
    rows = []
    for measured, paper, figures in zip(models, papers, outcome.value, strict=True):
        accuracy = accuracy_of(measured, known)
        shown = {"top1": accuracy.top1 if accuracy else None, "accuracy_source": accuracy.source if accuracy else None}
        rows.append({"name": measured.name, **_built_from(measured), **paper, **shown, **figures})

    report = storage.join(context.folder, f"{NAME}.md")
    files = {
        f"{NAME}.csv": measured_table.as_csv(rows),
        f"{NAME}.md": measured_table.as_markdown(context.job.name, rows, settings.map_batch),
    }
    picture = measured_plot.pareto(rows)
    if picture:
        files[f"{NAME}.png"] = picture
    else:
        context.warn("no plot of speed against accuracy: no model that fits has a known accuracy")
    for name, data in files.items():
        storage.write_bytes(storage.join(context.folder, name), data)
    storage.write_json(storage.join(context.folder, SUMMARY), {"job": context.job.name, "rows": rows, "report": report})
    metrics = {f"{row['name']}/{key}": float(row[key]) for row in rows for key in METRICS if row[key] is not None}
    return Result({"line": report}, metrics=metrics, artifacts=[*files, SUMMARY])


def _built_from(measured: Measured) -> dict[str, Any]:
    return {"model": measured.model, "size": measured.size, "overrides": measured.overrides}


def _worker(folder: str, settings: Measure) -> Callable[[Sequence[Measured]], list[dict[str, Any]]]:
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
