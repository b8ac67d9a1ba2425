"""Shows what a model gets wrong on the validation images: which classes it takes for which, and its surest mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import index_files, label_files, parquet_files
from pipeline.data.shards import Shard
from pipeline.plan.context import Context
from pipeline.printable import counted
from pipeline.report.contact_sheet import thumbnail
from pipeline.report.page import Cell, Mistakes, Pair, Tile
from pipeline.report.plots import Model
from pipeline.report.samples import THREADS, Place, read_pictures
from pipeline.report.style import clean

MATRIX = 25  # more classes than this are shown by the pairs that are mixed up most
PAIRS = 20
GALLERY = 24  # images
NAME, SHORT = 40, 24  # characters of a class name, in tables and below an image


def section(context: Context, model: Model, row: Mapping[str, Any]) -> Mistakes | None:
    """Of one model; `row`: its entry in evaluate.json. None where an earlier version evaluated."""
    validated, names = row["validation"], context.corpora.classes
    if "confusion" not in validated:
        return None
    wrong = sum(images for _, _, images in validated["confusion"])
    lead = (
        f"{model.stage}, the model to take, has {wrong:,} of {counted(validated['images'], 'validation image')} wrong."
    )
    few, names = len(names) <= MATRIX, [clean(name, NAME) for name in names]
    return Mistakes(
        lead,
        names,
        matrix(validated["confusion"], validated["per_class"]) if few else [],
        [] if few else pairs(validated["confusion"], validated["per_class"], names),
        gallery(context, model.stage, names) if wrong else [],
    )


def matrix(confusion: Sequence[Sequence[int]], per_class: Sequence[int]) -> list[list[Cell]]:
    """A row a true class, a column an answer. `confusion`: [true, answer, images] of wrong answers; `per_class`: images
    of each true class."""
    counts = np.zeros((len(per_class), len(per_class)), int)
    for true, said, images in confusion:
        counts[true, said] = images
    np.fill_diagonal(counts, np.asarray(per_class) - counts.sum(axis=1))
    return [
        [Cell(int(images), float(images / max(1, total)), true == said) for said, images in enumerate(line)]
        for true, (line, total) in enumerate(zip(counts, per_class, strict=True))
    ]


def pairs(confusion: Sequence[Sequence[int]], per_class: Sequence[int], names: Sequence[str]) -> list[Pair]:
    """The pairs that are mixed up most often, `confusion` being in that order."""
    return [
        Pair(names[true], names[said], images, images / per_class[true]) for true, said, images in confusion[:PAIRS]
    ]


def gallery(context: Context, stage: str, names: Sequence[str]) -> list[Tile]:
    """The wrong answers of which a model was surest, with image, true class, answer and confidence."""
    corpus = context.corpora["validation"].shards
    folder = context.needs["evaluate"].folder
    labelled = [storage.join(folder, label_files.file_name(f"validation/{stage}/{shard.name}")) for shard in corpus]

    def read(number: int) -> list[tuple[Place, int, int]]:
        return _wrong(context.needs["index"].folder, labelled[number], corpus[number], number)

    found: list[tuple[Place, int, int]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(read, range(len(corpus))):
            found = sorted([*found, *part], key=lambda one: (-one[0].confidence, *one[0][1:]))[:GALLERY]
    pictures = read_pictures([place for place, _, _ in found], labelled, corpus)
    return [
        Tile(
            thumbnail(pictures[place.shard, place.row]),
            f"{place.confidence:.3f}",
            clean(names[true], SHORT),
            clean(names[said], SHORT),
        )
        for place, true, said in found
    ]


def _wrong(index_folder: str, labelled: str, shard: Shard, number: int) -> list[tuple[Place, int, int]]:
    """(place, true class, answer) of the surest wrong answers about one shard."""
    known = parquet_files.read_table(index_files.rows_path(index_folder, "validation", shard.name), ["index", "label"])
    rows = parquet_files.read_table(labelled, ["label", "confidence"]).take(known["index"])  # row i is sample i
    said = rows["label"].combine_chunks().fill_null(-1).to_numpy()
    sure = rows["confidence"].combine_chunks().fill_null(-1).to_numpy()
    truth, index = known["label"].to_numpy(), known["index"].to_numpy()
    wrong = np.flatnonzero((said >= 0) & (said != truth))
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:GALLERY]
    return [(Place(float(sure[i]), number, int(index[i])), int(truth[i]), int(said[i])) for i in wrong]
