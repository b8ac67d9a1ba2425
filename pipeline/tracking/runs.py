"""Remembers what a tracker knows of its runs, and what of it goes into MLflow; no MLflow in here."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.printable import printable
from pipeline.tracking.contract import OURS, Dataset
from pipeline.tracking.sqlite_store import SCHEME, path_of

STATE = "mlflow.json"
POINTS_PER_BATCH = 900  # MLflow takes 1000 things at once, tags included
VALUE_LENGTH = 5000  # of a param or tag; MLflow takes 6000 and 8000, older servers 5000

Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step


def store_uri(output: str, uri: str | None = None) -> str:
    """The MLflow store of a job: `uri` (a local folder or an MLflow URI), else MLFLOW_TRACKING_URI, else
    sqlite in `output`. OutputError where `output` is a URL and nothing else is given: sqlite needs a local file."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and storage.is_url(output):
        raise OutputError(
            f"tracking has no place to write: output {storage.redact(output)} is not a local folder; set "
            "MLFLOW_TRACKING_URI to a server, `tracking.uri` to a local folder, or `tracking.enabled: false`"
        )
    uri = uri or output
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        raise OutputError(
            f"the MLflow store '{printable(uri)}' is a server without a scheme, which would be a local folder; write "
            f"http://{printable(uri)}"
        )
    if is_sqlite(uri):
        return f"{SCHEME}{path_of(uri).absolute()}"
    if storage.is_url(uri) or uri == "databricks":
        return uri
    return f"{SCHEME}{Path(uri).absolute()}/mlflow.db"


def shown(store: str) -> str:
    """The store as it may be recorded: without user and password."""
    return store if is_sqlite(store) else storage.redact(store)


def is_sqlite(store: str) -> bool:
    return store.startswith(SCHEME)


@dataclass
class End:
    """How a run ended, to be told to MLflow."""

    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    model: str | None = None
    time: int = field(default_factory=lambda: milliseconds())


@dataclass(eq=False)
class Run:
    """One MLflow run: what it should be (set by the runner), what it is (set by the background thread)."""

    name: str
    folder: str
    parent: Run | None
    params: Mapping[str, Any]
    tags: Mapping[str, Any]
    begun: bool = False  # in this process
    end: End | None = None
    created: int = field(default_factory=lambda: milliseconds())
    state: dict[str, Any] = field(default_factory=dict)  # what STATE holds
    run_id: str | None = None  # once it is running in MLflow
    start: int = 0
    sent: dict[str, int] = field(default_factory=dict)  # the last step of each metric that MLflow has
    position: int = 0  # in the journal
    late: int = 0  # records that MLflow should have got from an earlier process
    curves: set[str] = field(default_factory=set)  # the metrics that the journal has
    title: str = ""  # what MLflow calls it; "": its name
    datasets: Sequence[Dataset] = ()
    figures: Mapping[str, float] = field(default_factory=dict)  # of its model or of the job, known since it ended
    temperature: float | None = None  # of that model, since then
    note: str = ""  # its description, of that time too
    pages: Sequence[str] = ()  # and its further artifacts
    failures: int = 0
    done: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """What is known since it ended, as STATE keeps it."""
        pages = [storage.redact(page) for page in self.pages]
        return {"figures": dict(self.figures), "note": self.note, "pages": pages}


def load_state(run: Run, store: str) -> dict[str, Any]:
    """What is remembered of a run in this store; the token finds a run whose id never reached us."""
    path = storage.join(run.folder, STATE)
    try:
        state = storage.read_json(path) if storage.exists(path) else {}
    except ValueError:  # damaged: the journal has all that is sent
        state = {}
    if isinstance(state, dict) and state.get("store") == store:
        return state
    return {"store": store, "token": uuid.uuid4().hex, "run_id": None, "ended": None}


def save_state(run: Run, **changes: Any) -> None:
    run.state.update(changes)
    storage.write_json(storage.join(run.folder, STATE), run.state)


def names(record: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers in a journal's record are called in MLflow. A tracker knows names, not kinds of records."""
    kind = record.get("kind")
    called: dict[str, str] = {}
    if kind == "start":  # constants are no curves
        return called
    for key in _numbers(record):
        if kind == "validation" and "validation" not in key:
            called[key] = metric_name(f"validation_{key}")
        elif kind == "train" and key == "images_per_second":
            called[key] = "training_images_per_second"
        else:
            called[key] = metric_name(key)
    return called


def constants(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tags: what does not change while a stage runs."""
    found = [record for record in records if record.get("kind") == "start"]
    return {f"{OURS}{name}": str(record[name]) for record in found for name in _numbers(record)}


def _numbers(record: Mapping[str, Any]) -> list[str]:
    at = ("step", "total", "time")
    return [name for name, value in record.items() if name not in at and isinstance(value, (int, float))]


def is_new(record: Mapping[str, Any], sent: Mapping[str, int]) -> bool:
    """Whether the record has a number whose step was not sent."""
    return any(record["step"] > sent.get(name, -1) for name in names(record).values())


def batches(records: Iterable[Mapping[str, Any]], sent: Mapping[str, int]) -> Iterator[list[Point]]:
    """The numbers in the records, without the steps that were sent."""
    last, batch = dict(sent), []
    for record in records:
        step, at = record["step"], round(record["time"] * 1000)
        for key, name in names(record).items():
            if step <= last.get(name, -1):
                continue
            last[name] = step
            batch.append((name, float(record[key]), at, step))
            if len(batch) == POINTS_PER_BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of nested settings, without the secrets that URLs can hold."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            text = str([storage.redact(str(item)) for item in value])
            yield metric_name(prefix + key), text[:VALUE_LENGTH]
        else:
            yield metric_name(prefix + key), storage.redact(str(value))[:VALUE_LENGTH]


def described(figures: Mapping[str, float]) -> str:
    """A registered model in one line, by the names of the metrics."""
    texts = {name: f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}" for name, value in figures.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def within(text: str, length: int) -> str:
    """The text, without the last lines where it is too long."""
    while len(text) > length and "\n" in text:
        text = text.rpartition("\n")[0]
    return text[:length]


def metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def milliseconds() -> int:
    return time.time_ns() // 1_000_000
