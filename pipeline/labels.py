"""Joins what a run says of its unlabelled images: label files, selection files and the manifest, as one lazy dataset.

`noisy_lambda.labels` opens it. A row is a sample, a block the samples of one shard: blocks are read one after the
other, only the columns that are asked for, and rows are dropped before the next block is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from pipeline import graph, storage
from pipeline.config.load_run import load_run
from pipeline.data import label_files, parquet_files
from pipeline.data.manifest_rows import ManifestRows
from pipeline.errors import ConfigError, DataError, OutputError
from pipeline.labelling.corrected import label_path
from pipeline.plan.adopted import classes_of
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import JOB, SELECTION, Done, read_done, read_json_file

if TYPE_CHECKING:
    import pandas
    import polars

SHARD = pa.field("shard", pa.string(), nullable=False)
CHOSEN = (pa.field("copies", pa.int32()), pa.field("weight", pa.float32()))
FROM = (pa.field("path", pa.string()), pa.field("sha256", pa.string()))
STATUS = pa.field("status", pa.string(), nullable=False)
PROBS = pa.field("probs", pa.list_(pa.float32()))  # float16 in the files, which not every reader knows
OF_LABELS = [{"status": STATUS, "probs": PROBS}.get(field.name, field) for field in label_files.SCHEMA]
SCHEMA = pa.schema([SHARD, *OF_LABELS, *CHOSEN, *FROM])
BATCH = 1 << 16  # rows, at most


@dataclass(frozen=True)
class Labels:
    """The rows of one generation, lazily: `select` and `filter` only note what is wanted, and what gives rows reads
    block by block.

    Columns: `shard`, those of label files, `copies` and `weight` (0 of what was not kept; null where nothing was
    selected), `path` and `sha256` of the manifest that `prepare` wrote (null without one)."""

    folder: str
    shards: tuple[str, ...]
    """Names of those that could be labelled."""
    classes: tuple[str, ...]
    """Names, which `label` counts from 0; () where the teacher is gone."""
    selection: str | None = None
    corrected: frozenset[str] = frozenset()
    """Shards of which people have corrected labels."""
    root: str = ""
    """Where a manifest may lie."""
    expected: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = tuple(SCHEMA.names)
    where: pc.Expression | None = None

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([SCHEMA.field(name) for name in self.columns])

    def select(self, *columns: str) -> Labels:
        """Only these columns. ConfigError: there is no such one."""
        for name in columns:
            if name not in SCHEMA.names:
                raise ConfigError(f"labels have no column '{name}'; they have {', '.join(SCHEMA.names)}")
        return dataclasses.replace(self, columns=columns)

    def filter(self, where: pc.Expression) -> Labels:
        """Only rows of which this is true, such as `pyarrow.compute.field("confidence") > 0.9`, also of columns that
        are not selected; shards of which it cannot be true are not opened. ConfigError: it is not about these
        columns."""
        try:
            SCHEMA.empty_table().filter(where)
        except (pa.ArrowException, TypeError) as error:
            raise ConfigError(f"labels cannot be filtered by {where}: {str(error).splitlines()[0]}") from error
        return dataclasses.replace(self, where=where if self.where is None else self.where & where)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in the order of shards and samples, at most 65,536 at once; no more than a shard is in memory."""
        for number in self.units:
            yield from self.block(number).to_batches(BATCH)

    @property
    def units(self) -> list[int]:
        """Numbers of the shards that may have rows."""
        if self.where is None:
            return list(range(len(self.shards)))
        # Arrow itself decides which files a filter rules out; the files that it is told of are never opened.
        known = [ds.field("shard") == name for name in self.shards]
        paths = [str(number) for number in range(len(self.shards))]
        every = ds.FileSystemDataset.from_paths(
            paths, SCHEMA, ds.ParquetFileFormat(), fs.LocalFileSystem(), partitions=known
        )
        return [int(one.path) for one in every.get_fragments(self.where)]

    def block(self, number: int) -> pa.Table:
        """The rows of one shard. DataError: a file is damaged, or another shard's."""
        shard = self.shards[number]
        wanted = [*self.columns, *(_names_in(self.where) - set(self.columns))]
        path = label_path(self.folder, self.selection or "", shard, self.corrected)
        own = [name for name in wanted if name in label_files.SCHEMA.names and name != "crc32"]
        table, metadata = parquet_files.read_with_metadata(
            path, ["index", *own], ["crc32"] if "crc32" in wanted else []
        )
        label_files.check_labels(metadata, {"shard": shard, **dict(self.expected)}, path)
        columns = {name: table[name] for name in table.column_names} | {"shard": _repeated(shard, len(table))}
        if "crc32" in wanted and "crc32" not in columns:  # 0.2.0 wrote none
            columns["crc32"] = pa.nulls(len(table), pa.uint32())
        if {"copies", "weight"} & set(wanted):
            columns |= self._chosen(shard, table["index"].to_numpy())
        if {"path", "sha256"} & set(wanted):
            columns |= self._manifests.of(shard, table["index"].to_numpy())
        schema = pa.schema([SCHEMA.field(name) for name in wanted])
        arrays = [_cast(columns[field.name], field.type) for field in schema]
        found = pa.Table.from_arrays(arrays, schema=schema)
        return (found if self.where is None else found.filter(self.where)).select(list(self.columns))

    def _chosen(self, shard: str, index: np.ndarray) -> dict[str, Any]:
        if self.selection is None:
            return {field.name: pa.nulls(len(index), field.type) for field in CHOSEN}
        path = storage.join(self.selection, label_files.file_name(shard))
        table = parquet_files.read_expected(path, ["index", "copies"], {"shard": shard}, ["weight"])
        rows = np.searchsorted(index, table["index"].to_numpy())
        if len(rows) and (rows[-1] >= len(index) or (index[rows] != table["index"].to_numpy()).any()):
            raise DataError(
                f"the selection {storage.redact(path)} names samples that the label file of {shard} does not hold; "
                "delete the selection stage's folder and run again"
            )
        copies, weight = np.zeros(len(index), np.int32), np.zeros(len(index), np.float32)
        copies[rows] = table["copies"].to_numpy()
        weight[rows] = table["weight"].to_numpy() if "weight" in table.column_names else 1.0
        return {"copies": pa.array(copies), "weight": pa.array(weight)}

    @cached_property
    def _manifests(self) -> ManifestRows:
        return ManifestRows(self.root)

    # ---- in other forms -------------------------------------------------------------------------------------------

    def to_reader(self) -> pa.RecordBatchReader:
        """A stream of them, which DuckDB and others query without holding it."""
        return pa.RecordBatchReader.from_batches(self.schema, self.batches())

    def to_arrow(self) -> pa.Table:
        """All of them in memory."""
        return pa.Table.from_batches(self.batches(), self.schema)

    def to_pandas(self) -> pandas.DataFrame:
        """All of them in memory; whole numbers stay whole where some are null (pandas' own Int32 and UInt64)."""
        import pandas

        whole = {pa.int32(): pandas.Int32Dtype(), pa.uint32(): pandas.UInt32Dtype(), pa.uint64(): pandas.UInt64Dtype()}
        return self.to_arrow().to_pandas(types_mapper=whole.get)

    def to_polars(self) -> polars.LazyFrame:
        """A lazy frame, which reads only the columns and rows of a query; with `collect(engine="streaming")` block by
        block. ConfigError: Polars is not installed."""
        try:
            import polars
            from polars.io.plugins import register_io_source
        except ImportError as error:
            raise ConfigError("polars is not installed: python -m pip install polars") from error

        def read(
            columns: list[str] | None, predicate: polars.Expr | None, rows: int | None, size: int | None
        ) -> Iterator[polars.DataFrame]:
            narrow = self if columns is None else self.select(*columns)
            for batch in narrow.batches() if rows is None or rows > 0 else ():
                frame: Any = polars.from_arrow(batch)
                frame = frame if rows is None else frame.head(rows)
                rows = None if rows is None else rows - len(frame)
                yield frame if predicate is None else frame.filter(predicate)
                if rows == 0:
                    return

        empty: Any = polars.from_arrow(self.schema.empty_table())
        return register_io_source(read, schema=empty.schema)

    def to_ray(self) -> Any:
        """A ray.data.Dataset, of a block a shard; each is read by a worker, which must see the run's folder."""
        from pipeline.cluster import ray_dataset

        return ray_dataset.of_blocks(self.block, self.units)


