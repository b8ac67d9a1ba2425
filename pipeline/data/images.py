"""Decodes images and makes the view of labelling and evaluation: bytes, picture, uint8 array, normalised batch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.data.samples import looks_like_picture
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # decoding processes start seconds sooner without it
    import torch

STATUSES = ("ok", "empty", "truncated", "not_an_image", "too_large", "unreadable", "skipped")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TORCH_MODES = ("bilinear", "bicubic")
COPIED = 1 << 24  # pixels of a picture that may be copied and resized as a whole

# Nothing else may be opened: EPS would start Ghostscript, and obscure decoders are where the holes are.
WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "PPM", "TIFF")
Image.init()
FORMATS = tuple(name for name in WANTED if name in Image.OPEN)  # AVIF depends on how Pillow was built
JPEGS = ("JPEG", "MPO")
ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Images between half the limit and the limit are within what we allow; the filter is set once because
# `catch_warnings` is not safe in decoding threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\..*")


class BadImage(Exception):
    """Bytes that give no picture; `status` is one of STATUSES, `detail` a short text for people."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
    at_least: int | None = None,
    upright: bool = True,
) -> Image.Image:
    """The (first) picture in `data` as RGB, `upright` by EXIF. Raises BadImage, never anything else.

    What is transparent shows white, as on a page. 16 bits are scaled to 8; colour profiles are ignored, as by
    torchvision and timm. `at_least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as its shorter side keeps
    that many pixels. `max_bytes`: of memory that it may take.
    """
    with telling(data, max_pixels):
        image = read_header(data, max_pixels)
        if at_least is not None and image.format in JPEGS:
            image.draft(None, (at_least, at_least))
        if max_bytes is not None and memory_of(image) > max_bytes:
            size = f"{image.width}x{image.height} pixels would take {memory_of(image) / 1e9:.2f} GB"
            raise BadImage("too_large", f"{size}, data.max_image_gb allows {max_bytes / 1e9:.2f}")
        return finish(image, upright)


def memory_of(image: Image.Image) -> int:
    """Bytes that the pixels of a picture take until they are RGB, with the copies on the way (Pillow has 4 a pixel)."""
    copies = 3 if image.has_transparency_data else 1 if image.mode == "RGB" else 2
    return 4 * copies * image.width * image.height


