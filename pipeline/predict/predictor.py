"""Predicts classes of images: one predictor for the command line, Python and MLflow, and the same bits from each.

It looks at images as labelling does (pipeline.labelling.teacher): eval mode, the model's own view, batches of one size
but the last.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from pipeline import storage, weights
from pipeline.data import images
from pipeline.errors import ConfigError, DataError, WeightsError
from pipeline.labelling.teacher import OutOfMemory, Teacher, on_device

BATCH = 64
AHEAD = 2  # batches that are decoded while one is with the device
Picture = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""A path or URL, the bytes of an image file, a PIL image, or uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Prediction:
    """What is said of one image. `probabilities` float32 [classes], in the order of the model's classes. `problem`: why
    nothing is said ("" where something is), as a status of pipeline.data.images and a short text."""

    label: str
    confidence: float
    probabilities: npt.NDArray[np.float32]
    problem: str = ""


@dataclass(frozen=True)
class Model:
    """A trained model: where it was found, its card, the temperature that makes its probabilities honest, and the
    sha256 of its weights."""

    folder: str
    module: nn.Module
    card: weights.Card
    temperature: float
    identity: str


class Predictor:
    """Models that answer together, by the mean of their probabilities, each with its own view of an image."""

    def __init__(self, models: Sequence[Model], *, device: str = "auto", batch: int = BATCH) -> None:
        for other in models[1:]:
            if other.card.classes != models[0].card.classes:
                raise WeightsError(
                    f"{storage.redact(other.folder)} knows other classes than {storage.redact(models[0].folder)}; "
                    "models that answer together need the same class list in the same order"
                )
        if batch < 1:
            raise ConfigError(f"the batch is {batch}; it takes at least one image")
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            there = "auto, cpu and cuda" if torch.cuda.is_available() else "auto and cpu, for there is no GPU here"
            raise ConfigError(f"the device is '{device}'; allowed are {there}")
        self.models, self.batch = list(models), batch
        self._teachers = [on_device(one.module, one.card.view(), device, temperature=one.temperature) for one in models]
        self._threads = max(2, os.cpu_count() or 1)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the probabilities."""
        return list(self.models[0].card.classes)

    @property
    def card(self) -> weights.Card:
        """What model.yaml says of the first model."""
        return self.models[0].card

    @property
    def module(self) -> nn.Module:
        """The first model's network, in eval mode: float32 [b, 3, size, size], as `transform` gives them, to logits."""
        return self.models[0].module

    def transform(self, picture: Picture) -> torch.Tensor:
        """An image as `module` takes it: float32 [3, size, size]. UserError: it is none, or cannot be read."""
        view = self.card.view()
        try:
            [pixels] = _pixels(picture, [view])
        except (images.BadImage, OSError) as error:
            raise DataError(f"this is no image: {error}") from error
        return images.normalise(torch.from_numpy(pixels)[None], view)[0]

    def predict(self, pictures: Picture | Iterable[Picture]) -> list[Prediction]:
        """One prediction an image, in order; an image that cannot be read has its `problem`."""
        if isinstance(pictures, (str, os.PathLike, bytes, Image.Image, np.ndarray)):
            pictures = [pictures]
        return [one for several in self.batches(pictures) for one in several]

    def batches(self, pictures: Iterable[Picture]) -> Iterator[list[Prediction]]:
        """The same in parts, while more are read."""
        views = [teacher.view for teacher in self._teachers]
        waiting: deque[list[Future[list[npt.NDArray[np.uint8]] | str]]] = deque()
        part: list[Future[list[npt.NDArray[np.uint8]] | str]] = []

        def read(picture: Picture) -> list[npt.NDArray[np.uint8]] | str:
            try:
                return _pixels(picture, views)
            except images.BadImage as bad:
                return str(bad)
            except DataError as error:  # a server refused it
                return f"unreadable: {error}"
            except OSError as error:
                return f"unreadable: {(error.strerror or str(error)).lower()}"

        with ThreadPoolExecutor(self._threads, "decode") as pool:
            for picture in pictures:
                part.append(pool.submit(read, picture))
                if len(part) == self.batch:
                    waiting.append(part)
                    part = []
                if len(waiting) > AHEAD:
                    yield self._answer([one.result() for one in waiting.popleft()])
            for last in (*waiting, part):
                if last:
                    yield self._answer([one.result() for one in last])

    def _answer(self, read: Sequence[list[npt.NDArray[np.uint8]] | str]) -> list[Prediction]:
        good = [one for one in read if not isinstance(one, str)]
        probs: Iterator[npt.NDArray[np.float32]] = iter(self._probabilities(good) if good else ())
        nothing = np.full(len(self.classes), np.nan, np.float32)
        found = []
        for one in read:
            if isinstance(one, str):
                found.append(Prediction("", float("nan"), nothing, one))
            else:
                row = next(probs)
                # Of equal ones the lower class, as in label files.
                best = int(row.argmax())
                found.append(Prediction(self.classes[best], float(row[best]), row))
        return found

    def _probabilities(self, pictures: Sequence[list[npt.NDArray[np.uint8]]]) -> npt.NDArray[np.float32]:
        """float32 [n, classes] of n pictures, each in the view of every model."""
        said = [
            _ask(teacher, np.stack([picture[number] for picture in pictures]))
            for number, teacher in enumerate(self._teachers)
        ]
        return said[0] if len(said) == 1 else np.mean(said, axis=0, dtype=np.float32)


def _ask(teacher: Teacher, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Probabilities of uint8 [b, 3, s, s], in two halves where all of it does not fit into the device's memory."""
    stacked = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))).permute(0, 3, 1, 2)
    try:
        return teacher.launch(stacked)()[0].copy()
    except OutOfMemory as error:
        if len(pixels) == 1:
            raise ConfigError(f"the model does not fit into the memory of {teacher.device}; use the CPU") from error
        half = len(pixels) // 2
        return np.concatenate([_ask(teacher, pixels[:half]), _ask(teacher, pixels[half:])])


def _pixels(picture: Picture, views: Sequence[images.View]) -> list[npt.NDArray[np.uint8]]:
    """uint8 [3, s, s] of an image in each view. BadImage; OSError: there is no such file."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ConfigError(
                f"an array of shape {list(picture.shape)} and type {picture.dtype} is no image; give uint8 "
                "[height, width, 3]"
            )
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        with images.telling(b""):
            upright = images.finish(picture)
        return [images.to_array(upright, view) for view in views]
    if not isinstance(picture, (str, bytes, os.PathLike)):
        raise ConfigError(
            f"a {type(picture).__name__} is no image; give a path, the bytes of a file, a PIL image or an array uint8 "
            "[height, width, 3]"
        )
    data = picture if isinstance(picture, bytes) else storage.read_bytes(os.fspath(picture))
    return [images.load(data, view) for view in views]
