"""Writes the files of a checkpoint: all of them or none, whenever the process dies.

They are filled in a folder under another name, with a manifest of sizes and CRC-32s written last; the folder is then
renamed, or its files are sent to the object store one by one, the manifest last. All that takes long here leaves the
interpreter to the training thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline import storage
from pipeline.weights import telling_full_disks

FORMAT = 1
MANIFEST = "manifest.json"


def write(path: str, content: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """`content`: state dicts `model`, `ema` and `optimizer`, on the CPU; `facts`: state.json. OSError on a full
    disk."""
    discard(path)  # a damaged or half-uploaded one of the same step
    with _building(path) as local:
        for name in ("model", "ema"):
            with storage.writing(storage.join(local, f"{name}.safetensors")) as temporary, telling_full_disks():
                save_file({key: _in_order(tensor) for key, tensor in content[name].items()}, temporary)
        with (
            storage.writing(storage.join(local, "optimizer.pt")) as temporary,
            telling_full_disks(),
            Path(temporary).open("wb") as file,  # given the name alone, torch would not say why it failed
        ):
            torch.save(content["optimizer"], file)
        storage.write_json(storage.join(local, "state.json"), facts)
        files = {name: _describe_file(Path(local, name)) for name in storage.listdir(local)}
        storage.write_json(storage.join(local, MANIFEST), {"format": FORMAT, "files": files})


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers in the order of their indices, as safetensors wants them: those of channels-last weights are not.

    By numpy. Torch would start OpenMP threads for this thread too; where they make more threads than cores, libgomp
    lets all of them sleep between operations, also the training thread's, and for good: steps took about a tenth
    longer.
    """
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        return _in_order(tensor.view(torch.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape))  # it makes a scalar a vector


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


def discard(path: str) -> None:
    storage.remove(storage.join(path, MANIFEST))  # first: from here on it does not exist
    storage.remove(path)


def describe(data: bytes | mmap.mmap) -> dict[str, int]:
    return {"size": len(data), "crc32": zlib.crc32(data)}


def _describe_file(path: Path) -> dict[str, int]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return describe(data)
