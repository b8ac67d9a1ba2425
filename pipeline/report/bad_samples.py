"""Shows bad samples: what can still be seen of each, or how its bytes begin, and what is wrong.

Nothing of a file reaches the page as it is: pictures are decoded and drawn anew, bytes are shown as escaped text.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data import images, shards
from pipeline.data.shards import Shard
from pipeline.errors import UserError
from pipeline.report.contact_sheet import SCALE, thumbnail
from pipeline.report.samples import THREADS, BadSample
from pipeline.report.style import DPI, INK, MUTED, PALE, clean, colour, png

READ = 1 << 20  # bytes of a bad image that are looked at
PIXELS = 40_000_000  # a picture of more is not tried
SIDE, SPACE, ACROSS = 96, 12, 10  # pixels of the page: a tile, between tiles; tiles in a row
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
        return images.decode(data, max_pixels=PIXELS, at_least=SIDE * SCALE)
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


def bad_sheet(found: Sequence[Shown], generation: int) -> bytes:
    """A tile for each bad sample, with its reason and key below."""
    rows = -(-len(found) // ACROSS)
    columns = min(len(found), ACROSS)
    step, line, head = SIDE + SPACE, SIDE + 44, 34
    width, height = max(SPACE + columns * step, 560), head + rows * line
    figure = Figure((width / 100, height / 100), dpi=DPI, facecolor="white")
    canvas = np.full((height * SCALE, width * SCALE, 3), 255, np.uint8)

    def write(x: float, y: float, text: str, size: float, shade: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, color=shade, parse_math=False, **style)

    write(SPACE, 20, "Bad samples", 10.5, colour(generation), fontweight="bold")
    pale = np.array([int(PALE[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    for number, shown in enumerate(found):
        x, y = SPACE + number % ACROSS * step, head + number // ACROSS * line
        tile = canvas[y * SCALE : (y + SIDE) * SCALE, x * SCALE : (x + SIDE) * SCALE]
        if shown.picture is None:
            tile[:] = pale
            text = "\n".join(textwrap.wrap(clean(shown.start, 60), 13)[:5])
            write(x + SIDE / 2, y + SIDE / 2, text, 6.5, INK, ha="center", va="center", family="monospace")
        else:
            tile[:] = thumbnail(shown.picture, SIDE * SCALE)
        reason = clean(shown.sample.status.replace("_", " "), 18)
        write(x + SIDE / 2, y + SIDE + 13, reason, 7.6, INK, ha="center", fontweight="bold")
        write(x + SIDE / 2, y + SIDE + 25, clean(shown.sample.key, 20), 6.2, MUTED, ha="center")
    figure.figimage(canvas, origin="upper", zorder=-1)
    return png(figure)
