"""Opens an MLflow store, and makes the sqlite file of a job that has no server.

Everything in here may block or raise; it is called from the background thread of to_mlflow.py. Only this module and
mirror.py import mlflow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking import sqlite_store
from pipeline.tracking.runs import Run, is_sqlite

EXPERIMENT = "noisy-lambda"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the pages are those of language models
ENVIRONMENT = {  # of this process only, and only where the user has set nothing
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # the default of 120 s with 7 retries blocks for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
FOR_SQLITE = {"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"}  # or a file that was replaced is written to for ever

# A process forked in the middle of an import would find that module locked for ever, so forks wait for ours.
importing = threading.RLock()
os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)


class Connection:
    """A connection to one MLflow store. `tell` is called when a damaged one was set aside."""

    def __init__(self, uri: str, tell: Callable[[str], None]) -> None:
        self.uri = uri
        self.tell = tell
        self.checked = False  # the sqlite file
        self.client: Any = None
        self.experiment = ""
        self.monitors: list[Any] = []
        self.progress = time.monotonic()  # when MLflow last took something
        self.preparing = False  # with work of this process, which is no fault of MLflow's

    def took(self) -> None:
        self.progress = time.monotonic()

    def silent_for(self) -> float:
        """Seconds for which MLflow has been asked and has taken nothing."""
        return 0.0 if self.preparing else time.monotonic() - self.progress

    @contextlib.contextmanager
    def own_work(self) -> Iterator[None]:
        """Imports, which took 11 s on a busy machine, and making tables: nobody's patience wears out meanwhile."""
        self.preparing = True
        try:
            yield
        finally:
            self.took()
            self.preparing = False

    def answers(self) -> bool:
        try:
            self.connect()
            self.client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def holds(self, run: Run) -> bool:
        """Whether a run that has ended is still in the store, without importing mlflow: a server is believed."""
        if not is_sqlite(self.uri):
            return True
        path = sqlite_store.path_of(self.uri)
        if not self.checked:
            self.checked = path.exists() and not sqlite_store.damage(path)
        return self.checked and sqlite_store.holds(path, run.state["run_id"])

    def forget(self) -> None:
        """Connect anew next time, and look at the sqlite file again."""
        self.client, self.checked = None, False

    def connect(self) -> None:
        if self.client is not None:
            return
        for name, value in {**ENVIRONMENT, **(FOR_SQLITE if is_sqlite(self.uri) else {})}.items():
            os.environ.setdefault(name, value)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with self.own_work(), importing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - it is needed in a moment
            from mlflow.tracking import MlflowClient

        if is_sqlite(self.uri):
            with self.own_work():
                self._make_sqlite()
        client = MlflowClient(tracking_uri=sqlite_store.address(self.uri))
        self.experiment = self._find_experiment(client)
        self.took()
        with self.own_work(), importing:
            self.monitors = _monitors()
        self.client = client

    def _make_sqlite(self) -> None:
        """The sqlite file where it is missing, damaged, or was left half made: 0.2 was killed there."""
        path = sqlite_store.path_of(self.uri)
        if path.exists():
            reason = "" if self.checked else sqlite_store.damage(path)
            if not reason and sqlite_store.is_empty(path):
                reason = self._misfit()
            if reason:
                aside = sqlite_store.set_aside(path)
                self.tell(
                    f"MLflow's store {path} is damaged ({reason[:200]}): it was renamed to {aside.name}, and a new "
                    "one is filled from the journals of the job"
                )
        if not path.exists():
            sqlite_store.create(path, self._initialise)
        self.checked = True

    def _misfit(self) -> str:
        """Why MLflow does not open the store, "" where it does."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        try:
            SqlAlchemyStore(sqlite_store.address(self.uri), self._artifacts())
        except MlflowException as error:
            return " ".join(str(error).split())
        return ""

    def _initialise(self, path: Path) -> None:
        """MLflow's tables, and our experiment, in a new sqlite file."""
        from mlflow.entities import ExperimentTag
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        artifacts = self._artifacts()
        store = SqlAlchemyStore(sqlite_store.address(f"{sqlite_store.SCHEME}{path}"), artifacts)
        store.create_experiment(_experiment_name(), artifacts, [ExperimentTag(*tag) for tag in KIND.items()])

    def _artifacts(self) -> str:
        """Where artifacts go beside a sqlite file; MLflow's own default is relative to the working directory."""
        return (sqlite_store.path_of(self.uri).parent / "mlartifacts").as_uri()

    def _find_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(_experiment_name())
        if found:
            return found.experiment_id
        # A server knows where its artifacts go.
        return client.create_experiment(_experiment_name(), self._artifacts() if is_sqlite(self.uri) else None, KIND)

    def sample(self) -> dict[str, float]:
        """System metrics of the driver's machine, now."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return values


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)


def _monitors() -> list[Any]:
    """MLflow's own samplers of this machine; GPUs where nvidia-ml-py and a driver are there."""
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    monitors = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
    try:
        return [*monitors, gpu_monitor.GPUMonitor()]
    except Exception:  # no nvidia-ml-py, no driver, no GPU
        return monitors
