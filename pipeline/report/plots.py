"""Draws the report's pictures, each a function from plain data to PNG bytes.

Names stand beside what they name instead of in legends; colours and type are in report_style.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report import fonts
from pipeline.report.style import (
    DASHED,
    DPI,
    FULL,
    GRID,
    INK,
    MUTED,
    PALE,
    STEPS,
    Shade,
    clean,
    colour,
    count,
    count_ticks,
    figure_of,
    heading,
    key,
    note,
    percent_range,
    png,
    short,
    spread,
    style,
    tint,
)

NAMED = 6  # more generations than this are numbered on the axis, not named
BARS = 40  # more classes than this are drawn as a sorted curve


@dataclass(frozen=True)
class Model:
    """What `evaluate` measured of one trained stage. Accuracies are fractions; the speed is inference."""

    stage: str
    dir: str
    model: str
    top1: float
    top5: float
    parameters: int
    images_per_second: float
    size: int
    batch: int
    device: str
    dtype: str
    ece: float | None = None
    slowest_round: float | None = None
    fastest_round: float | None = None

    @property
    def generation(self) -> int:
        return generation_of(self.stage)

    @property
    def label(self) -> str:
        name = label_of(self.generation)
        return f"{name}, tuned" if self.stage.endswith("finetune") else name


def generation_of(stage: str) -> int:
    """0 for the teacher's stage."""
    return int(stage.removeprefix("gen").partition("-")[0])


def label_of(generation: int) -> str:
    """What the model of a generation is called, if it is not tuned."""
    return f"student {generation}" if generation else "teacher"


@dataclass(frozen=True)
class Curve:
    """Something measured during training; y over steps."""

    label: str
    generation: int
    steps: Sequence[float]
    values: Sequence[float]


def accuracy_by_generation(models: Sequence[Model], images: int) -> bytes:
    """Top-1 of teacher and students, with whiskers of one standard error of `images` test images."""
    figure, axes = figure_of("Top-1 accuracy by generation")
    many = len(models) > NAMED
    x = np.array([model.generation for model in models]) if many else np.arange(len(models))
    y = np.array([100 * model.top1 for model in models])
    error = 100 * np.sqrt(y / 100 * (1 - y / 100) / max(images, 1))
    axes.plot(x, y, color=PALE, linewidth=2, zorder=2)
    for place, model in enumerate(models):
        shade = colour(model.generation)
        axes.errorbar(x[place], y[place], error[place], color=shade, linewidth=1.4, zorder=3)
        axes.plot(x[place], y[place], "o", color=shade, markersize=9, markeredgecolor="white", zorder=4)
        if not many or place in (0, len(models) - 1):
            note(axes, f"{y[place]:.1f} %", (x[place], y[place]), shade, 11.5, xytext=(10, 0))
    axes.set_xlim(-0.2 - 0.06 * len(models), 1.16 * len(models) - 0.85)
    percent_range(axes, y - error, y + error)
    if many:
        axes.xaxis.set_major_locator(MaxNLocator(NAMED, integer=True, steps=STEPS))
        axes.set_xlabel("generation (0: teacher)", color=MUTED, fontsize=9.5)
    else:
        names = [f"{model.label}\n{clean(model.model, 52 // len(models))}" for model in models]
        axes.set_xticks(x, names, fontsize=8.5, parse_math=False)
    axes.tick_params(axis="x", labelcolor=INK, length=0)
    return png(figure)


