"""Opens MLflow's own user interface on the store of a job, on loopback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from pipeline.errors import OutputError
from pipeline.tracking import sqlite_store
from pipeline.tracking.runs import is_sqlite, shown, store_uri

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def arguments(port: int = 5000) -> list[str]:
    """What follows `mlflow` on the command line, but for the store."""
    return ["ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def command(output: str, uri: str | None = None) -> str:
    """What to type to look at a job in MLflow; where that is no local file, its address without the password."""
    store = store_uri(output, uri)
    if not is_sqlite(store):
        return shown(store)
    return shlex.join(["mlflow", *arguments(), "--backend-store-uri", sqlite_store.address(store)])


def ui(output: str, uri: str | None = None, port: int = 5000) -> int:
    """Run `mlflow ui` until it is stopped, return its exit status; where the store is a server, print it."""
    store = store_uri(output, uri)
    if store.startswith(("http://", "https://")):
        print(shown(store))
        return 0
    if is_sqlite(store) and not sqlite_store.path_of(store).exists():
        raise OutputError(f"there is no {sqlite_store.path_of(store)}: this job has not run yet, or without tracking")
    # By the environment: everybody on the machine sees the arguments of a process, and a database has a password.
    environment = {**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": sqlite_store.address(store)}
    try:
        return subprocess.run(
            [sys.executable, "-m", "mlflow", *arguments(port)], env=environment, check=False
        ).returncode
    except KeyboardInterrupt:
        return 0
