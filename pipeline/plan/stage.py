"""Says what a stage of a job is, where it lives, and which files it leaves.

    <output>/                        `output` of the job: a local folder, or a URL of an object store
    ├── job.yaml                     every setting of the run
    ├── progress.json                how far it is, rewritten every 10 s
    ├── corpus-1a2b3c4d.json         the frozen list of shards of one or more sources
    ├── mlflow.db  mlflow.json       MLflow's store, and the id of the run in it
    ├── prepare-1a2b3c4d/            classes.json  labelled-000.tar  unlabelled-000.tar …  manifest-<split>.parquet
    ├── index-1a2b3c4d/              <source>/<shard>.parquet  shards.json  classes.parquet
    ├── gen0-teacher-1a2b3c4d/       checkpoints/step-000500/ …  model.safetensors  model.yaml  result.json
    ├── gen1-audit-1a2b3c4d/         <source>/<shard>.parquet  audit.json
    ├── gen1-label-1a2b3c4d/         <shard>.parquet, or <shard>.failed.json
    ├── gen1-select-1a2b3c4d/        <shard>.parquet  summary.json
    ├── gen1-student-1a2b3c4d/       as the teacher's
    ├── gen2-…                       … and so on, generation after generation
    ├── gen2-finetune-1a2b3c4d/      as the teacher's
    ├── evaluate-1a2b3c4d/           evaluate.json  evaluate.sets.<name>/<shard>.parquet …
    ├── robustness-1a2b3c4d/         robustness.json  robustness.csv
    ├── detect-index-1a2b3c4d/       <source>/<shard>.parquet  shards.json   (and detect-prepare-…)
    ├── detector-NAME-1a2b3c4d/      checkpoints/  model.safetensors  detector.yaml  result.json
    ├── detect-evaluate-1a2b3c4d/    detection.json  NAME/detections.json
    ├── report-1a2b3c4d/             index.html  summary.json  speed_accuracy.csv  *.png …
    ├── measure-1a2b3c4d/            speed_accuracy.{csv,md,png}  summary.json   (all that such a job has)
    ├── fold1of2-1a2b3c4d/ …         as the teacher's, and <part>/<shard>.parquet   (`review --folds 2`)
    ├── sweep-1a2b3c4d/              sweep.json  best.yaml  index.html  progress.json  mlflow.json   (no stage; `sweep`)
    └── review/                      index.html  label_studio.{json,xml}  progress.json   (no stage; written anew)

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
from pipeline.errors import OutputError

DONE = "done.json"
WEIGHTS, CARD = "model.safetensors", "model.yaml"
CHECKPOINTS, RESULT = "checkpoints", "result.json"
SHARDS, CLASS_COUNTS = "shards.json", "classes.parquet"
AUDIT = "audit.json"
FAILED = ".failed.json"
SELECTION = "summary.json"
EVALUATION = "evaluate.json"
ROBUSTNESS = "robustness.json"
DETECTION = "detection.json"
SUMMARY, PAGE, SPEED_ACCURACY = "summary.json", "index.html", "speed_accuracy"
PROGRESS, JOB = "progress.json", "job.yaml"
REVIEW = "review"
SWEEP = "sweep-[0-9a-f]{8}"


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
    files: Mapping[str, str] = field(default_factory=dict)
    """The sha256 of what later stages read of it, by name; Parquet files check themselves. 0.1.0 recorded none."""


def fingerprint(kind: str, inputs: Mapping[str, Any], format: int = 1) -> str:
    """sha256 over the canonical JSON of a stage's kind, its inputs and the number of its format."""
    text = json.dumps({"format": format, "kind": kind, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(job: Job, stage: Stage, print_: str) -> str:
    """Where a stage with this fingerprint lives."""
    return storage.join(job.output, f"{stage.name}-{print_[:8]}")


def read_done(folder: str) -> Done | None:
    """What a finished stage left, or None where it has not finished. OutputError: its done.json is damaged."""
    path = storage.join(folder, DONE)
    mend = "delete it, and the next run ends that stage again with what is in its folder"
    try:
        record = storage.read_record(path, mend)
    except (FileNotFoundError, NotADirectoryError):  # `run` says what is wrong with such an output
        return None
    try:
        done = Done(folder=folder, **record)
    except TypeError as error:
        raise OutputError(f"{storage.redact(path)} is damaged ({str(error).split('() ')[-1]}); {mend}") from None
    for value, kind in ((done.name, str), (done.fingerprint, str), (done.output, str), (done.info, dict)):
        if not isinstance(value, kind):
            raise OutputError(f"{storage.redact(path)} is damaged ({str(value)[:40]!r} is out of place); {mend}")
    return done


def write_done(done: Done) -> None:
    """Mark a stage as finished: the last file that it writes."""
    record = {key: value for key, value in asdict(done).items() if key != "folder"}
    storage.write_record(storage.join(done.folder, DONE), record)


def files_of(folder: str) -> dict[str, str]:
    """`Done.files` of what lies in a stage's folder; of weights the sha256 is the stage's output."""
    names = [
        name
        for name in storage.listdir(folder)
        if name.endswith((".json", ".yaml", ".tar")) and not name.endswith(FAILED) and name not in (DONE, "mlflow.json")
    ]
    return {name: storage.sha256(storage.join(folder, name)) for name in sorted(names)}


def read_file(done: Done, name: str) -> bytes:
    """A file of a finished stage. OutputError: it is gone, or not what the stage left."""
    path = storage.join(done.folder, name)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise OutputError(
            f"{storage.redact(path)} is gone; delete the folder {storage.redact(done.folder)} and run again, which "
            "makes it again"
        ) from None
    check_file(done, name, hashlib.sha256(data).hexdigest())
    return data


def read_json_file(done: Done, name: str) -> Any:
    """The JSON in a file of a finished stage. OutputError: it is gone, or not what the stage left."""
    try:
        return json.loads(read_file(done, name))
    except (ValueError, RecursionError) as error:
        raise OutputError(
            f"{storage.redact(storage.join(done.folder, name))} is damaged (it is no JSON, {str(error)[:100]}); delete "
            f"the folder {storage.redact(done.folder)} and run again, which makes it again"
        ) from None


def check_files(stages: list[Done]) -> None:
    """`check_file` of all files of some stages, which are taken off the list. OutputError."""
    while stages:
        done = stages.pop()
        for name in (*done.files, *([WEIGHTS] if done.model else [])):
            path = storage.join(done.folder, name)
            if not storage.exists(path):
                read_file(done, name)  # which says so
            check_file(done, name, storage.sha256(path))


def check_file(done: Done, name: str, sha256: str) -> None:
    """OutputError unless a file of a finished stage has the sha256 that it had when the stage ended."""
    known = done.output if done.model and name == WEIGHTS else done.files.get(name)
    if known and known != sha256:
        raise OutputError(
            f"{storage.redact(storage.join(done.folder, name))} is not the file that its stage left (sha256 "
            f"{sha256[:12]}… instead of {known[:12]}…); bring the file back, or delete the folder "
            f"{storage.redact(done.folder)} and let its run make it again (if it was changed on purpose: its done.json)"
        )
