"""Our selection against DuckDB's window function on the same label files, row for row.

    python -m benchmarks.select [--rows 100000000] [--files 1000] [--folder /tmp/selection] [--fewer 10000000]
    python -m benchmarks.select --rows 5000000 --files 50 --fewer 500000 --rounds 1        # under a minute

Writes label files once into the folder (about 12 bytes a row), with every column that labelling writes, and beside
them `file` and `tie`, our tie hash, for DuckDB. One confidence in five is exactly 1. Then, in turns:

    ours     select_all over two processes: reads labels, writes one selection file per label file
    DuckDB   row_number() over (partition by label order by confidence desc, tie) on two threads, its result one
             Parquet file

Both start from files in the page cache, both are bound to the same two cores. The results are compared row for row,
copies included. Ours runs on the `--fewer` rows of the first files too, to see that time is linear. Memory is the peak
of the sum of the resident sets of our three processes, sampled every 20 ms, and of DuckDB's own process. Prints a table
and, last, one JSON line. DuckDB comes with the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa

from pipeline.data import label_files, parquet_files
from pipeline.selection.radix import Settings
from pipeline.selection.select import select_all
from pipeline.selection.sort_keys import tie_hash

PROCESSES = 2
DUCKDB = {"threads": PROCESSES, "preserve_insertion_order": False}
LISTED = 5  # classes and probs of a row; nobody here may read them
SURE = 0.2  # of the confidences are exactly 1
THRESHOLD = 0.3
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """One selection: seconds, seconds of all cores, peak of resident bytes, and our passes over the files."""

    seconds: float
    cpu: float
    peak: int
    passes: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--per-class", type=int, default=None, help="default: 0.6 of the rows for each class")
    parser.add_argument("--fewer", type=int, default=10_000_000, help="rows of the smaller table; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/selection"))
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:PROCESSES]
    os.sched_setaffinity(0, cores)
    per_class = args.per_class or max(1, round(0.6 * args.rows / args.classes))
    paths = generate(args.folder, args.rows, args.files, args.classes)
    some = paths[: round(args.files * args.fewer / args.rows)]
    out = args.folder / "out"
    turns: dict[str, list[Turn]] = {"ours": [], "duckdb": [], "fewer": []}
    with processes() as pool:
        list(pool.map(warm, paths))
        for _ in range(args.rounds):
            turns["ours"].append(ours(pool, paths, args.classes, per_class, out / "ours"))
            turns["duckdb"].append(theirs(args.folder / "labels", per_class, out / "duckdb"))
            if some:
                fewer = max(1, round(per_class * len(some) / len(paths)))
                turns["fewer"].append(ours(pool, some, args.classes, fewer, out / "fewer"))
            print(", ".join(f"{name} {taken[-1].seconds:.1f} s" for name, taken in turns.items() if taken), flush=True)
    rows, differing = compare(out / "ours", out / "duckdb")
    written = sum(path.stat().st_size for path in (out / "ours").glob("*.parquet"))
    shutil.rmtree(out)
    found: dict[str, Any] = {
        "benchmark": "select",
        "files": args.files,
        "classes": args.classes,
        "per_class": per_class,
        "cores": len(cores),
        "rounds": args.rounds,
        "selected_rows": rows,
        "differing_rows": differing,
        "bytes_per_selected_row": round(written / rows, 3),
        "versions": {"duckdb": duckdb.__version__, "pyarrow": pa.__version__, "numpy": np.__version__},
    }
    for name, taken in turns.items():
        if taken:
            found[name] = {
                "rows": round(args.rows * len(some) / len(paths)) if name == "fewer" else args.rows,
                "seconds": round(statistics.median(turn.seconds for turn in taken), 3),
                "cpu_seconds": round(statistics.median(turn.cpu for turn in taken), 3),
                "peak_mib": round(max(turn.peak for turn in taken) / MIB),
                "passes": taken[-1].passes,
            }
    found["speed"] = round(found["duckdb"]["seconds"] / found["ours"]["seconds"], 2)
    if some:  # 1: exactly linear
        rates = [found[name]["rows"] / found[name]["seconds"] for name in ("fewer", "ours")]
        found["growth"] = round(rates[0] / rates[1], 2)
    show(found)


def generate(folder: Path, rows: int, files: int, classes: int) -> list[str]:
    """Paths of the label files, which are written where they are not there yet."""
    mark = folder / "table.json"
    wanted = {"rows": rows, "files": files, "classes": classes, "listed": LISTED, "sure": SURE}
    if not mark.exists() or json.loads(mark.read_text()) != wanted:
        shutil.rmtree(folder / "labels", ignore_errors=True)
        (folder / "labels").mkdir(parents=True)
        began = time.perf_counter()
        with processes() as pool:
            borders = np.linspace(0, rows, files + 1).astype(int)
            list(
                pool.map(partial(write_file, str(folder / "labels"), classes), range(files), np.diff(borders).tolist())
            )
        mark.write_text(json.dumps(wanted))
        print(f"wrote {rows:,} rows in {files:,} files in {time.perf_counter() - began:.0f} s", flush=True)
    return sorted(map(str, (folder / "labels").glob("*.parquet")))


def write_file(folder: str, classes: int, number: int, n: int) -> None:
    """One label file, with skewed classes: the most frequent one is some 30 times as frequent as the rarest."""
    rng, shard = np.random.default_rng(number), f"{number:05d}.tar"
    label = (classes * (np.exp(3.4 * rng.random(n)) - 1) / (np.exp(3.4) - 1)).astype(np.int32)
    confidence = (1 - 0.95 * rng.random(n, np.float32) ** 2).astype(np.float32)
    confidence[rng.random(n) < SURE] = 1
    offsets = np.arange(0, LISTED * (n + 1), LISTED, dtype=np.int32)
    shares = np.linspace(0.5, 0.01, LISTED)
    listed = ((label[:, None] + np.arange(LISTED, dtype=np.int32)) % classes).astype(np.int32)
    probs = (confidence[:, None] * shares).astype(np.float16)
    index = np.arange(n, dtype=np.int32)
    table = pa.table(
        {
            "index": index,
            "key": pa.array([f"{i:09d}" for i in range(n)]),
            "offset": 1536 + 20480 * index.astype(np.int64),
            "size": np.full(n, 18000, np.int32),
            "status": pa.array(["ok"] * n).dictionary_encode(),
            "label": label,
            "confidence": confidence,
            "classes": pa.ListArray.from_arrays(offsets, listed.reshape(-1)),
            "probs": pa.ListArray.from_arrays(offsets, pa.array(probs.reshape(-1))),
            "image_hash": rng.integers(0, 2**63, n, np.uint64),
            "crc32": rng.integers(0, 2**32, n, np.uint32),
        }
    ).cast(label_files.SCHEMA)
    table = table.append_column("file", pa.array(np.full(n, number, np.int32)))
    table = table.append_column("tie", pa.array(tie_hash(shard, index.astype(np.int64))))
    parquet_files.write_table(f"{folder}/{number:05d}.parquet", table, {"format": label_files.FORMAT, "shard": shard})


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))


def warm(path: str) -> None:
    """A file into the page cache, as far as it fits; and the processes into life."""
    with Path(path).open("rb") as file:
        while file.read(1 << 22):
            pass


def ours(pool: ProcessPoolExecutor, paths: Sequence[str], classes: int, per_class: int, out: Path) -> Turn:
    shutil.rmtree(out, ignore_errors=True)
    passes = 0

    def over_files(function: Callable[[Any], Any], groups: Sequence[Any]) -> Iterator[Any]:
        nonlocal passes
        passes += 1
        return pool.map(function, groups)

    with Resident() as resident:
        began, used = time.perf_counter(), resident.cpu()
        select_all(paths, Settings(classes, THRESHOLD, per_class), over_files, str(out), groups=8 * PROCESSES)
        return Turn(time.perf_counter() - began, resident.cpu() - used, resident.peak, passes)


class Resident:
    """The largest sum of the resident sets of this process and its children, while the block runs."""

    def __enter__(self) -> Resident:
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.02):
            self.peak = max(self.peak, sum(each.memory_info().rss for each in self._processes()))

    def cpu(self) -> float:
        """Seconds of all cores that these processes have used."""
        return sum(sum(each.cpu_times()[:2]) for each in self._processes())

    @staticmethod
    def _processes() -> list[psutil.Process]:
        me = psutil.Process()
        return [me, *me.children(recursive=True)]


QUERY = """
copy (
    with confident as (select file, index, label, confidence, tie from read_parquet('{labels}') where confidence >=
    {threshold}::float), ranked as (select file, index, label, row_number() over (partition by label order by confidence
    desc, tie) as rank from confident), counted as (select label, count(*) as n from confident group by label)
    select file, index, {wanted} // n + (rank <= {wanted} % n)::int as copies
    from ranked join counted using (label) where rank <= {wanted}
) to '{out}' (format parquet)
"""


def theirs(folder: Path, per_class: int, out: Path) -> Turn:
    """The same selection by DuckDB, in a process of its own, so that what it keeps is not counted as ours."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    selected = out / "selected.parquet"
    query = QUERY.format(labels=folder / "*.parquet", threshold=THRESHOLD, wanted=per_class, out=selected)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        return alone.submit(execute, query, str(out)).result()


