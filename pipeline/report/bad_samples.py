"""Shows bad samples: what can still be seen of each, or how its bytes begin, and what is wrong.

Nothing of a file reaches the page as it is: pictures are decoded and drawn anew, bytes are shown as escaped text.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from pipeline.data import images, shards
from pipeline.data.shards import Shard
from pipeline.errors import UserError
from pipeline.report.contact_sheet import SIDE
from pipeline.report.samples import THREADS, BadSample

READ = 1 << 20  # bytes of a bad image that are looked at
PIXELS = 40_000_000  # a picture of more is not tried
START = 24  # bytes that are shown as text


@dataclass(frozen=True)
class Shown:
    """A bad sample, how its bytes begin (escaped), and what can be seen of it."""

    sample: BadSample
    start: str
    picture: Image.Image | None


def look_at(bad: Sequence[BadSample], corpus: Sequence[Shard]) -> list[Shown]:
    """Look at the bytes of some bad samples."""

    def look(sample: BadSample) -> Shown:
        data = b""
        with contextlib.suppress(UserError, OSError):  # the report does not fail on what is known to be bad
            data = shards.read_at(corpus[sample.shard].path, sample.offset, min(sample.size, READ))
        return Shown(sample, repr(data[:START])[2:-1] or "nothing", glimpse(data))

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(look, bad))


def glimpse(data: bytes) -> Image.Image | None:
    """The part of a picture that can be decoded, or None."""
    try:
        return images.decode(data, max_pixels=PIXELS, at_least=SIDE)
    except images.BadImage as error:
        if error.status != "truncated":
            return None
    try:
        image = Image.open(io.BytesIO(data), formats=images.FORMATS)
        if image.width * image.height > PIXELS:
            return None
        with contextlib.suppress(OSError):
            image.load()
        image.tile = []  # so that what was decoded before the end is taken for the whole
        picture = image.convert("RGB")
    except Exception:  # damaged data makes decoders raise anything
        return None
    return picture if picture.getbbox() else None  # all black: nothing was decoded
