"""Trains the teacher's recipe on all labelled images but those of one fold, and lets it label these: probabilities from
a model that has not seen their labels, by which `review` finds the doubtful ones.

    fold1of2-1a2b3c4d/labelled/<shard>.parquet   the images that are trained on (data.index_files)
    fold1of2-1a2b3c4d/held_out/<shard>.parquet   the images of the fold
    fold1of2-1a2b3c4d/answers/<shard>.parquet    what is said of them (label_files.SCHEMA); other rows are `skipped`
    fold1of2-1a2b3c4d/                           and what training leaves

Images are labelled as the audit does it, without noise. The weights are for this alone: no other stage uses them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

from pipeline import storage
from pipeline.data.samples import RULE
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import WEIGHTS, Result, Stage
from pipeline.progress import percent
from pipeline.stages import train

LABELLED, HELD_OUT, ANSWERS = "labelled", "held_out", "answers"
SMALL_BYTES = 2 << 20  # of shards that this process labels in the time in which a worker starts


def name_of(number: int, folds: int) -> str:
    """The stage of a fold, from 1."""
    return f"fold{number}of{folds}"


def counts(folders: Iterable[str]) -> list[int]:
    """The numbers of folds for which there are folders among these."""
    found = (re.fullmatch(r"fold\d+of(\d+)-[0-9a-f]{8}", name) for name in folders)
    return sorted({int(match[1]) for match in found if match})


def identity(inputs: Inputs) -> dict[str, Any]:
    number, folds = _which(inputs.stage)
    return train.identity(inputs) | {"fold": number, "folds": folds, "batch": inputs.job.evaluate.batch}


def run(context: Context) -> Result:
    from pipeline import preflight, weights
    from pipeline.labelling import audit

    settings, classes = context.job.teacher, context.corpora.classes
    trained, held_out = _divide(context)
    preflight.check_models(context.job, [Stage(context.stage.name, "train", ())], len(classes), sum(trained.values()))
    shards = train.shards_of(context, LABELLED, context.folder, trained)
    spec = train.make_spec(context, settings, labelled=[shard for shard in shards if shard.count])
    context.fit(train.loop_of(settings), spec)
    card = weights.card_of(settings.model, spec.overrides, classes, spec.view, spec.test_views)
    weights.write_card(context.folder, card)
    made = storage.sha256(storage.join(context.folder, WEIGHTS))
    _label(context, made, held_out)
    found, bad = audit.join(answered(context.folder, held_out), len(classes))
    if not len(found.truth):
        raise DataError(f"{context.stage.name} has no image that could be labelled; look at the labelled shards")
    agrees = float(found.correct.mean())
    line = f"{settings.model}, {spec.steps:,} steps, agrees with {percent(agrees)} of the labels of "
    line += f"{len(found.truth):,} other images"
    info = {"held_out": held_out, "images": len(found.truth), "bad": dict(bad), "agrees": agrees, "line": line}
    return Result(info, output=made, metrics={"held_out_top1": agrees})


def answered(folder: str, held_out: Iterable[str]) -> list[tuple[str, str]]:
    """(index file, label file) of each shard of which the fold in `folder` holds images."""
    from pipeline.data.index_files import rows_path

    return [(rows_path(folder, HELD_OUT, name), rows_path(folder, ANSWERS, name)) for name in held_out]


def _which(stage: Stage) -> tuple[int, int]:
    """(the number of the stage's fold, from 1; of how many)."""
    number, folds = stage.name.removeprefix("fold").split("of")
    return int(number), int(folds)


def _divide(context: Context) -> tuple[dict[str, int], dict[str, int]]:
    """Write the index files of both sides; {shard: images} of what is trained on, and of what is not, where any are."""
    import numpy as np
    import pyarrow as pa

    from pipeline.data import index_files, parquet_files
    from pipeline.data.folds import fold_of

    number, folds = _which(context.stage)
    names = [shard.name for shard in context.corpora[LABELLED].shards]
    index = context.needs["index"].folder
    tables = [parquet_files.read_table(index_files.rows_path(index, LABELLED, name)) for name in names]
    labels = [table["label"].to_numpy() for table in tables]
    hashes = np.concatenate([table["image_hash"].to_numpy() for table in tables])
    fold = fold_of(hashes, np.concatenate(labels), folds)
    _warn_of_rare(context, np.concatenate(labels), fold != number - 1)
    sides: tuple[dict[str, int], dict[str, int]] = ({}, {})
    start = 0
    for name, table in zip(names, tables, strict=True):
        inside = fold[start : start + len(table)] == number - 1
        start += len(table)
        for side, source, rows in ((sides[0], LABELLED, ~inside), (sides[1], HELD_OUT, inside)):
            metadata = index_files.metadata_of(context.folder, source, name)
            path = index_files.rows_path(context.folder, source, name)
            parquet_files.write_table(path, table.filter(pa.array(rows)), {**metadata, "rule": RULE})
            side[name] = int(rows.sum())
    return sides[0], {name: count for name, count in sides[1].items() if count}


def _warn_of_rare(context: Context, labels: Any, trained: Any) -> None:
    """Of classes whose images all lie in the fold, so that its model cannot know them."""
    import numpy as np

    classes = len(context.corpora.classes)
    lacking = (np.bincount(labels[trained], minlength=classes) == 0) & (np.bincount(labels, minlength=classes) > 0)
    if lacking.any():
        named = [context.corpora.classes[c] for c in np.flatnonzero(lacking)]
        context.warn(
            f"{context.stage.name}: every labelled image of {', '.join(named[:3])}{' …' if len(named) > 3 else ''} "
            "lies in this fold, so its model does not know them, and doubts their labels; give such classes more labels"
        )


def _label(context: Context, made: str, held_out: dict[str, int]) -> None:
    """Let the weights of this folder, whose sha256 is `made`, label the images of the fold."""
    from pipeline import weights
    from pipeline.labelling.labeller import IN_FLIGHT, LabelSpec, make_labeller
    from pipeline.labelling.relabel import Before

    spec = LabelSpec(
        load=weights.load_model,
        weights=context.folder,
        teacher=made,
        out=storage.join(context.folder, ANSWERS),
        classes=tuple(context.corpora.classes),
        batch=context.job.evaluate.batch,
        threads=max(2, math.ceil(context.job.workers.cpus)),
        cache=context.cache,
        max_image_bytes=context.max_image_bytes,
        before=Before("", storage.join(context.folder, HELD_OUT), context.fingerprint, frozenset()),
    )
    shards = [shard for shard in context.corpora[LABELLED].shards if shard.name in held_out]
    small = not context.job.workers.label_gpus and sum(shard.size for shard in shards) <= SMALL_BYTES
    units, workers = [(shard.name, shard) for shard in shards], context.job.workers.label
    labeller = functools.partial(make_labeller, spec)
    for outcome in context.map(labeller, units, workers, small=small, overlap=IN_FLIGHT):
        if outcome.value is None:
            raise DataError(f"cannot label the fold's images of the shard {outcome.name}: {outcome.error}")


KIND = Kind("fold", stages=r"fold\d+of\d+", needs=lambda line, generation: ("index",), identity=identity, run=run)
