"""`noisy_lambda.labels` on large synthetic label files: its answers against DuckDB's, and the memory that they take.

    python -m benchmarks.labels [--rows 100000000] [--files 1000] [--folder /tmp/labels]
    python -m benchmarks.labels --rows 2000000 --files 20        # under a minute

The files are those of benchmarks.select. One question, how many images of each class a confidence of 0.875 keeps and
how sure the teacher is of them, goes to a tenth of the files and to all of them: through `batches()`, counted by numpy;
through `to_polars()`, streamed; and to DuckDB, which reads the files themselves. Each runs in a process of its own,
whose peak resident set is compared with that before the question. Prints one JSON line. DuckDB comes with the `bench`
extra, Polars with `dev`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.compute as pc

from benchmarks.select import generate
from pipeline.labels import Labels

SURE = 0.875  # the same number in single and double precision, so that all compare alike
MIB = 1024  # of ru_maxrss, which counts KiB
Answer = dict[int, tuple[int, float]]
"""{class: (images, mean confidence)}."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/labels"))
    args = parser.parse_args()
    paths = generate(args.folder, args.rows, args.files, 1_000)
    found: dict[str, object] = {"benchmark": "labels", "rows": args.rows, "files": args.files}
    for name, some in (("tenth", paths[: max(1, len(paths) // 10)]), ("all", paths)):
        answers = {}
        for by in (batches, polars, theirs):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                answer, seconds, before, peak = alone.submit(asked, by, some).result()
            answers[by.__name__] = answer
            found[f"{by.__name__}_{name}"] = {
                "seconds": round(seconds, 2), "mib_before": before // MIB, "peak_mib": peak // MIB,
            }  # fmt: skip
        found[f"equal_{name}"] = same(answers["batches"], answers["theirs"]) and same(
            answers["polars"], answers["theirs"]
        )
    print(json.dumps(found))


def asked(by: Callable[[list[str]], Answer], paths: list[str]) -> tuple[Answer, float, int, int]:
    """(answer, seconds, peak before the question, peak), of this process in KiB."""
    by(paths[:1])  # what it imports is no part of the answer
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    answer = by(paths)
    return answer, time.perf_counter() - began, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def labels(paths: list[str]) -> Labels:
    folder = str(Path(paths[0]).parent)
    return Labels(folder, tuple(f"{Path(path).stem}.tar" for path in paths), ())


def batches(paths: list[str]) -> Answer:
    images, sums = np.zeros(1_000, np.int64), np.zeros(1_000)
    for batch in labels(paths).filter(pc.field("confidence") >= SURE).select("label", "confidence").batches():
        label = batch["label"].to_numpy()
        images += np.bincount(label, minlength=1_000)
        sums += np.bincount(label, batch["confidence"].to_numpy().astype(np.float64), 1_000)
    return {number: (int(images[number]), sums[number] / images[number]) for number in np.flatnonzero(images).tolist()}


def polars(paths: list[str]) -> Answer:
    import polars as pl

    sure = labels(paths).to_polars().filter(pl.col("confidence") >= SURE)
    by_class = sure.group_by("label").agg(pl.len(), pl.col("confidence").cast(pl.Float64).mean())
    return {label: (images, mean) for label, images, mean in by_class.collect(engine="streaming").rows()}


def theirs(paths: list[str]) -> Answer:
    sql = f"SELECT label, count(*), avg(confidence::DOUBLE) FROM read_parquet({paths}) WHERE confidence >= {SURE}"
    return {label: (images, mean) for label, images, mean in duckdb.sql(f"{sql} GROUP BY label").fetchall()}


def same(one: Answer, other: Answer) -> bool:
    return one.keys() == other.keys() and all(
        one[key][0] == other[key][0] and abs(one[key][1] - other[key][1]) < 1e-9 for key in one
    )


if __name__ == "__main__":
    main()