def open_labels(run: str, generation: int | None = None) -> Labels:
    """What `noisy_lambda.labels` gives. UserError: there are no such labels, or which ones is not certain."""
    stages, corpus = _stages(run)
    known = sorted(int(name[3:].partition("-")[0]) for name in stages if re.fullmatch(r"gen\d+-label", name))
    if not known or (generation is not None and generation not in known):
        which = "labels" if generation is None else f"labels of generation {generation}"
        have = f"; it has those of {', '.join(map(str, known))}" if known else ""
        raise OutputError(f"{storage.redact(run)} has no finished {which}{have}")
    number = known[-1] if generation is None else generation
    labels, chosen = stages[f"gen{number}-label"], stages.get(f"gen{number}-select")
    shards = _shards(labels, corpus)
    teacher = str(labels.info.get("teacher", ""))
    made = next((one for one in _all_done(run) if one.model and teacher and one.output == teacher), None)
    classes = classes_of(made.folder) if made else None
    expected = {"teacher": teacher} if teacher else {}
    expected |= {"class_list": label_files.class_list_hash(classes)} if classes else {}
    corrected = read_json_file(chosen, SELECTION).get("corrected", {}) if chosen else {}
    root = load_run(run).data.root
    root = root or (stages["prepare"].folder if "prepare" in stages else "")
    return Labels(
        labels.folder,
        shards,
        tuple(classes or ()),
        chosen.folder if chosen else None,
        frozenset(corrected),
        root,
        tuple(expected.items()),
    )


