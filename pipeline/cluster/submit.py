"""Hands a job to a running cluster through Ray's job API, and follows it.

`ray job submit jobs/x.yaml` does the same where the head runs in the repository; this also tells a job that was
stopped from one that succeeded (Ray's own command ends with 0 for both).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import secrets_file
from pipeline.cluster.inline import last_line
from pipeline.config import shipped
from pipeline.errors import ClusterError, ConfigError
from pipeline.printable import redact

SUCCEEDED, FAILED, STOPPED = 0, 1, 3  # the exit status of `submit`
# Variables of this shell that the job gets: where things are, and no secret.
HANDED_ON = (
    "MLFLOW_TRACKING_URI", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
)  # fmt: skip
EXCLUDES = ["/runs/", "/.git/", "/.venv/", "/mlruns/", "*.db", "__pycache__/", "/.mypy_cache/", "/.ruff_cache/"]


# What the log says where the head's `python` cannot run a job, and what is missing then.
MISSING = {
    "No module named noisy_lambda": "the head's python has no noisy_lambda",
    "No module named 'noisy_lambda'": "the head's python has no noisy_lambda",
    "python: not found": "there is no python on the PATH with which the head was started",
}


def submit(
    job_path: str,
    overrides: Sequence[str],
    address: str | None,
    working_dir: str | None,
    follow: bool = True,
    env: Sequence[str] = (),
    secrets: str | None = None,
) -> int:
    """Run `python -m noisy_lambda run JOB key=value …` on the cluster; 0 succeeded, 1 failed, 3 stopped.

    That takes code of the repository from the job's folder where it lies there, and works beside a folder `models` of
    the user's.

    `address` is the dashboard's, http://HOST:8265 (None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine).
    `working_dir` is uploaded and becomes the job's folder, a cache: the job's `output` must be absolute then, and
    `job_path` lie inside or be the name of a shipped job. None: the job runs where the head was started. Without
    `follow`: 0 as soon as it is queued. The job gets this shell's variables HANDED_ON, those that `env` names, which
    Ray keeps readable, and on every machine what stands in its file `secrets`, of which only the path is recorded.
    """
    handed_on = {name: os.environ[name] for name in HANDED_ON if name in os.environ and name not in env}
    for text in (*overrides, *(f"{name}={value}" for name, value in handed_on.items())):
        if redact(text) != text:
            raise ConfigError(
                f"the URL in {redact(text)} has a password or a query, which everybody at the cluster's dashboard "
                "would see; leave secrets out here and put them into a file on each of its machines (--secrets PATH, "
                "with MLFLOW_TRACKING_USERNAME=…, AWS_ACCESS_KEY_ID=… and the like)"
            )
    handed_on |= _asked_for(env)
    if secrets is not None:
        if not secrets.startswith("/"):
            raise ConfigError(f"--secrets {secrets} is the file's path on the cluster's machines; give it from / on")
        handed_on[secrets_file.VARIABLE] = secrets
    client = _connect(address)
    environment: dict[str, Any] = {} if working_dir is None else {"working_dir": working_dir, "excludes": EXCLUDES}
    if handed_on:
        environment["env_vars"] = handed_on
    job = job_path if working_dir is None else _inside(job_path, working_dir)
    try:
        submission = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "noisy_lambda", "run", job, *overrides]),
            runtime_env=environment,
        )
    except Exception as error:
        raise ClusterError(f"the Ray cluster at {_shown(address)} did not take the job: {_short(error)}") from error
    print(f"submitted as {submission}", file=sys.stderr)
    if not follow:
        return SUCCEEDED
    try:
        missing = asyncio.run(_print_log(client, submission))
        return _exit_status(client, submission, missing)
    except KeyboardInterrupt:
        print(f"no longer following; the job goes on (to stop it: ray job stop {submission})", file=sys.stderr)
        raise


def _asked_for(names: Sequence[str]) -> dict[str, str]:
    """Variables that a person hands on whatever they are, and is told what that means."""
    for name in names:
        if name not in os.environ:
            raise ConfigError(f"--env {name}: this shell has no such variable; export it, or leave it out")
    if names:
        print(
            f"Ray keeps {', '.join(names)} readable for all who use the cluster; secrets are safe in a file on each "
            "machine (--secrets PATH)",
            file=sys.stderr,
        )
    return {name: os.environ[name] for name in names}


def _connect(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except Exception as error:
        hint = " and export RAY_AUTH_MODE=token where its head wants a token"
        raise ClusterError(
            f"no Ray cluster takes jobs at {_shown(address)} ({_short(error)}); start one with `ray start --head` in "
            f"the repository, or give its address as http://HOST:8265{hint}"
        ) from error
    logging.getLogger("ray").setLevel(logging.WARNING)
    return client


def _inside(job_path: str, working_dir: str) -> str:
    """The job's path as it will be below the uploaded folder; the name of a shipped one means the same there."""
    if shipped.named(Path(job_path)) and not Path(job_path).is_file():
        return job_path
    try:
        return str(Path(job_path).resolve().relative_to(Path(working_dir).resolve()))
    except ValueError as error:
        raise ConfigError(
            f"the job {job_path} is not inside the working directory {working_dir}, which is all that the cluster "
            "gets; move it there or give another working directory"
        ) from error


async def _print_log(client: Any, submission: str) -> str:
    """To the end; what the head turned out to lack."""
    missing = ""
    async for lines in client.tail_job_logs(submission):
        print(lines, end="", flush=True)
        missing = missing or next((what for words, what in MISSING.items() if words in lines), "")
    return missing


def _exit_status(client: Any, submission: str, missing: str) -> int:
    from ray.job_submission import JobStatus

    info = client.get_job_info(submission)
    if info.status == JobStatus.SUCCEEDED:
        return SUCCEEDED
    reason = (info.message or "no message").splitlines()[0]  # what follows is the log again
    print(f"{submission} {info.status.lower()}: {reason}", file=sys.stderr)
    if missing:
        print(
            f"{missing}: activate the environment in which this project is installed (pip install -e .) before `ray "
            "start --head`, or upload the project with --working-dir",
            file=sys.stderr,
        )
    return STOPPED if info.status == JobStatus.STOPPED else FAILED


def _shown(address: str | None) -> str:
    known = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return redact(known or "http://127.0.0.1:8265")


def _short(error: Exception) -> str:
    return redact(last_line(error))[:300]