@contextlib.contextmanager
def telling(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Make a BadImage of whatever is raised while these bytes become a picture."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("too_large", f"more than {min(max_pixels, MAX_PIXELS)} pixels") from None
    except UnidentifiedImageError:
        if looks_like_picture(data):
            status = "truncated" if _ends_early(data) else "unreadable"
            raise BadImage(status, "begins like an image, but its header is damaged") from None
        raise BadImage("not_an_image", f"begins with {data[:12]!r}") from None
    except Exception as error:  # damaged data makes decoders raise anything: SyntaxError, struct.error, …
        text = f"{type(error).__name__}: {error}"[:200]
        truncated = "truncated" in text.lower() or _ends_early(data)
        raise BadImage("truncated" if truncated else "unreadable", text) from None


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """The picture in `data`, before its pixels are decoded; inside `telling`."""
    if not data:
        raise BadImage("empty", "0 bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > min(max_pixels, MAX_PIXELS):
        raise BadImage("too_large", f"{width}x{height} pixels, more than {max_pixels}")
    return image


def finish(image: Image.Image, upright: bool = True) -> Image.Image:
    """Its pixels as RGB, `upright` or as they lie in the file; inside `telling`."""
    image.load()
    return _to_rgb(_upright(image) if upright else image)


def _ends_early(data: bytes) -> bool:
    """A WebP or AVIF is shorter than it says itself; their decoders do not tell why they fail."""
    if data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    at = 0
    if data[8:12] in (b"avif", b"avis"):
        while (size := int.from_bytes(data[at : at + 4], "big")) >= 8:  # boxes; 0 and 1 mean other things
            at += size
    return at > len(data)


def _upright(image: Image.Image) -> Image.Image:
    turn = orientation(image)
    return image.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else image


def orientation(image: Image.Image) -> int:
    """By EXIF, 1 … 8; 1 is upright, and so is what EXIF does not know."""
    try:
        turn: int = image.getexif().get(ORIENTATION, 1)
        return turn if turn in TRANSPOSE else 1
    except Exception:  # damaged EXIF data is no reason to lose a good picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
        grey = np.asarray(image)
        scaled = np.empty(grey.shape, np.uint8)
        for row, line in enumerate(grey):  # a row at a time, for the memory
            scaled[row] = (line.clip(0, 65535).astype(np.uint32) + 128) // 257
        return Image.fromarray(scaled).convert("RGB")
    if image.mode == "F":
        raise BadImage("unreadable", "floating-point pixels, whose black and white are not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class View:
    """How a picture becomes a network's input in labelling and evaluation.

    The shorter side is resized to round(size / crop), then the centre size x size is cut out. mean and std
    are per channel, of pixel values in 0..1.
    """

    size: int
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            allowed = ", ".join(INTERPOLATIONS)
            raise ConfigError(f"interpolation '{self.interpolation}' is unknown; allowed are {allowed}")
        if self.size < 1 or not 0 < self.crop <= 1:
            raise ConfigError(
                f"a view of size {self.size} and crop {self.crop} is impossible; size is at least 1, "
                "crop above 0 and at most 1"
            )

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the crop."""
        return round(self.size / self.crop)

    @property
    def at_least(self) -> int:
        """What `decode` must keep of a JPEG: twice the side that resampling begins to need.

        Photos of 2,000 x 1,500 then load 1.6 times as fast, for a mean difference of 0.2 of 255 and 0.5 at worst.
        Once the side would be more than twice as fast, but the mean 0.6 and in some photos 4.
        """
        return 2 * self.resize


def to_array(image: Image.Image, view: View) -> np.ndarray:
    """uint8 [3, size, size] of an RGB picture."""
    width, height = image.size
    shorter = min(width, height)
    wide, high = int(view.resize * width / shorter), int(view.resize * height / shorter)
    left, top = round((wide - view.size) / 2), round((high - view.size) / 2)
    if (wide, high) == (width, height):
        image = image.crop((left, top, left + view.size, top + view.size))
    elif view.interpolation in TORCH_MODES and max(width * height, wide * high) <= COPIED:
        return _resized(image, (high, wide), view)[:, top : top + view.size, left : left + view.size].copy()
    else:
        # Resizing just the part that stays: a 1 x 100,000 picture never becomes a giant. Slower, and its outermost
        # pixels differ by up to a dozen, because the filter does not see beyond the part.
        right, bottom = (left + view.size) * width / wide, (top + view.size) * height / high
        box = (left * width / wide, top * height / high, min(right, width), min(bottom, height))
        image = image.resize((view.size, view.size), INTERPOLATIONS[view.interpolation], box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _resized(image: Image.Image, size: tuple[int, int], view: View) -> np.ndarray:
    """uint8 [3, *size]: Pillow's filters by torch's vectorised code, in half the time and within 2 of 255."""
    import torch

    channels_last = tensor_of(image).permute(2, 0, 1)[None]  # which the quick kernel asks for
    whole = torch.nn.functional.interpolate(channels_last, size, mode=view.interpolation, antialias=True)[0, :3]
    array: np.ndarray = whole.numpy()
    return array


def tensor_of(image: Image.Image) -> torch.Tensor:
    """uint8 [height, width, 3 or 4] of an RGB picture."""
    import pyarrow as pa
    import torch

    try:  # Pillow's own memory, four bytes a pixel: a copy of three would take a sixth of the time, and hold the GIL
        return torch.from_dlpack(pa.array(image).values).view(image.height, image.width, 4)
    except ValueError:  # it lies in several pieces, as those above 16 MB do
        return torch.from_numpy(np.array(image))


def load(data: bytes, view: View, *, max_bytes: int | None = None) -> np.ndarray:
    """Bytes of an image file -> uint8 [3, size, size], in labelling and evaluation alike. Raises BadImage."""
    return to_array(decode(data, max_bytes=max_bytes, at_least=view.at_least), view)


def normalise(batch: torch.Tensor, view: View, dtype: torch.dtype | None = None) -> torch.Tensor:
    """uint8 [b, 3, s, s] -> (x / 255 - mean) / std on the batch's device, computed in float32, given as `dtype`."""
    import torch

    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (view.mean, view.std))
    # Made on a GPU they would be waited for.
    scale, shift = (part.to(batch.device, non_blocking=True) for part in (1 / (255 * std), mean / std))
    return batch.to(torch.float32).mul_(scale).sub_(shift).to(dtype or torch.float32)
