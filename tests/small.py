"""A job on two dozen tiny images of three classes, run in this process: a second where tests/tiny.py takes ten."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import cli, storage
from tests import tiny
from tests.data import tars

CLASSES = ["cat", "dog", "owl"]
STAGES = ["index", "gen0-teacher", "gen1-audit", "gen1-label", "gen1-select", "gen1-student", "evaluate", "report"]
TEACHER_ONLY = [name for name in STAGES if not name.startswith("gen1")]


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def command(*words: object) -> Ran:
    """`python -m pipeline WORDS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
    return Ran(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class World:
    """Shards, a job on them, its output, and the stages that it has."""

    shards: Path
    job: Path
    output: Path
    stages: list[str]

    def run(self, *settings: str) -> Ran:
        return command("run", self.job, f"output={self.output}", *settings)

    def call(self, name: str, *settings: str) -> Ran:
        return command(name, self.job, f"output={self.output}", *settings)

    def done(self) -> list[str]:
        """The stages with a done.json, in the order of STAGES."""
        found = {path.parent.name.rpartition("-")[0] for path in self.output.glob("*/done.json")}
        assert found <= set(STAGES)
        return [name for name in STAGES if name in found]

    def folder(self, stage: str) -> Path:
        """The one folder of a stage."""
        [found] = [path for path in self.output.iterdir() if re.fullmatch(rf"{stage}-[0-9a-f]{{8}}", path.name)]
        return found

    def temporary(self) -> list[Path]:
        return list(self.output.rglob(".tmp-*"))


def make(folder: Path, **changes: Any) -> World:
    """One labelled, validation and test shard, two unlabelled ones, and a job of a teacher and one student of two
    steps; `changes` replace settings at the top of the job."""
    shards = folder / "shards"
    tars.shard(shards / "labelled-000.tar", 6, labels=[0, 1, 2, 0, 1, 2])
    tars.shard(shards / "val-000.tar", 3, labels=[0, 1, 2], start=100)
    tars.shard(shards / "test-000.tar", 3, labels=[0, 1, 2], start=200)
    tars.shard(shards / "unlabelled-000.tar", 4, start=300)
    tars.shard(shards / "unlabelled-001.tar", 4, start=400)
    (shards / "classes.json").write_text(json.dumps(CLASSES))
    job = yaml.safe_load(tiny.JOB)
    del job["prepare"]
    short = {"duration": "2st", "warmup": "1st", "batch": 4, "checkpoint_every": "100st"}
    job |= {
        "data": {"root": str(shards)},
        "teacher": job["teacher"] | short,
        "student": job["student"] | short,
        "select": {"threshold": 0.0},
        "generations": [{"student": {}}],
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(job))
    return World(shards, path, folder / "out", STAGES if job["generations"] else TEACHER_ONLY)


def copy(world: World, folder: Path, until: str = "") -> World:
    """The same shards, job and output in another folder, as if they had been made there: the same bytes and time
    stamps.
    `until`: without the folders of the stages after this one."""
    shutil.copytree(world.shards, folder / "shards")
    shutil.copytree(world.output, folder / "out")
    job = yaml.safe_load(world.job.read_text())
    job["data"]["root"] = str(folder / "shards")
    path = folder / world.job.name
    path.write_text(yaml.safe_dump(job))
    found = dataclasses.replace(world, shards=folder / "shards", job=path, output=folder / "out")
    for frozen in found.output.glob("corpus-*.json"):  # they name the pattern that was looked up
        record = json.dumps(storage.read_record(str(frozen)))
        storage.write_record(str(frozen), json.loads(record.replace(f'"{world.shards}/', f'"{found.shards}/')))
    for stage in world.stages[world.stages.index(until) + 1 :] if until else []:
        shutil.rmtree(found.folder(stage))
    return found


@dataclass(frozen=True)
class Store:
    """Finished worlds in a folder that all processes of a run of the tests share: each is made once and then copied."""

    folder: Path

    def finished(self, folder: Path, until: str = "", **changes: Any) -> World:
        """A world that `make` made and that was run, in `folder`; see `copy`."""
        return copy(self.original(**changes), folder, until)

    def original(self, **changes: Any) -> World:
        """The world itself, to be read and never changed."""
        name = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed; ends with its process
            ready, world = self.folder / name / "ready", self.folder / name
            if ready.exists():
                stages = STAGES if changes.get("generations", True) else TEACHER_ONLY
                return World(world / "shards", world / "small.yaml", world / "out", stages)
            shutil.rmtree(world, ignore_errors=True)
            made = make(world, **changes)
            ran = made.run()
            assert (ran.status, ran.err) == (0, ""), ran
            ready.touch()
            return made
