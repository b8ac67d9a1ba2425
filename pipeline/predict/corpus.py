"""Composes the job that predicts shards into a folder: it only labels, exactly once and resumable, one file a shard."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import graph, storage
from pipeline.config.load import resolve_output
from pipeline.config.settings import Data, Generation, Job, Label, Tracking
from pipeline.config.settings_train import Teacher, Train
from pipeline.config.settings_workers import Workers
from pipeline.data.shards import find_shards
from pipeline.errors import ConfigError, OutputError
from pipeline.plan.stage import JOB
from pipeline.predict import choose, inputs, table
from pipeline.printable import shown


def wanted(input: str, out: str | None) -> bool:
    """Whether shards go into a folder, not into one table."""
    return bool(out) and not str(out).lower().endswith(table.SUFFIXES) and inputs.are_shards(input)


def compose(
    models: Sequence[str],
    shards: str,
    out: str,
    *,
    raw: bool,
    batch: int,
    device: str,
    cluster: str | None,
) -> Job:
    """The job. UserError: it cannot be, or `out` holds something else."""
    if batch < 1:
        raise ConfigError(f"the batch is {batch}; it takes at least one image")
    if named := [name for name in models if name.startswith(choose.REGISTERED)]:
        raise ConfigError(
            f"{named[0]} lies in MLflow; label files come from a model's own folder: name a stage's, "
            "or a .parquet file as --out"
        )
    find_shards(shards, "input", str(Path.cwd()))  # that there are some, before anything is written
    found = [choose.find(name, _say, raw=raw) for name in models]
    calibrate = any(model.temperature != 1 for model in found)
    if calibrate and len(found) > 1:
        raise ConfigError(
            "several models label by the mean of their own probabilities, without temperatures; add --raw, or name a "
            ".parquet file as --out"
        )
    folders = [model.folder if storage.is_url(model.folder) else str(Path(model.folder).absolute()) for model in found]
    output = resolve_output(out)
    job = Job(
        name=storage.name(output),
        output=output,
        cluster=cluster or "inline",
        workers=Workers(gpus=_gpus(device, cluster)),
        # As in a table, what cannot be read is a row that says so.
        data=Data(root=str(Path.cwd()), unlabelled=shards, validation=None, max_bad_fraction=1.0),
        teacher=Teacher(model=found[0].card.architecture, checkpoint=folders[0] if len(folders) == 1 else folders),
        generations=[Generation(student=Train(model=""), label=Label(batch=batch, calibrate=calibrate))],
        tracking=Tracking(enabled=False),
    )
    _check_place(job, out)
    return job


def _say(text: str) -> None:
    print(f"model: {shown(text)}", file=sys.stderr)


def _gpus(device: str, cluster: str | None) -> float:
    """Of a worker. On a cluster, whose machines this one does not know, `auto` goes by this one."""
    import torch

    here = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not here and not cluster):
        there = "auto, cpu and cuda" if here else "auto and cpu, for there is no GPU here"
        raise ConfigError(f"the device is '{device}'; allowed are {there}")
    if device == "cpu" and here and not cluster:
        raise ConfigError(
            "--device cpu: this process labels on the GPU that it sees; add --cluster embedded, or hide it"
        )
    return float(device == "cuda" or (device == "auto" and here))


def _check_place(job: Job, out: str) -> None:
    """OutputError: the folder is not this job's."""
    there = [name for name in storage.listdir(job.output) if not name.startswith(".")]
    if there and JOB not in there:
        raise OutputError(f"--out {storage.redact(out)} is a folder with other things in it; name a new one")
    looks = graph.look(job)
    if problem := next((look.problem for look in looks if look.problem), None):
        raise problem
    own = {look.stage.name: storage.name(look.folder) for look in looks}
    for name in there:
        # What `run OUT/job.yaml --refreeze` leaves beside the new is welcome.
        if re.match(r"gen\d", name) and own.get(name.rpartition("-")[0]) not in there:
            raise OutputError(
                f"--out {storage.redact(out)} holds the results of another model, temperature, batch or list of shards "
                f"({name}); name another folder, or delete it"
            )
