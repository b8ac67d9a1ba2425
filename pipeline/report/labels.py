"""Assembles the report of a job that only labels: how many labels, how sure, of which classes, and samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.data.shards import Shard, bad_counts
from pipeline.plan.context import Context
from pipeline.plan.stage import JOB, PAGE, SUMMARY, Result
from pipeline.printable import counted
from pipeline.report import audit, bad_samples, fonts, generation, noise_levels, page, samples
from pipeline.report.contact_sheet import contact_sheet
from pipeline.report.page import Page, Picture, Section, Sheet
from pipeline.report.plots import BARS, confidence_axes
from pipeline.report.style import GRID, INK, MUTED, clean, colour, count_ticks, figure_of, png
from pipeline.selection.candidates import histogram
from pipeline.selection.radix import STEPS

BY_CLASS = "labels_by_class.csv"
AUDITED = ("images", "accuracy", "ece", "nll", "temperature", "calibrate", "calibrated_ece", "sources")


@dataclass(frozen=True)
class Counts:
    """Of the labelled images: `steps` int64 [100], their confidences in equal steps from 0 to 1; `per_class` int64
    [classes]; `sure` float64 [classes], the sum of their confidences."""

    steps: npt.NDArray[np.int64]
    per_class: npt.NDArray[np.int64]
    sure: npt.NDArray[np.float64]

    def add(self, other: Counts) -> None:
        for mine, more in ((self.steps, other.steps), (self.per_class, other.per_class), (self.sure, other.sure)):
            np.add(mine, more, out=mine)

    @property
    def mean_confidence(self) -> float | None:
        """None where nothing is labelled."""
        images = int(self.per_class.sum())
        return float(self.sure.sum()) / images if images else None


def count(folder: str, corpus: Sequence[Shard], classes: int, progress: Callable[[int], None]) -> Counts:
    """Read two columns of all label files in `folder`; `progress(number)` after each."""
    found = Counts(np.zeros(STEPS, np.int64), np.zeros(classes, np.int64), np.zeros(classes))
    present = set(storage.walk(folder))
    names = [name for name in (label_files.file_name(shard.name) for shard in corpus) if name in present]

    def read(name: str) -> Counts:
        table = parquet_files.read_table(storage.join(folder, name), ["label", "confidence"]).drop_null()
        label, sure = table["label"].to_numpy(), table["confidence"].to_numpy()
        per_class = np.bincount(label, minlength=classes).astype(np.int64)
        return Counts(histogram(sure), per_class, np.bincount(label, sure, classes).astype(np.float64))

    with ThreadPoolExecutor(samples.THREADS) as pool:
        for number, part in enumerate(pool.map(read, names), 1):
            found.add(part)
            progress(number)
    return found


def assemble(context: Context) -> Result:
    """Write everything into the folder of the report stage."""
    label, teacher = context.needs["gen1-label"], context.needs["gen0-teacher"]
    corpus, names = context.corpora["unlabelled"].shards, context.corpora.classes
    with context.journal() as log:
        total = 2 * len(corpus) + 1
        counts = count(label.folder, corpus, len(names), lambda number: log.log(number, total))
        shown = samples.shown_classes(counts.per_class.tolist())
        found = samples.scan(label.folder, None, corpus, shown, (), lambda number: log.log(len(corpus) + number, total))
        audited = audit.read(context, 1) if "gen1-audit" in context.needs else None
        facts = _facts(context, counts, found)
        sentences = [_sentence(facts), *([_audit_sentence(audited)] if audited else [])]
        bad = bad_samples.look_at(found.bad, corpus)
        drawn, lacking = fonts.in_plots(names)
        pictures = _pictures(counts, drawn, audited)
        section = Section(
            1,
            str(teacher.info["line"]),
            "",
            "",
            _shown_facts(facts, found, audited),
            pictures,
            (),
            _sheets(context, found, shown),
            *generation.bad_of(found, bad, corpus),
            noise_levels.grids(audited, names) if audited else (),
        )
        content = Page(
            context.job.name,
            0,
            [],
            [],
            [section],
            [
                (stage.name, storage.name(stage.folder), stage.fingerprint, f"{stage.info['seconds']:,.1f}")
                for stage in context.needs.values()
            ],
            command=f"noisy-lambda run {storage.redact(storage.join(context.job.output, JOB))}",
            verdict=sentences,
            warnings=[lacking] if lacking else [],
        )
        files = {picture.name: picture.png for picture in pictures}
        files |= {BY_CLASS: _table(counts, names), PAGE: page.render(content)}
        for name, data in files.items():
            storage.write_bytes(storage.join(context.folder, name), data)
        summary = {
            "job": context.job.name,
            "labels": facts,
            "audits": [{name: audited[name] for name in AUDITED}] if audited else [],
            "seconds": {stage.name: stage.info["seconds"] for stage in context.needs.values()},
            "report": storage.redact(storage.join(context.folder, PAGE)),
            "verdict": sentences,
        }
        storage.write_json(storage.join(context.folder, SUMMARY), summary)
        log.log(total, total)
    metrics = {"images": float(facts["images"])}
    metrics |= {} if facts["mean_confidence"] is None else {"mean_confidence": facts["mean_confidence"]}
    metrics |= {"audit_accuracy": float(audited["accuracy"])} if audited else {}
    return Result({"line": summary["report"]}, metrics=metrics, artifacts=[SUMMARY, *files])


def _facts(context: Context, counts: Counts, found: samples.Found) -> dict[str, Any]:
    label = context.needs["gen1-label"]
    return {
        "dir": storage.redact(label.folder),
        "model": context.needs["gen0-teacher"].info["model"],
        "shards": len(context.corpora["unlabelled"].shards),
        "failed": label.info["failed"],
        "images": int(counts.per_class.sum()),
        "bad": label.info["bad"],
        "mean_confidence": counts.mean_confidence,
    }


def _sentence(facts: dict[str, Any]) -> str:
    bad = sum(facts["bad"].values())
    sure = facts["mean_confidence"]
    return (
        f"{counted(facts['images'], 'image')} of {counted(facts['shards'] - len(facts['failed']), 'shard')} labelled"
        + ("" if sure is None else f", with a confidence of {sure:.3f} in the mean")
        + (f"; {bad:,} are bad." if bad else ".")
    )


def _audit_sentence(audited: dict[str, Any]) -> str:
    what = "is applied" if audited["calibrate"] else "would calibrate it"
    return (
        f"On {audited['images']:,} images whose class is known, {100 * audited['accuracy']:.1f} % of such labels are "
        f"right; ECE {audited['ece']:.3f}, and temperature {audited['temperature']:.2f} {what} (ECE "
        f"{audited['calibrated_ece']:.3f})."
    )


def _shown_facts(facts: dict[str, Any], found: samples.Found, audited: dict[str, Any] | None) -> dict[str, str]:
    sure, bad = facts["mean_confidence"], bad_counts(dict(found.statuses.most_common()))
    shown = {
        "images": f"{sum(found.statuses.values()):,}",
        "labelled": f"{facts['images']:,}",
        "bad samples": ", ".join(f"{number:,} {why.replace('_', ' ')}" for why, number in bad.items()) or "none",
        "shards": f"{facts['shards']:,}",
        "mean confidence": "" if sure is None else f"{sure:.3f}",
    }
    if facts["failed"]:
        shown["shards without labels"] = f"{len(facts['failed']):,}"
    if audited:
        shown |= {"audited accuracy": f"{100 * audited['accuracy']:.1f} %", "ECE": f"{audited['ece']:.3f}"}
    return shown | {"label files": facts["dir"]}


def _pictures(counts: Counts, names: Sequence[str], audited: dict[str, Any] | None) -> list[Picture]:
    pictures = [
        Picture(
            "confidence.png",
            confidence(counts.steps),
            "Histogram of the confidence of the labels",
            "How sure the model was of its label for each image.",
        ),
        Picture("classes.png", classes(names, counts.per_class), "Images per class", "Images by their label."),
    ]
    if audited:
        caption = (
            f"How often a label is right where the model is so sure, on {audited['images']:,} images whose class is "
            "known; below the dashed line it is too sure. Whiskers are one standard error."
        )
        pictures += [
            Picture("reliability.png", audit.reliability(audited, 1), "Reliability diagram of the labels", caption),
            Picture(
                "threshold.png",
                audit.threshold(counts.steps.tolist(), audited["steps"], 0.0, 1),
                "Share of images and of right labels by confidence thresholds",
                "Share of the images at or above a threshold, and how many of such labels are right on the audited "
                "images; nothing is left out here.",
            ),
        ]
    return pictures


def _sheets(context: Context, found: samples.Found, shown: Sequence[int]) -> list[Sheet]:
    if not found.kept.most:
        return []
    corpus, names = context.corpora["unlabelled"].shards, context.corpora.classes
    rows = samples.contact_rows(found.kept, context.needs["gen1-label"].folder, corpus, names, shown)
    caption = "Images of some classes as the model labelled them, with the confidence: look for mistakes on the right."
    return [contact_sheet(rows, ("Most confident", "Least confident"), caption)]


def confidence(steps: npt.NDArray[np.int64]) -> bytes:
    """Confidences of all labelled images, counted in equal steps from 0 to 1."""
    figure, axes = figure_of("Confidence of the labels")
    axes.bar(np.arange(len(steps)) / len(steps), steps, 0.9 / len(steps), align="edge", color=colour(1), zorder=2)
    confidence_axes(axes, steps)
    return png(figure)


def classes(names: Sequence[str], images: npt.NDArray[np.int64]) -> bytes:
    """Labelled images per class; more than BARS classes as a curve, the most frequent first."""
    top = 1.06 * max(1, int(images.max()))
    if len(names) > BARS:
        figure, axes = figure_of("Images per class")
        axes.fill_between(np.arange(1, len(names) + 1), np.sort(images)[::-1], color=colour(1), step="mid", zorder=2)
        axes.set_xlim(1, len(names))
        axes.set_ylim(0, top)
        axes.set_xlabel(f"{len(names):,} classes, most frequent first", color=MUTED, fontsize=9.5)
        count_ticks(axes, "y")
        return png(figure)
    height, longest = max(3.5, 1.1 + 0.22 * len(names)), max(len(name) for name in names)
    figure, axes = figure_of("Images per class", height, left=0.05 + 0.014 * min(22, longest))
    y = np.arange(len(names))
    axes.barh(y, images, 0.6, color=colour(1), zorder=2)
    axes.set_yticks(y, [clean(name, 22) for name in names], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, top)
    axes.grid(visible=True, axis="x", color=GRID)
    axes.grid(visible=False, axis="y")
    count_ticks(axes, "x")
    return png(figure)


def _table(counts: Counts, names: Sequence[str]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class", "images", "mean_confidence"])
    for name, images, sure in zip(names, counts.per_class.tolist(), counts.sure.tolist(), strict=True):
        writer.writerow([name, images, f"{sure / images:.6f}" if images else ""])
    return out.getvalue().encode()
