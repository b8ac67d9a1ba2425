"""Saves where a training run is, durable at any moment, and what it ends with.

    STAGE/
    ├── checkpoints/
    │   ├── step-000500/          the last `keep` of them, and the best one
    │   │   ├── model.safetensors     raw weights and batch-norm statistics
    │   │   ├── ema.safetensors       their moving average
    │   │   ├── optimizer.pt          read with weights_only=True
    │   │   ├── state.json            step, format, architecture, last validation …
    │   │   └── manifest.json         size and CRC-32 of the others; written last
    │   └── step-001000/
    ├── model.safetensors         the final weights (the average), when training is over
    └── result.json               what `run` returned; written after the weights

A checkpoint without manifest.json does not exist; one that its manifest shows to be damaged is passed over for the
one before. Only rank 0 writes, in the background; any number of workers can read. Positions in the data and states
of random generators are not in it: they are functions of the step.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from torch import nn

from pipeline import storage
from pipeline.errors import OutputError, RemoteError, WeightsError
from pipeline.plan.stage import CHECKPOINTS, RESULT, WEIGHTS
from pipeline.train import checkpoint_files
from pipeline.train.checkpoint_files import FORMAT, MANIFEST, describe, discard
from pipeline.train.host_copy import HostCopy
from pipeline.weights import save_state

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    path: str
    step: int
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]  # state.json


class Checkpoints:
    """Rank 0's writer of a stage folder's checkpoints; a context manager, whose end waits for the last of them.

    A write that fails is raised by the next `save`, `wait` or `close`: OutputError where the place is to blame.
    """

    def __init__(self, folder: str, keep: int) -> None:
        self.folder, self.keep = folder, keep
        storage.sweep(storage.join(folder, CHECKPOINTS))  # what a writer left that was killed
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            log.error("the last checkpoint was not written: %s", error)  # what ended the block says more

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Get the memory for their copies in the background, so that the first save is as short as the next ones."""
        # Tensors that it keeps for each parameter; were there more, the first save would take longer.
        slots = 2 if "betas" in optimizer.defaults else 1
        tensors = [*model.parameters(), *model.buffers()]
        self._writing = self._thread.submit(self._copy.reserve, tensors, 2 + slots)

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, torch.Tensor],
        ema: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        also: Collection[int] = (),
    ) -> str:
        """Copy the state of `step` and return the path where a thread now writes it; training may go on changing it.

        Once it is durable, all checkpoints but the last `keep` and those of the steps `also` are deleted. A write
        that is still going on is waited for: the copy's memory is used again.
        """
        self.wait()
        path = _path(self.folder, step)
        facts = copy.deepcopy({**state, "format": FORMAT, "step": step})
        content = self._copy.take({"model": dict(model), "ema": dict(ema), "optimizer": dict(optimizer)})
        self._writing = self._thread.submit(self._write, path, content, facts, {step, *also})
        return path

    def wait(self) -> None:
        """Until the last save is durable."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, path: str, content: Mapping[str, Any], facts: Mapping[str, Any], wanted: Collection[int]) -> None:
        self._copy.wait()
        try:
            checkpoint_files.write(path, content, facts)
            _thin_out(self.folder, facts["step"], self.keep, wanted)
        except RemoteError:  # says itself what failed
            raise
        except (OSError, OutputError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = (getattr(cause, "strerror", None) or str(cause or error)).lower()
            raise OutputError(
                f"cannot write checkpoint {storage.redact(path)}: {reason}; make room there and run again: training "
                "goes on from the checkpoint before it"
            ) from error


def _thin_out(folder: str, step: int, keep: int, wanted: Collection[int]) -> None:
    """Delete all but the last `keep` checkpoints up to `step` and the `wanted` ones."""
    # Those after this step are damaged, or of a run that went back: this run would have gone on from there.
    last = [name for found, name in _list(folder) if found <= step][:keep]
    parent = storage.join(folder, CHECKPOINTS)
    for name in storage.listdir(parent):
        if (match := NAME.fullmatch(name)) and name not in last and int(match[1]) not in wanted:
            discard(storage.join(parent, name))


def latest(folder: str, before: float = math.inf) -> Checkpoint | None:
    """The newest whole checkpoint of a stage folder of a step `before` this one, or None; damaged ones are passed over
    with a warning."""
    for step, _ in _list(folder):
        if step >= before:
            continue
        try:
            return load(folder, step)
        except WeightsError as error:
            log.warning("%s; going back to the checkpoint before it", error)
    return None


def load(folder: str, step: int) -> Checkpoint:
    """The checkpoint of one step; WeightsError says which of its files is damaged."""
    path = _path(folder, step)
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
        if describe(content[name]) != expected:
            raise WeightsError(f"{name} of checkpoint {storage.redact(path)} is damaged")
    return Checkpoint(
        path=path,
        step=step,
        model=parse_safetensors(content["model.safetensors"]),
        ema=parse_safetensors(content["ema.safetensors"]),
        optimizer=torch.load(io.BytesIO(content["optimizer.pt"]), map_location="cpu", weights_only=True),
        state=json.loads(content["state.json"]),
    )


def newest_path(folder: str, step: float) -> str | None:
    """Where the newest checkpoint up to `step` lies, for messages; its content is not looked at."""
    found = [name for saved, name in _list(folder) if saved <= step]
    return storage.join(folder, CHECKPOINTS, found[0]) if found else None


def is_there(folder: str, step: int) -> bool:
    """Whether there is a checkpoint of this step; its content is not looked at."""
    return storage.exists(storage.join(_path(folder, step), MANIFEST))


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
    storage.write_record(storage.join(folder, RESULT), dict(result))


def read_result(folder: str) -> dict[str, Any] | None:
    """The result of a run that ended well in this folder, else None."""
    path = storage.join(folder, RESULT)
    if not (storage.exists(path) and storage.exists(storage.join(folder, WEIGHTS))):
        return None
    return storage.read_record(path, "delete it, and the run ends again from its last checkpoint")


def raw_weights(folder: str, step: int) -> str:
    """Where a checkpoint has the weights themselves, not their average."""
    return storage.join(_path(folder, step), WEIGHTS)


def _list(folder: str) -> list[tuple[int, str]]:
    """(step, name) of the checkpoints with a manifest, newest first."""
    parent = storage.join(folder, CHECKPOINTS)
    found = [(int(match[1]), name) for name in storage.listdir(parent) if (match := NAME.fullmatch(name))]
    return [
        (step, name)
        for step, name in sorted(found, reverse=True)
        if storage.exists(storage.join(parent, name, MANIFEST))
    ]


def _path(folder: str, step: int) -> str:
    return storage.join(folder, CHECKPOINTS, f"step-{step:06d}")
