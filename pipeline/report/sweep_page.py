"""Renders the page of a sweep: the ranking, and a picture of what each setting does. The page is sweep.html.j2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.page import Picture, environment
from pipeline.report.style import FULL, INK, MUTED, PALE, clean, colour, heading, percent_range, png, style

TEMPLATE = "sweep.html.j2"
COLUMNS, HEIGHT = 3, 2.7  # panels in a row, and inches of one


@dataclass(frozen=True)
class Sweep:
    """`lead`: sentences; `columns` and `rows`: the ranking; `others`: of each combination its settings, state, top-1
    and what there is to say."""

    job: str
    lead: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    combinations: Sequence[tuple[str, str, str, str]]
    effects: Picture | None
    command: str


def render(sweep: Sweep) -> bytes:
    """The page as UTF-8."""
    return environment().get_template(TEMPLATE).render(page=sweep).encode()


def effects(swept: Mapping[str, Sequence[str]], points: Sequence[tuple[Mapping[str, str], float]]) -> Picture | None:
    """A panel a setting: top-1 of every combination over its value, and a line through the means; None where no
    combination is done. `points`: (settings, top-1 as a share)."""
    if not points:
        return None
    names, across = list(swept), min(COLUMNS, len(swept))
    down = math.ceil(len(names) / across)
    figure = Figure((FULL, 0.5 + HEIGHT * down), dpi=200, facecolor="white")
    heading(figure, 0.01, "Validation top-1 over each setting")
    top1 = np.array([100 * value for _, value in points])
    for place, name in enumerate(names):
        row, column = divmod(place, across)
        height = figure.get_figheight()
        left, width = 0.06 + column * 0.94 / across, 0.94 / across - 0.06
        axes = figure.add_axes((left, 1 - (0.5 + HEIGHT * (row + 1) - 0.55) / height, width, (HEIGHT - 0.75) / height))
        style(axes)
        values = swept[name]
        x = np.array([values.index(settings[name]) for settings, _ in points])
        means = [top1[x == number].mean() if (x == number).any() else np.nan for number in range(len(values))]
        axes.plot(range(len(values)), means, color=colour(1), linewidth=2, zorder=3)
        axes.plot(x, top1, "o", color=MUTED, markersize=5, markeredgecolor="white", zorder=4)
        axes.set_xlim(-0.5, len(values) - 0.5)
        percent_range(axes, top1, top1, margin=0.25)
        axes.set_xticks(range(len(values)), [clean(value, 14) for value in values], fontsize=9, parse_math=False)
        axes.tick_params(axis="x", color=PALE, labelcolor=INK)
        axes.set_xlabel(clean(name, 40), color=MUTED, fontsize=9.5, parse_math=False)
    caption = "A dot is a combination, the line goes through the means: what a setting does while the others vary."
    return Picture("effects.png", png(figure), "Validation top-1 over each swept setting", caption)
