"""Let the teacher label every unlabelled shard: one Parquet file per shard, each written once, in one step.

    gen1-label-1a2b3c4d/<shard>.parquet        a row per sample (labels.SCHEMA)
    gen1-label-1a2b3c4d/<shard>.failed.json    or why there is none; tried again at the next start

Kill it at any moment: what is finished stays, what was in flight is done again.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from pipeline import storage, weights
from pipeline.data import labels
from pipeline.data.labeller import LabelSpec, make_labeller
from pipeline.errors import DataError
from pipeline.stages.context import Context, Result

FAILED = ".failed.json"


def run(context: Context) -> Result:
    job, teacher = context.job, context.needs[context.stage.needs[-1]]
    settings = job.generations[context.stage.generation - 1].label
    shards = context.sources["unlabelled"].shards
    present = set(storage.walk(context.folder))
    for name in present:
        if name.endswith(FAILED):
            storage.remove(storage.join(context.folder, name))
    waiting = [shard for shard in shards if labels.file_name(shard.name) not in present]
    spec = LabelSpec(
        load=weights.load_model,
        weights=teacher.folder,
        teacher=teacher.output,
        out=context.folder,
        classes=tuple(context.sources.classes),
        batch=settings.batch,
    )
    failed: dict[str, str] = {}
    images = 0
    with context.journal() as log:
        done = len(shards) - len(waiting)
        log.log(done, len(shards))
        units = [(shard.name, shard) for shard in sorted(waiting, key=lambda shard: -shard.size)]
        for outcome in context.map(functools.partial(make_labeller, spec), units, job.workers.label):
            if outcome.value is None:
                failed[outcome.name] = str(outcome.error)
                record = {"shard": outcome.name, "error": outcome.error, "attempts": outcome.attempts}
                storage.write_json(storage.join(context.folder, _failed_name(outcome.name)), record)
                context.warn(f"shard {outcome.name} failed: {outcome.error}")
            else:
                images += outcome.value["rows"]
            done += 1
            log.log(done, len(shards), images=images, failed=len(failed))
    if len(failed) > job.data.max_bad_shards:
        name, error = next(iter(failed.items()))
        raise DataError(
            f"{len(failed)} of {len(shards)} unlabelled shards failed, data.max_bad_shards allows {job.data.max_bad_shards}; "
            f"the first is {name}: {error}; mend or remove the shards, or raise data.max_bad_shards"
        )
    return _result(context, failed)


def _result(context: Context, failed: dict[str, str]) -> Result:
    """Compare the files with the corpus and add up what they say of themselves."""
    shards = context.sources["unlabelled"].shards
    present = set(storage.walk(context.folder))
    lost = [shard.name for shard in shards if labels.file_name(shard.name) not in present and shard.name not in failed]
    if lost:
        raise DataError(f"{len(lost)} shards have no label file after labelling, the first is {lost[0]}; run again")
    counts: Counter[str] = Counter()
    cut: list[str] = []
    for shard in shards:
        if shard.name not in failed:
            metadata = labels.read_metadata(storage.join(context.folder, labels.file_name(shard.name)))
            counts.update(metadata["counts"])
            if metadata.get("cut"):
                cut.append(shard.name)
                context.warn(f"shard {shard.name} is damaged, {metadata['cut']}; its samples up to there are labelled")
    allowed, total = context.job.data, sum(counts.values())
    if len(cut) + len(failed) > allowed.max_bad_shards:
        for name in cut:  # as failed ones: tried again at the next start
            storage.remove(storage.join(context.folder, labels.file_name(name)))
        raise DataError(
            f"{len(cut) + len(failed)} unlabelled shards are damaged, data.max_bad_shards allows {allowed.max_bad_shards}; "
            f"the first is {[*failed, *cut][0]}; mend or remove it, or raise data.max_bad_shards"
        )
    bad: dict[str, Any] = {status: number for status, number in counts.items() if status != "ok"}
    if sum(bad.values()) > allowed.max_bad_fraction * total:
        reasons = ", ".join(f"{number:,} {status}" for status, number in bad.items())
        raise DataError(
            f"{sum(bad.values()):,} of {total:,} unlabelled images cannot be used ({reasons}), more than data.max_bad_fraction "
            f"{allowed.max_bad_fraction} allows; mend the shards or raise data.max_bad_fraction"
        )
    line = f"{counts['ok']:,} images of {len(shards) - len(failed):,} shards labelled" + (
        f", {sum(bad.values()):,} bad" if bad else ""
    )
    metrics = {
        "images": float(total),
        "ok": float(counts["ok"]),
        "bad": float(sum(bad.values())),
        "failed_shards": float(len(failed)),
    }
    return Result({"line": line, "images": total, "bad": bad, "failed": sorted(failed)}, metrics=metrics)


def _failed_name(shard: str) -> str:
    return shard.removesuffix(".tar") + FAILED
