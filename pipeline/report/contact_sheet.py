"""Makes contact sheets for the page: small images with their confidences, a row a class, two sides.

The images are squares of the middle, drawn anew; small ones keep their pixels, which the page enlarges.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from pipeline.report.page import Sheet, SheetRow, Tile
from pipeline.report.style import clean

SIDE = 128  # pixels of the file: two for each of the page's
LOSSLESS = 64  # images up to this side are PNGs


@dataclass(frozen=True)
class Row:
    """One class of a contact sheet: (image, confidence) of its most and its least confident images."""

    name: str
    most: Sequence[tuple[Image.Image, float]]
    least: Sequence[tuple[Image.Image, float]]


def contact_sheet(rows: Sequence[Row], titles: tuple[str, str], caption: str) -> Sheet:
    """Images of some classes, on the left the most confident, on the right the least; `titles` of the two sides."""

    def side(pictures: Sequence[tuple[Image.Image, float]]) -> list[Tile]:
        return [Tile(thumbnail(image), f"{sure:.3f}") for image, sure in pictures]

    return Sheet(titles, [SheetRow(clean(row.name, 42), side(row.most), side(row.least)) for row in rows], caption)


def thumbnail(image: Image.Image) -> bytes:
    """A square of the image's middle, as PNG or JPEG; no larger than it is."""
    side = min(SIDE, *image.size)
    square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if side <= LOSSLESS:
        square.save(out, "png", optimize=True)
    else:
        square.save(out, "jpeg", quality=85)
    return out.getvalue()
