"""Lets the teacher label every unlabelled shard: one Parquet file per shard, each written once, in one step.

    gen1-label-1a2b3c4d/<shard>.parquet        a row per sample (label_files.SCHEMA)
    gen1-label-1a2b3c4d/<shard>.failed.json    or why there is none; tried again at the next start

Kill it at any moment: what is finished stays, what was in flight is done again. Label files of the same teacher that
another corpus left in the output (`--refreeze` made a new one) are taken over, where the shard is unchanged.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.data.samples import RULE, SKIPPED, Left, kinds_of, left_out
from pipeline.data.shards import Shard, bad_counts
from pipeline.errors import DataError, OutputError
from pipeline.labelling.label_progress import Progress, shares
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs, temperature_of
from pipeline.plan.kind import Kind, Line
from pipeline.plan.mended import LABEL_FOLDER
from pipeline.plan.stage import FAILED, Result, read_done
from pipeline.printable import counted
from pipeline.tracking import journal

if TYPE_CHECKING:
    from pipeline.data.corpus import Corpus
    from pipeline.labelling.labeller import LabelSpec
    from pipeline.labelling.relabel import Before

STAGES = r"gen\d+-label"
READERS = 16  # threads that read footers


def needs(line: Line, generation: int) -> tuple[str, ...]:
    settings = line.job.generations[generation - 1].label
    calibrating = line.names("audit")[-1:] if settings.calibrate else ()
    before = (line.last("label"), line.last("select")) if settings.corpus == "selected" else ()
    return (*line.names("prepare"), *calibrating, *before, line.model)


def identity(inputs: Inputs) -> dict[str, Any]:
    number, settings = inputs.stage.generation, identity_of(inputs.generation.label)
    if settings.get("calibrate"):
        settings["temperature"] = temperature_of(inputs.job, inputs.stage, inputs.done)
    if settings.get("corpus") == "selected":
        settings["selection"] = inputs.output(f"gen{number - 1}-select")
    corpus = inputs.corpora["unlabelled"]
    return {
        "settings": settings,
        "teacher": inputs.model,
        "corpus": corpus.fingerprint,
        **({"mended": corpus.mended} if corpus.mended else {}),
        "origin": inputs.prepared,
        "classes": inputs.classes,
        **inputs.image_limit,
    }


def run(context: Context) -> Result:
    from pipeline.data import label_files
    from pipeline.labelling.labeller import IN_FLIGHT, make_labeller

    job = context.job
    settings = job.generations[context.stage.generation - 1].label
    corpus = context.corpora["unlabelled"]
    shards = corpus.shards
    present = set(storage.walk(context.folder))
    for name in present:
        if name.endswith(FAILED):
            storage.remove(storage.join(context.folder, name))
    temperature = temperature_of(job, context.stage, context.needs) if settings.calibrate else 1.0
    spec = make_spec(context, temperature)
    spec = replace(spec, earlier=_earlier(context, spec.teacher), before=_before(context))
    waiting = [
        _with_checksum(shard, corpus, spec)
        for shard in sorted(shards, key=lambda shard: -shard.size)
        if shard.name in corpus.touched or label_files.file_name(shard.name) not in present
    ]
    failed: dict[str, str] = {}
    made: dict[str, dict[str, Any]] = {}
    with context.journal() as log:
        records, _ = journal.read(context.folder)
        progress = Progress(log, shards, waiting, records[-1] if records else {})
        units = [(shard.name, shard) for shard in waiting]
        labeller = functools.partial(make_labeller, spec)
        for outcome in context.map(labeller, units, job.workers.label, overlap=IN_FLIGHT):
            progress.add(outcome.name, outcome.value, outcome.workers)
            if outcome.value is None:
                failed[outcome.name] = str(outcome.error)
                record = {
                    "shard": outcome.name,
                    "error": storage.redact(outcome.error or ""),
                    "attempts": outcome.attempts,
                }
                storage.write_json(storage.join(context.folder, _failed_name(outcome.name)), record)
                context.warn(f"shard {outcome.name} failed: {outcome.error}")
            else:
                made[outcome.name] = _facts(outcome.value)
    if len(failed) > job.data.max_bad_shards:
        name, error = next(iter(failed.items()))
        raise DataError(
            f"{len(failed)} of {len(shards)} unlabelled shards failed, data.max_bad_shards allows "
            f"{job.data.max_bad_shards}; the first is {name}: {error}; mend or remove the shards, or raise "
            "data.max_bad_shards"
        )
    return _result(context, spec, failed, made)


def make_spec(context: Context, temperature: float) -> LabelSpec:
    """How this generation's teacher labels, here and in the audit."""
    from pipeline import weights
    from pipeline.labelling.labeller import LabelSpec

    teacher = context.needs[context.stage.needs[-1]]
    settings = context.job.generations[context.stage.generation - 1].label
    return LabelSpec(
        load=weights.load_model,
        weights=teacher.folder,
        teacher=teacher.output,
        out=context.folder,
        classes=tuple(context.corpora.classes),
        batch=settings.batch,
        threads=max(2, math.ceil(context.job.workers.cpus)),
        temperature=temperature,
        flip=settings.flip,
        compile=settings.compile,
        cache=context.cache,
        max_image_bytes=context.max_image_bytes,
    )


