"""Shows the test beyond top-1 of each model: by class, at other sizes, on further sets, of raw weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.report import fonts
from pipeline.report.page import Further, OnSet, Picture
from pipeline.report.plots import BARS, Model
from pipeline.report.style import GRID, INK, MUTED, PALE, clean, colour, count_ticks, figure_of, key, percent_range, png

Floats = npt.NDArray[np.float64]
Evaluations = Sequence[Mapping[str, Any]]
"""Of evaluate.json, one a model."""


def further(models: Sequence[Model], rows: Evaluations) -> list[Further]:
    """What was tested beside each model at its own size: its raw weights, and other sizes."""
    found: list[Further] = []
    for model, row in zip(models, rows, strict=True):
        raw = [("raw", {**row["raw"], "size": row["size"]})] if "raw" in row else []
        others = [*raw, *(("averaged", other) for other in row.get("sizes", []))]
        for kind, one in [("averaged", row), *others] if others else []:
            figures = (one["size"], one["top1"], one["top5"], one["ece"])
            found.append(Further(model.label, model.generation, kind, *figures))
    return found


def on_sets(models: Sequence[Model], rows: Evaluations) -> list[OnSet]:
    """What each model reached on the sets of `evaluate.sets`, set by set."""
    names = rows[0].get("sets", {})  # none where an earlier version evaluated
    return [
        OnSet(model.label, model.generation, name, one["top1"], one["top5"], one["ece"], _note(one))
        for name in names
        for model, row in zip(models, rows, strict=True)
        for one in [row["sets"][name]]
    ]


def _note(one: Mapping[str, Any]) -> str:
    """What the figures on a set are of, and what stands beside them."""
    if "clean" in one:
        top1 = percent(one["clean"]["top1"])
        return f"of {counted(one['classes'], 'class')}; test images of these: {top1}"
    if "skipped" in one:
        return f"{counted(one['skipped'], 'image')} without a right class left out"
    if "reference" not in one:
        return ""
    of = "AlexNet" if one["reference"] == "alexnet" else "the teacher"
    if missing := one["missing"]:
        return f"no mCE: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} missing"
    if one["mce"] is None:
        return f"no mCE: there is a corruption on which {of} makes no mistake"
    return f"mCE {one['mce']:.1f} ({of} 100)"


def pictures(models: Sequence[Model], rows: Evaluations, names: Sequence[str]) -> list[Picture]:
    """Accuracy by class of the teacher and the last student; nothing of an evaluation that did not count by class."""
    if not _counted(rows):
        return []
    shown = [0, len(models) - 1] if len(models) > 1 else [0]
    drawn = by_class([models[place] for place in shown], [share_of(rows[place]) for place in shown], names)
    caption = (
        f"Share of right answers by the true class, of {' and '.join(models[place].label for place in shown)}; the "
        f"smallest class has {counted(min(rows[0]['per_class']['images']), 'test image')}."
    )
    return [Picture("accuracy_by_class.png", drawn, "Test accuracy by class", caption)]


def tables(models: Sequence[Model], rows: Evaluations, names: Sequence[str]) -> dict[str, bytes]:
    """The same of all models as CSV: a line a class with its test images and accuracies, empty where it has no
    image."""
    if not _counted(rows):
        return {}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class", "images", *(model.stage for model in models)])
    shares = np.stack([share_of(row) for row in rows])
    for number, name in enumerate(names):
        values = ["" if np.isnan(value) else f"{value:.6g}" for value in shares[:, number]]
        writer.writerow([clean(name), rows[0]["per_class"]["images"][number], *values])
    return {"accuracy_by_class.csv": out.getvalue().encode()}


def _counted(rows: Evaluations) -> bool:
    return all("per_class" in row for row in rows)


def share_of(row: Mapping[str, Any]) -> Floats:
    """Share of right answers by class; NaN where there is no image."""
    images, right = (np.array(row["per_class"][name], np.float64) for name in ("images", "right"))
    return np.divide(right, images, out=np.full(len(images), np.nan), where=images > 0)


def by_class(models: Sequence[Model], shares: Sequence[Floats], names: Sequence[str]) -> bytes:
    """A line a class from one model to the other; of many classes, the accuracies of each model, worst first."""
    title = "Accuracy by class"
    entries = [(model.label, colour(model.generation)) for model in models]
    if len(names) > BARS:
        figure, axes = figure_of(title, head=0.72)
        for model, share in zip(models, shares, strict=True):
            known = np.sort(100 * share[~np.isnan(share)])
            axes.plot(np.arange(1, len(known) + 1), known, color=colour(model.generation), linewidth=1.8, zorder=3)
        axes.set_xlim(1, len(names))
        percent_range(axes, np.zeros(1), np.full(1, 100.0), margin=0.02)
        axes.set_xlabel(f"{len(names):,} classes, worst first for each model", color=MUTED, fontsize=9.5)
        count_ticks(axes, "x")
        key(figure, entries)
        return png(figure)
    height, longest = max(3.5, 1.3 + 0.22 * len(names)), max(len(name) for name in names)
    figure, axes = figure_of(title, height, left=0.05 + 0.014 * min(22, longest), head=0.72)
    y = np.arange(len(names))
    axes.hlines(y, 100 * shares[0], 100 * shares[-1], color=PALE, linewidth=2, zorder=2)
    for model, share in zip(models, shares, strict=True):
        axes.plot(100 * share, y, "o", color=colour(model.generation), markersize=6, markeredgecolor="white", zorder=3)
    axes.set_yticks(y, [clean(name, 22) for name in names], parse_math=False, fontfamily=fonts.families(names))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.grid(visible=True, axis="x", color=GRID)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("right, % of the class's test images", color=MUTED, fontsize=9.5)
    key(figure, entries)
    return png(figure)
