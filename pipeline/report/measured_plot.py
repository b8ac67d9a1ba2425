"""Draws speed against accuracy of measured models, one curve per family, in inference and in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.plots import speed_range
from pipeline.report.style import COLOURS, DPI, FULL, MUTED, clean, heading, key, note, percent_range, png, style

HEIGHT = 4.4  # inches
NAMED = 12  # with more models than this only the ends of a curve are named


def pareto(rows: Sequence[dict[str, Any]]) -> bytes | None:
    """A PNG of the models whose accuracy is known; None where there is none."""
    shown = [row for row in rows if row["top1"] is not None and row["inference_images_per_second"] is not None]
    if not shown:
        return None
    families = list(dict.fromkeys(row["family"] for row in shown))
    shades = {name: COLOURS[(number + 1) % len(COLOURS)] for number, name in enumerate(families)}
    figure = Figure((FULL, HEIGHT), dpi=DPI, facecolor="white")
    heading(figure, 0.005, "Speed against accuracy")
    key(figure, list(shades.items()))
    conditions = clean(f"{shown[0]['device']}, {shown[0]['dtype']}, {shown[0]['compile']}", 60)
    for left, use in ((0.055, "inference"), (0.555, "training")):
        fitting = [row for row in shown if row[f"{use}_images_per_second"] is not None]
        axes = figure.add_axes((left, 0.56 / HEIGHT, 0.435, 1 - 1.3 / HEIGHT))
        style(axes)
        axes.set_xlabel(f"{use} images/s ({conditions})", color=MUTED, fontsize=9.5, parse_math=False)
        if fitting:
            _curves(axes, fitting, use, shades)
    return png(figure)


def _curves(axes: Axes, rows: Sequence[dict[str, Any]], use: str, shades: dict[str, str]) -> None:
    speeds = np.array([row[f"{use}_images_per_second"] for row in rows])
    accuracies = np.array([row["top1"] for row in rows])
    speed_range(axes, float(speeds.min()), float(speeds.max()))
    percent_range(axes, accuracies, accuracies, margin=0.25)
    for family, shade in shades.items():
        members = [place for place in np.argsort(speeds) if rows[place]["family"] == family]
        axes.plot(speeds[members], accuracies[members], "-o", color=shade, linewidth=1.7, markersize=6, zorder=4)
        for place in members:
            if len(rows) <= NAMED or place in (members[0], members[-1]):
                at = (float(speeds[place]), float(accuracies[place]))
                note(axes, _label(rows[place]), at, shade, 7.5, xytext=(0, 9), ha="center", fontweight="normal")


def _label(row: dict[str, Any]) -> str:
    """A row's own label; of a name model@size, for which colour tells the family, the numbers: 'b0@224'."""
    name = str(row["name"])
    if name != f"{row['model']}@{row['size']}":
        return clean(name, 32)
    found = re.search(r"(?<![a-z])[a-z]?\d.*|\d.*", name)
    return clean(found[0] if found else name, 32)
