"""A finished run folder of which a file is damaged: what is made of it is what it would have been, or one sentence.

A bit is flipped, a file is cut or emptied, or two files change places; then the folders of later stages are deleted and
the same command runs again. The *result* (weights, rows of labels and selections, accuracies, class lists) must be that
of the undamaged run, or the run ends in one sentence with exit status 2. Times, speeds, MLflow's store and the screen
may differ.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import storage
from pipeline.data import parquet_files
from pipeline.errors import DataError
from tests import small
from tests.small import World

WAYS = ("flip", "flip", "flip", "cut", "empty", "swap")
FIGURES = ("stage", "top1", "top5", "ece", "images", "parameters")


def result(world: World) -> dict[str, Any]:
    """What a run is for."""
    found: dict[str, Any] = {}
    for path in sorted(world.output.rglob("*")):
        name = path.relative_to(world.output).as_posix()
        if path.name == "model.safetensors" and "checkpoints" not in name:
            found[name] = storage.sha256(str(path))
        elif path.name == "model.yaml":
            found[name] = yaml.safe_load(path.read_text())
        elif path.suffix == ".parquet" and ("-label-" in name or "-select-" in name):
            try:
                found[name] = parquet_files.read_table(str(path)).to_pydict()
            except DataError:  # which whoever reads it gets
                found[name] = None
        elif path.name == "evaluate.json":
            rows = json.loads(path.read_text())["models"]
            found[name] = [{key: row.get(key) for key in FIGURES} for row in rows]
    return found


def damage(draw: random.Random, path: Path, others: list[Path], way: str) -> bool:
    """Whether the file is another one now."""
    before = path.read_bytes()
    if way == "flip" and before:
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif way == "cut" and before:
        path.write_bytes(before[: draw.randrange(len(before))])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "swap":
        alike = [other for other in others if other.suffix == path.suffix and other != path]
        if alike:
            other = draw.choice(alike)
            theirs = other.read_bytes()
            other.write_bytes(before)
            path.write_bytes(theirs)
    return path.read_bytes() != before


def files_of(world: World) -> Iterator[Path]:
    for path in sorted(world.output.rglob("*")):
        if path.is_file() and not path.name.startswith(("mlflow.db", "metrics")) and ".lock" not in path.name:
            yield path


def attack(worlds: small.Store, folder: Path, seed: int) -> str | None:
    """One case; what came of it, or None where nothing was damaged."""
    draw = random.Random(seed)
    world = worlds.finished(folder)
    whole = result(world)
    later = draw.randrange(1, len(world.stages))
    before = [
        path
        for stage in world.stages[:later]
        for path in files_of(world)
        if path.relative_to(world.output).parts[0].startswith(stage)
    ]
    before += [path for path in files_of(world) if path.parent == world.output]
    path = draw.choice(before)
    way = draw.choice(WAYS)
    case = f"seed {seed}: {way} {path.relative_to(world.output)}, {world.stages[later]} deleted"
    for stage in world.stages[later:] if draw.random() < 0.7 else world.stages[later : later + 1]:
        shutil.rmtree(world.folder(stage))
    if not damage(draw, path, [other for other in before if other != path], way):
        return None
    ran = world.run()
    assert "Traceback" not in ran.out + ran.err, (case, ran.err)
    if ran.status == 2:
        assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, (case, ran.err)
        return f"{case}: {ran.err}"
    assert ran.status == 0, (case, ran)
    found = result(world)
    unread = {name for name in whole if name.endswith(".parquet") and found.get(name, 0) is None}
    if way == "swap":  # so does whoever reads these
        unread |= {name for name in whole if name.endswith(".parquet") and path.suffix == ".parquet"}
    changed = [name for name in whole if name not in unread and found.get(name) != whole[name]]
    assert not changed, (case, changed)
    return f"{case}: the same"


@pytest.mark.parametrize("seed", range(6))
def test_damage_never_makes_another_result(worlds: small.Store, tmp_path: Path, seed: int) -> None:
    attack(worlds, tmp_path, seed)


@pytest.mark.parametrize("stage", ["gen1-label", "gen1-select"])
def test_rows_of_two_shards_that_changed_places_are_found_by_whoever_reads_them(
    worlds: small.Store, tmp_path: Path, stage: str
) -> None:
    world = worlds.finished(tmp_path)
    first, second = sorted(world.folder(stage).rglob("*.parquet"))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    for path in (first, second):
        with pytest.raises(DataError, match=f"{path.name} is the file of another shard"):
            parquet_files.read_table(str(path))
    shutil.rmtree(world.folder("report"))
    ran = world.run()
    assert ran.status == 2 and "is the file of another shard" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_kinds_of_damage(worlds: small.Store, tmp_path: Path, hundred: int) -> None:
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        folder = tmp_path / str(seed)
        folder.mkdir()
        attack(worlds, folder, seed)
        shutil.rmtree(folder)
