"""Indexes the shards whose labels are known: where each good image lies, and its label.

    index-1a2b3c4d/<source>/<shard>.parquet   a row per good image (pipeline.data.index_files)
    index-1a2b3c4d/shards.json                {source: {shard name: rows}}
    index-1a2b3c4d/classes.parquet            images per labelled shard and class (pipeline.loading.shuffle_quality)

A job that only labels has it where there is something to audit on, and then of that alone.

Mistakes in the labels surface here, before anything is trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.data.classes import alike, by_number
from pipeline.data.samples import RULE, left_out
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.corpora import indexed_of, setting_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import SHARDS, Result
from pipeline.printable import counted
from pipeline.tracking.journal import Journal

if TYPE_CHECKING:
    import numpy as np

SMALL_BYTES = 32 << 20  # of shards that one process reads in the time in which a worker starts


def identity(inputs: Inputs) -> dict[str, Any]:
    # Time stamps count here and nowhere else: shards that were touched are read again, and what depends on them is done
    # again only if what was read differs. What `prepare` wrote is known by its own fingerprint.
    corpora = {name: inputs.corpora[name] for name in indexed_of(inputs.job)}
    stamps = [shard.stamp for name in corpora for shard in corpora[name].shards]
    return {
        "corpora": {name: found.fingerprint for name, found in corpora.items()},
        "origin": inputs.prepared or stamps,
        "classes": inputs.classes,
        **inputs.corrections(*corpora),
        **inputs.image_limit,
    }


@dataclass(frozen=True)
class Indexed:
    """What the shards of some sources hold; of each source by shard `rows` and `digests` of images and labels, and
    `per_class`, images int64 [classes]. `bad`: what cannot be used, by "source: reason"."""

    rows: dict[str, dict[str, int]]
    digests: dict[str, dict[str, str]]
    per_class: dict[str, np.ndarray]
    classes_of: dict[str, dict[int, int]]
    """Of each labelled shard {class: images}."""
    bad: Counter[str]
    uncorrected: dict[str, dict[str, str]]
    """`digests` as they would be without corrections."""
    dropped: dict[str, list[int]]
    """Hashes of images that people took out, by source."""

    @property
    def counts(self) -> dict[str, int]:
        """Good images by source."""
        return {source: int(found.sum()) for source, found in self.per_class.items()}


def run(context: Context) -> Result:
    from pipeline.loading import shuffle_quality

    for number, generation in enumerate(context.job.generations):
        by_number(generation.select.thresholds, context.corpora.classes, f"generations[{number}].select.thresholds")
    for one, other in alike(context.corpora.classes)[:3]:
        context.warn(f"the classes '{one}' and '{other}' differ in case or Unicode form alone; are they one?")
    with context.journal() as log:
        found = index_sources(context, indexed_of(context.job), log)
    drop_leaks(context, found)
    check_usable(context, found)
    storage.write_json(storage.join(context.folder, SHARDS), found.rows)
    if "labelled" in found.rows:
        _warn_of_missing_classes(context, found)
        shuffle_quality.write_class_counts(context.folder, [found.classes_of[name] for name in found.rows["labelled"]])
    line = ", ".join(f"{number:,} {source}" for source, number in found.counts.items())
    line += f", {found.bad.total():,} bad" if found.bad else ""
    corrected = {source: number for source in found.rows if (number := context.corpora.corrections.count(source))}
    line += f", {sum(corrected.values()):,} corrected" if corrected else ""
    # What a source holds, whatever its shards' time stamps: what training, selection and evaluation depend on.
    content = {source: _digest(sorted(digests.items())) for source, digests in found.digests.items()}
    held_out = [source for source in found.rows if source != "labelled" and source in corrected]
    uncorrected = {source: _digest(sorted(found.uncorrected[source].items())) for source in held_out}
    dropped = [hash_ for source in held_out for hash_ in found.dropped[source]]
    info = {
        "counts": found.counts,
        "content": content,
        "per_class": {source: counts.tolist() for source, counts in found.per_class.items()},
        "bad": dict(found.bad),
        **({"corrected": corrected} if corrected else {}),
        **({"uncorrected": uncorrected, "dropped": dropped} if uncorrected else {}),
        "line": line,
    }
    return Result(info, output=_digest([content, sorted(found.bad.items())]))


def index_sources(context: Context, sources: Sequence[str], log: Journal) -> Indexed:
    """Write the index files of all shards of some sources into the stage's folder. DataError: a shard that cannot be
    read, or a label that is none."""
    import numpy as np

    from pipeline.data import index_files

    units = [
        (f"{source}/{shard.name}", (source, shard)) for source in sources for shard in context.corpora[source].shards
    ]
    names = context.corpora.classes
    classes = len(names)
    per_class = {source: np.zeros(classes, np.int64) for source in sources}
    classes_of: dict[str, dict[int, int]] = {}
    answers: dict[str, index_files.Indexed] = {}
    bad: Counter[str] = Counter()
    worker = functools.partial(
        index_files.make_indexer,
        context.folder,
        names,
        context.cache,
        context.max_image_bytes,
        context.corpora.corrections,
        context.corpora.meanings(sources),
    )
    small = sum(shard.size for _, (_, shard) in units) <= SMALL_BYTES
    for number, outcome in enumerate(context.map(worker, units, context.job.workers.label, small=small), 1):
        found = outcome.value
        if found is None:
            raise DataError(f"cannot index the shard {outcome.name}: {outcome.error}")
        answers[outcome.name] = found
        source, _, name = outcome.name.partition("/")
        per_class[source] += found.per_class
        if source == "labelled":
            held = np.flatnonzero(found.per_class)
            classes_of[name] = dict(zip(held.tolist(), found.per_class[held].tolist(), strict=True))
        for key, reason in found.bad:
            context.warn(f"image '{key}' of shard {outcome.name} is left out: {reason}")
            bad[f"{source}: {reason}"] += 1
        for reason, count in found.left.images.items():
            context.warn(left_out(outcome.name, reason, count, found.left.example[reason]))
            bad[f"{source}: {reason}"] += count
        log.log(number, len(units), shard=outcome.name, images=int(found.per_class.sum()), bad=bad.total())

    def by_shard(value: Callable[[index_files.Indexed], Any]) -> dict[str, dict[str, Any]]:
        return {
            source: {shard.name: value(answers[f"{source}/{shard.name}"]) for shard in context.corpora[source].shards}
            for source in sources
        }

    rows, digests = by_shard(lambda found: int(found.per_class.sum())), by_shard(lambda found: found.digest)
    dropped = by_shard(lambda found: found.dropped)
    return Indexed(
        rows,
        digests,
        per_class,
        classes_of,
        bad,
        by_shard(lambda found: found.uncorrected),
        {source: [hash_ for some in shards.values() for hash_ in some] for source, shards in dropped.items()},
    )


def drop_leaks(context: Context, indexed: Indexed) -> None:
    """Take labelled copies of held-out images out of the index, of those too that people took out of the held-out
    shards (or a correction of a test label would change what models are trained on); warn of all images in several
    places."""
    from pipeline.data import leaks

    folder, names = context.folder, context.corpora.classes
    places = {source: [(source, shard) for shard in shards] for source, shards in indexed.rows.items()}
    held_out = [source for source in places if source != "labelled"]
    for source in held_out if "labelled" in places else ():
        hashes = leaks.shared(folder, places["labelled"], places[source], indexed.dropped[source])
        dropped: list[str] = []
        for place in places["labelled"] if len(hashes) else ():
            left = leaks.drop(folder, place, hashes, len(names))
            if left is not None:
                shard = place[1]
                before = indexed.classes_of[shard]
                for number, count in before.items():
                    indexed.per_class["labelled"][number] -= count
                indexed.per_class["labelled"] += left.per_class
                indexed.rows["labelled"][shard] = int(left.per_class.sum())
                indexed.digests["labelled"][shard] = left.digest
                indexed.classes_of[shard] = {int(c): int(left.per_class[c]) for c in left.per_class.nonzero()[0]}
                dropped += [f"'{key}' of {shard}" for key in left.keys]
        if dropped:
            context.warn(
                f"{counted(len(dropped), 'labelled image')} also found in the {source} shards, the first is "
                f"{dropped[0]}: not trained on, for what models are tested on must not be; take such images out of the "
                "labelled shards"
            )
    for number, source in enumerate(held_out):
        for other in held_out[number + 1 :]:
            if count := len(leaks.shared(folder, places[source], places[other])):
                context.warn(
                    f"{counted(count, 'image')} found in both the {source} and the {other} shards; take them out of one"
                )
    count, key = leaks.ambiguous(folder, [place for source in places for place in places[source]])
    if count:
        context.warn(f"{counted(count, 'image')} found under several labels, '{key}' for instance; correct the labels")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_usable(context: Context, indexed: Indexed) -> None:
    """DataError: a source without images, or with more bad ones than `data.max_bad_fraction` allows."""
    for source, good in indexed.counts.items():
        lost = sum(number for reason, number in indexed.bad.items() if reason.startswith(f"{source}:"))
        total = lost + good
        if not total:
            raise DataError(
                f"the {source} shards hold no image ({setting_of(source)}: "
                f"{', '.join(shard.name for shard in context.corpora[source].shards[:3])}); name shards with images "
                "and labels"
            )
        if lost == total or lost > context.job.data.max_bad_fraction * total:
            raise DataError(
                f"{lost} of {total} {source} images cannot be used, more than data.max_bad_fraction "
                f"{context.job.data.max_bad_fraction} allows; mend the shards or raise data.max_bad_fraction"
            )


def _warn_of_missing_classes(context: Context, indexed: Indexed) -> None:
    missing = [context.corpora.classes[number] for number in (indexed.per_class["labelled"] == 0).nonzero()[0]]
    if missing:
        context.warn(
            f"no labelled image of {counted(len(missing), 'class')} ({', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}): the teacher cannot learn {'it' if len(missing) == 1 else 'them'}"
        )


KIND = Kind(
    "index",
    stages="index",
    needs=lambda line, generation: line.names("prepare"),
    identity=identity,
    run=run,
    format=RULE,
)
