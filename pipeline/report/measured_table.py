"""Writes the table of measured models: as CSV with every column in plain units, and as Markdown for people.

Columns of the CSV: what was built (name, model, size, overrides), what is known on paper (family, parameters, flops:
two per multiply-add for one image; map_bytes, if asked for), accuracy (top1 in percent, accuracy_source), what was
measured (batch, images per second and peak bytes of inference and of training; latency_ms), `problem` where something
did not fit in memory (its figures are empty then), and under which conditions (device, dtype, compile, versions).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.report.style import clean

Row = dict[str, Any]
LEFT = ("model", "accuracy is")  # columns of words


def as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"overrides": json.dumps(row["overrides"])} for row in rows)
    return text.getvalue().encode()


def as_markdown(title: str, rows: Sequence[Row], map_batch: int | None) -> bytes:
    """The table, the conditions under which it was measured, and where its accuracies are from."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: clean(row["name"]),
        "parameters": lambda row: f"{row['parameters'] / 1e6:.2f} M",
        "FLOPs": lambda row: f"{row['flops'] / 1e9:.2f} G",
        **({f"maps at batch {map_batch}": lambda row: _size(row["map_bytes"])} if map_batch else {}),
        "inference images/s": lambda row: _rate(row, "inference"),
        "training images/s": lambda row: _rate(row, "training"),
        "latency": lambda row: "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f} ms",
        "inference peak": lambda row: _size(row["inference_peak_bytes"]),
        "training peak": lambda row: _size(row["training_peak_bytes"]),
        "top-1": lambda row: "" if row["top1"] is None else f"{row['top1']:.1f} %",
        "accuracy is": lambda row: row["accuracy_source"] or "",
    }
    lines = [f"# {clean(title)}", "", _line(columns), _line("---" if name in LEFT else "---:" for name in columns)]
    lines += [_line(cell(row) for cell in columns.values()) for row in rows]
    lines += ["", *(f"- {note}" for note in _notes(rows, map_batch))]
    return ("\n".join(lines) + "\n").encode()


def _notes(rows: Sequence[Row], map_batch: int | None) -> list[str]:
    first, versions = rows[0], {part for row in rows for part in row["versions"].split(", ")}
    notes = [
        f"{first['device']}, {first['dtype']}, {first['compile']}, {', '.join(sorted(versions, reverse=True))}; "
        "channels-last memory; medians over rounds in which all models take turns.",
        "In parentheses: images in a batch. Latency: one image, from call to result. Peak: what a step allocates above "
        "weights and optimiser state, in eager mode.",
        "FLOPs: two per multiply-add for one image; lambda layers count as in the paper, however they are computed.",
    ]
    if map_batch:
        notes.append("Maps: attention maps or position embeddings of all layers in fp32, by the paper's formulas.")
    return notes


def _rate(row: Row, use: str) -> str:
    rate, batch = row[f"{use}_images_per_second"], row[f"{use}_batch"]
    return f"out of memory ({batch})" if rate is None else f"{rate:,.1f} ({batch})"


def _size(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