def speed_accuracy(models: Sequence[Model]) -> bytes:
    """Accuracy over inference speed, an arrow from each generation to the next; a bar from the slowest round to the
    fastest."""
    figure, axes = figure_of("Speed against accuracy")
    x = np.array([model.images_per_second for model in models])
    y = np.array([100 * model.top1 for model in models])
    ends = np.array([speed for model in models for speed in (model.slowest_round, model.fastest_round) if speed] or x)
    speed_range(axes, min(x.min(), ends.min()), max(x.max(), ends.max()))
    percent_range(axes, y, y, margin=0.25)
    for place, model in enumerate(models):
        if model.slowest_round and model.fastest_round:
            rounds = [model.slowest_round, model.fastest_round]
            axes.plot(rounds, [y[place]] * 2, color=tint(colour(model.generation), 0.5), linewidth=1.4, zorder=3)
    for before, after in itertools.pairwise(zip(x, y, strict=True)):
        arrow = {"arrowstyle": "-|>", "color": PALE, "linewidth": 1.6, "shrinkA": 7, "shrinkB": 7}
        axes.annotate("", after, before, arrowprops=arrow)
    share = axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([x, y])))
    for right in (True, False):  # names go into the wider half
        members = [place for place in range(len(models)) if (share[place, 0] < 0.5) == right]
        heights = spread([float(share[place, 1]) for place in members], 0.125)
        for place, height in zip(members, heights, strict=True):
            model, shade = models[place], colour(models[place].generation)
            axes.plot(x[place], y[place], "o", color=shade, markersize=10, markeredgecolor="white", zorder=4)
            at = (share[place, 0] + (0.03 if right else -0.03), height)
            where: dict[str, Any] = {"xycoords": "axes fraction", "ha": "left" if right else "right"}
            if len(models) > NAMED:
                note(axes, str(model.generation), (at[0], share[place, 1]), shade, **where)
                continue
            note(axes, model.label, at, shade, 10.5, va="bottom", **where)
            detail = f"{clean(model.model, 24)}, {short(model.parameters)}"
            note(axes, detail, at, MUTED, 8.5, va="top", xytext=(0, -1), fontweight="normal", **where)
    conditions = f"images/s (batch {models[0].batch}, {clean(models[0].device, 40)})"
    axes.set_xlabel(conditions, color=MUTED, fontsize=9.5, parse_math=False)
    return png(figure)


def speed_range(axes: Axes, low: float, high: float) -> None:
    """The axis of speeds: logarithmic where they differ much."""
    if high > 4 * low:
        axes.set_xscale("log")
        left, right = low / (high / low) ** 0.12, high * (high / low) ** 0.12
        axes.set_xlim(left, right)
        ticks = [factor * 10.0**power for power in range(-3, 12) for factor in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if left <= tick <= right])
        axes.minorticks_off()
    else:
        span = max(high - low, 0.3 * high)
        axes.set_xlim(max(0, low - 0.3 * span), high + 0.3 * span)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if high >= 10 else f"{value:g}"))


def learning_curves(validation: Sequence[Curve], loss: Sequence[Curve]) -> bytes:
    """Validation accuracy (fractions) and training loss, one line per trained stage."""
    figure = Figure((FULL, 3.6), dpi=DPI, facecolor="white")
    measured = 100 * np.concatenate([curve.values for curve in validation])
    left, right = (figure.add_axes((x, 0.155, 0.365, 0.7)) for x in (0.052, 0.557))
    heading(figure, 0.005, "Validation top-1 during training")
    heading(figure, 0.525, "Training loss")
    style(left)
    style(right)
    percent_range(left, measured, measured)
    right.set_ylim(0, 1.05 * max(max(curve.values) for curve in loss))
    for axes, curves, scale in ((left, validation, 100), (right, loss, 1)):
        low, high = axes.get_ylim()
        heights = spread([scale * curve.values[-1] for curve in curves], 0.075 * (high - low))
        for curve, height in zip(curves, heights, strict=True):
            shade = colour(curve.generation)
            mark = "o" if axes is left and len(curve.values) < 40 else ""
            values = scale * np.asarray(curve.values)
            axes.plot(curve.steps, values, color=shade, linewidth=1.7, marker=mark, markersize=3.5)
            note(axes, curve.label, (1.02, (height - low) / (high - low)), shade, xycoords="axes fraction")
        axes.set_xlim(left=0)
        axes.set_xlabel("step", color=MUTED, fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return png(figure)


def confidence(
    histogram: Sequence[int], kept: Sequence[int], confident: int, threshold: float | None, generation: int
) -> bytes:
    """Confidences of all labelled images and, inside them, of the kept ones, in equal steps from 0 to 1;
    `confident` images are at or above the threshold, or each its class's own (None)."""
    figure, axes = figure_of("Confidence of the labels", head=0.72)
    total, inner, shade = np.asarray(histogram), np.asarray(kept), colour(generation)
    left = np.arange(len(total)) / len(total)
    sure = left + 0.5 / len(total) >= (threshold or 0.0)
    width = 0.9 / len(total)
    light = tint(shade, 0.4)
    axes.bar(left, total, width, align="edge", color=[light if yes else PALE for yes in sure], zorder=2)
    axes.bar(left, inner, width, align="edge", color=shade, zorder=3)
    confidence_axes(axes, total)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.1, linestyle=DASHED, zorder=4)
        side = {"xytext": (5, -6), "ha": "left"} if threshold < 0.5 else {"xytext": (-5, -6), "ha": "right"}
        note(axes, f"threshold {threshold:g}", (threshold, 1), INK, 9, xycoords=("data", "axes fraction"), **side)
    key(
        figure,
        [
            (f"kept {count(inner.sum())}", shade),
            (f"confident, not kept {count(confident - inner.sum())}", light),
            (f"below {count(total.sum() - confident)}", PALE),
        ],
    )
    return png(figure)


