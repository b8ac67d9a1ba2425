"""Shows how models stand corrupted test images: a heat map, errors over severity, and what the models were shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corruption.corrupt import canvas, corrupt
from pipeline.data import images, parquet_files, shards
from pipeline.data.index_files import rows_path
from pipeline.plan.context import Context
from pipeline.plan.stage import ROBUSTNESS, SHARDS, read_json_file
from pipeline.report.page import Picture
from pipeline.report.plots import Model
from pipeline.report.style import INK, MUTED, clean, colour, figure_of, note, png, spread

Floats = npt.NDArray[np.float64]
STRIP, COLUMNS = 96, 8  # pixels of a picture of the strip, and pictures in a row


def pictures(context: Context, models: Sequence[Model]) -> list[Picture]:
    """None where the job has no such test."""
    if "robustness" not in context.needs:
        return []
    found = read_json_file(context.needs["robustness"], ROBUSTNESS)
    rows = found["models"]
    about = f"{found['images']:,} test images, spoilt in {len(rows[0]['errors'])} ways"
    mean = ", ".join(f"{one.label} {row['mean_error']:.1f} %" for one, row in zip(models, rows, strict=True))
    severity = f"Top-1 error over the ways, on {about}; at 0 as they are. Mean of all severities: {mean}."
    shown = "One test image in each way, at severity 3: pictures of this job's own, no part of a published set."
    return [
        Picture("corruption_error.png", *_heat_map(models, found, about)),
        Picture("error_by_severity.png", _by_severity(models, found), "Error over severity", severity),
        Picture("corruptions.png", _strip(context, list(rows[0]["errors"])), "Corrupted images", shown, True),
    ]


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heat_map(models: Sequence[Model], found: Mapping[str, Any], about: str) -> tuple[bytes, str, str]:
    """(picture, what it is, caption): corruption errors by model; of a teacher alone, who is the reference, errors by
    severity."""
    rows, reference = found["models"], found["reference"]
    names = list(rows[0]["ce"])
    if reference == "teacher" and len(rows) == 1:
        errors = np.array([rows[0]["errors"][name] for name in names]).T
        labels = [f"severity {severity}" for severity in found["severities"]]
        clean_error, mean = (_number(rows[0][name]) for name in ("clean_error", "mean_error"))
        caption = f"Top-1 error in percent on {about}: {mean} on average, against {clean_error} as they are."
        drawn = _grid("Top-1 error, %", labels, names, errors, "Reds", (0.0, 100.0))
        return drawn, "Error by way and severity", caption
    of = "AlexNet's published errors on other images" if reference == "alexnet" else "the teacher"
    values = np.array([[np.nan if row["ce"][name] is None else row["ce"][name] for name in names] for row in rows])
    limit = max(100.0, float(np.nanmax(np.abs(values - 100), initial=1)))
    labels = [clean(model.label, 30) for model in models]
    drawn = _grid("Corruption error, % of the reference's", labels, names, values, "RdBu_r", (100 - limit, 100 + limit))
    kinds = [
        f"{'approximate ' if reference == 'alexnet' else ''}{word} "
        + ", ".join(f"{model.label} {_number(row[key])}" for model, row in zip(models, rows, strict=True))
        for word, key in (("mCE", "mce"), ("relative mCE", "relative_mce"))
    ]
    caption = f"Corruption error in percent of that of {of} (below 100: better), on {about}. {'; '.join(kinds)}."
    return drawn, "Corruption error by way and model", caption


def _grid(
    title: str, labels: Sequence[str], names: Sequence[str], values: Floats, colours: str, limits: tuple[float, float]
) -> bytes:
    """Numbers [labels, names] on coloured cells."""
    figure, axes = figure_of(title, 1.9 + 0.4 * len(labels), 0.16)
    axes.set_position((0.16, 0.9 / figure.get_figheight(), 0.82, 1 - 1.4 / figure.get_figheight()))
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        red, green, blue, _ = image.to_rgba(np.array([[value]]))[0, 0]
        shade = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 and not np.isnan(value) else INK
        axes.text(x, y, "–" if np.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(range(len(names)), [_words(name) for name in names], rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return png(figure)


def _by_severity(models: Sequence[Model], found: Mapping[str, Any]) -> bytes:
    figure, axes = figure_of("Top-1 error over severity, %")
    severities = [0, *found["severities"]]
    means = [[row["clean_error"], *np.mean(list(row["errors"].values()), axis=0)] for row in found["models"]]
    highest = max(max(one) for one in means)
    places = spread([one[-1] for one in means], highest / 14)
    for model, values, place in zip(models, means, places, strict=True):
        shade = colour(model.generation)
        axes.plot(severities, values, "o-", color=shade, linewidth=2, markersize=6, markeredgecolor="white")
        note(axes, clean(model.label, 30), (severities[-1], place), shade, 10, xytext=(8, 0))
    axes.set_xlim(-0.2, severities[-1] + 1.3)
    axes.set_ylim(bottom=0)
    axes.set_xticks(severities)
    axes.set_xlabel("severity", color=MUTED, fontsize=9.5)
    return png(figure)


def _strip(context: Context, names: Sequence[str]) -> bytes:
    """One image as it is and in every way."""
    counts = read_json_file(context.needs["index"], SHARDS)["test"]
    shard = next(shard for shard in context.corpora["test"].shards if counts[shard.name])  # the test has images
    path = rows_path(context.needs["index"].folder, "test", shard.name)
    [row] = parquet_files.read_table(path, ["offset", "size", "image_hash"]).slice(0, 1).to_pylist()
    pixels = canvas(images.decode(shards.read_at(shard.path, row["offset"], row["size"])))
    shown = [("clean", pixels), *((_words(name), corrupt(pixels, name, 3, row["image_hash"])) for name in names)]
    lines = -(-len(shown) // COLUMNS)
    figure, axes = figure_of("The same image, spoilt", 0.5 + 0.95 * lines)
    axes.set_position((0.02, 0, 0.97, 1 - 0.45 / figure.get_figheight()))
    axes.set_axis_off()
    for number, (name, picture) in enumerate(shown):
        line, column = divmod(number, COLUMNS)
        place = axes.inset_axes((column / COLUMNS, 1 - (line + 0.96) / lines, 0.86 / COLUMNS, 0.6 / lines))
        place.imshow(picture, interpolation="nearest" if picture.shape[0] < STRIP else "antialiased")
        place.set_title(name.replace(" ", "\n"), fontsize=6.5, color=INK, pad=3)
        place.set_axis_off()
    return png(figure)
