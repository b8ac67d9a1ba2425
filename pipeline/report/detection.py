"""Assembles what the report shows of detectors: a table, precision over recall, classes, and what they found."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline import storage
from pipeline.data.index_files import metadata_of, rows_path
from pipeline.detection import masks
from pipeline.detection.rows import load_rows
from pipeline.detection.scene import Scene, picture
from pipeline.loading import prefetch
from pipeline.loading.training_rows import TrainingShard
from pipeline.plan.context import Context
from pipeline.plan.corpora import detection_sources_of, tested_scenes_of
from pipeline.plan.stage import DETECTION, JOB, PAGE, SHARDS, SUMMARY, Result, read_json_file
from pipeline.printable import counted
from pipeline.report import fonts, page
from pipeline.report.page import Detected, Page, Picture
from pipeline.report.style import DPI, FULL, INK, MUTED, clean, colour, figure_of, key, png

PAPER = (
    Detected("LambdaResNet-101, paper", "lambda_resnet_101", None, {"ap": 0.494, "ap_small": 0.317}, {"ap": 0.435}),
    Detected("ResNet-101, paper", "resnet_101", None, {"ap": 0.482, "ap_small": 0.299}, {"ap": 0.426}),
    Detected("LambdaResNet-152, paper", "lambda_resnet_152", None, {"ap": 0.500}, {"ap": 0.439}),
)
"""LambdaNetworks, table 6: on COCO, which other data are not to be compared with."""
WORST, RANDOM = 8, 16
SIDE = 240  # pixels of an example
SURE = 0.5  # confidence from which on an answer is drawn
SAME = 0.5  # overlap from which on an answer is of an object
BARS = 40  # classes with a bar of their own


def assemble(context: Context) -> Result:
    """The report of a job that has nothing but detectors."""
    found = read_json_file(context.needs["detect-evaluate"], DETECTION)
    with context.journal() as log:
        shown = pictures(context)
        sentences = verdict(found)
        stages = [
            (stage.name, storage.name(stage.folder), stage.fingerprint, f"{stage.info['seconds']:,.1f}")
            for stage in context.needs.values()
        ]
        content = Page(
            context.job.name, found["images"], [], shown, [], stages,
            command=f"noisy-lambda run {storage.redact(storage.join(context.job.output, JOB))}",
            verdict=sentences, detectors=table(found), annotations=dropped(context),
        )  # fmt: skip
        for one in shown:
            storage.write_bytes(storage.join(context.folder, one.name), one.png)
        storage.write_bytes(storage.join(context.folder, PAGE), page.render(content))
        summary = {
            "job": context.job.name,
            "detectors": [
                {name: row[name] for name in ("name", "stage", "model", "parameters", "body_parameters")}
                | {f"{kind}_{name}": row[kind][name] for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")}
                for row in found["detectors"]
            ],
            "source": found["source"],
            "seconds": {stage.name: stage.info["seconds"] for stage in context.needs.values()},
            "report": storage.redact(storage.join(context.folder, PAGE)),
            "verdict": sentences,
        }
        storage.write_json(storage.join(context.folder, SUMMARY), summary)
        log.log(1, 1)
    metrics = dict(context.needs["detect-evaluate"].metrics)
    return Result({"line": summary["report"]}, metrics=metrics, artifacts=[SUMMARY, PAGE, *(one.name for one in shown)])


def table(found: Mapping[str, Any]) -> list[Detected]:
    """A row for each detector, and those of the paper."""
    rows = [
        Detected(row["name"], row["model"], row["body_parameters"], row["box"], row["mask"])
        for row in found["detectors"]
    ]
    return [*rows, *PAPER]


def verdict(found: Mapping[str, Any]) -> list[str]:
    rows = found["detectors"]
    best = max(rows, key=lambda row: row["box"]["ap"] or 0.0)
    images = counted(found["images"], f"{found['source']} image")
    where = f"{images} with {counted(found['objects'], 'object')}"
    sentences = [
        f"{best['name']} finds most: AP50 {_percent(best['box']['ap50'])} of boxes and "
        f"{_percent(best['mask']['ap50'])} of masks on {where} (AP {_percent(best['box']['ap'])} and "
        f"{_percent(best['mask']['ap'])})."
    ]
    if found["source"] == "validation":
        sentences.append("There is no test split: these are figures of validation, which tuning has looked at.")
    return sentences


def dropped(context: Context) -> list[str]:
    """What of the annotations is not used, and why."""
    counts = context.needs["detect-index"].info["counts"]
    notes = []
    for source in detection_sources_of(context.job):
        one = counts[source]
        reasons = {**one["dropped"], **{f"image: {reason}": number for reason, number in one["bad"].items()}}
        said = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items()) or "none"
        also = f"; neither taught nor scored: {counted(one['crowds'], 'crowd')}" if one["crowds"] else ""
        name = source.rpartition(".")[2]
        notes.append(
            f"{name}: {one['images']:,} images, {one['objects']:,} objects; annotations dropped: {said}{also}."
        )
    return notes


def pictures(context: Context) -> list[Picture]:
    """None where the job has no detectors."""
    if "detect-evaluate" not in context.needs:
        return []
    found = read_json_file(context.needs["detect-evaluate"], DETECTION)
    rows = found["detectors"]
    names, _ = fonts.in_plots(context.corpora.detection_classes)
    best = max(rows, key=lambda row: row["box"]["ap"] or 0.0)
    worst, drawn = _examples(context, best)
    about = f"Left: the truth; right: what {best['name']} found, with confidence {SURE:g} or more."
    return [
        Picture("precision_recall.png", _curves(rows), "Precision over recall", "Boxes, overlap 0.5, mean of classes."),
        Picture(
            "ap_by_class.png", _by_class(best, names), "AP by class",
            f"Box AP of {best['name']} by class{', the first ' + str(BARS) if len(names) > BARS else ''}.",
        ),
        Picture("found_worst.png", worst, "Images with most mistakes", f"The images with most mistakes. {about}", True),
        Picture("found_random.png", drawn, "Images drawn at random", f"Images drawn at random. {about}", True),
    ]  # fmt: skip


def _percent(fraction: float | None) -> str:
    return "not defined" if fraction is None else f"{100 * fraction:.1f} %"


def _curves(rows: Sequence[Mapping[str, Any]]) -> bytes:
    figure, axes = figure_of("Precision over recall", head=0.75)
    recall = np.linspace(0, 100, 101)
    for number, row in enumerate(rows, 1):
        curves = list(row["box"]["curve"].values())
        if curves:
            axes.plot(recall, 100 * np.mean(curves, axis=0), color=colour(number), linewidth=2)
    key(figure, [(clean(row["name"], 22), colour(number)) for number, row in enumerate(rows, 1)])
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_xlabel("recall, %", color=MUTED, fontsize=9.5)
    return png(figure)


def _by_class(row: Mapping[str, Any], names: Sequence[str]) -> bytes:
    values = [100 * (value or 0.0) for value in row["box"]["per_class"].values()][:BARS]
    shown = names[: len(values)]
    longest = max(len(name) for name in shown)
    figure, axes = figure_of("AP by class", max(3.5, 1.1 + 0.22 * len(values)), left=0.05 + 0.014 * min(22, longest))
    axes.barh(np.arange(len(values)), values, 0.6, color=colour(1), zorder=2)
    axes.set_yticks(np.arange(len(values)), [clean(name, 22) for name in shown], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    return png(figure)


Answer = Mapping[str, Any]


def _examples(context: Context, row: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The images with most mistakes, and some drawn at random."""
    classes = context.corpora.detection_classes
    stage = context.needs["detect-evaluate"]
    answers: dict[Any, list[Answer]] = defaultdict(list)
    for one in storage.read_json(storage.join(stage.folder, row["name"], "detections.json")):
        if one["score"] >= SURE:
            answers[one["image_id"]].append(one)
    source, done = tested_scenes_of(context.job), context.needs["detect-index"]
    counts = read_json_file(done, SHARDS)[source]
    places = []
    for shard in context.corpora[source].shards:
        expected = metadata_of(done.folder, source, shard.name)
        path = rows_path(done.folder, source, shard.name)
        tar = TrainingShard(shard.path, path, None, counts[shard.name], context.cache, expected=expected)
        rows = load_rows(tar)
        places += [(tar, rows, number, rows.scene(number, classes)) for number in range(len(rows.texts))]
    order = sorted(range(len(places)), key=lambda place: (_right(places[place][3], answers), place))
    chosen = random.Random(0).sample(range(len(places)), min(RANDOM, len(places)))

    def drawn(which: Sequence[int]) -> Iterator[Image.Image]:
        for tar, rows, number, scene in (places[place] for place in which):
            image = picture(prefetch.read_image(tar, rows.places, number), scene)
            yield _beside(image, scene, answers[scene.image_id], classes)

    return _grid(list(drawn(order[:WORST]))), _grid(list(drawn(chosen)))