def _stages(run: str) -> tuple[dict[str, Done], list[str] | None]:
    """The finished stages that the run's job.yaml reaches, and the names of its unlabelled shards; where these are
    gone, all stages that are there, if each is there once, and None."""
    path = storage.join(run, JOB)
    if not storage.exists(path):
        raise OutputError(f"{storage.redact(run)} is no run: it has no {JOB}; name the output of one")
    job = load_run(run)
    if not job.generations:
        return {}, None
    done: dict[str, Done] = {}
    corpora = Corpora(job, done, write=False)
    try:
        looks = list(graph.walk(job, done, corpora))
        if problem := next((look.problem for look in looks if look.problem), None):
            raise problem
        return done, [shard.name for shard in corpora["unlabelled"].shards] if done else None
    except DataError as error:
        problem = error
    found = _all_done(run)
    names = [one.name for one in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{problem}; without them it is not certain which {twice[0]} of {storage.redact(run)} is meant")
    return {one.name: one for one in found}, None


def _all_done(run: str) -> list[Done]:
    folders = [name for name in storage.listdir(run) if re.fullmatch(graph.stage_folders(), name)]
    return [one for one in (read_done(storage.join(run, name)) for name in folders) if one]


def _shards(labels: Done, corpus: Sequence[str] | None) -> tuple[str, ...]:
    """Those of which there are labels; `corpus`: all that were to be labelled, if that is known."""
    present = {
        f"{name.removesuffix('.parquet')}.tar" for name in storage.walk(labels.folder) if name.endswith(".parquet")
    }
    wanted = sorted(present) if corpus is None else [name for name in corpus if name not in labels.info["failed"]]
    if lost := [name for name in wanted if name not in present]:
        raise DataError(
            f"{len(lost)} of {len(wanted)} label files are gone from {storage.redact(labels.folder)}, the first of "
            f"{lost[0]}; delete the done.json there and run again, which labels the shards that lack one"
        )
    return tuple(wanted)


def _names_in(where: pc.Expression | None) -> set[str]:
    """The columns that an expression speaks of, and at most others whose names are in its constants."""
    text = "" if where is None else str(where)
    return {name for name in SCHEMA.names if re.search(rf"(?<!\w){name}(?!\w)", text)}


def _repeated(text: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([text])).dictionary_decode()


def _cast(column: Any, kind: pa.DataType) -> Any:
    return column if column.type == kind else column.cast(kind)
