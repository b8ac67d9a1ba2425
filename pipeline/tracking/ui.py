"""Opens MLflow's own user interface on the store of a job, on loopback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.errors import OutputError
from pipeline.tracking.runs import is_sqlite, store_uri

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def arguments(output: str, uri: str | None = None, port: int = 5000) -> list[str]:
    """What follows `mlflow` on the command line."""
    store = store_uri(output, uri)
    return ["ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def command(output: str, uri: str | None = None) -> str:
    """What to type to look at a job in MLflow; where that is a server, its address."""
    store = store_uri(output, uri)
    if store.startswith(("http://", "https://")):
        return store
    return shlex.join(["mlflow", *arguments(output, uri)])


def ui(output: str, uri: str | None = None, port: int = 5000) -> int:
    """Run `mlflow ui` until it is stopped, return its exit status; where the store is a server, print it."""
    store = store_uri(output, uri)
    if store.startswith(("http://", "https://")):
        print(store)
        return 0
    if is_sqlite(store) and not Path(store.removeprefix("sqlite:///")).exists():
        raise OutputError(
            f"there is no {store.removeprefix('sqlite:///')}: this job has not run yet, or without tracking"
        )
    call = [sys.executable, "-m", "mlflow", *arguments(output, uri, port)]
    try:
        return subprocess.run(call, env={**os.environ, **QUIET}, check=False).returncode
    except KeyboardInterrupt:
        return 0
