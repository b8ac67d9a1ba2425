"""Draws contact sheets: the most and the least confident images of some classes, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from pipeline.report.style import DPI, INK, MUTED, clean, colour, png

CELL, SPACE, NAME = 64, 5, 140  # pixels of the page: a picture's side, between pictures, for class names
SCALE = DPI // 100  # pixels of the file for each of the page's


@dataclass(frozen=True)
class Row:
    """One class of a contact sheet: (image, confidence) of its most and its least confident images."""

    name: str
    most: Sequence[tuple[Image.Image, float]]
    least: Sequence[tuple[Image.Image, float]]


def contact_sheet(rows: Sequence[Row], generation: int, titles: tuple[str, str]) -> bytes:
    """Images of some classes, on the left the most confident, on the right the least; `titles` of the two sides."""
    columns = max(3, *(max(len(row.most), len(row.least)) for row in rows))
    step, head, line, middle, scale = CELL + SPACE, 46, CELL + 21, 26, SCALE
    width, height = NAME + 2 * columns * step + middle, head + len(rows) * line
    canvas = np.full((height * scale, width * scale, 3), 255, np.uint8)
    figure = Figure((width / 100, height / 100), dpi=DPI, facecolor="white")

    def write(x: float, y: float, text: str, size: float, shade: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, color=shade, parse_math=False, **style)

    starts = (NAME, NAME + columns * step + middle)
    for x, title in zip(starts, titles, strict=True):
        write(x, 20, title, 10.5, colour(generation), fontweight="bold")
    for number, row in enumerate(rows):
        y = head - 14 + number * line
        lines = textwrap.wrap(clean(row.name, 42), 15)[:3] or ["?"]
        write(NAME - 12, y + CELL / 2, "\n".join(lines), 10, INK, ha="right", va="center", fontweight="bold")
        for start, pictures in zip(starts, (row.most, row.least), strict=True):
            for column, (image, sure) in enumerate(pictures):
                x = start + column * step
                canvas[y * scale : (y + CELL) * scale, x * scale : (x + CELL) * scale] = thumbnail(image, CELL * scale)
                write(x + CELL / 2, y + CELL + 12, f"{sure:.3f}", 7.2, MUTED, ha="center")
    figure.figimage(canvas, origin="upper")
    return png(figure)


def thumbnail(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """A square of the image's middle, uint8 [side, side, 3]; small images are enlarged without smoothing."""
    times = side // min(image.size)
    if times >= 2:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    smooth = Image.Resampling.NEAREST if times >= 2 else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), smooth))
