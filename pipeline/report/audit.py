"""Shows the audit: can the confidences be trusted, and how many of the kept labels are wrong?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.plan.context import Context
from pipeline.plan.stage import AUDIT, SELECTION, read_json_file
from pipeline.printable import counted
from pipeline.report import verdict
from pipeline.report.page import Picture
from pipeline.report.style import DASHED, INK, MUTED, PALE, colour, figure_of, key, note, percent_range, png, tint

FADED = 0.3  # how much is seen of what few images say


def summary(context: Context, number: int) -> dict[str, Any]:
    """A generation's audit in numbers, with the noise to expect in what its selection kept."""
    found = read(context, number)
    chosen = read_json_file(context.needs[f"gen{number}-select"], SELECTION)
    numbers = ("images", "accuracy", "ece", "nll", "temperature", "calibrate", "calibrated_ece", "threshold", "noise")
    return {
        "generation": number,
        "dir": storage.redact(context.needs[f"gen{number}-audit"].folder),
        **{name: found[name] for name in (*numbers, "max_noise") if name in found},
        **verdict.expected(found, chosen["copies_per_class"]),
        "sources": found["sources"],
        "steps": found["steps"],
    }


def sentence(audit: Mapping[str, Any], who: str) -> str:
    """What the audit found, for people."""
    what = "is applied" if audit["calibrate"] else "would calibrate it"
    return (
        f"Audit: on {counted(audit['images'], 'image')} whose class is known, {who} is right in "
        f"{_percent(audit['accuracy'])}; ECE {audit['ece']:.3f}, and temperature {audit['temperature']:.2f} {what} "
        f"(ECE {audit['calibrated_ece']:.3f}); {verdict.of_labels(audit)}."
    )


def facts(audit: Mapping[str, Any]) -> dict[str, str]:
    found = {"audited accuracy": _percent(audit["accuracy"]), "ECE": f"{audit['ece']:.3f}"}
    found["temperature"] = f"{audit['temperature']:.2f}{' (applied)' if audit['calibrate'] else ''}"
    if audit["expected_noise"] is not None:
        found["expected label noise"] = _percent(audit["expected_noise"])
    return found


def pictures(context: Context, number: int, chosen: Mapping[str, Any], who: str) -> list[Picture]:
    """The reliability diagram, and what a threshold keeps; `chosen`: the selection's summary."""
    found = read(context, number)
    return [
        Picture(
            f"gen{number}-reliability.png",
            reliability(found, number),
            f"Reliability diagram of generation {number}'s labels",
            f"How often {who} is right where it is so sure, on {counted(found['images'], 'image')} whose class is "
            "known; below the dashed line it is too sure. Whiskers are one standard error; bins of under "
            f"{verdict.FEW} images are faded.",
        ),
        Picture(
            f"gen{number}-threshold.png",
            threshold(chosen["histogram"], found["steps"], found["threshold"], number),
            f"Share of images kept by confidence thresholds in generation {number}",
            "Share of the unlabelled images at or above a threshold, before balancing, and how many of such labels are "
            f"right on the audited images; faded where these are fewer than {verdict.FEW}.",
        ),
    ]


def reliability(found: Mapping[str, Any], generation: int) -> bytes:
    """Accuracy over confidence in equally wide bins, as it is and at the temperature that calibrates."""
    figure, axes = figure_of("Accuracy against confidence", head=0.72)
    shade = colour(generation)
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1.1, linestyle=DASHED, zorder=2)
    curves = ((found["calibrated_reliability"], tint(shade, 0.4), 4), (found["reliability"], shade, 6))
    for order, (bins, tone, size) in enumerate(curves, 3):
        count, sure, right = (np.asarray(bins[name], float) for name in ("count", "confidence", "accuracy"))
        filled = count > 0
        count, sure, right = count[filled], 100 * sure[filled], 100 * right[filled]
        error = np.sqrt(right * (100 - right) / count)
        axes.plot(sure, right, color=tone, linewidth=1.4, alpha=FADED, zorder=order)
        few = count < verdict.FEW
        for some, alpha in ((few, FADED), (~few, 1.0)):
            dots: dict[str, Any] = {"fmt": "o", "markersize": size, "markeredgewidth": 0, "elinewidth": 1}
            axes.errorbar(sure[some], right[some], error[some], color=tone, alpha=alpha, zorder=order + 0.5, **dots)
        together = np.where(few, np.nan, right)  # neighbours of which both are known well
        axes.plot(sure, together, color=tone, linewidth=1.4, zorder=order)
    axes.set_xlim(0, 101)
    percent_range(axes, np.zeros(1), np.full(1, 100.0), margin=0.02)
    key(
        figure,
        [
            (f"as it is, ECE {found['ece']:.3f}", shade),
            (f"at temperature {found['temperature']:.2f}, ECE {found['calibrated_ece']:.3f}", tint(shade, 0.4)),
        ],
    )
    axes.set_xlabel("confidence, %", color=MUTED, fontsize=9.5)
    return png(figure)


def threshold(
    histogram: Sequence[int], steps: Mapping[str, Sequence[int]], chosen: float | None, generation: int
) -> bytes:
    """Over the threshold: the share of labelled images at or above it, and the share of right labels among the audited
    ones. Both in equal steps from 0 to 1."""
    figure, axes = figure_of("What a threshold keeps", head=0.72)
    shade = colour(generation)
    total = _from_the_right(histogram)
    count, right = _from_the_right(steps["count"]), _from_the_right(steps["right"])
    kept = 100 * total / max(1, total[0])
    axes.fill_between(np.arange(len(kept)) / len(kept), kept, color=PALE, linewidth=0, zorder=2)
    at = np.arange(len(count)) / len(count)
    precise = 100 * np.divide(right, count, out=np.full(len(count), np.nan), where=count > 0)
    axes.plot(at, precise, color=shade, linewidth=2, alpha=FADED, zorder=3)
    axes.plot(at, np.where(count < verdict.FEW, np.nan, precise), color=shade, linewidth=2, zorder=3)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1.1, linestyle=DASHED, zorder=4)
        side = {"xytext": (5, 8), "ha": "left"} if chosen < 0.5 else {"xytext": (-5, 8), "ha": "right"}
        note(axes, f"threshold {chosen:g}", (chosen, 0), INK, 9, xycoords=("data", "axes fraction"), **side)
    axes.set_xlim(0, 1.005)
    percent_range(axes, np.zeros(1), np.full(1, 100.0), margin=0.02)
    key(figure, [("labels right, on audited images", shade), ("unlabelled images kept", PALE)])
    axes.set_xlabel("threshold", color=MUTED, fontsize=9.5)
    return png(figure)


def _from_the_right(counts: Sequence[int]) -> Any:
    return np.cumsum(np.asarray(counts, float)[::-1])[::-1]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def read(context: Context, number: int) -> dict[str, Any]:
    """What a generation's audit left."""
    found: dict[str, Any] = read_json_file(context.needs[f"gen{number}-audit"], AUDIT)
    return found
