"""Where a training run is, durable at any moment, and what it ends with.

    STAGE/
    ├── checkpoints/
    │   ├── step-000500/          the last `keep` of them
    │   │   ├── model.safetensors     raw weights and batch-norm statistics
    │   │   ├── ema.safetensors       their moving average
    │   │   ├── optimizer.pt          read with weights_only=True
    │   │   ├── state.json            step, format, architecture, last validation …
    │   │   └── manifest.json         size and CRC-32 of the others; written last
    │   └── step-001000/
    ├── model.safetensors         the final weights (the average), when training is over
    └── result.json               what `run` returned; written after the weights

A checkpoint without manifest.json does not exist. Locally it is written under another name and renamed; on an
object store its files go up one by one, manifest.json last. One that its manifest shows to be damaged is
passed over for the one before. Only rank 0 writes; any number of workers can read. Positions in the data and
states of random generators are not in it: they are functions of the step.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors

from pipeline import storage
from pipeline.errors import WeightsError
from pipeline.weights import WEIGHTS, save_state

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER, RESULT, MANIFEST = "checkpoints", "result.json", "manifest.json"
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    path: str
    step: int
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]  # state.json


def save(
    folder: str,
    step: int,
    *,
    model: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> str:
    """Write the checkpoint of `step` into a stage folder, delete all but the last `keep`, return its path."""
    parent = storage.join(folder, FOLDER)
    path = storage.join(parent, f"step-{step:06d}")
    _discard(path)  # a damaged or half-uploaded one of the same step
    with _building(path) as local:
        save_state(storage.join(local, "model.safetensors"), model)
        save_state(storage.join(local, "ema.safetensors"), ema)
        with storage.writing(storage.join(local, "optimizer.pt")) as temporary:
            torch.save(dict(optimizer), temporary)
        storage.write_json(storage.join(local, "state.json"), {**state, "format": FORMAT, "step": step})
        files = {name: _describe(Path(local, name).read_bytes()) for name in storage.listdir(local)}
        storage.write_json(storage.join(local, MANIFEST), {"format": FORMAT, "files": files})
    # Those after this step are damaged: this run would have gone on from there.
    kept = [name for found, name in _list(folder) if found <= step][:keep]
    for name in storage.listdir(parent):
        if NAME.fullmatch(name) and name not in kept:
            _discard(storage.join(parent, name))
    return path


@contextlib.contextmanager
def _building(path: str) -> Iterator[str]:
    """A local folder to fill; when the block ends well it appears as `path`, its manifest last."""
    if storage.is_url(path):
        with tempfile.TemporaryDirectory() as local:
            yield local
            for name in sorted(storage.listdir(local), key=lambda name: (name == MANIFEST, name)):
                with storage.writing(storage.join(path, name)) as temporary:
                    shutil.move(storage.join(local, name), temporary)
        return
    parent = str(Path(path).parent)
    local = storage.join(parent, f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        storage.make_folder(local)
        yield local
        Path(local).rename(path)
        storage.sync_folder(parent)
    finally:
        storage.remove(local)


def latest(folder: str) -> Checkpoint | None:
    """The newest whole checkpoint of a stage folder, or None; damaged ones are passed over with a warning."""
    for step, _ in _list(folder):
        try:
            return load(folder, step)
        except WeightsError as error:
            log.warning("%s; going back to the checkpoint before it", error)
    return None


def load(folder: str, step: int) -> Checkpoint:
    """The checkpoint of one step; WeightsError says which of its files is damaged."""
    path = storage.join(folder, FOLDER, f"step-{step:06d}")
    try:
        manifest = storage.read_json(storage.join(path, MANIFEST))
    except (FileNotFoundError, ValueError) as error:
        raise WeightsError(f"checkpoint {storage.redact(path)} has no readable {MANIFEST}") from error
    if manifest.get("format") != FORMAT:
        raise WeightsError(f"checkpoint {storage.redact(path)} has format {manifest.get('format')}, not {FORMAT}")
    content: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        try:
            content[name] = storage.read_bytes(storage.join(path, name))
        except FileNotFoundError as error:
            raise WeightsError(f"checkpoint {storage.redact(path)} has lost {name}") from error
        if _describe(content[name]) != expected:
            raise WeightsError(f"{name} of checkpoint {storage.redact(path)} is damaged")
    return Checkpoint(
        path=path,
        step=step,
        model=parse_safetensors(content["model.safetensors"]),
        ema=parse_safetensors(content["ema.safetensors"]),
        optimizer=torch.load(io.BytesIO(content["optimizer.pt"]), map_location="cpu", weights_only=True),
        state=json.loads(content["state.json"]),
    )


def newest_path(folder: str) -> str | None:
    """Where the newest checkpoint lies, for messages; its content is not looked at."""
    found = _list(folder)
    return storage.join(folder, FOLDER, found[0][1]) if found else None


def check_architecture(found: Checkpoint, architecture: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another network, naming what differs."""
    theirs = found.state["architecture"]
    for key, value in architecture.items():
        if theirs.get(key) != value:
            raise WeightsError(
                f"checkpoint {storage.redact(found.path)} is of another architecture: its {key} is "
                f"{theirs.get(key)!r}, this stage's is {value!r}; use another output folder, or delete it"
            )


def write_final(folder: str, weights: Mapping[str, torch.Tensor], result: Mapping[str, Any]) -> None:
    """What a finished run leaves: the weights, then the result."""
    save_state(storage.join(folder, WEIGHTS), weights)
    storage.write_json(storage.join(folder, RESULT), dict(result))


def read_result(folder: str) -> dict[str, Any] | None:
    """The result of a run that ended well in this folder, else None."""
    path = storage.join(folder, RESULT)
    if not (storage.exists(path) and storage.exists(storage.join(folder, WEIGHTS))):
        return None
    result: dict[str, Any] = storage.read_json(path)
    return result


def _list(folder: str) -> list[tuple[int, str]]:
    """(step, name) of the checkpoints with a manifest, newest first."""
    parent = storage.join(folder, FOLDER)
    found = [(int(match[1]), name) for name in storage.listdir(parent) if (match := NAME.fullmatch(name))]
    return [
        (step, name)
        for step, name in sorted(found, reverse=True)
        if storage.exists(storage.join(parent, name, MANIFEST))
    ]


def _discard(path: str) -> None:
    storage.remove(storage.join(path, MANIFEST))  # first: from here on it does not exist
    storage.remove(path)


def _describe(data: bytes) -> dict[str, int]:
    return {"size": len(data), "crc32": zlib.crc32(data)}
