"""Opens MLflow's own user interface on the store of a job, on loopback."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.tracking import sqlite_store
from pipeline.tracking.runs import STATE, is_sqlite, shown, store_uri

HOST = "127.0.0.1"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING_SECONDS = 5.0
VIEW = "workflowType=machine_learning&orderByKey=metrics.%60test_top1%60&orderByAsc=false"


def arguments(port: int = 5000) -> list[str]:
    """What follows `mlflow` on the command line, but for the store."""
    return ["ui", "--host", HOST, "--port", str(port), "--workers", "1"]


def command(output: str, uri: str | None = None) -> str:
    """What to type to look at a job in MLflow; where that is no local file, its address without the password."""
    store = store_uri(output, uri)
    if not is_sqlite(store):
        return shown(store)
    return shlex.join(["mlflow", *arguments(), "--backend-store-uri", sqlite_store.address(store)])


def ui(output: str, uri: str | None = None, port: int = 5000) -> int:
    """Run `mlflow ui` until it is stopped, and print its address; where the store is a server, only print that."""
    store = store_uri(output, uri)
    if store.startswith(("http://", "https://")):
        print(shown(store))
        return 0
    if is_sqlite(store) and not sqlite_store.path_of(store).exists():
        raise OutputError(f"there is no {sqlite_store.path_of(store)}: this job has not run yet, or without tracking")
    _check_free(port)
    # By the environment: everybody on the machine sees the arguments of a process, and a database has a password.
    environment = {**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": sqlite_store.address(store)}
    called = [sys.executable, "-m", "mlflow", *arguments(port)]
    # In a session of its own, so that Ctrl-C reaches this process alone, which ends all of it.
    with tempfile.TemporaryFile() as said, _interrupted():
        server = subprocess.Popen(called, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            return _follow(server, said, f"http://{HOST}:{port}", _page(output, store))
        except KeyboardInterrupt:
            return 0
        finally:
            _end(server)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise OutputError(f"port {port} of {HOST} cannot be had ({reason}); name another with --port") from error


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Have every signal that ends a command raise KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(server: subprocess.Popen[bytes], said: IO[bytes], address: str, page: str) -> int:
    """Print the address once the server answers, and wait for its end; if it ends by itself, print what it said."""
    while server.poll() is None and not _answers(address):
        time.sleep(0.2)
    if server.poll() is None:
        print(f"MLflow   {address}{page}   (Ctrl-C ends it)", flush=True)
        server.wait()
    said.seek(0)
    print(storage.redact(said.read().decode(errors="replace")), file=sys.stderr)
    return server.returncode


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
        return True
    return False


def _page(output: str, store: str) -> str:
    """The page of the runs, "" where it is not known: MLflow's first page is about other things."""
    try:
        run_id = storage.read_json(storage.join(output, STATE))["run_id"]
        experiment = sqlite_store.experiment_of(sqlite_store.path_of(store), run_id) if is_sqlite(store) else None
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f"/#/experiments/{experiment}/runs?{VIEW}" if experiment else ""


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(ENDING_SECONDS)
            return
