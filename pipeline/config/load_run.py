"""Loads the job of a run from its output, also from one on an object store."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from pipeline import storage
from pipeline.config.load import RUN_JOB, load_job
from pipeline.config.settings import Job
from pipeline.errors import ConfigError


def load_run(output: str) -> Job:
    """The job of the run in a folder or at a URL, by the job.yaml there, in the place where it lies.
    ConfigError."""
    where = storage.join(output, RUN_JOB)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, RUN_JOB)
        try:
            copy.write_bytes(storage.read_bytes(where))
            return load_job(str(copy), [f"output={json.dumps(output)}"])
        except FileNotFoundError:
            raise ConfigError(f"there is no job file {storage.redact(where)}") from None
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(copy), storage.redact(where))) from error