def execute(query: str, folder: str) -> Turn:
    with duckdb.connect(config={**DUCKDB, "temp_directory": folder}) as db:
        db.execute("set enable_progress_bar = false")
        began, used = time.perf_counter(), time.process_time()
        db.execute(query)
        taken = time.perf_counter() - began, time.process_time() - used
    return Turn(*taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def compare(mine: Path, theirs: Path) -> tuple[int, int]:
    """(rows selected, rows that one side lacks or that differ in copies)."""
    query = f"""
        with mine as (select parse_filename(filename, true)::int as file, index, copies
                      from read_parquet('{mine}/*.parquet', filename = true)),
        theirs as (select file, index, copies from read_parquet('{theirs}/selected.parquet'))
        select (select count(*) from mine), count(*) from mine full join theirs using (file, index)
        where mine.copies is distinct from theirs.copies
    """
    with duckdb.connect(config={**DUCKDB, "temp_directory": str(theirs)}) as db:
        found = db.execute(query).fetchone()
    assert found is not None
    return int(found[0]), int(found[1])


def show(found: dict[str, Any]) -> None:
    print("\n| | rows | seconds | rows/s | seconds of all cores | peak MiB |\n|---|---|---|---|---|---|")
    for name in ("ours", "duckdb", "fewer"):
        if name in found:
            row = found[name]
            cells = f"{row['rows']:,} | {row['seconds']:.1f} | {row['rows'] / row['seconds']:,.0f}"
            print(f"| {name.replace('fewer', 'ours')} | {cells} | {row['cpu_seconds']:.1f} | {row['peak_mib']:,} |")
    print(f"\n{found['selected_rows']:,} rows selected, {found['differing_rows']:,} of them differ\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
