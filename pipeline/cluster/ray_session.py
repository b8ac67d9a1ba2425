"""Opens the Ray that this process uses: an embedded one of its own, or a running one that it joins.

An embedded Ray leaves nothing behind: its files, its socket and its access token live in one temporary folder.
Left alone, Ray would write ~/.ray/auth_token, and with it the next `ray start --head` demands a token that a
plain `ray job submit` does not send.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import malloc, secrets_file
from pipeline.cluster.inline import last_line
from pipeline.errors import ClusterError

EMBEDDED = "embedded"
PREFIX = "nlray-"  # short: Ray's socket lies below it and may have 107 bytes in all
# Names what a worker calls first (runtime_env's worker_process_setup_hook): Ray then puts the working directory in
# front of all paths, where folders `models` and `pipeline` of the user's may lie.
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
WORKERS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that was given no GPU sees none
    SETUP_HOOK: "noisy_lambda.in_worker",
}
OBJECT_STORE_BYTES = 200_000_000  # units and results are small; Ray would take 30 % of the memory
CONNECT_SECONDS = 10.0
TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once

ENVIRONMENT = {  # Ray's own settings, in force while a session is open
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's prints appear twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # standard output is the job's: Ray's notes about dead workers stay off it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a job mean the same in a training worker
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def resolve(address: str) -> str:
    """The address meant by a job's setting: 'auto' is RAY_ADDRESS where it is set, else an embedded Ray."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or EMBEDDED
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"the Ray address {address} is a dashboard's, for submitting jobs; to run from here give the head as "
            "HOST:6379 or ray://HOST:10001, or use `submit`"
        )
    return EMBEDDED if address == "local" else address


class Session:
    """Open on the first `start`; `close` ends what `start` began, and nothing else."""

    def __init__(
        self, address: str, cpus: int | None, gpus: int | None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`say` hears what a person waits for."""
        self.say, self.address = say, address
        self.embedded = address == EMBEDDED
        self._cpus, self._gpus = cpus, gpus
        self._undo: contextlib.ExitStack | None = None
        self._folder = ""

    def prepare(self) -> None:
        """Put Ray's settings in force. Ray reads some of them when it is first imported, so this comes before that."""
        if self._undo is not None:
            return
        with contextlib.ExitStack() as undo:
            if self.embedded:
                self._folder = undo.enter_context(_temporary_folder())
                undo.enter_context(environment({**ENVIRONMENT, **_private(self._folder)}))
            else:
                check_reachable(self.address)
                undo.enter_context(environment(ENVIRONMENT))
            self._undo = undo.pop_all()

    def start(self) -> None:
        self.prepare()
        import ray

        if ray.is_initialized():
            return
        self.say("starting Ray" if self.embedded else "joining the Ray cluster")
        with _keep_signal_handlers():
            if self.embedded:
                self._start_embedded(self._folder)
            else:
                self._connect()
        assert self._undo is not None
        self._undo.callback(ray.shutdown)
        self.say("")

    def close(self) -> None:
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo.close()

    def _start_embedded(self, folder: str) -> None:
        import ray

        shared = Path("/dev/shm")
        too_small = not shared.is_dir() or shutil.disk_usage(shared).free < OBJECT_STORE_BYTES
        try:
            # Never on a thread that ends before the session: the kernel ends Ray's processes with that thread.
            # Its workers inherit these.
            paths = os.pathsep.join(_own_import_paths())
            with environment({"PYTHONPATH": paths, **malloc.environment(), **WORKERS}):
                ray.init(
                    address="local",
                    num_cpus=self._cpus,
                    num_gpus=self._gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    _plasma_directory=folder if too_small else None,
                )
        except Exception as error:
            raise ClusterError(
                f"cannot start an embedded Ray: {last_line(error)}; set `cluster: inline` to work without Ray"
            ) from error

    def _connect(self) -> None:
        import ray

        try:
            ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env=_runtime_env(),
            )
        except Exception as error:
            hint = "; its head wants a token: export RAY_AUTH_MODE=token" if "uthentication" in str(error) else ""
            raise ClusterError(
                f"cannot join the Ray cluster at {self.address}: {last_line(error)[:300]}{hint}; check the address "
                "(RAY_ADDRESS or `cluster`), or set `cluster: embedded`"
            ) from error


def check_reachable(address: str) -> None:
    """A closed port is told in seconds; Ray itself would try for a minute and then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # 'auto': Ray finds the head of this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`, "
            "check the address (RAY_ADDRESS or `cluster`), or set `cluster: embedded`"
        ) from error


def _private(folder: str) -> dict[str, str]:
    """A token of our own, and no telemetry."""
    token = Path(folder, "token")
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}


def _package_root() -> Path:
    return Path(__file__).resolve().parents[2]


def _own_import_paths() -> list[str]:
    """Where this process imports from, outside the Python installation, for workers on this machine."""
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    paths = [Path(path).absolute() for path in [str(_package_root()), *sys.path]]
    return list(dict.fromkeys(str(path) for path in paths if path.is_dir() and not str(path).startswith(installed)))


def _runtime_env() -> dict[str, Any]:
    """For the workers of a running cluster: how to use memory and GPUs, and our packages unless the job brought them or
    they are installed."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    found: dict[str, Any] = {"env_vars": {**malloc.environment(), **WORKERS}}
    name = secrets_file.VARIABLE
    if name in os.environ and name not in job.get("env_vars", {}):  # Ray takes none twice
        found["env_vars"][name] = os.environ[name]
    root = _package_root()
    if job.get("working_dir") or job.get("py_modules") or root.name in ("site-packages", "dist-packages"):
        return found
    return {**found, "py_modules": [str(root / name) for name in ("models", "pipeline", "noisy_lambda.py")]}


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder for one session, locked while its owner lives; folders of killed owners are removed."""
    base = tempfile.gettempdir()
    if len(base) > 30:
        base = "/tmp"
    for old in Path(base).glob(PREFIX + "*"):
        _remove_if_orphan(old)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    unlocked = folder / "unlocked"
    with unlocked.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(folder / "lock")
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_orphan(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Ray installs a SIGTERM handler of its own; one that the program already has stays in force."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before):
        signal.signal(signal.SIGTERM, before)
