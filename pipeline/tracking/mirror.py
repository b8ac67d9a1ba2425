"""Writes runs, metrics, artifacts and models to MLflow.

Everything in here may block or raise; it is called from the background thread of to_mlflow.py.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.tracking import journal, registered
from pipeline.tracking.connection import Connection, importing
from pipeline.tracking.contract import OURS, Dataset
from pipeline.tracking.runs import (
    POINTS_PER_BATCH,
    VALUE_LENGTH,
    End,
    Point,
    Run,
    batches,
    constants,
    described,
    flatten,
    is_new,
    load_state,
    metric_name,
    milliseconds,
    names,
    save_state,
    shown,
    within,
)

TOKEN, PARENT = f"{OURS}token", "mlflow.parentRunId"
NOTE = "mlflow.note.content"  # a run's description
CONTEXT = "mlflow.data.context"
SYSTEM = "system/"  # metrics of the machine
STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
NAMES_PER_BATCH = 100  # params and tags


class Mirror:
    """What is written to MLflow over a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.uri = connection.uri

    @property
    def client(self) -> Any:
        return self.connection.client

    def resume(self, run: Run) -> None:
        """Create the run in MLflow, or set the one that is remembered to RUNNING; its parent first."""
        if run.run_id:
            return
        self.connection.connect()
        if run.parent:
            self.resume(run.parent)
        if not run.state:
            run.state = load_state(run, shown(self.uri))
        found = self._existing(run)
        if found is None:
            save_state(run, run_id=None, ended=None, told=None, champion=None)
            tags = {TOKEN: run.state["token"], **({PARENT: run.parent.run_id} if run.parent else {})}
            if run.end and not run.begun:  # it was over before this store was filled
                records = journal.read(run.folder)[0]
                times = [round(record["time"] * 1000) for record in records] or [run.created, run.end.time]
                run.created, run.end.time = times[0], times[-1]
            found = self.client.create_run(self.connection.experiment, run.created, tags, run.title or run.name)
        else:
            self.client.update_run(found.info.run_id, status="RUNNING")
            if run.parent is None:
                self._bury(found.info.run_id)
        run_id = found.info.run_id
        save_state(run, run_id=run_id, ended=None)
        self._describe(run_id, run, found.data.params)
        run.start, run.sent = found.info.start_time, _last_steps(found)
        run.begun, run.run_id = True, run_id
        self.connection.took()

    def _existing(self, run: Run) -> Any:
        from mlflow.exceptions import MlflowException

        run_id = run.state["run_id"]
        if run_id is None:
            query = f"tags.`{TOKEN}` = '{run.state['token']}'"
            found = self.client.search_runs([self.connection.experiment], query, max_results=1)
            return found[0] if found else None
        try:
            kept = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return kept if kept.info.lifecycle_stage == "active" else None

    def _describe(self, run_id: str, run: Run, known: Mapping[str, str]) -> None:
        """Params and tags. Params cannot be changed in MLflow: those it has are left alone."""
        from mlflow.entities import Param, RunTag

        params = [Param(name, value) for name, value in flatten(run.params) if name not in known]
        tags = [RunTag(name, value) for name, value in flatten(run.tags)]
        for first in range(0, max(len(params), len(tags)), NAMES_PER_BATCH):
            chunk = slice(first, first + NAMES_PER_BATCH)
            self.client.log_batch(run_id, params=params[chunk], tags=tags[chunk])
        if run.datasets:  # those that the run has already are left alone
            self.client.log_inputs(run_id, datasets=[_input(one) for one in run.datasets])

    def _bury(self, parent_id: str) -> None:
        """Stages that a killed process left RUNNING are KILLED; those that go on are set to RUNNING again."""
        query = f"tags.`{PARENT}` = '{parent_id}' and attributes.status = 'RUNNING'"
        for left in self.client.search_runs([self.connection.experiment], query):
            self.client.set_terminated(left.info.run_id, STATUS["killed"])

    def send_journal(self, run: Run, whole: bool, began: float) -> None:
        """Send what the journal has got since the last time; `whole`: to the last record. Those of before this process
        `began`, in seconds since 1970, are `run.late`."""
        records, position = journal.read(run.folder, run.position, follow=not whole)
        late = sum(1 for record in records if record["time"] < began and is_new(record, run.sent))
        run.late = max(run.late, late)  # what failed is counted again
        if tags := constants(records):
            from mlflow.entities import RunTag

            self.client.log_batch(run.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        run.curves.update(name for record in records for name in names(record).values())
        for batch in batches(records, run.sent):
            self._log(run, batch)
        run.position = position

    def send_samples(self, run: Run, samples: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Samples (milliseconds, values); their steps are seconds since the run's start, which grow over
        resumes too."""
        points = [
            (f"{SYSTEM}{name}", float(value), at, (at - run.start) // 1000)
            for at, values in samples
            for name, value in values.items()
        ]
        for first in range(0, len(points), POINTS_PER_BATCH):
            self._log(run, points[first : first + POINTS_PER_BATCH])

    def _log(self, run: Run, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, at, step) for name, value, at, step in points]
        self.client.log_batch(run.run_id, metrics=metrics)
        run.sent.update((name, step) for name, _, _, step in points if not name.startswith(SYSTEM))
        self.connection.took()

    def finish(self, run: Run, end: End, last: bool) -> None:
        """Send final metrics, artifacts and the model, and end the run. `last`: no other model has ended since."""
        known = self.client.get_run(run.run_id)
        step = max(run.sent.values(), default=0)
        points = [
            (metric_name(name), float(value), end.time, step)
            for name, value in end.metrics.items()
            # What the journal has is a curve, which a last value of another kind would spoil.
            if math.isfinite(value)
            and metric_name(name) not in run.curves
            and known.data.metrics.get(metric_name(name)) != value
        ]
        if points:
            self._log(run, points)
        for path in end.artifacts:
            self._upload(run.run_id, path)
        if end.model:
            self._send_model(run, end.model)
            self._register(run, known.info.artifact_uri + "/model", last)
        if run.title and known.info.run_name != run.title:  # which weights were adopted is known in the end
            self.client.update_run(run.run_id, name=run.title)
        self.client.set_terminated(run.run_id, STATUS[end.status], end.time)
        save_state(run, ended=end.status)
        run.done = True

    def _upload(self, run_id: Any, path: str) -> None:
        """Log a file, or a folder under its own name."""
        with tempfile.TemporaryDirectory() as folder:
            local = _fetch(path, folder) if storage.is_url(path) else path
            if Path(local).is_dir():
                self.client.log_artifacts(run_id, local, Path(local).name)
            else:
                self.client.log_artifact(run_id, local)
        self.connection.took()

    def add(self, run: Run, told: Mapping[str, Any]) -> None:
        """Send what is known of a run's model, or of the job, since the run ended: figures, a description, pages, and
        the temperature into model.yaml."""
        from mlflow.entities import Metric

        self.connection.connect()
        run_id = run.state["run_id"]
        known = self.client.get_run(run_id)
        step = max(_last_steps(known).values(), default=0)
        points = [
            (metric_name(name), float(value), milliseconds(), step)
            for name, value in told["figures"].items()
            if known.data.metrics.get(metric_name(name)) != value
        ]
        if points:
            self.client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        # A version that 0.2.0 registered is no MLflow model: it stays as it is.
        if run.temperature is not None and self.client.list_artifacts(run_id, f"model/{registered.INSIDE}"):
            with tempfile.TemporaryDirectory() as folder:
                card = storage.read_bytes(storage.join(run.folder, registered.CARD)).decode()
                path = Path(folder, registered.CARD)
                path.write_text(f"{card.rstrip()}\ntemperature: {run.temperature}\n")
                self.client.log_artifact(run_id, str(path), f"model/{registered.INSIDE}")
        for page in run.pages:
            self._upload(run_id, page)
        for version in self.client.search_model_versions(f"run_id = '{run_id}'") if run.figures else ():
            self.client.update_model_version(version.name, version.version, described(told["figures"]))
        if run.note:
            self.client.set_tag(run_id, NOTE, within(run.note, VALUE_LENGTH))
        save_state(run, told=told)
        self.connection.took()

    def crown(self, run: Run) -> None:
        """Have the alias `champion` mean the model of a run."""
        self.connection.connect()
        for version in self.client.search_model_versions(f"run_id = '{run.state['run_id']}'")[:1]:
            self.client.set_registered_model_alias(version.name, "champion", version.version)

    def _send_model(self, run: Run, folder: str) -> None:
        """Log the model in a stage's folder as one that MLflow can load."""
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary, registered.LOADER)
            data.mkdir()
            for name in registered.FILES:
                (data / name).write_bytes(storage.read_bytes(storage.join(folder, name)))
            made = str(Path(temporary, "model"))
            with self.connection.own_work(), importing:
                registered.save(str(data), made)
            self.client.log_artifacts(run.run_id, made, "model")
        self.connection.took()

    def _register(self, run: Run, source: str, last: bool) -> None:
        """A version of the job's model, with the stage's name as an alias, and `last` for the newest."""
        from mlflow.exceptions import MlflowException

        assert run.parent
        name = re.sub(r"[/:]", "_", run.parent.name)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self.client.search_model_versions(f"run_id = '{run.run_id}'")
        version = (versions or [self.client.create_model_version(name, source, run.run_id)])[0].version
        self.client.set_registered_model_alias(name, re.sub(r"[^\w-]", "-", run.name), version)
        if last:
            self.client.set_registered_model_alias(name, "last", version)


def _input(dataset: Dataset) -> Any:
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    where = storage.redact(dataset.where)
    scheme = where.partition("://")[0] if storage.is_url(where) else "local"
    source = json.dumps({"url" if scheme in ("http", "https") else "uri": where})
    profile = json.dumps(dict(dataset.facts)) if dataset.facts else None
    entity = Entity(dataset.name, dataset.digest, scheme, source, profile=profile)
    return DatasetInput(entity, [InputTag(CONTEXT, dataset.context)])


def _last_steps(run: Any) -> dict[str, int]:
    """The last step of each metric of a run; MLflow updates it in one transaction with the metric's points."""
    latest = run.data.to_proto().metrics  # RunData.metrics leaves the steps out
    return {metric.key: metric.step for metric in latest if not metric.key.startswith(SYSTEM)}


def _fetch(url: str, folder: str) -> str:
    """Copy a file, or a folder with all that is in it, from an object store; returns the local path."""
    target = Path(folder, url.rstrip("/").rsplit("/", 1)[-1])
    below = storage.walk(url)
    for name in below or [""]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read_bytes(storage.join(url, name) if below else url))
    return str(target)
