"""Keep the confident part of the pseudo-labels, balanced over the classes; copies of held-out images are dropped.

gen1-select-1a2b3c4d/<shard>.parquet   index int32, copies int32
gen1-select-1a2b3c4d/summary.json      what was kept, per class and per shard (selection.select_all)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import labels, selection
from pipeline.errors import DataError
from pipeline.stages import index
from pipeline.stages.context import Context, Result

SUMMARY = "summary.json"
SMALL_FILES = 32  # label files that one process reads in the time in which a worker starts


def run(context: Context) -> Result:
    settings = context.job.generations[context.stage.generation - 1].select
    folder = context.needs[f"gen{context.stage.generation}-label"].folder
    names = set(storage.walk(folder))
    paths = [
        storage.join(folder, name)
        for shard in context.sources["unlabelled"].shards
        if (name := labels.file_name(shard.name)) in names
    ]
    wanted = selection.Settings(
        num_classes=len(context.sources.classes),
        threshold=settings.threshold,
        per_class=settings.per_class,
        max_copies=settings.max_copies,
        expected={"class_list": labels.class_list_hash(context.sources.classes)},
        exclude=held_out(context),
    )
    with context.journal() as log:
        passes = 0

        def map_groups(function: Callable[[tuple[str, ...]], Any], groups: Sequence[tuple[str, ...]]) -> Iterator[Any]:
            nonlocal passes
            passes += 1
            units = [(f"files {number + 1} of {len(groups)}", group) for number, group in enumerate(groups)]
            worker = functools.partial(_worker, function)
            for done, outcome in enumerate(context.map(worker, units, small=len(paths) <= SMALL_FILES), 1):
                if outcome.value is None:
                    raise DataError(f"selection failed on {outcome.name}: {outcome.error}")
                log.log(done, len(units), selection_pass=passes)
                yield outcome.value

        summary = selection.select_all(paths, wanted, map_groups, context.folder)
    storage.write_json(storage.join(context.folder, SUMMARY), summary)
    _warn(context, summary)
    line = f"{summary['kept']:,} of {summary['labelled']:,} images kept, {summary['copies']:,} with copies"
    metrics = {name: float(summary[name]) for name in ("labelled", "confident", "excluded", "kept", "copies")}
    return Result({"line": line}, metrics=metrics, artifacts=[SUMMARY])


def held_out(context: Context) -> np.ndarray:
    """Sorted hashes uint64 of all validation and test images."""
    folder = context.needs["index"].folder
    found = [
        labels.read_labels(index.rows_path(folder, source, shard.name), ["image_hash"])["image_hash"].to_numpy()
        for source in ("validation", "test")
        for shard in context.sources[source].shards
    ]
    return np.unique(np.concatenate(found).astype(np.uint64))


def _worker(function: Callable[[tuple[str, ...]], Any]) -> Callable[[tuple[str, ...]], Any]:
    return function


def _warn(context: Context, summary: dict[str, Any]) -> None:
    names = context.sources.classes
    for key, text in (("empty", "no image of"), ("much_copied", "more than 16 copies of each image of")):
        classes = summary[key]
        if classes:
            shown = ", ".join(names[number] for number in classes[:5])
            context.warn(
                f"{context.stage.name}: {text} {len(classes)} classes ({shown}{' …' if len(classes) > 5 else ''})"
            )
