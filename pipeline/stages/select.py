"""Keeps the confident part of the pseudo-labels, balanced over the classes; copies of held-out images are dropped.

gen1-select-1a2b3c4d/<shard>.parquet   index int32, copies int32, with `weight: confidence` also weight float32
gen1-select-1a2b3c4d/<shard>.corrected label files with what people say of unlabelled images (labelling.corrected)
gen1-select-1a2b3c4d/summary.json      what was kept, per class and per shard (selection.select_all), and `bias`
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.data.classes import by_number
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.corpora import held_out_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import AUDIT, SELECTION, Result, read_json_file
from pipeline.printable import counted

SMALL_FILES = 32  # label files that one process reads in the time in which a worker starts
BIASED = 0.25  # total variation distance, beyond chance, from which on it is worth a warning


def identity(inputs: Inputs) -> dict[str, Any]:
    # Copies of held-out images are dropped, so these corpora decide too; whatever people say of those images.
    content = {**inputs.content, **inputs.done["index"].info.get("uncorrected", {})}
    held_out = [content[name] for name in held_out_of(inputs.job)]
    settings = identity_of(inputs.generation.select)
    return {
        "settings": settings,
        **({} if inputs.generation.select.max_noise is None else {"audit": inputs.output(inputs.stage.needs[1])}),
        "labels": inputs.output(inputs.stage.needs[-1]),
        "held_out": held_out,
        **inputs.corrections("unlabelled"),
    }


def run(context: Context) -> Result:
    import numpy as np

    from pipeline.data.index_files import image_hashes
    from pipeline.report import verdict
    from pipeline.selection import select
    from pipeline.selection.bias import bias

    settings = context.job.generations[context.stage.generation - 1].select
    corrected = correct(context)
    paths = label_paths(context, corrected)
    held_out = [(source, shard.name) for source in held_out_of(context.job) for shard in context.corpora[source].shards]
    index = context.needs["index"]
    dropped = np.array(index.info.get("dropped", ()), np.uint64)
    audited = read_json_file(context.needs[f"gen{context.stage.generation}-audit"], AUDIT)
    least = audited["level"]["thresholds"] if settings.max_noise is not None else []
    found = {number: threshold for number, threshold in enumerate(least) if threshold is not None}
    left_out = tuple(number for number, threshold in enumerate(least) if threshold is None)
    wanted = select.Settings(
        num_classes=len(context.corpora.classes),
        threshold=1.0 if settings.threshold is None else settings.threshold,
        per_class=settings.per_class,
        max_copies=settings.max_copies,
        top_fraction=settings.top_fraction,
        thresholds=by_number(settings.thresholds, context.corpora.classes, "select.thresholds") | found,
        left_out=left_out,
        by_noise=settings.max_noise is not None,
        by_confidence=settings.weight == "confidence",
        expected=expected(context),
        exclude=np.union1d(image_hashes(index.folder, held_out), dropped),
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

        summary = select.select_all(paths, wanted, map_groups, context.folder)
    labelled = context.needs["index"].info["per_class"]["labelled"]
    summary["bias"] = bias(summary["available"], labelled)
    summary |= {"corrected": corrected} if corrected else {}
    storage.write_json(storage.join(context.folder, SELECTION), summary)
    audited |= verdict.expected(audited, summary["copies_per_class"])
    _warn(context, summary, verdict.of_selection(audited, summary["kept_per_class"], context.corpora.classes))
    line = f"{summary['kept']:,} of {counted(summary['labelled'], 'image')} kept, {summary['copies']:,} with copies"
    line += f", {sum(corrected.values()):,} corrected" if corrected else ""
    if audited["expected_noise"] is not None:
        line += f"; {verdict.of_labels(audited)}"
    metrics = {name: float(summary[name]) for name in ("labelled", "confident", "excluded", "kept", "copies")}
    return Result({"line": line}, metrics=metrics, artifacts=[SELECTION])


def correct(context: Context) -> dict[str, int]:
    """Leave a corrected copy of each label file of which people have corrected something: {shard: samples}."""
    from pipeline.labelling import corrected

    done = context.needs[f"gen{context.stage.generation}-label"]
    classes = len(context.corpora.classes)
    found: dict[str, int] = {}
    for shard in context.corpora["unlabelled"].shards:
        rows = context.corpora.corrections.of("unlabelled", shard.name)
        if rows and shard.name in done.info["failed"]:
            context.warn(f"{len(rows):,} corrections of {shard.name} have no effect, for it could not be labelled")
        elif rows:
            found[shard.name] = len(rows)
            said, out = (corrected.label_path(done.folder, context.folder, shard.name, by) for by in ((), found))
            corrected.correct_labels(said, out, shard, rows, classes, context.cache, context.max_image_bytes)
    return found


def label_paths(context: Context, corrected: Mapping[str, int]) -> list[str]:
    """The label files of all shards but those that could not be labelled; DataError where one is gone."""
    from pipeline.data import label_files
    from pipeline.labelling.corrected import label_path

    done = context.needs[f"gen{context.stage.generation}-label"]
    shards = [shard.name for shard in context.corpora["unlabelled"].shards if shard.name not in done.info["failed"]]
    lost = sorted({label_files.file_name(name) for name in shards} - set(storage.walk(done.folder)))
    if lost:
        raise DataError(
            f"{len(lost)} of {len(shards)} label files are gone from {storage.redact(done.folder)}, the first is "
            f"{lost[0]}; delete the done.json there and run again, which labels the shards that lack one"
        )
    return [label_path(done.folder, context.folder, name, corrected) for name in shards]


def expected(context: Context) -> dict[str, str]:
    """What every label file must say of itself."""
    from pipeline.data import label_files

    info = context.needs[f"gen{context.stage.generation}-label"].info
    by = {"teacher": info["teacher"]} if "teacher" in info else {}  # folders made by an earlier version do not tell
    return {"class_list": label_files.class_list_hash(context.corpora.classes), **by}


def _worker(function: Callable[[tuple[str, ...]], Any]) -> Callable[[tuple[str, ...]], Any]:
    return function


def _warn(context: Context, summary: dict[str, Any], judged: Sequence[str]) -> None:
    """What a person should know before the student trains."""
    names = context.corpora.classes
    for sentence in judged:
        context.warn(f"{context.stage.name}: {sentence}")
    if copied := summary["much_copied"]:
        shown = ", ".join(names[number] for number in copied[:5]) + (" …" if len(copied) > 5 else "")
        context.warn(
            f"{context.stage.name}: more than 16 copies of each image of {counted(len(copied), 'class')} ({shown})"
        )
    found = summary["bias"]
    if found["distance"] > BIASED + found["chance"]:
        over, under = (
            ", ".join(f"{names[number]} ({100 * p:.3g} % for {100 * q:.3g} %)" for number, p, q in found[side])
            for side in ("over", "under")
        )
        context.warn(
            f"{context.stage.name}: the confident labels are spread over the classes unlike the labelled images: "
            f"{100 * found['distance']:.0f} % of them would have to be of another class; too many of {over}; too few "
            f"of {under}"
        )


KIND = Kind(
    "select",
    stages=r"gen\d+-select",
    needs=lambda line, generation: ("index", line.last("audit"), line.last("label")),
    identity=identity,
    run=run,
)
