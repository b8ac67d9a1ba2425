"""Label and selection files are a public product: other programs read them, with the very lines of
docs/label_files.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import small, tiny
from tests.data import tars
from tests.small import World

BLOCK = re.compile(r"```(sql|python)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run with a bad image."""
    world = small.make(tmp_path_factory.mktemp("public"))
    members = {"good.png": tars.picture(1), "no.jpg": b"<html>", "own.png": tars.picture(2)}
    tars.make(world.shards / "unlabelled-002.tar", members)
    ran = world.run("data.max_bad_fraction=1", "select.per_class=5")
    assert ran.status == 0, ran
    return world


def example(world: World, word: str) -> str:
    """The one example of the page that holds `word`, on this run."""
    text = (tiny.ROOT / "docs" / "label_files.md").read_text()
    [found] = [code for _, code in BLOCK.findall(text) if word in code]
    return found.replace("runs/noisy_student", str(world.output))


def run(world: World, library: str) -> dict[str, Any]:
    """What the example of a library leaves."""
    pytest.importorskip(library)
    names: dict[str, Any] = {}
    exec(example(world, f"{library} import" if library == "datasets" else f"import {library}"), names)  # noqa: S102
    return names


def files(world: World, stage: str) -> list[Path]:
    return sorted(world.folder(stage).glob("*.parquet"))


def rows(world: World, stage: str) -> list[dict[str, Any]]:
    """Through pyarrow, which wrote them."""
    return [{"file": path.name, **row} for path in files(world, stage) for row in pq.read_table(path).to_pylist()]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal rows in any order; float16 may have become anything wider."""
    assert len(found) == len(expected)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["key"], row["offset"], row["size"]

    for mine, theirs in zip(sorted(expected, key=key), sorted(found, key=key), strict=True):
        for name in set(mine) - {"file"}:
            value = theirs[name]
            assert (value is None) == (mine[name] is None), name
            if mine[name] is not None:
                assert (list(value) if isinstance(mine[name], list) else value) == mine[name], name


def test_duckdb(world: World) -> None:
    duckdb = pytest.importorskip("duckdb")
    labels, kept = rows(world, "gen1-label"), rows(world, "gen1-select")
    copies = {(row["file"], row["index"]): row["copies"] for row in kept}
    chosen = [row for row in labels if (row["file"], row["index"]) in copies]
    found = duckdb.sql(example(world, "GROUP BY label")).fetchall()
    assert {label: images for label, images, _, _ in found} == Counter(row["label"] for row in chosen)
    for label, _, samples, confidence in found:
        mine = [row for row in chosen if row["label"] == label]
        assert samples == sum(copies[row["file"], row["index"]] for row in mine) == 5
        assert confidence == pytest.approx(sum(row["confidence"] for row in mine) / len(mine))
    bad = {status: (images, key) for status, images, key in duckdb.sql(example(world, "any_value")).fetchall()}
    assert {status: images for status, (images, _) in bad.items()} == Counter(row["status"] for row in labels)
    assert bad["not_an_image"] == (1, "no")
    table = duckdb.sql(f"SELECT * FROM '{world.folder('gen1-label')}/*.parquet'").fetchall()
    names = pq.read_schema(files(world, "gen1-label")[0]).names
    same([dict(zip(names, row, strict=True)) for row in table], labels)


def test_polars(world: World) -> None:
    pl = pytest.importorskip("polars")
    unsure = run(world, "polars")["unsure"]
    expected = [row for row in rows(world, "gen1-label") if (row["confidence"] or 1) < 0.5]
    same(unsure.to_dicts(), expected)
    same(pl.read_parquet(f"{world.folder('gen1-label')}/*.parquet").to_dicts(), rows(world, "gen1-label"))
    same_kept = pl.read_parquet(f"{world.folder('gen1-select')}/*.parquet").to_dicts()
    assert same_kept == [{k: v for k, v in row.items() if k != "file"} for row in rows(world, "gen1-select")]


def test_pandas(world: World) -> None:
    labels = run(world, "pandas")["labels"]
    expected = rows(world, "gen1-label")
    assert len(labels) == len(expected) and labels["status"].value_counts()["not_an_image"] == 1
    assert sorted(labels["confidence"].dropna()) == sorted(
        r["confidence"] for r in expected if r["confidence"] is not None
    )
    assert sorted(labels["image_hash"].dropna()) == sorted(
        r["image_hash"] for r in expected if r["image_hash"] is not None
    )


def test_datasets(world: World) -> None:
    same(list(run(world, "datasets")["rows"]), rows(world, "gen1-label"))


def test_the_page_names_every_column(world: World) -> None:
    text = (tiny.ROOT / "docs" / "label_files.md").read_text()
    for stage in ("gen1-label", "gen1-select"):
        schema = pq.read_schema(files(world, stage)[0])
        for field in schema:
            words = str(field.type).replace("halffloat", "float16").replace("float>", "float32>")
            assert f"| `{field.name}` |" in text, field.name
            if not words.startswith(("list", "dictionary", "float")):
                assert f"| `{field.name}` | {words} |" in text
    audit = json.loads((world.folder("gen1-audit") / "audit.json").read_text())
    assert not [name for name in audit if f"`{name}`" not in text]
