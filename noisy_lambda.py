"""noisy-lambda from Python: lambda layers and models, the trained models of a run, and whole jobs.

    import noisy_lambda

    summary = noisy_lambda.run("noisy_student", "seed=1")
    model = noisy_lambda.load("runs/noisy_student")  # its best model
    for one in model.predict(["a.jpg", pil_image, array]):
        print(one.label, one.confidence)

What `__all__` names stays; all else may change. Nothing heavy is imported before it is used. From the first use on,
`import models` and `import pipeline` mean this package's in this process, whatever else of these names lies on
sys.path.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models import LambdaLayer as LambdaLayer
    from models import create_model as create_model
    from models import list_models as list_models
    from pipeline.cli import main as main
    from pipeline.errors import UserError as UserError
    from pipeline.labels import Labels
    from pipeline.predict.predictor import Predictor

__all__ = ["LambdaLayer", "UserError", "create_model", "labels", "list_models", "load", "plan", "run"]

ELSEWHERE = {
    "LambdaLayer": "models",
    "create_model": "models",
    "list_models": "models",
    "UserError": "pipeline.errors",
    "main": "pipeline.cli",  # the command `noisy-lambda`
}
OURS = ("models", "pipeline")
HOME = Path(__file__).resolve().parent


def load(model: str | Path, *more: str | Path, raw: bool = False, device: str = "auto") -> Predictor:
    """A trained model: of a stage folder (gen2-student-…), of its export, of a URL of one, of the output of a run (its
    best model), or of MLflow ("models:/NAME@champion"). With `more`, models that answer together, by the mean of their
    probabilities.

    `predict(images)` takes paths, bytes, PIL images and arrays uint8 [height, width, 3], one or many, and gives of each
    its `label`, `confidence` and `probabilities` float32 [classes], in the order of `classes`, divided by the
    temperature that the run found (`raw`: as the network gives them), or its `problem`. `transform` makes of one image
    what `module`, the torch network in eval mode, takes: float32 [3, size, size]. `card` is what model.yaml says.
    `device`: "cpu", "cuda" or "auto". UserError: there is no model, or its files are damaged.
    """
    claim()
    from pipeline.predict import choose

    return choose.predictor([str(one) for one in (model, *more)], lambda text: None, raw=raw, device=device)


def run(job: str | Path, *overrides: str) -> dict[str, Any]:
    """Run a job as `noisy-lambda run JOB key=value …` does, progress on standard output included; its summary.json.

    `job` is a path or the name of a shipped job; `overrides` are such as "seed=1" or "teacher.lr=0.2". What is done is
    not done again. UserError: a mistake in the job or its data, in one sentence; the job can be run again. As in the
    command, the allocator keeps the memory of this process for the next batch. Under torchrun every process calls this,
    and all but the first get {}.
    """
    claim()
    from pipeline.cluster import torchrun
    from pipeline.malloc import keep_memory

    keep_memory()
    if torchrun.follows():
        torchrun.follow()
        return {}
    from pipeline import launch
    from pipeline.config.load import load_job

    return launch.run(load_job(str(job), overrides))


def plan(job: str | Path, *overrides: str) -> list[dict[str, str]]:
    """The stages of a job in their order, each {"stage", "state", "folder", "what"}. Nothing is written.

    `state` is "done", "will run", "blocked" (`what` says by what) or "not run" (training stops before it); `folder` is
    "" until the stages before it decide it. UserError: a mistake in the job.
    """
    claim()
    from pipeline.config.load import load_job
    from pipeline.views import plan_rows

    return plan_rows(load_job(str(job), overrides))


def labels(run: str | Path, generation: int | None = None) -> Labels:
    """What a run says of its unlabelled images, a row a sample: label, selection and manifest joined, lazily.

    `run` is the output of a run, `generation` counts from 1 (None: the last one whose labels are done). The result has
    `select(*columns)`, `filter(expression of pyarrow.compute)`, and `to_arrow()`, `to_pandas()`, `to_polars()` (a lazy
    frame), `to_ray()` (a Ray Dataset), `to_reader()` and `batches()`, which hold one shard's rows at a time.
    docs/label_files.md has its columns. UserError: there are none, or a file is damaged.
    """
    claim()
    from pipeline.labels import open_labels

    return open_labels(str(run).rstrip("/"), generation)


class _Served:
    """What MLflow calls: a table with a column `image`, the bytes of image files, becomes one of `label`, `confidence`
    and `problem`."""

    def __init__(self, folder: str) -> None:
        self.model = load(folder)

    def predict(self, images: Any, params: Any = None) -> Any:
        import pandas

        # What is no bytes and no path has no image: its row says so.
        found = self.model.predict([data if isinstance(data, (bytes, str)) else b"" for data in images["image"]])
        columns = ("label", "confidence", "problem")
        return pandas.DataFrame([[getattr(one, name) for name in columns] for one in found], columns=columns)


def _load_pyfunc(data_path: str) -> _Served:
    """For `mlflow.pyfunc.load_model` (pipeline/tracking/registered.py)."""
    return _Served(data_path)


# ---- imports -------------------------------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module 'noisy_lambda' has no attribute '{name}'")
    claim()
    return getattr(importlib.import_module(ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Ours(MetaPathFinder):
    """Finds `models` and `pipeline` beside this file, or where sys.path had them when they were claimed."""

    def __init__(self) -> None:
        self.path = [str(HOME), *sys.path]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, self.path) if fullname in OURS else None


def claim() -> None:
    """Have `models` and `pipeline` mean ours from here on; a user's folder of such a name may come first on sys.path.

    ImportError: another package of such a name is in use already.
    """
    for name in OURS:
        module = sys.modules.get(name)
        found = [Path(path).resolve() for path in getattr(module, "__path__", [])]
        if module is not None and (HOME / name).is_dir() and HOME / name not in found:
            raise ImportError(
                f"noisy_lambda has a package `{name}` of its own, and this process has imported another one, "
                f"{found[0] if found else module}; use noisy_lambda in a process that does not import that"
            )
    if not any(isinstance(finder, _Ours) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Ours())


def in_worker() -> None:
    """What each of Ray's workers calls first, before Ray puts the working directory in front on sys.path."""
    claim()
    from pipeline import secrets_file
    from pipeline.errors import ConfigError

    with contextlib.suppress(ConfigError):  # Ray would start worker after worker; a check says it (plan/context)
        secrets_file.load()


if __name__ in ("__main__", "__mp_main__"):  # python -m noisy_lambda, and the processes that it starts
    from noisy_lambda import main

    if __name__ == "__main__":
        sys.exit(main())