def _right(scene: Scene, answers: Mapping[Any, Sequence[Answer]]) -> float:
    """Of all objects and answers the share that match, one to one."""
    ids = dict(enumerate(scene.category_ids))
    left, matched = list(answers[scene.image_id]), 0
    for thing in scene.single:
        best = max(left, key=lambda one: _overlap(thing.box, one["bbox"]), default=None)
        if best and best["category_id"] in ids.values() and _overlap(thing.box, best["bbox"]) >= SAME:
            left.remove(best)
            matched += 1
    return matched / max(1, len(scene.single) + len(left))


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of boxes x, y, width, height."""
    wide = max(0.0, min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1]))
    return wide * high / max(1e-9, one[2] * one[3] + other[2] * other[3] - wide * high)


def _beside(image: Image.Image, scene: Scene, answers: Sequence[Answer], classes: Sequence[str]) -> Image.Image:
    """The truth on the left, the answers on the right."""
    number = {name: place for place, name in enumerate(classes)}
    of_id = {id_: place for place, id_ in enumerate(scene.category_ids)}
    truth = [(number[thing.name], thing.box, thing.mask, "") for thing in scene.single]
    found = [
        (of_id[one["category_id"]], one["bbox"], one["segmentation"]["counts"], f" {one['score']:.2f}")
        for one in answers
    ]
    sheet = Image.new("RGB", (2 * SIDE + 4, SIDE), "white")
    for place, things in enumerate((truth, found)):
        sheet.paste(draw(image, things, classes, SIDE), (place * (SIDE + 4), 0))
    return sheet


def draw(
    image: Image.Image, things: Sequence[tuple[int, Sequence[float], str, str]], classes: Sequence[str], side: int
) -> Image.Image:
    """The picture, at most `side` pixels wide and high, with masks, boxes and names of (class, box x y width height,
    mask, words after the name)."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.resize(size, Image.Resampling.BILINEAR)
    for label, _, mask, _ in things:
        pixels = Image.fromarray(masks.decode(mask, image.height, image.width) * 110).resize(size)
        shown.paste(Image.new("RGB", size, colour(1 + label % 7)), mask=pixels)
    pen = ImageDraw.Draw(shown)
    for label, (x, y, wide, high), _, words in things:
        box = [scale * x, scale * y, max(scale * (x + wide) - 1, scale * x), max(scale * (y + high) - 1, scale * y)]
        pen.rectangle(box, outline=colour(1 + label % 7), width=2)
        name = clean(classes[label], 16).encode("ascii", "replace").decode()
        pen.text(
            (box[0] + 2, box[1] + 1), name + words, fill="white", stroke_width=1, stroke_fill="black", font_size=11
        )
    return shown


def _grid(sheets: Sequence[Image.Image]) -> bytes:
    """Two in a row, as a picture of the page's full width."""
    wide = 2 * sheets[0].width + 24 if sheets else 1
    whole = Image.new("RGB", (wide, max(1, -(-len(sheets) // 2) * (SIDE + 12))), "white")
    for place, sheet in enumerate(sheets):
        whole.paste(sheet, (place % 2 * (sheet.width + 24), place // 2 * (SIDE + 12)))
    scale = FULL * DPI / whole.width
    out = io.BytesIO()
    whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BILINEAR).save(out, "PNG")
    return out.getvalue()
