"""Writes the scenes that a job detects in itself: scikit-learn's digits on canvases.

detect-prepare-1a2b3c4d/   classes.json  train-000.tar …  val-000.tar …  test-000.tar …  manifest-<split>.parquet
"""

from __future__ import annotations

from typing import Any

from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import Result


def identity(inputs: Inputs) -> dict[str, Any]:
    return {"dataset": inputs.job.detection.data.dataset, "seed": inputs.job.seed}


def run(context: Context) -> Result:
    from pipeline.detection.digit_scenes import digit_scenes

    with context.journal() as log:
        made = digit_scenes(context.folder, seed=context.job.seed, progress=lambda step, total: log.log(step, total))
    counts = made["images"]
    return Result({"counts": counts, "line": ", ".join(f"{number:,} {name}" for name, number in counts.items())})


KIND = Kind("detect-prepare", stages="detect-prepare", needs=lambda line, generation: (), identity=identity, run=run)
