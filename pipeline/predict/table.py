"""Writes predictions as a table, CSV or Parquet, in one step, while more are made.

Columns: `path`, or `shard`, `index`, `key`; `class`, `confidence`; `class_2`, `confidence_2` … up to the k-th;
`problem`, why an image has no prediction. A Parquet file says in its metadata which models made it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, OutputError
from pipeline.predict.inputs import Wanted
from pipeline.predict.predictor import Picture, Prediction, Predictor

MODELS_KEY = b"noisy_lambda.models"
SUFFIXES = (".csv", ".parquet")


def write(
    predictor: Predictor, wanted: Iterable[Wanted], out: str, top: int, seen: Callable[[Wanted, Prediction], None]
) -> Counter[str]:
    """Predict all images into the file `out`; how many there are by problem, "" for none. `top` classes each. `seen`
    hears of each. OutputError: the file is there already, and of other models."""
    check(out, predictor)
    found: Counter[str] = Counter()
    top = min(top, len(predictor.classes))
    rows = _rows(predictor, wanted, top, found, seen)
    first = list(islice(rows, 1))
    columns = list(first[0]) if first else ["path", *_columns(top)]
    with storage.writing(out) as temporary:
        write_file = _write_csv if out.lower().endswith(".csv") else _write_parquet
        write_file(temporary, columns, chain(first, rows), predictor)
    return found


def check(out: str, predictor: Predictor) -> None:
    """ConfigError, OutputError: predictions of these models cannot be written to `out`."""
    check_name(out)
    if not Path(out).exists():
        return
    try:
        known = pq.read_metadata(out).metadata or {}
    except (OSError, pa.ArrowException):
        known = {}
    if known.get(MODELS_KEY) != _models(predictor):
        other = (
            "a .csv does not say of which model" if out.lower().endswith(".csv") else "of another model or temperature"
        )
        raise OutputError(f"--out {out} is there already, {other}; name another file, or delete it")


def check_name(out: str) -> None:
    """ConfigError: no table can be called so."""
    if not out.lower().endswith(SUFFIXES):
        raise ConfigError(
            f"--out {out} is neither .csv nor .parquet; name a file that ends so (a folder is for shards)"
        )


def _models(predictor: Predictor) -> bytes:
    return json.dumps([[one.identity, one.temperature] for one in predictor.models]).encode()


def _columns(top: int) -> list[str]:
    more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "confidence")]
    return ["class", "confidence", *more, "problem"]


def _rows(
    predictor: Predictor,
    wanted: Iterable[Wanted],
    top: int,
    found: Counter[str],
    seen: Callable[[Wanted, Prediction], None],
) -> Iterator[dict[str, Any]]:
    for one, prediction in answered(predictor, wanted):
        found[prediction.problem.partition(":")[0]] += 1
        yield {**one.where, **_row(predictor.classes, prediction, top)}
        seen(one, prediction)


def answered(predictor: Predictor, wanted: Iterable[Wanted]) -> Iterator[tuple[Wanted, Prediction]]:
    """Each image with what is said of it, while more are read; few are in memory at a time."""
    asked: deque[Wanted] = deque()

    def pictures() -> Iterator[Picture]:
        for one in wanted:
            asked.append(one)
            yield one.picture

    for part in predictor.batches(pictures()):
        for prediction in part:
            yield asked.popleft(), prediction


def _row(classes: list[str], prediction: Prediction, top: int) -> dict[str, Any]:
    names = _columns(top)
    if prediction.problem:
        return dict.fromkeys(names) | {"problem": prediction.problem}
    order = np.argsort(-prediction.probabilities, kind="stable")[:top]
    said = [value for number in order for value in (classes[number], float(prediction.probabilities[number]))]
    return dict(zip(names, [*said, ""], strict=True))


def _write_csv(path: str, columns: list[str], rows: Iterator[dict[str, Any]], predictor: Predictor) -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def _write_parquet(path: str, columns: list[str], rows: Iterator[dict[str, Any]], predictor: Predictor) -> None:
    def type_of(name: str) -> pa.DataType:
        return pa.float32() if name.startswith("confidence") else pa.int64() if name == "index" else pa.string()

    schema = pa.schema([(name, type_of(name)) for name in columns], metadata={MODELS_KEY: _models(predictor)})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while part := list(islice(rows, 10_000)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
