"""Label and selection files are a public product: other programs read them, with the very lines of
docs/label_files.md."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import noisy_lambda
from tests import small, tiny
from tests.data import tars
from tests.small import World

BLOCK = re.compile(r"```(sql|python)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of two generations with a bad image and one that is there twice."""
    world = small.make(tmp_path_factory.mktemp("public"), generations=[{"student": {}}, {"student": {}}])
    members = {
        "good.png": tars.picture(1),
        "no.jpg": b"<html>",
        "own.png": tars.picture(2),
        "twin.png": tars.picture(2),
    }
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


# ---- as one table ------------------------------------------------------------------------------------------


def answers(world: World) -> dict[str, Any]:
    """The five questions of the page, a row at a time."""
    before = {(row["file"], row["index"]): row["label"] for row in rows(world, "gen1-label")}
    every = rows(world, "gen2-label")
    known = [row for row in every if row["label"] is not None]
    both = [(row["label"], before[row["file"], row["index"]]) for row in known]
    both = [(mine, theirs) for mine, theirs in both if theirs is not None]
    sure: dict[int, list[float]] = {}
    for row in known:
        sure.setdefault(row["label"], []).append(row["confidence"])
    hashes = Counter(row["image_hash"] for row in every if row["image_hash"] is not None)
    return {
        "worst": {label: pytest.approx(sum(found) / len(found), rel=1e-5) for label, found in sure.items()},
        "agreement": pytest.approx(sum(mine == theirs for mine, theirs in both) / len(both)),
        "close": sum(row["probs"][0] - row["probs"][1] < 0.1 for row in known),
        "kept": Counter(row["label"] for row in known if row["confidence"] >= 0.34),
        "twice": {number: count for number, count in hashes.items() if count > 1},
    }


@pytest.mark.parametrize("library", ["duckdb", "polars", "pandas"])
def test_five_questions(world: World, library: str) -> None:
    pytest.importorskip(library)
    word = {"duckdb": "import duckdb", "polars": "from polars import", "pandas": ".to_pandas()"}[library]
    names: dict[str, Any] = {}
    code = example(world, word).replace(">= 0.5", ">= 0.34")  # two steps of training make nothing surer
    exec(code, names)  # noqa: S102
    asked = {name: names[name] for name in ("worst", "agreement", "close", "kept", "twice")}
    for name in ("worst", "kept", "twice"):
        found = asked[name]
        pairs = found if library == "duckdb" else found.rows() if library == "polars" else found.items()
        asked[name] = dict(pairs)
    wanted = answers(world)
    assert asked == wanted and len(wanted["twice"]) == 1 and wanted["close"] and wanted["kept"]


def test_the_example_of_arrow(world: World) -> None:
    names: dict[str, Any] = {}
    exec(example(world, "from pyarrow.compute import field"), names)  # noqa: S102
    expected = [row["key"] for row in rows(world, "gen2-label") if (row["confidence"] or 0) > 0.9]
    assert names["sure"].column_names == ["shard", "key", "label"] and names["sure"]["key"].to_pylist() == expected


def test_labels_of_a_run(world: World, tmp_path: Path) -> None:
    for generation in (1, 2):
        found = noisy_lambda.labels(world.output, generation)
        assert found.classes == tuple(small.CLASSES) and found.folder == str(world.folder(f"gen{generation}-label"))
        kept = {(row["file"], row["index"]): row["copies"] for row in rows(world, f"gen{generation}-select")}
        for row in found.select("shard", "index", "copies", "weight").to_arrow().to_pylist():
            assert row["copies"] == kept.get((row["shard"].replace(".tar", ".parquet"), row["index"]), 0)
            assert row["weight"] == (1.0 if row["copies"] else 0.0)
    assert noisy_lambda.labels(str(world.output)).folder == str(world.folder("gen2-label"))
    with pytest.raises(noisy_lambda.UserError, match=r"has no finished labels of generation 3; it has those of 1, 2"):
        noisy_lambda.labels(world.output, 3)
    elsewhere = small.copy(world, tmp_path)
    shutil.rmtree(elsewhere.shards)
    assert noisy_lambda.labels(elsewhere.output).to_arrow().num_rows == len(rows(world, "gen2-label"))
    next(elsewhere.folder("gen2-label").glob("*.parquet")).write_bytes(b"no")
    with pytest.raises(noisy_lambda.UserError, match="is not a readable Parquet file"):
        noisy_lambda.labels(elsewhere.output).to_arrow()
