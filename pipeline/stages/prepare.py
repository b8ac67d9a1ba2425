"""Write the job's own data as shards: the demo's handwritten digits."""

from __future__ import annotations

from pipeline.data.prepare_digits import digits
from pipeline.plan.context import Context, Result


def run(context: Context) -> Result:
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