def confidence_axes(axes: Axes, counts: npt.NDArray[np.int64]) -> None:
    """For counts of confidences from 0 to 1: logarithmic where few of them would hide the others."""
    filled = counts[counts > 0]
    if len(filled) and filled.max() > 60 * np.median(filled):
        axes.set_yscale("log")
        axes.set_ylim(0.7, filled.max() ** 1.2)
    else:
        axes.set_ylim(0, 1.15 * max(1, counts.max()))
    axes.set_xlim(0, 1.005)
    axes.set_xlabel("confidence", color=MUTED, fontsize=9.5)
    count_ticks(axes, "y")


def classes(
    names: Sequence[str],
    before: Sequence[int],
    unique: Sequence[int],
    copies: Sequence[int],
    per_class: int | None,
    generation: int,
) -> bytes:
    """Confident samples per class before balancing; after it, images kept and what their copies add."""
    title, shade = "Samples per class, before and after balancing", colour(generation)
    light = tint(shade, 0.4)
    old, once, new = np.asarray(before), np.asarray(unique), np.asarray(copies)
    top = max(1, int(old.max()), int(new.max()))
    wanted: list[tuple[str, Shade]] = [(f"wanted {per_class:,}", INK)] if per_class else []
    if len(names) > BARS:
        figure, axes = figure_of(title, head=0.72)
        order, x = np.argsort(-old, kind="stable"), np.arange(1, len(old) + 1)
        axes.fill_between(x, old[order], color=PALE, step="mid", linewidth=0, zorder=2)
        axes.step(x, new[order], where="mid", color=shade, linewidth=1.6, zorder=3)
        axes.set_xlim(1, len(old))
        if per_class:
            axes.axhline(per_class, color=INK, linewidth=1.1, linestyle=DASHED, zorder=4)
        if top > 50 * max(1, np.median(old)):
            axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 1.15 * top)
        axes.set_xlabel(f"{len(old):,} classes, most frequent first", color=MUTED, fontsize=9.5)
        count_ticks(axes, "x")
        count_ticks(axes, "y")
        key(figure, [("before", PALE), ("after, with copies", shade), *wanted])
        return png(figure)
    height, longest = max(3.5, 1.3 + 0.22 * len(names)), max(len(name) for name in names)
    figure, axes = figure_of(title, height, left=0.05 + 0.014 * min(22, longest), head=0.72)
    y = np.arange(len(names))
    axes.barh(y - 0.2, old, 0.34, color=PALE, zorder=2)
    axes.barh(y + 0.2, new, 0.34, color=light, zorder=2)
    axes.barh(y + 0.2, np.minimum(once, new), 0.34, color=shade, zorder=3)
    axes.set_yticks(y, [clean(name, 22) for name in names], parse_math=False, fontfamily=fonts.families(names))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * top)
    axes.grid(visible=True, axis="x", color=GRID)
    axes.grid(visible=False, axis="y")
    if per_class:
        axes.axvline(per_class, color=INK, linewidth=1.1, linestyle=DASHED, zorder=4)
    count_ticks(axes, "x")
    key(figure, [("before", PALE), ("kept", shade), ("their copies", light), *wanted])
    return png(figure)
