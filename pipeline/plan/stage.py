"""Says what a stage of a job is, where it lives, and which files it leaves.

    <output>/                        `output` of the job: a local folder, or a URL of an object store
    ├── job.yaml                     every setting of the run
    ├── progress.json                how far it is, rewritten every 10 s
    ├── corpus-1a2b3c4d.json         the frozen list of shards of one or more sources
    ├── mlflow.db  mlflow.json       MLflow's store, and the id of the run in it
    ├── prepare-1a2b3c4d/            classes.json  labelled-000.tar  unlabelled-000.tar …  val-000.tar  test-000.tar
    ├── index-1a2b3c4d/              <source>/<shard>.parquet  shards.json  classes.parquet
    ├── gen0-teacher-1a2b3c4d/       checkpoints/step-000500/ …  model.safetensors  model.yaml  result.json
    ├── gen1-audit-1a2b3c4d/         <source>/<shard>.parquet  audit.json
    ├── gen1-label-1a2b3c4d/         <shard>.parquet, or <shard>.failed.json
    ├── gen1-select-1a2b3c4d/        <shard>.parquet  summary.json
    ├── gen1-student-1a2b3c4d/       as the teacher's
    ├── gen2-…                       … and so on, generation after generation
    ├── gen2-finetune-1a2b3c4d/      as the teacher's
    ├── evaluate-1a2b3c4d/           evaluate.json  evaluate.sets.<name>/<shard>.parquet
    ├── report-1a2b3c4d/             index.html  summary.json  speed_accuracy.csv  *.png …
    └── measure-1a2b3c4d/            speed_accuracy.{csv,md,png}  summary.json   (all that such a job has)

Every stage folder also has metrics.jsonl (the journal), mlflow.json and, written last, done.json: without it the stage
has not finished. The eight digits are the beginning of the stage's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import storage
from pipeline.config.settings import Job

DONE = "done.json"
WEIGHTS, CARD = "model.safetensors", "model.yaml"
CHECKPOINTS, RESULT = "checkpoints", "result.json"
SHARDS, CLASS_COUNTS = "shards.json", "classes.parquet"
AUDIT = "audit.json"
FAILED = ".failed.json"
SELECTION = "summary.json"
EVALUATION = "evaluate.json"
SUMMARY, PAGE, SPEED_ACCURACY = "summary.json", "index.html", "speed_accuracy"
PROGRESS, JOB = "progress.json", "job.yaml"


@dataclass(frozen=True)
class Stage:
    """One step of a job. `generation` counts from 0, the teacher's; `model`: it leaves weights."""

    name: str
    kind: str
    needs: tuple[str, ...]
    generation: int = 0
    model: bool = False


@dataclass(frozen=True)
class Result:
    """What a stage leaves for those after it. `output` is the identity of what it made (None: its fingerprint),
    `info` small facts for done.json (`line`: one for people), `metrics` numbers and `artifacts` names of files in its
    folder for tracking, `model` whether the folder holds weights."""

    info: dict[str, Any]
    output: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    model: bool = False


@dataclass(frozen=True)
class Done:
    """A finished stage, as its done.json has it: its Result, where it lives, and the fingerprint that it is named
    after."""

    name: str
    folder: str
    fingerprint: str
    output: str
    info: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    model: bool = False


def fingerprint(kind: str, inputs: Mapping[str, Any], format: int = 1) -> str:
    """sha256 over the canonical JSON of a stage's kind, its inputs and the number of its format."""
    text = json.dumps({"format": format, "kind": kind, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(job: Job, stage: Stage, print_: str) -> str:
    """Where a stage with this fingerprint lives."""
    return storage.join(job.output, f"{stage.name}-{print_[:8]}")


def read_done(folder: str) -> Done | None:
    """What a finished stage left, or None where it has not finished."""
    try:
        record = storage.read_json(storage.join(folder, DONE))
    except (FileNotFoundError, NotADirectoryError):  # `run` says what is wrong with such an output
        return None
    return Done(folder=folder, **record)


def write_done(done: Done) -> None:
    """Mark a stage as finished: the last file that it writes."""
    record = {key: value for key, value in asdict(done).items() if key != "folder"}
    storage.write_json(storage.join(done.folder, DONE), record)
