"""Writes runs, metrics, artifacts and models to MLflow: the only code that imports mlflow.

Everything in here may block or raise; it is called from the background thread of to_mlflow.py.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.tracking import journal
from pipeline.tracking.runs import (
    POINTS_PER_BATCH,
    End,
    Point,
    Run,
    batches,
    flatten,
    load_state,
    metric_name,
    save_state,
    shown,
)

EXPERIMENT = "noisy-lambda"
TOKEN, PARENT = "journal.token", "mlflow.parentRunId"
SYSTEM = "system/"  # metrics of the machine
STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
MODEL_FILES = ("model.safetensors", "model.yaml")
NAMES_PER_BATCH = 100  # params and tags
POLL_URL_SECONDS = 10.0  # an object store gets a new part of a journal this often
ENVIRONMENT = {  # of this process only, and only where the user has set nothing
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # the default of 120 s with 7 retries blocks for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}

# A process forked in the middle of an import would find that module locked for ever, so forks wait for ours.
_importing = threading.RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


class Mirror:
    """A connection to one MLflow store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client: Any = None
        self.experiment = ""
        self.monitors: list[Any] = []
        self.progress = time.monotonic()  # when MLflow last took something

    def resume(self, run: Run) -> None:
        """Create the run in MLflow, or set the one that is remembered to RUNNING; its parent first."""
        if run.run_id:
            return
        self._connect()
        if run.parent:
            self.resume(run.parent)
        if not run.state:
            run.state = load_state(run, shown(self.uri))
        found = self._existing(run)
        if found is None:
            save_state(run, run_id=None, ended=None)
            tags = {TOKEN: run.state["token"], **({PARENT: run.parent.run_id} if run.parent else {})}
            found = self.client.create_run(self.experiment, run.created, tags, run.name)
        else:
            self.client.update_run(found.info.run_id, status="RUNNING")
            if run.parent is None:
                self._bury(found.info.run_id)
        run_id = found.info.run_id
        save_state(run, run_id=run_id, ended=None)
        self._describe(run_id, run, found.data.params)
        run.start, run.sent = found.info.start_time, _last_steps(found)
        run.begun, run.run_id = True, run_id
        self.progress = time.monotonic()

    def answers(self) -> bool:
        try:
            self._connect()
            self.client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _connect(self) -> None:
        if self.client is not None:
            return
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _importing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - it is needed in a moment
            from mlflow.tracking import MlflowClient

        self.progress = time.monotonic()
        client = MlflowClient(tracking_uri=self.uri)
        self.experiment = self._find_experiment(client)
        self.progress = time.monotonic()
        self.monitors = _monitors()
        self.client = client

    def _find_experiment(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        if self.uri.startswith("sqlite:///"):  # MLflow's own default is relative to the working directory
            folder = Path(self.uri.removeprefix("sqlite:///")).parent
            folder.mkdir(parents=True, exist_ok=True)
            return client.create_experiment(name, artifact_location=(folder / "mlartifacts").as_uri())
        return client.create_experiment(name)  # a server knows where its artifacts go

    def _existing(self, run: Run) -> Any:
        from mlflow.exceptions import MlflowException

        run_id = run.state["run_id"]
        if run_id is None:
            query = f"tags.`{TOKEN}` = '{run.state['token']}'"
            found = self.client.search_runs([self.experiment], query, max_results=1)
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

    def _bury(self, parent_id: str) -> None:
        """Stages that a killed process left RUNNING are KILLED; those that go on are set to RUNNING again."""
        query = f"tags.`{PARENT}` = '{parent_id}' and attributes.status = 'RUNNING'"
        for left in self.client.search_runs([self.experiment], query):
            self.client.set_terminated(left.info.run_id, STATUS["killed"])

    def send_journal(self, run: Run, whole: bool) -> None:
        """Send what the journal has got since the last time; `whole`: now, however long ago that was."""
        interval = POLL_URL_SECONDS if storage.is_url(run.folder) else 0.0
        if not whole and time.monotonic() - run.read_at < interval:
            return
        records, position = journal.read(run.folder, run.position)
        for batch in batches(records, run.sent):
            self._log(run, batch)
        run.position, run.read_at = position, time.monotonic()

    def sample(self) -> dict[str, float]:
        """System metrics of the driver's machine, now."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return values

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
        self.progress = time.monotonic()

    def finish(self, run: Run, end: End, champion: bool) -> None:
        """Send final metrics, artifacts and the model, and end the run."""
        known = self.client.get_run(run.run_id)
        step = max(run.sent.values(), default=0)
        points = [
            (metric_name(name), float(value), end.time, step)
            for name, value in end.metrics.items()
            if math.isfinite(value) and known.data.metrics.get(metric_name(name)) != value
        ]
        if points:
            self._log(run, points)
        for path in end.artifacts:
            self._upload(run, path, None)
        if end.model:
            for name in MODEL_FILES:
                self._upload(run, storage.join(end.model, name), "model")
            self._register(run, known.info.artifact_uri + "/model", champion)
        self.client.set_terminated(run.run_id, STATUS[end.status], end.time)
        save_state(run, ended=end.status)
        run.done = True

    def _upload(self, run: Run, path: str, under: str | None) -> None:
        """Log a file, or a folder under its own name."""
        with tempfile.TemporaryDirectory() as folder:
            local = _fetch(path, folder) if storage.is_url(path) else path
            if Path(local).is_dir():
                self.client.log_artifacts(run.run_id, local, Path(local).name)
            else:
                self.client.log_artifact(run.run_id, local, under)
        self.progress = time.monotonic()

    def _register(self, run: Run, source: str, champion: bool) -> None:
        """A version of the job's model, with the stage's name as an alias; `champion` is its last model."""
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
        if champion:
            self.client.set_registered_model_alias(name, "champion", version)


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


def _monitors() -> list[Any]:
    """MLflow's own samplers of this machine; GPUs where nvidia-ml-py and a driver are there."""
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    monitors = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
    try:
        return [*monitors, gpu_monitor.GPUMonitor()]
    except Exception:  # no nvidia-ml-py, no driver, no GPU
        return monitors
