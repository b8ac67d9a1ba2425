"""What the selection stage adds to the selection: names of classes, and how far the labels are from the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.selection.bias import bias
from pipeline.stages import select
from tests import small
from tests.data import tars


def test_bias_is_the_share_that_would_have_to_change_class() -> None:
    found = bias([60, 20, 20, 0], [1, 1, 1, 1])
    assert found["distance"] == pytest.approx(0.35)
    assert found["over"] == [[0, 0.6, 0.25]]
    assert found["under"] == [[3, 0.0, 0.25], [2, 0.2, 0.25], [1, 0.2, 0.25]]
    same = bias([30, 10], [3, 1])
    assert (same["distance"], same["over"], same["under"]) == (0, [], [])


def test_chance_is_what_two_draws_differ_by() -> None:
    rng = np.random.default_rng(0)
    sizes, classes = (200, 300), 20
    draws = [[rng.multinomial(size, np.full(classes, 1 / classes)).tolist() for size in sizes] for _ in range(200)]
    found = [bias(*draw) for draw in draws]
    assert np.mean([one["distance"] for one in found]) == pytest.approx(found[0]["chance"], rel=0.05)


def test_an_unknown_class_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    world = small.make(tmp_path, select={"threshold": 0.0, "thresholds": {"dgo": 0.5}})
    ran = world.run()
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert "generations[0].select.thresholds names the class 'dgo'" in ran.err and "did you mean 'dog'?" in ran.err
    assert world.done() == []
    ran = world.run("select.thresholds={owl: 2}")
    assert ran.status == 2 and "generations[0].select.thresholds.owl is 2.0; it must be between 0.0 and 1.0" in ran.err
    ran = world.run("select.thresholds={3: 0.5}")
    assert ran.status == 2 and 'a name that is a number stands in quotes, such as "3": 0.5' in ran.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_class": 3, "top_fraction": 0.5}, "select.per_class and generations[0].select.top_fraction are both set"),
        ({"max_noise": 0.05, "threshold": 0.3}, "select.max_noise and generations[0].select.threshold are both set"),
        ({"max_noise": 0.05, "thresholds": {"cat": 0.3}}, "select.max_noise and generations[0].select.thresholds are"),
        ({"weight": "confidence", "max_copies": 2}, "select.weight and generations[0].select.max_copies are both set"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path: Path, settings: dict[str, float], words: str) -> None:
    ran = small.make(tmp_path, select=settings).run()
    assert ran.status == 2 and ran.err.count("\n") == 1 and words in ran.err


def test_a_student_learns_from_images_weighted_by_confidence(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, until="gen1-label")
    ran = world.run("select.weight=confidence", "select.thresholds={cat: 0.1}")
    assert ran.status == 0, ran.err
    [label], [chosen] = (
        [path for path in world.folder(f"gen1-{kind}").glob("*.parquet") if path.name == "unlabelled-001.parquet"]
        for kind in ("label", "select")
    )
    confidence = pq.read_table(label, columns=["index", "confidence"]).to_pydict()
    rows = pq.read_table(chosen).to_pydict()
    assert rows == {"index": confidence["index"], "copies": [1] * 4, "weight": confidence["confidence"]}
    summary = json.loads((world.folder("gen1-select") / "summary.json").read_text())
    assert 0 <= summary["bias"]["distance"] <= 1


def test_a_skewed_labelling_is_warned_about(tmp_path: Path) -> None:
    """A threshold that all but one class miss stands in for a teacher that says the same of everything."""
    world = small.make(tmp_path, select={"threshold": 0.0})
    tars.shard(world.shards / "unlabelled-000.tar", 200, start=300)
    assert "the selection keeps no image" in world.run("select.threshold=1.0").err  # labelled, that is
    shutil.rmtree(world.folder("gen1-select"))
    label = pq.read_table(world.folder("gen1-label") / "unlabelled-000.parquet", columns=["label"])["label"].to_numpy()
    most = int(np.bincount(label).argmax())
    others = {name: 1.0 for number, name in enumerate(small.CLASSES) if number != most}
    ran = world.run(f"select.thresholds={json.dumps(others)}")
    assert ran.status == 0
    text = " ".join((ran.out + ran.err).split())
    assert "67 % of them would have to be of another class" in text
    assert f"too many of {small.CLASSES[most]} (100 % for 33.3 %); too few of" in text
    found = json.loads((world.folder("gen1-select") / "summary.json").read_text())["bias"]
    assert found["distance"] == pytest.approx(2 / 3, abs=1e-6) and found["chance"] < 0.4
    assert found["over"] == [[most, 1.0, 0.333333]] and len(found["under"]) == 2


def test_a_label_file_that_is_gone_is_not_passed_over(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path)
    folder = world.folder("gen1-label")
    (folder / "unlabelled-001.parquet").unlink()
    ran = world.run("select.threshold=0.01")
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert "1 of 2 label files are gone from" in ran.err and "the first is unlabelled-001.parquet" in ran.err
    (folder / "done.json").unlink()
    assert world.run("select.threshold=0.01").status == 0


def test_groups_go_through_the_cluster_where_there_are_many_files(
    worlds: small.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds.finished(tmp_path, select={"threshold": 0.0, "per_class": 2})
    here = {path.name: path.read_bytes() for path in world.folder("gen1-select").glob("*.parquet")}
    shutil.rmtree(world.folder("gen1-select"))
    monkeypatch.setattr(select, "SMALL_FILES", 0)
    assert world.run().status == 0
    assert here == {path.name: path.read_bytes() for path in world.folder("gen1-select").glob("*.parquet")}
    shutil.rmtree(world.folder("gen1-select"))
    (world.folder("gen1-label") / "unlabelled-001.parquet").write_bytes(b"PAR1")
    ran = world.run()
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert "selection failed on files 2 of 2" in ran.err and "not a readable Parquet file" in ran.err
