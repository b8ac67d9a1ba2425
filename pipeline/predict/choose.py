"""Finds the trained models that a name means: a stage's folder, an export, its ONNX file, a run, or one in MLflow."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import graph, storage, weights
from pipeline.config.load_run import load_run
from pipeline.config.settings import Job
from pipeline.errors import DataError, OutputError, WeightsError
from pipeline.plan import best
from pipeline.plan.stage import CARD, DONE, EVALUATION, JOB, SWEEP, WEIGHTS, Done, read_done
from pipeline.predict.predictor import Model, Predictor

REGISTERED = "models:/"


def predictor(
    named: Sequence[str], say: Callable[[str], None], *, raw: bool = False, device: str = "auto", batch: int = 64
) -> Predictor:
    """Of one name or several. `say` hears what was chosen; `raw`: as the networks say it, without temperatures.
    UserError: there is no such model."""
    return Predictor([find(name, say, raw=raw) for name in named], device=device, batch=batch)


def find(name: str, say: Callable[[str], None], *, raw: bool = False) -> Model:
    """The one model that a name means."""
    name = name.rstrip("/")
    if name.startswith(REGISTERED):
        from pipeline.tracking.registered import fetch

        with tempfile.TemporaryDirectory(prefix="noisy-lambda-") as folder:
            return _model(fetch(name, folder), raw)
    if storage.exists(storage.join(name, JOB)):
        return _model(_best_of(name, say), raw)
    return _model(name, raw)


def _model(folder: str, raw: bool) -> Model:
    if not storage.exists(storage.join(folder, CARD)) or not storage.exists(storage.join(folder, WEIGHTS)):
        return _of_onnx(folder, raw)
    module, card = weights.load_model(folder)
    honest = best.temperature_of(folder) if card.temperature is None else card.temperature
    identity = storage.sha256(storage.join(folder, WEIGHTS))
    return Model(folder, module, card, 1.0 if raw or honest is None else honest, identity)


def _of_onnx(name: str, raw: bool) -> Model:
    """The model of an ONNX file, or of a folder that has one and no weights."""
    from pipeline.predict import onnx_network

    path = name if name.lower().endswith(".onnx") else storage.join(name, onnx_network.NAME)
    if not storage.exists(path):
        raise _no_model(name)
    module, card = onnx_network.load(path)
    return Model(path, module, card, 1.0 if raw else card.temperature or 1.0, storage.sha256(path))


def _no_model(name: str) -> WeightsError:
    shown = storage.redact(name)
    if name.lower().endswith((".tar", ".jpg", ".jpeg", ".png", ".webp", ".csv", ".parquet")):
        return WeightsError(
            f"{shown} is no model: of several arguments the last one alone is the input; give a folder or a table of "
            "images, and put a pattern of shards into quotes"
        )
    wanted = (
        f"name a stage's folder or an export (with {WEIGHTS} and {CARD}), a .onnx file of one, the output of a run, or "
        f"{REGISTERED}NAME@champion"
    )
    inside = [] if storage.is_url(name) else storage.listdir(name)
    if sweeps := [one for one in inside if re.fullmatch(SWEEP, one)]:
        best_job = storage.redact(storage.join(name, sweeps[-1], "best.yaml"))
        return WeightsError(
            f"{shown} holds a sweep and no run yet: `noisy-lambda run {best_job}` makes one of its best"
        )
    if storage.name(name) in (WEIGHTS, CARD):
        return WeightsError(f"{shown} is a part of a model; name the folder, which holds {WEIGHTS} and {CARD}")
    if not storage.is_url(name) and Path(name).is_file():
        return WeightsError(f"{shown} is a file and no model that is known here; {wanted}")
    return WeightsError(f"there is no trained model at {shown}; {wanted}")


def _best_of(run: str, say: Callable[[str], None]) -> str:
    """The folder of a run's best model, by its job.yaml."""
    found = best.find(finished(run)[0])
    if found is None:
        raise OutputError(
            f"no model is finished in {storage.redact(run)}; `noisy-lambda status {storage.redact(run)}/{JOB}` says "
            "how far it is"
        )
    folder = storage.join(run, storage.name(found.model.folder))
    shown = "" if found.top1 is None else f", validation top-1 {100 * found.top1:.2f} %"
    say(f"{found.model.name} ({storage.name(folder)}{shown})")
    return folder


def finished(run: str) -> tuple[dict[str, Done], Job | None]:
    """The finished stages that the run's job.yaml reaches, and that job; where its shards are gone, those of the newest
    evaluation, and None, for nothing says then with which settings they were made."""
    job = load_run(run)
    try:
        done = {look.stage.name: look.done for look in graph.look(job) if look.done}
    except DataError:
        done = {}
    if any(one.model for one in done.values()):
        return done, job
    folders = [name for name in storage.listdir(run) if re.fullmatch(graph.stage_folders(), name)]
    read = [one for one in (read_done(storage.join(run, name)) for name in folders) if one]
    evaluations = [one for one in read if one.name == "evaluate"]
    if not evaluations:
        return {one.name: one for one in read}, None
    newest = max(evaluations, key=lambda one: 0.0 if storage.is_url(run) else Path(one.folder, DONE).stat().st_mtime)
    tested = json.loads(storage.read_bytes(storage.join(newest.folder, EVALUATION)))["models"]
    named = {storage.name(row["dir"]) for row in tested}
    return {one.name: one for one in read if storage.name(one.folder) in named} | {"evaluate": newest}, None