def _earlier(context: Context, teacher: str) -> tuple[str, ...]:
    """The label folders of other corpora, and those of other stages that this teacher may have labelled: the files of
    another one's fit nowhere, so that they need not be looked at one by one."""
    output, own = context.job.output, storage.name(context.folder)
    names = [name for name in storage.listdir(output) if name != own and LABEL_FOLDER.fullmatch(name)]
    return tuple(folder for name in names if _may_be_of(folder := storage.join(output, name), teacher))


def _may_be_of(folder: str, teacher: str) -> bool:
    try:
        done = read_done(folder)
    except OutputError:  # its stage says so when its turn comes
        return True
    return done is None or done.info.get("teacher", teacher) == teacher


def _before(context: Context) -> Before | None:
    """The generation before, where only what it kept is labelled."""
    from pipeline.labelling.relabel import Before

    number = context.stage.generation
    if context.job.generations[number - 1].label.corpus == "all":
        return None
    made, chosen = (context.needs[f"gen{number - 1}-{kind}"] for kind in ("label", "select"))
    if made.info.get("rule", 1) != RULE:
        raise DataError(
            f"generations[{number - 1}].label.corpus is 'selected', but {storage.name(made.folder)} counts samples as "
            "an earlier version did, so its numbers would mean other images; set it to 'all', or delete that folder "
            "and run again"
        )
    return Before(made.folder, chosen.folder, chosen.output, frozenset(made.info["failed"]))


def _with_checksum(shard: Shard, corpus: Corpus, spec: LabelSpec) -> Shard:
    """A shard that was taken in again, or touched since the corpus was frozen, with the checksum that it must have,
    where a label file tells."""
    from pipeline.data import label_files
    from pipeline.labelling import reuse

    if shard.name in corpus.mended:
        return replace(shard, sha256=corpus.mended[shard.name])
    if shard.name in corpus.touched:
        for folder in (spec.out, *spec.earlier):
            path = storage.join(folder, label_files.file_name(shard.name))
            metadata = reuse.fitting_metadata(path, {"shard_size": shard.size})
            if metadata and metadata.get("shard_stamp") == corpus.touched[shard.name]:
                return replace(shard, sha256=metadata["shard_sha256"])
    return shard


