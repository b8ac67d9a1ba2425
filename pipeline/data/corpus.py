"""Freezes the list of shards of a source: what a run works on, though the folder may grow meanwhile.

`corpus-<first 8 hex of the fingerprint>.json` in the output folder holds names and sizes, which make the
fingerprint, and under `uses` which source and pattern stand for it. The use with the highest sequence number
is the current one. `mended` of a use are shards that were replaced by others of the same name and size and taken in.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.data.shards import Shard
from pipeline.errors import DataError, OutputError


@dataclass(frozen=True)
class Corpus:
    fingerprint: str  # sha256 over names and sizes, 64 hex digits
    shards: list[Shard]
    changes: list[str]  # one line per way in which today's listing differs from the frozen one
    touched: dict[str, str] = field(default_factory=dict)  # shards of another stamp than the frozen one, which it gives
    mended: dict[str, str] = field(default_factory=dict)  # shards that were replaced and taken in, with their sha256


Records = dict[str, dict[str, Any]]
"""By name of the file, the lists of shards that lie in an output."""


def fingerprint(shards: list[Shard]) -> str:
    listed = [[shard.name, shard.size] for shard in shards]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()


def freeze(
    output: str,
    shards: list[Shard],
    source: str,
    pattern: str | list[str],
    *,
    refreeze: bool = False,
    write: bool = True,
    seen: Records | None = None,
) -> Corpus:
    """The frozen corpus of this source and pattern; frozen now, from `shards`, at first use or by `refreeze`.

    Where today's listing differs, the frozen shards are used and `changes` says what is different; a frozen
    shard that is missing or has another size is a DataError; one of which only the stamp differs is `touched`, and its
    checksum decides. `write=False` (for plan) writes nothing. `seen`: the lists that were read for other sources.
    """
    seen = {} if seen is None else seen
    texts = [storage.redact(text) for text in ([pattern] if isinstance(pattern, str) else pattern)]
    records = _records(output, seen)
    uses = [
        (use, record)
        for record in records
        for use in record["uses"]
        if use["source"] == source and use["pattern"] == texts
    ]
    if uses:
        use, frozen = max(uses, key=lambda use: use[0]["sequence"])
        stamps = {name: stamp for (name, _), stamp in zip(frozen["shards"], use["stamps"], strict=True)}
        touched = {shard.name: old for shard in shards if (old := stamps.get(shard.name, shard.stamp)) != shard.stamp}
        mended = use.get("mended", {})
        if frozen["fingerprint"] == fingerprint(shards):
            return Corpus(frozen["fingerprint"], shards, [], touched, mended)
        if not refreeze:
            return _compare(frozen, shards, source, touched, mended)
    found = fingerprint(shards)
    if write:
        _write(output, seen, found, shards, source, texts)
    return Corpus(found, shards, [])


def take_in(
    output: str,
    frozen: Corpus,
    source: str,
    pattern: str | list[str],
    mended: Mapping[str, str],
    *,
    write: bool = True,
    seen: Records | None = None,
) -> Corpus:
    """The frozen corpus with shards that were replaced, `mended` (name: sha256); `freeze` gives it from now on. `seen`
    as there."""
    seen = {} if seen is None else seen
    stamps = {shard.name: shard.stamp for shard in frozen.shards}
    touched = {name: stamp for name, stamp in frozen.touched.items() if name not in mended}
    all_mended = dict(sorted({**frozen.mended, **mended}.items()))
    if write:
        texts = [storage.redact(text) for text in ([pattern] if isinstance(pattern, str) else pattern)]
        shards = [replace(shard, stamp=touched.get(shard.name, stamps[shard.name])) for shard in frozen.shards]
        _records(output, seen)
        _write(output, seen, frozen.fingerprint, shards, source, texts, all_mended)
    return replace(frozen, touched=touched, mended=all_mended)


def _records(output: str, seen: Records) -> list[dict[str, Any]]:
    names = fnmatch.filter(storage.listdir(output), "corpus-*.json")
    for name in names:
        if name not in seen:
            seen[name] = _read(storage.join(output, name))
    return [seen[name] for name in names]


def _read(path: str) -> dict[str, Any]:
    record = storage.read_record(path)
    try:
        listed = json.dumps([[str(name), int(size)] for name, size in record["shards"]], separators=(",", ":"))
        fits = hashlib.sha256(listed.encode()).hexdigest() == record["fingerprint"]
        fits &= storage.name(path) == f"corpus-{record['fingerprint'][:8]}.json"
        fits &= all(
            {"source", "pattern", "sequence"} < use.keys() and len(use["stamps"]) == len(record["shards"])
            for use in record["uses"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise OutputError(
            f"{storage.redact(path)} is not the list of shards that it should be; delete it and run again"
        )
    return record


def _write(
    output: str,
    seen: Records,
    found: str,
    shards: list[Shard],
    source: str,
    texts: list[str],
    mended: Mapping[str, str] | None = None,
) -> None:
    sequence = 1 + max((use["sequence"] for record in seen.values() for use in record["uses"]), default=0)
    # Two sources may hold the same names and sizes: they share the file, each with its own use.
    record = next((record for record in seen.values() if record["fingerprint"] == found), None) or {
        "format": 1,
        "fingerprint": found,
        "uses": [],
        "shards": [[shard.name, shard.size] for shard in shards],
    }
    stamps = [shard.stamp for shard in shards]
    use = {"source": source, "pattern": texts, "sequence": sequence, "stamps": stamps}
    record["uses"].append({**use, "mended": dict(mended)} if mended else use)
    name = f"corpus-{found[:8]}.json"
    storage.write_record(storage.join(output, name), record)
    seen[name] = record


def _compare(
    frozen: dict[str, Any], shards: list[Shard], source: str, touched: dict[str, str], mended: dict[str, str]
) -> Corpus:
    now = {shard.name: shard for shard in shards}
    sizes = {str(name): int(size) for name, size in frozen["shards"]}
    missing = [name for name in sizes if name not in now]
    resized = [name for name, size in sizes.items() if name in now and now[name].size != size]
    if missing or resized:
        found = [f"missing: {_some(missing)}"] if missing else []
        found += [f"{name} has {now[name].size} bytes instead of {sizes[name]}" for name in resized[:3]]
        found += [f"and {len(resized) - 3} more of another size"] if len(resized) > 3 else []
        raise DataError(
            f"source '{source}': shards differ from the corpus frozen at first use ({'; '.join(found)}); "
            "bring them back, or go on with what is there by --refreeze"
        )
    new = [shard.name for shard in shards if shard.name not in sizes]
    change = f"source '{source}': {len(new)} new shards are not used ({_some(new)}); --refreeze takes them in"
    return Corpus(frozen["fingerprint"], [now[name] for name in sizes], [change], touched, mended)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
