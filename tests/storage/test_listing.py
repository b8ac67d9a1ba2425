"""Folders are listed whole, at the cost of a directory scan."""

from __future__ import annotations

import random
from pathlib import Path

from pipeline import storage
from tests.operations import lines


def make(folder: Path, seed: int) -> None:
    """A tree of files, folders, links of all kinds, hidden and temporary things."""
    chance, folders = random.Random(seed), [folder]
    folder.mkdir()
    for number in range(60):
        path = chance.choice(folders) / f"{chance.choice(['', '', '.', '.tmp-', 'ü '])}{number}"
        kind = chance.choice(["file", "file", "file", "folder", "link", "broken", "to a folder"])
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "file":
            path.write_bytes(bytes(chance.randrange(50)))
        else:
            path.symlink_to({"link": __file__, "broken": "nothing", "to a folder": folder}[kind])


def by_pathlib(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-")]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def test_a_walk_finds_every_file_and_its_size(tmp_path: Path) -> None:
    for seed in range(20):
        folder = tmp_path / str(seed)
        make(folder, seed)
        found = storage.walk(str(folder))
        assert found == by_pathlib(folder) and list(found) == sorted(found)
    assert storage.walk(str(tmp_path / "nothing")) == storage.walk(__file__) == {}


def test_a_walk_is_a_scan(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"part-{number:06d}.parquet").touch()
    assert lines(lambda: storage.walk(str(tmp_path))) < 12 * 300, "pathlib takes ten times that"


def test_names_that_begin_in_a_way(tmp_path: Path) -> None:
    for name in ("metrics-1", "metrics-2", "other", ".tmp-metrics-3"):
        (tmp_path / name).touch()
    assert storage.listdir(str(tmp_path), prefix="metrics-") == ["metrics-1", "metrics-2"]
