"""Makes of ours models that `mlflow.pyfunc.load_model` and `mlflow models serve` load, and fetches registered ones.

An MLflow model holds model.safetensors and model.yaml, nothing pickled; `noisy_lambda._load_pyfunc` loads it, for which
noisy-lambda must be installed.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import warnings
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError

LOADER = "noisy_lambda"  # has _load_pyfunc
CARD = "model.yaml"
FILES = ("model.safetensors", CARD)
INSIDE = f"data/{LOADER}"  # of an MLflow model: where the files lie


def save(data: str, to: str) -> None:
    """Make an MLflow model of the local folder `data`, which is called LOADER and has FILES, in the new folder `to`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
        import pandas
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema
        from PIL import Image

        example = io.BytesIO()
        Image.new("RGB", (64, 64), "gray").save(example, "PNG")
        answers: list[Any] = [ColSpec("string", "label"), ColSpec("double", "confidence"), ColSpec("string", "problem")]
        mlflow.pyfunc.save_model(
            path=to,
            loader_module=LOADER,
            data_path=data,
            pip_requirements=[_requirement()],
            signature=ModelSignature(Schema([ColSpec("binary", "image")]), Schema(answers)),
            input_example=pandas.DataFrame({"image": [example.getvalue()]}),
        )


def _requirement() -> str:
    try:
        return f"noisy-lambda=={importlib.metadata.version('noisy-lambda')}"
    except importlib.metadata.PackageNotFoundError:  # a copy of the repository, as Ray makes one for a job
        return "noisy-lambda"


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
