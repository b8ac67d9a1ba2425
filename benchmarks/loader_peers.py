"""Training batches by others: webdataset with torch's DataLoader, and Ray Data's iter_torch_batches.

Their views come from the same bytes with the same distributions of crop, flip and policy, as uint8 [size, size, 3]:
what torchvision and timm offer, by Pillow's decoder or torchvision's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline.augment.view import Augment
from pipeline.cluster import ray_session as sessions
from pipeline.cluster.ray_session import Session

SHUFFLE = 1000  # samples in webdataset's buffer, still encoded
STORE_BYTES = 2 << 30  # of Ray's objects: ten times what our stages need
BICUBIC, BILINEAR = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
View = Callable[[bytes], Tensor]


class Pillow:
    """Pillow decodes, torchvision's transforms work on Pillow's images."""

    def __init__(self, augment: Augment) -> None:
        self.crop = transforms.RandomResizedCrop(augment.size, augment.scale, augment.ratio, _mode(augment))
        self.flip = transforms.RandomHorizontalFlip(augment.flip)
        self.policy = _policy(augment)

    def __call__(self, data: bytes) -> Tensor:
        image = self.flip(self.crop(Image.open(BytesIO(data)).convert("RGB")))
        return torch.from_numpy(np.array(self.policy(image)))


class Torchvision:
    """torchvision decodes, its transforms work on tensors; timm's policy needs an image of Pillow's."""

    def __init__(self, augment: Augment) -> None:
        self.crop = v2.RandomResizedCrop(augment.size, augment.scale, augment.ratio, _mode(augment), antialias=True)
        self.flip = v2.RandomHorizontalFlip(augment.flip)
        self.policy = _policy(augment) if augment.policy else None

    def __call__(self, data: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        view = self.flip(self.crop(decode_image(encoded, ImageReadMode.RGB))).permute(1, 2, 0)
        if self.policy is None:
            return view.contiguous()
        return torch.from_numpy(np.array(self.policy(Image.fromarray(view.numpy()))))


VIEWS: dict[str, Callable[[Augment], View]] = {"pillow": Pillow, "torchvision": Torchvision}


class Constant:
    """One ready view whatever the bytes."""

    def __init__(self, augment: Augment) -> None:
        self.view = torch.zeros(augment.size, augment.size, 3, dtype=torch.uint8)

    def __call__(self, data: bytes) -> Tensor:
        return self.view


def _mode(augment: Augment) -> Any:
    return {"bicubic": BICUBIC, "bilinear": BILINEAR}[augment.interpolation]


def _policy(augment: Augment) -> Callable[[Image.Image], Image.Image]:
    if not augment.policy:
        return lambda image: image
    mean = tuple(round(255 * value) for value in augment.mean)
    pillow = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[augment.interpolation]
    policy = rand_augment_transform(augment.policy, {"img_mean": mean, "interpolation": pillow})
    for op in policy.ops:
        if op.name == "Posterize":  # Pillow 13 refuses 0 bits and fewer, which timm asks for above magnitude 10
            op.level_fn = lambda level, hparams, of=op.level_fn: (max(1, of(level, hparams)[0]),)
    return policy


def webdataset(paths: list[str], view: View, batch: int, workers: int, epochs: int) -> Iterator[int]:
    """The images of every batch that arrives; batches are collated in the workers, into shared memory."""
    import webdataset as wds
    from torch.utils.data import default_collate

    data = (
        wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False)
        .shuffle(SHUFFLE)
        .to_tuple("jpg;png", "cls")
        .map_tuple(view, int)
        .batched(batch, collation_fn=default_collate)
        .repeat(epochs)
    )
    for pixels, _ in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield len(pixels.permute(0, 3, 1, 2))


@contextlib.contextmanager
def ray_data(paths: list[str], view: View, batch: int) -> Iterator[Callable[[], Iterable[int]]]:
    """read_webdataset in a random order of files, views in tasks, iter_torch_batches in this process."""
    session = Session("embedded", None, None)
    with mock.patch.object(sessions, "OBJECT_STORE_BYTES", STORE_BYTES):
        session.start()  # before Ray is imported: it reads its settings then
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)

    def views(rows: dict[str, Any]) -> dict[str, Any]:
        images = rows["jpg" if "jpg" in rows else "png"]
        pixels = np.stack([view(data).numpy() for data in images])
        return {"pixels": pixels, "label": np.array([int(text) for text in rows["cls"]])}

    def run() -> Iterator[int]:
        data = ray.data.read_webdataset(paths, decoder=None, shuffle="files").map_batches(views, batch_size=batch)
        for found in data.iter_torch_batches(batch_size=batch, prefetch_batches=2):
            yield len(found["pixels"].permute(0, 3, 1, 2))

    try:
        yield run
    finally:
        session.close()
