"""Tests models on the sets of `evaluate.sets`, for `evaluate`: reads what they hold, and says what answers come to.

Of each set top-1, top-5, loss and ECE; and where its entry asks for it
    classes     how many may be answered, and the same figures of the test images of these classes, `clean`
    labels      `skipped`, images that have no right class (top-1: one of the right classes is answered)
    reference   `errors` by corruption, one a severity (null: not there), `ce`, `mce` and the relative ones, in percent
                (corruption.errors); `missing`: corruptions or severities that an mCE takes, without which it is null
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.checks_evaluate import CORRUPTIONS
from pipeline.errors import DataError
from pipeline.plan import marking
from pipeline.plan.context import Context
from pipeline.plan.corpora import set_source
from pipeline.plan.inputs import Inputs
from pipeline.stages.index import Indexed, check_usable, index_sources
from pipeline.stages.train import shards_of
from pipeline.tracking.journal import Journal

if TYPE_CHECKING:
    from pipeline.loading.training_rows import TrainingShard
    from pipeline.train.trials import Trial

SHOWN = ("top1", "top5", "loss", "ece")  # of a further size or set, and of raw weights
Figures = dict[str, Any]


@dataclass(frozen=True)
class TestShard:
    """A shard on which models are tested. `right`: the classes that are right for each image of the index, where they
    are several; `part`: its corruption/severity, where it has one."""

    __test__ = False  # no class of tests
    name: str
    size: int
    rows: TrainingShard
    right: Sequence[Sequence[int]] | None = None
    part: str = ""


def identity(inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in sorted(inputs.job.evaluate.sets.items()):
        source = set_source(name)
        shards, marked = inputs.corpora[source], inputs.corpora.marking(source).identity
        marked |= {"reference": entry.reference} if entry.reference else {}
        # As data, not as Python's tuples.
        facts = [json.loads(json.dumps(marked))] if marked else []
        found[name] = [shards.fingerprint, [shard.stamp for shard in shards.shards], *facts]
    return {"sets": found} if found else {}


def index(context: Context, log: Journal) -> dict[str, list[TestShard]]:
    """The shards of all sets by source, with index files that are written here. DataError."""
    sources = [set_source(name) for name in context.job.evaluate.sets]
    if not sources:
        return {}
    found = index_sources(context, sources, log)
    check_usable(context, found)
    _warn_of_known(context, found)
    tested: dict[str, list[TestShard]] = {}
    for source in sources:
        marked = context.corpora.marking(source)
        rows = shards_of(context, source, context.folder, found.rows[source])
        if marked.answers is not None:
            _check_classes(context, source, found, marked.answers)
        right = _right(context, source, rows, marked.right) if marked.right is not None else [None] * len(rows)
        parts = marked.parts or {}
        if lacking := marking.missing(parts.values()) if parts else []:
            context.warn(f"{source} has no shards of {', '.join(lacking)}, so there is no mCE of it")
        tested[source] = [
            TestShard(shard.name, shard.size, of_shard, several, "/".join(parts.get(shard.name, ())))
            for shard, of_shard, several in zip(context.corpora[source].shards, rows, right, strict=True)
        ]
    return tested


def _warn_of_known(context: Context, found: Indexed) -> None:
    """Of images of a set that the models were trained on."""
    import numpy as np

    from pipeline.data.index_files import image_hashes

    trained_on = [("labelled", shard.name) for shard in context.corpora["labelled"].shards]
    labelled = image_hashes(context.needs["index"].folder, trained_on)
    for source, shards in found.rows.items():
        hashes = image_hashes(context.folder, [(source, name) for name in shards])
        if known := int(np.isin(hashes, labelled).sum()):
            context.warn(
                f"{known:,} of {len(hashes):,} different images of {source} are labelled images too, on which models "
                "were trained: what they reach on that set says less; take them out of its shards"
            )


def _check_classes(context: Context, source: str, found: Indexed, answers: Sequence[int]) -> None:
    others = set(found.per_class[source].nonzero()[0].tolist()) - set(answers)
    if others:
        raise DataError(
            f"{source} holds images of the class '{context.corpora.classes[min(others)]}', which is none of the "
            f"{len(answers)} of {source}.classes; if its shards count classes in another way than the job, put the "
            "classes.json that they were written with beside them"
        )


def _right(
    context: Context, source: str, shards: Sequence[TrainingShard], right: Mapping[str, Sequence[int]]
) -> list[list[Sequence[int]]]:
    """The right classes of each image, shard by shard."""
    from pipeline.data import parquet_files

    seen: dict[str, str] = {}
    found = []
    for shard in shards:
        keys = parquet_files.read_expected(shard.rows, ["key"], shard.expected)["key"].to_pylist()
        names = [marking.of_image(key, right) for key in keys]
        for key, name in zip(keys, names, strict=True):
            if name is None:
                raise DataError(
                    f"{source}.labels says nothing of the image '{key}'; name every image of the set, one that shows "
                    "none of the classes with an empty list"
                )
            if name in seen:
                raise DataError(
                    f"{source}.labels says one thing of two images, '{seen[name]}' and '{key}'; file names must differ"
                )
            seen[name] = key
        found.append([right[name] for name in names if name is not None])
    if not any(some for of_shard in found for some in of_shard):
        raise DataError(f"{source}.labels has no class for any image of the set; correct the file")
    return found


def trials(context: Context, stage: str, folder: str, size: int) -> list[Trial]:
    """A model on each set at its own size, and on the test images of the classes that an entry keeps."""
    from pipeline.train.trials import Trial

    found = []
    for name in context.job.evaluate.sets:
        answers = context.corpora.marking(set_source(name)).answers
        found.append(Trial(stage, folder, size, set_source(name), answers=answers))
        if answers is not None:
            found.append(Trial(stage, folder, size, answers=answers, restricted=name))
    return found


def figures(
    context: Context,
    tried: Mapping[str, Sequence[Trial]],
    counted: Mapping[tuple[Trial, str], Figures],
    sources: Mapping[str, Sequence[TestShard]],
) -> dict[str, dict[str, Figures]]:
    """By stage and set what a model reached; `tried`: the trials of each stage, of which the first is that on all test
    images; `counted`: what `Scores.figures` says of each, by part."""
    clean = {stage: 1 - counted[several[0], ""]["top1"] for stage, several in tried.items()}
    found: dict[str, dict[str, Figures]] = {stage: {} for stage in tried}
    for name, entry in context.job.evaluate.sets.items():
        source = set_source(name)
        own = {stage: next(one for one in several if one.source == source) for stage, several in tried.items()}
        for stage, trial in own.items():
            found[stage][name] = {figure: counted[trial, ""][figure] for figure in SHOWN}
            if trial.answers is not None:
                beside = next(one for one in tried[stage] if one.restricted == name)
                same = {figure: counted[beside, ""][figure] for figure in SHOWN}
                found[stage][name] |= {"classes": len(trial.answers), "clean": same}
            if entry.labels:
                right = [some for shard in sources[source] for some in shard.right or ()]
                found[stage][name]["skipped"] = sum(not some for some in right)
        if entry.reference:
            parts = {shard.part for shard in sources[source]}
            tops = {stage: {part: counted[trial, part]["top1"] for part in parts} for stage, trial in own.items()}
            for stage, some in _corruption_errors(entry.reference, tops, clean).items():
                found[stage][name] |= some
    return found


def _corruption_errors(
    reference: str, tops: Mapping[str, Mapping[str, float]], clean: Mapping[str, float]
) -> dict[str, Figures]:
    """By stage, the first of which is the teacher; `tops`: top-1 by part, "snow/3"."""
    from pipeline.corruption import errors

    parts = next(iter(tops.values()))
    there = {part.partition("/")[0] for part in parts}
    names = [*(name for name in CORRUPTIONS if name in there), *sorted(there - {*CORRUPTIONS})]
    listed = {
        stage: {name: [_error(some.get(f"{name}/{severity}")) for severity in marking.SEVERITIES] for name in names}
        for stage, some in tops.items()
    }
    missing = marking.missing((part.partition("/")[0], part.partition("/")[2]) for part in parts)
    whole = [name for name in CORRUPTIONS if all(f"{name}/{severity}" in parts for severity in marking.SEVERITIES)]
    models = {
        stage: errors.Errors(clean[stage], {name: [one for one in some[name] if one is not None] for name in whole})
        for stage, some in listed.items()
    }
    against = errors.alexnet(whole) if reference == "alexnet" else next(iter(models.values()))
    found = {}
    for stage, model in models.items():
        found[stage] = {"reference": reference, "missing": missing, **errors.summary(model, against)}
        found[stage] |= {"mce": None, "relative_mce": None} if missing else {}
        found[stage]["errors"] = {
            name: [None if error is None else 100 * error for error in some] for name, some in listed[stage].items()
        }
    return found


def _error(top1: float | None) -> float | None:
    return None if top1 is None else 1 - top1
