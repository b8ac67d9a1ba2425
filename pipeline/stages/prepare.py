"""Writes the job's own data as shards: the demo's handwritten digits, or the images of folders.

    prepare-1a2b3c4d/   classes.json  labelled-000.tar …  val-000.tar …  test-000.tar …  unlabelled-000.tar …
                        manifest-<split>.parquet  bad_files.txt

Images are known by where they lie in their folder, size and time of change: where one changed, all are written anew.
What depends on them is done again only if the shards differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import Result, fingerprint, read_done
from pipeline.prepare.picture_files import images_below

SPLITS = {"labelled": "labelled", "validation": "val", "test": "test", "unlabelled": "unlabelled"}


def identity(inputs: Inputs) -> dict[str, Any]:
    found = {"settings": identity_of(inputs.job.prepare), "seed": inputs.job.seed}
    if inputs.job.prepare.dataset == "folder":
        sources = inputs.job.prepare.sources
        try:
            found["files"] = files_of(sources)
        except DataError:
            found["files"] = _as_prepared(inputs.job.output, found, sources)
    return found


def run(context: Context) -> Result:
    prepare = context.job.prepare
    if prepare.dataset == "folder":
        return _folders(context)
    from pipeline.prepare.digits import digits

    with context.journal() as log:
        written = digits(
            context.folder,
            seed=context.job.seed,
            labels_per_class=prepare.labels_per_class,
            progress=lambda step, total: log.log(step, total),
        )
    counts = written["images"]
    return Result({"counts": counts, "line": _line(counts)})


def _folders(context: Context) -> Result:
    from pipeline.prepare import folders

    sources, split_off = context.job.prepare.sources, context.job.prepare.split_off
    files = files_of(sources)
    counts: dict[str, int] = {}
    lost = 0
    with context.journal() as log:
        # In the order of SPLITS: the labelled images decide on the classes.
        for source in (source for source in SPLITS if source in sources):
            labelled = source == "labelled"
            written = folders.folder(
                sources[source],
                context.folder,
                split=SPLITS[source],
                labelled=source != "unlabelled",
                split_off=split_off if labelled else {},
                leave_out=[folder for name, folder in sources.items() if name != source],
                seed=context.job.seed,
                workers=1,  # others are started anew, and so would a program that calls `noisy_lambda.run`
                progress=lambda step, total, source=source: log.log(step, total, source=source),
            )
            lost += written["bad"] + written["skipped"]
            split = SPLITS[source]
            counts[split] = written.get(split, written["images"])
            counts |= {SPLITS[name]: written[SPLITS[name]] for name in split_off if labelled}
    if files_of(sources) != files:
        raise DataError("images changed while they were written as shards; run again")
    if lost:
        context.warn(f"{lost} files are bad or no images: {storage.join(context.folder, 'bad_files.txt')} lists them")
    return Result({"counts": counts, "files": files, "sources": sources, "line": _line(counts)})


def files_of(sources: dict[str, str]) -> str:
    """A hash of where the images lie in their folders, their sizes and times of change. DataError: a folder is gone."""
    found = {}
    for source, folder in sources.items():
        apart = [other for name, other in sources.items() if name != source]
        for path in images_below(folder, [], apart):
            known = Path(path).lstat() if Path(path).is_symlink() and not Path(path).exists() else Path(path).stat()
            found[f"{source}/{Path(path).relative_to(folder)}"] = [known.st_size, known.st_mtime_ns]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _as_prepared(output: str, found: dict[str, Any], sources: dict[str, str]) -> str:
    """The images as a stage wrote them that had these settings: a finished run can do without them. DataError: there is
    no such stage, or there are several."""
    known = set()
    for name in storage.listdir(output):
        done = read_done(storage.join(output, name)) if re.fullmatch(r"prepare-[0-9a-f]{8}", name) else None
        if done and done.info.get("sources") == sources:
            files = done.info["files"]
            if done.fingerprint == fingerprint("prepare", {**found, "files": files}):
                known.add(files)
    if len(known) != 1:
        return files_of(sources)  # which says which folder is gone
    return known.pop()


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


KIND = Kind("prepare", stages="prepare", needs=lambda line, generation: (), identity=identity, run=run)
