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

from pipeline.cluster.inline import last_line
from pipeline.config import shipped
from pipeline.errors import ClusterError, ConfigError
from pipeline.printable import redact

SUCCEEDED, FAILED, STOPPED = 0, 1, 3  # the exit status of `submit`
HANDED_ON = ("MLFLOW_TRACKING_URI",)  # variables of this shell that the job gets
EXCLUDES = ["/runs/", "/.git/", "/.venv/", "/mlruns/", "*.db", "__pycache__/", "/.mypy_cache/", "/.ruff_cache/"]


def submit(
    job_path: str, overrides: Sequence[str], address: str | None, working_dir: str | None, follow: bool = True
) -> int:
    """Run `python -m noisy_lambda run JOB key=value …` on the cluster; 0 succeeded, 1 failed, 3 stopped.

    That takes code of the repository from the job's folder where it lies there, and works beside a folder `models` of
    the user's.

    `address` is the dashboard's, http://HOST:8265 (None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine).
    `working_dir` is uploaded and becomes the job's folder, a cache: the job's `output` must be absolute then, and
    `job_path` lie inside or be the name of a shipped job. None: the job runs where the head was started. Without
    `follow`: 0 as soon as it is queued. The job gets this shell's MLFLOW_TRACKING_URI.
    """
    for text in (*overrides, *(f"{name}={os.environ[name]}" for name in HANDED_ON if name in os.environ)):
        if redact(text) != text:
            raise ConfigError(
                f"the URL in {redact(text)} has a password or a query, which everybody at the cluster's dashboard "
                "would see; give secrets to the environment of the cluster's nodes (MLFLOW_TRACKING_USERNAME, "
                "AWS_ACCESS_KEY_ID …) and leave them out here"
            )
    client = _connect(address)
    environment: dict[str, Any] = {} if working_dir is None else {"working_dir": working_dir, "excludes": EXCLUDES}
    if handed_on := {name: os.environ[name] for name in HANDED_ON if name in os.environ}:
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
        asyncio.run(_print_log(client, submission))
        return _exit_status(client, submission)
    except KeyboardInterrupt:
        print(f"no longer following; the job goes on (to stop it: ray job stop {submission})", file=sys.stderr)
        raise


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


async def _print_log(client: Any, submission: str) -> None:
    async for lines in client.tail_job_logs(submission):
        print(lines, end="", flush=True)


def _exit_status(client: Any, submission: str) -> int:
    from ray.job_submission import JobStatus

    info = client.get_job_info(submission)
    if info.status == JobStatus.SUCCEEDED:
        return SUCCEEDED
    reason = (info.message or "no message").splitlines()[0]  # what follows is the log again
    print(f"{submission} {info.status.lower()}: {reason}", file=sys.stderr)
    return STOPPED if info.status == JobStatus.STOPPED else FAILED


def _shown(address: str | None) -> str:
    known = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return redact(known or "http://127.0.0.1:8265")


def _short(error: Exception) -> str:
    return redact(last_line(error))[:300]
