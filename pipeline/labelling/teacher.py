"""Runs the teacher on its device: images in, class probabilities out, never noised, whatever fits into memory.

All forward passes of a process run on one thread (`Device`), in the order in which they were asked for, so several
shards may ask at once. On a GPU a batch is handed over while the one before is being computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.measure import if_it_fits
from models.memory_format import channels_last
from models.precision import has_bfloat16
from pipeline.data import images
from pipeline.data.images import View

CACHED = 4  # images that stay in a core's cache from one step of normalising to the next
Probabilities = npt.NDArray[np.float32]
Answer = Callable[[], tuple[Probabilities, float]]
"""Waits for probabilities float32 [b, classes] and the seconds that the device took."""


class OutOfMemory(Exception):
    """A batch of this size does not fit."""


@dataclass(frozen=True)
class Teacher:
    """Eval mode, the deterministic view. `flip`: the mean of the probabilities of the image and its mirror image.
    `temperature` divides the logits. `compiled`: torch.compile, which wants every batch to have one size."""

    module: nn.Module
    view: View
    device: torch.device
    dtype: torch.dtype
    temperature: float = 1.0
    flip: bool = False
    compiled: bool = False
    _host: _Host = field(default_factory=lambda: _Host(), repr=False, compare=False)

    def launch(self, batch: torch.Tensor) -> Answer:
        """Ask about uint8 [b, 3, s, s]. Raises OutOfMemory."""
        answer = if_it_fits(lambda: self._launch(batch), None, self.device)
        if answer is None:
            raise OutOfMemory(f"a batch of {len(batch)}")
        return answer

    def _launch(self, batch: torch.Tensor) -> Answer:
        cuda = self.device.type == "cuda"
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
        start = time.perf_counter()
        if begin:
            begin.record()
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=cuda):
            if cuda:
                pixels = images.normalise(batch.to(self.device, non_blocking=True), self.view)
            else:
                pixels = self._host.normalise(batch, self.view)
            probs = self.probabilities(pixels)
            found = torch.empty(probs.shape, dtype=probs.dtype, pin_memory=cuda)
            found.copy_(probs, non_blocking=True)
        if begin and end:
            end.record()
            return lambda: (_after(end, found), begin.elapsed_time(end) / 1000)
        seconds = time.perf_counter() - start
        return lambda: (found.numpy(), seconds)

    def probabilities(self, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities float32 [b, classes] of normalised images [b, 3, s, s], on their device."""
        logits = self._logits(pixels)
        if self.flip:
            logits = (logits.softmax(1) + self._logits(pixels.flip(3)).softmax(1)).div_(2).log_()
        return (logits / self.temperature).softmax(1).clamp_(max=1)

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(pixels.contiguous(memory_format=torch.channels_last))
        return logits.float()


def on_device(
    module: nn.Module,
    view: View,
    device: str = "auto",
    *,
    temperature: float = 1.0,
    flip: bool = False,
    compiled: bool = False,
) -> Teacher:
    """A trained network ready to be asked, on a device ("auto": a GPU where there is one), as labelling asks it."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if has_bfloat16(where) else torch.float32
    module = channels_last(module.eval().requires_grad_(False).to(where))
    if compiled:
        module.compile()
    return Teacher(module, view, where, dtype, temperature, flip, compiled)


class _Host:
    """images.normalise on the CPU, to the same bits, into memory that is used again: with fresh pages for every batch,
    and constants spread over the channels again and again, it takes ten times as long."""

    def __init__(self) -> None:
        self._pixels = self._scale = self._shift = torch.empty(0)

    def normalise(self, batch: torch.Tensor, view: View) -> torch.Tensor:
        """float32 [b, 3, s, s], channels last, of uint8 [b, 3, s, s]; valid until the next call."""
        rows = len(batch)
        if self._pixels.shape[1:] != batch.shape[1:] or len(self._pixels) < rows:
            self._pixels = torch.empty(batch.shape, dtype=torch.float32, memory_format=torch.channels_last)
            mean, std = (torch.tensor(values).view(1, 3, 1, 1).expand_as(batch[:1]) for values in (view.mean, view.std))
            self._scale, self._shift = (
                constant.contiguous(memory_format=torch.channels_last) for constant in (1 / (255 * std), mean / std)
            )
        pixels = self._pixels[:rows]
        for first in range(0, rows, CACHED):
            pixels[first : first + CACHED].copy_(batch[first : first + CACHED]).mul_(self._scale).sub_(self._shift)
        return pixels


def _after(event: torch.cuda.Event, found: torch.Tensor) -> Probabilities:
    event.synchronize()
    probs: Probabilities = found.numpy()
    return probs


class Device:
    """The one thread on which a teacher works."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._thread = ThreadPoolExecutor(1, "device")

    def ask(self, pictures: Sequence[npt.NDArray[np.uint8]], batch: int) -> Future[Answer]:
        """Ask about up to `batch` images uint8 [s, s, 3]; the answer's first len(pictures) rows are theirs."""
        rows = batch if self.teacher.compiled else len(pictures)
        pinned = self.teacher.device.type == "cuda"
        stacked = torch.zeros((rows, *pictures[0].shape), dtype=torch.uint8, pin_memory=pinned)
        np.stack(pictures, out=stacked.numpy()[: len(pictures)])
        return self._thread.submit(self.teacher.launch, stacked.permute(0, 3, 1, 2))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
