"""Fetches registered models from MLflow: the third and last module that imports it."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline import storage
from pipeline.errors import OutputError


def fetch(uri: str, folder: str) -> str:
    """Download models:/NAME@ALIAS (or /VERSION) from the store of MLFLOW_TRACKING_URI into `folder`; where its weights
    lie then. OutputError: there is none."""
    from pipeline.tracking.connection import ENVIRONMENT

    store = os.environ.get("MLFLOW_TRACKING_URI")
    hint = "set MLFLOW_TRACKING_URI to the store that has it (of a run's sqlite file: sqlite:////path/to/mlflow.db)"
    if not store:  # MLflow would make an empty one in the working directory
        raise OutputError(f"{uri} is in no store that is known here; {hint}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        found = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        reason = storage.redact(" ".join(str(error).split()))[:200]
        raise OutputError(f"cannot fetch {uri} from {storage.redact(store)} ({reason}); {hint}") from error
    weights = next(found.rglob("model.safetensors"), None)
    if weights is None:
        raise OutputError(f"{uri} holds no model.safetensors: it was not registered by a run of noisy-lambda")
    return str(weights.parent)
