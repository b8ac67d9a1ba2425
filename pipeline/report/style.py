"""Sets how the report looks: colours, type, axes, and text from data made fit to be shown.

One colour per generation throughout. Figures are made without pyplot, so nothing global changes. Text that comes from
data goes through `clean` and is drawn with `parse_math=False` ('$' in a class name).
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, PALE, GRID = "#1c2733", "#66727f", "#cbd3db", "#e8ecf0"
STEPS = (1, 2, 5, 10)  # what ticks count by
DASHED = (0, (4, 3))
COLOURS = ("#64748b", "#0b6bb5", "#d4520c", "#128457", "#9a4aa0", "#a87900", "#00808a", "#b02a4a")
Shade = str | tuple[float, float, float]
DPI = 200  # two pixels for each of the page's: 1 inch is 100 of them
HALF, FULL = 5.2, 10.6  # widths in inches of pictures that stand in pairs, or alone


def colour(generation: int) -> str:
    """Grey for the teacher, then one colour per student."""
    return COLOURS[1 + (generation - 1) % (len(COLOURS) - 1)] if generation else COLOURS[0]


def tint(shade: str, amount: float) -> tuple[float, float, float]:
    """A colour mixed with white: amount 0 is white, 1 the colour."""
    red, green, blue = (1 - amount * (1 - part) for part in to_rgb(shade))
    return red, green, blue


def clean(text: str, limit: int = 200) -> str:
    """Text from data as it may be shown: no control, format, surrogate or line-breaking characters, not too long."""
    kept = "".join(c for c in text if unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp"))
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def short(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def count(number: float) -> str:
    """A whole number in little space: 1,234 and 123 k."""
    return f"{number:,.0f}" if number < 100_000 else short(number)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The positions nearest to `wanted` (least squares) that keep their order and stand `gap` apart."""
    order = np.argsort(np.asarray(wanted), kind="stable")
    blocks: list[list[float]] = []  # (mean, members) of runs that touch
    for rank, place in enumerate(order):
        blocks.append([wanted[place] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, members = blocks.pop()
            total = blocks[-1][1] + members
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * members) / total, total]
    free = [mean for mean, members in blocks for _ in range(int(members))]
    found = [0.0] * len(wanted)
    for rank, place in enumerate(order):
        found[place] = free[rank] + rank * gap
    return found


def figure_of(title: str, height: float = 3.5, left: float = 0.11, head: float = 0.5) -> tuple[Figure, Axes]:
    """A picture of half the page's width with one pair of axes; `head`: inches above them."""
    figure = Figure((HALF, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left, 0.56 / height, 0.965 - left, 1 - (0.56 + head) / height))
    style(axes)
    heading(figure, 0.01, title)
    return figure, axes


def heading(figure: Figure, x: float, title: str) -> None:
    height = figure.get_figheight()
    figure.text(x, 1 - 0.08 / height, title, va="top", color=INK, fontsize=12, fontweight="bold")


def style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    axes.tick_params(colors=PALE, labelcolor=MUTED, labelsize=9.5, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)


def percent_range(
    axes: Axes, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], margin: float = 0.12
) -> None:
    """A y axis in percent around the values, never beyond 0 and 100 by more than a margin."""
    span = max(float(np.max(high) - np.min(low)), 5.0)
    axes.set_ylim(max(-0.02 * span, np.min(low) - margin * span), min(100 + 0.05 * span, np.max(high) + margin * span))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def count_ticks(axes: Axes, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
    else:
        axes.minorticks_off()
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def key(figure: Figure, entries: Sequence[tuple[str, Shade]]) -> None:
    """What the colours mean, as a row of words under the heading."""
    words: list[Artist] = []
    for text, shade in entries:
        parts = [
            TextArea("■", textprops={"color": shade, "size": 10}),
            TextArea(text, textprops={"color": INK, "size": 9}),
        ]
        words.append(HPacker(children=list[Artist](parts), pad=0, sep=4, align="center"))
    place = (0.01, 1 - 0.36 / figure.get_figheight())
    row = HPacker(children=words, pad=0, sep=16)
    figure.add_artist(
        AnchoredOffsetbox(
            "upper left",
            child=row,
            pad=0,
            borderpad=0,
            frameon=False,
            bbox_to_anchor=place,
            bbox_transform=figure.transFigure,
        )
    )


def note(axes: Axes, text: str, at: tuple[float, float], shade: Shade, size: float = 10, **more: Any) -> None:
    """Words in the picture, with a white edge so that they can be read on lines and bars."""
    style: dict[str, Any] = {
        "textcoords": "offset points",
        "xytext": (0, 0),
        "va": "center",
        "fontweight": "bold",
        "zorder": 6,
    } | more
    edge = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(text, at, color=shade, fontsize=size, path_effects=edge, parse_math=False, **style)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()
