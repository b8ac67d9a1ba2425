"""Draws a contact sheet of predictions: the first images, each with its class and confidence."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline import storage
from pipeline.data import images
from pipeline.errors import ConfigError, OutputError
from pipeline.predict.inputs import Wanted
from pipeline.predict.predictor import Prediction
from pipeline.printable import counted
from pipeline.report import fonts
from pipeline.report.style import DPI, INK, MUTED, clean, png

MOST, COLUMNS = 120, 10
CELL, SPACE = 64, 5  # pixels of the page: a picture's side, and between pictures
SCALE = DPI // 100  # pixels of the file for each of the page's
WRONG = "#b02a4a"  # the class of an image that is known to be of another one
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
HEAD, CAPTION, LETTERS = 34, 28, 13  # pixels of the page; letters of a class's name below a picture


class Sheet:
    """Takes predictions as they come, and is written once."""

    def __init__(self, path: str, classes: Sequence[str]) -> None:
        """ConfigError, OutputError: no sheet can be written there."""
        self.path, self.classes, self.number = path, classes, 0
        self.cells: list[tuple[npt.NDArray[np.uint8], Prediction, bool]] = []
        self.format = FORMATS.get(os.path.splitext(path)[1].lower(), "")  # noqa: PTH122 - a text
        if not self.format:
            raise ConfigError(f"--contact-sheet {path} is neither .png nor .jpg; name a file that ends so")
        if os.path.exists(path):  # noqa: PTH110
            raise OutputError(f"--contact-sheet {path} is there already; name another file, or delete it")

    def take(self, one: Wanted, prediction: Prediction) -> None:
        self.number += 1
        if prediction.problem or len(self.cells) == MOST:
            return
        data = one.picture if isinstance(one.picture, bytes) else storage.read_bytes(str(one.picture))
        picture = images.decode(data, at_least=2 * CELL * SCALE)
        wrong = one.truth is not None and self.classes[one.truth] != prediction.label
        self.cells.append((_square(picture, CELL * SCALE), prediction, wrong))

    def write(self) -> None:
        drawn = self._draw()
        if self.format == "JPEG":
            made = io.BytesIO()
            Image.open(io.BytesIO(drawn)).convert("RGB").save(made, "JPEG", quality=90)
            drawn = made.getvalue()
        storage.write_bytes(self.path, drawn)

    def _draw(self) -> bytes:
        from matplotlib.figure import Figure

        step, line = CELL + 5 * SPACE, CELL + CAPTION + SPACE
        rows = max(1, -(-len(self.cells) // COLUMNS))
        width, height = COLUMNS * step + 2 * SPACE, HEAD + rows * line
        canvas = np.full((height * SCALE, width * SCALE, 3), 255, np.uint8)
        figure = Figure((width / 100, height / 100), dpi=DPI, facecolor="white")

        def write(x: float, y: float, text: str, size: float, shade: str, align: str) -> None:
            place = (x / width, 1 - y / height)
            figure.text(*place, text, fontsize=size, color=shade, ha=align, parse_math=False)

        drawn, _ = fonts.in_plots(list(dict.fromkeys(said.label for _, said, _ in self.cells)))
        names = dict(zip(dict.fromkeys(said.label for _, said, _ in self.cells), drawn, strict=True))
        some = f"{len(self.cells):,} of " if len(self.cells) < self.number else ""
        write(2 * SPACE, 20, f"{some}{counted(self.number, 'image')}", 10, INK, "left")
        for number, (pixels, said, wrong) in enumerate(self.cells):
            x = 2 * SPACE + number % COLUMNS * step
            y = HEAD + number // COLUMNS * line
            canvas[y * SCALE : (y + CELL) * SCALE, x * SCALE : (x + CELL) * SCALE] = pixels
            write(
                x + CELL / 2, y + CELL + 11, clean(names[said.label], LETTERS), 6.5, WRONG if wrong else INK, "center"
            )
            write(x + CELL / 2, y + CELL + 21, f"{100 * said.confidence:.1f} %", 6, MUTED, "center")
        figure.figimage(canvas, origin="upper")
        return png(figure)


def _square(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """The image's middle, uint8 [side, side, 3]; small images are enlarged without smoothing."""
    smooth = Image.Resampling.NEAREST if side // min(image.size) >= 2 else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), smooth))
