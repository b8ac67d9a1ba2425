"""Runs the units of a command that writes shards on a cluster, each once, and keeps what is finished until all is.

out/.spread-<split>-1a2b3c4d/    what is on its way (pipeline.prepare.spread), named by all that decides it
    labelled-003.parquet         the manifest's rows of a shard that is written, and what of it was bad
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.cluster.contract import Cluster, Resources
from pipeline.data import manifest, parquet_files
from pipeline.errors import DataError
from pipeline.prepare.shard_writer import Progress
from pipeline.storage.lock import lock

MakeWorker = Callable[[], Callable[[Any], Any]]
ONE_GROUP = 1 << 20  # rows of a manifest that are held in memory


@dataclass(frozen=True)
class Work:
    """What a command is writing, for its units too: shards of `split` in `out`, what is on its way in `folder`."""

    out: str
    split: str
    folder: str
    token: str

    def there(self) -> set[str]:
        """The files of finished units."""
        return set(storage.listdir(self.folder))

    def leave(self, shard: str, rows: pa.Table, facts: dict[str, Any]) -> None:
        """Note that a shard is written; called by its unit."""
        parquet_files.write_table(self._note(shard), rows, facts)

    def left(self, shard: str) -> dict[str, Any]:
        return parquet_files.read_metadata(self._note(shard))

    def write_manifest(self, shards: Sequence[str]) -> None:
        path = storage.join(self.out, manifest.manifest_name(self.split))
        tables = (parquet_files.read_table(self._note(shard)) for shard in shards)
        if sum(self.left(shard)["images"] for shard in shards) <= ONE_GROUP:  # as on one machine, to the byte
            parquet_files.write_table(path, pa.concat_tables(tables).combine_chunks())
        else:
            parquet_files.write_stream(path, tables)

    def check(self) -> None:
        """OutputError where a worker does not see these folders."""
        storage.require_token(self.folder, self.token)

    def _note(self, shard: str) -> str:
        return storage.join(self.folder, note_name(shard))


def note_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.parquet"


def run_units(
    cluster: Cluster,
    make_worker: MakeWorker,
    units: Sequence[tuple[str, Any]],
    progress: Progress | None,
    done: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """{name: value} of the units that are not `done`. DataError: one failed; what is finished is kept."""
    waiting = [(name, unit) for name, unit in units if done is None or not done(name)]
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for number, outcome in enumerate(cluster.map(make_worker, waiting, resources=Resources()), 1):
        if outcome.error is not None:
            failed[outcome.name] = outcome.error
        found[outcome.name] = outcome.value
        if progress is not None:
            progress(len(units) - len(waiting) + number, len(units))
    if failed:
        more = f" ({len(failed) - 1} more such errors)" if len(failed) > 1 else ""
        raise DataError(f"{storage.redact(failed[min(failed)])}{more}")
    return found


def write_outputs(
    cluster: Cluster,
    make_worker: MakeWorker,
    outputs: Sequence[tuple[str, Any]],
    present: Collection[str],
    work: Work,
    progress: Progress | None,
) -> None:
    """Run the units of shards, by their names, that are not written and noted. Those `present` are compared first, so
    that a wrong folder is refused before it is written to."""
    there = work.there()
    left = [unit for unit in outputs if not (unit[0] in present and note_name(unit[0]) in there)]
    for batch in ([unit for unit in left if unit[0] in present], [unit for unit in left if unit[0] not in present]):
        run_units(cluster, make_worker, batch, progress)


@contextlib.contextmanager
def working(out: str, split: str, identity: Any) -> Iterator[Work]:
    """Hold `out` for a command that `identity` describes; what is on its way is removed when the block ends well."""
    kind = f".spread-{split}-"
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    with lock(out):
        folder = storage.join(out, kind + fingerprint)
        storage.make_folder(folder)
        storage.sweep(folder)
        _sweep_shards(out, split)
        yield Work(out, split, folder, storage.write_token(folder))
        _sweep_shards(out, split)
        for name in storage.listdir(out):
            if name.startswith(kind):
                storage.remove(storage.join(out, name))


def _sweep_shards(out: str, split: str) -> None:
    """Delete what killed writers left of these shards; those of other splits may be at work in the same folder."""
    if not storage.is_url(out):
        for path in Path(out).glob(f".tmp-*-{split}-*.tar"):
            path.unlink(missing_ok=True)
