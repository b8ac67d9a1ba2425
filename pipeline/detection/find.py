"""Shows images to a detector, and says what it found in each, in the image's own pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import storage
from pipeline.data import images
from pipeline.detection import masks
from pipeline.detection.card import DetectorCard
from pipeline.detection.figures import Found
from pipeline.detection.rows import SceneRows
from pipeline.detection.scene import picture
from pipeline.errors import DataError
from pipeline.loading import prefetch
from pipeline.loading.training_rows import TrainingShard

Unit = tuple[TrainingShard, SceneRows, int]
READERS = 2
IN_MASK = 0.5  # probability from which on a pixel belongs to the object


def find_in(
    detector: nn.Module, card: DetectorCard, units: Sequence[Unit], batch: int, device: torch.device
) -> list[list[Found]]:
    """What the detector finds in these rows of indexed shards, `batch` images at a time, in eval mode. DataError: an
    image cannot be read."""
    found: list[list[Found]] = []
    with ThreadPoolExecutor(READERS) as readers:
        for part in _batched(units, batch):
            pictures = list(readers.map(lambda unit: read(unit, card), part))
            found += find(detector, card, pictures, device)
    return found


def find(
    detector: nn.Module, card: DetectorCard, pictures: Sequence[Image.Image], device: torch.device
) -> list[list[Found]]:
    """The same for RGB pictures, in one batch; the most confident first."""
    training = detector.training
    detector.eval()
    try:
        with torch.inference_mode():
            answers: list[dict[str, Tensor]] = detector([_tensor(image).to(device) for image in pictures])
    finally:
        detector.train(training)
    return [list(_found(answer, card)) for answer in answers]


def read(unit: Unit, card: DetectorCard) -> Image.Image:
    """The image of a row. DataError: it is no longer what was indexed."""
    shard, rows, row = unit
    try:
        return picture(prefetch.read_image(shard, rows.places, row), rows.scene(row, card.classes))
    except (FileNotFoundError, PermissionError, images.BadImage) as error:
        raise DataError(
            f"cannot read image {rows.places.index[row]} of {storage.redact(shard.path)}, on which detectors are "
            f"tested ({type(error).__name__}: {error}); bring the shard back, and run again"
        ) from error


def _batched(units: Sequence[Unit], size: int) -> Iterator[Sequence[Unit]]:
    for start in range(0, len(units), size):
        yield units[start : start + size]


def _tensor(image: Image.Image) -> Tensor:
    """float32 [3, height, width] in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _found(answer: dict[str, Any], card: DetectorCard) -> Iterator[Found]:
    pixels = (answer["masks"][:, 0] >= IN_MASK).to(torch.uint8).cpu().numpy()
    for box, label, score, mask in zip(
        answer["boxes"].tolist(), answer["labels"].tolist(), answer["scores"].tolist(), pixels, strict=True
    ):
        left, top, right, bottom = box
        yield Found(card.classes[label - 1], score, (left, top, right - left, bottom - top), masks.encode(mask))