def _facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is summed up over the shards."""
    return {name: metadata.get(name) for name in ("counts", "cut", "seconds", "batch", "left")}


def _read_facts(spec: LabelSpec, shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """The same of shards that were labelled before this attempt, from their files; DataError where one is not ours."""
    from pipeline.data import label_files, parquet_files

    by = {"class_list": label_files.class_list_hash(spec.classes), "teacher": spec.teacher}

    def read(shard: Shard) -> tuple[str, dict[str, Any]]:
        path = storage.join(spec.out, label_files.file_name(shard.name))
        metadata = parquet_files.read_metadata(path)
        label_files.check_labels(metadata, {"shard": shard.name, "shard_size": shard.size, **by}, path)
        return shard.name, _facts(metadata)

    with ThreadPoolExecutor(READERS) as readers:
        return dict(readers.map(read, shards))


def _result(context: Context, spec: LabelSpec, failed: dict[str, str], made: dict[str, dict[str, Any]]) -> Result:
    """Compare the files with the corpus and add up what they say of themselves."""
    from pipeline.data import label_files

    shards = context.corpora["unlabelled"].shards
    present = set(storage.walk(context.folder))
    lost = [
        shard.name for shard in shards if label_files.file_name(shard.name) not in present and shard.name not in failed
    ]
    if lost:
        have = "has" if len(lost) == 1 else "have"
        raise DataError(
            f"{counted(len(lost), 'shard')} {have} no label file after labelling, the first is {lost[0]}; run again"
        )
    made |= _read_facts(spec, [shard for shard in shards if shard.name not in made and shard.name not in failed])
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    batches: Counter[str] = Counter()
    damaged: list[str] = []
    left = Left()
    for shard in shards:
        if shard.name not in failed:
            facts = made[shard.name]
            counts.update(facts["counts"])
            seconds.update(facts["seconds"])
            batches[str(facts["batch"])] += 1
            here = Left(**facts["left"]) if facts["left"] else Left()
            left.add(here)
            for reason, count in here.images.items():
                context.warn(left_out(shard.name, reason, count, here.example[reason]))
            if not facts["counts"] and here.runs:
                context.warn(f"shard {shard.name} holds no image, only {kinds_of(here)}")
            elif not facts["counts"] and not here.images:
                context.warn(f"shard {shard.name} holds no image: it has no members")
            if facts["cut"]:
                damaged.append(shard.name)
                context.warn(f"shard {shard.name} is damaged, {facts['cut']}; its samples up to there are labelled")
    skipped = counts.pop(SKIPPED, 0)
    allowed, total = context.job.data, sum(counts.values())
    if len(damaged) + len(failed) > allowed.max_bad_shards:
        for name in damaged:  # as failed ones: tried again at the next start
            storage.remove(storage.join(context.folder, label_files.file_name(name)))
        raise DataError(
            f"{len(damaged) + len(failed)} unlabelled shards are damaged, data.max_bad_shards allows "
            f"{allowed.max_bad_shards}; the first is {[*failed, *damaged][0]}; mend or remove it, or raise "
            "data.max_bad_shards"
        )
    bad = bad_counts(counts) | left.images
    total += sum(left.images.values())
    if sum(bad.values()) > allowed.max_bad_fraction * total:
        reasons = ", ".join(f"{number:,} {status}" for status, number in bad.items())
        raise DataError(
            f"{sum(bad.values()):,} of {total:,} unlabelled images cannot be used ({reasons}), more than "
            f"data.max_bad_fraction {allowed.max_bad_fraction} allows; mend the shards or raise data.max_bad_fraction"
        )
    line = f"{counted(counts['ok'], 'image')} of {counted(len(shards) - len(failed), 'shard')} labelled"
    line += f", {sum(bad.values()):,} bad" if bad else ""
    line += f", {kinds_of(left)} without an image" if left.runs else ""
    line += f", {skipped:,} skipped that were not kept before" if skipped else ""
    metrics = {
        "images": float(total),
        "ok": float(counts["ok"]),
        "bad": float(sum(bad.values())),
        "failed_shards": float(len(failed)),
    }
    metrics |= {f"seconds_{part}": value for part, value in seconds.items()}
    info = {
        "line": line,
        "images": total,
        "bad": bad,
        "skipped": skipped,
        "failed": sorted(failed),
        "time": {part: round(value, 3) for part, value in seconds.items()},
        "where": shares(seconds),
        "batches": dict(batches),
        "teacher": spec.teacher,
        "rule": RULE,
    }
    return Result(info, metrics=metrics)


def _failed_name(shard: str) -> str:
    return shard.removesuffix(".tar") + FAILED


KIND = Kind("label", stages=STAGES, needs=needs, identity=identity, run=run, format=RULE)
