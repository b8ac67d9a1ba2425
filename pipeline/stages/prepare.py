"""Writes the job's own data as shards: the demo's handwritten digits."""

from __future__ import annotations

from typing import Any

from pipeline.config.fields import identity_of
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import Result


def identity(inputs: Inputs) -> dict[str, Any]:
    return {"settings": identity_of(inputs.job.prepare), "seed": inputs.job.seed}


def run(context: Context) -> Result:
    from pipeline.data.prepare_digits import digits

    with context.journal() as log:
        written = digits(
            context.folder,
            seed=context.job.seed,
            labels_per_class=context.job.prepare.labels_per_class,
            progress=lambda step, total: log.log(step, total),
        )
    counts = written["images"]
    line = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    return Result({"counts": counts, "line": line})


KIND = Kind("prepare", stages="prepare", needs=lambda line, generation: (), identity=identity, run=run)
