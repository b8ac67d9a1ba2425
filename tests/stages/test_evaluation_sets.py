"""`evaluate.sets`: further labelled sets are entries of the configuration, and touch nothing but the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import small
from tests.data import tars
from tests.small import World

STAYING = ("index", "gen0-teacher")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of a teacher alone, and shards that it does not know of: `copies` holds the test images again."""
    made = small.make(tmp_path_factory.mktemp("sets"), generations=[])
    tars.shard(made.shards / "copies-000.tar", 3, labels=[0, 1, 2], start=200)
    tars.shard(made.shards / "other-000.tar", 4, labels=[0, 0, 1, 2], start=600)
    tars.shard(made.shards / "other-001.tar", 2, labels=[2, 1], start=700)
    assert made.run().status == 0
    return made


def evaluations(world: World) -> list[Path]:
    return sorted(world.output.glob("evaluate-*"), key=lambda path: path.stat().st_mtime)


def test_adding_sets_reruns_evaluate_and_report_alone(world: World) -> None:
    [first] = evaluations(world)
    before = json.loads((first / "evaluate.json").read_text())
    assert before["models"][0]["sets"] == {}
    sets = "evaluate.sets={same: 'copies-*.tar', other: 'other-*.tar'}"
    planned = small.command("plan", world.job, f"output={world.output}", sets)
    assert "evaluate.sets.other" in planned.out and planned.status == 0
    ran = world.run(sets)
    assert ran.status == 0, ran.err
    redone = [line.split()[1] for line in ran.out.splitlines() if line.startswith("✓")]
    assert redone == ["evaluate", "report"]
    found = json.loads((evaluations(world)[-1] / "evaluate.json").read_text())["models"]
    for old, new in zip(before["models"], found, strict=True):
        figures = ("top1", "top5", "loss", "ece")
        assert {key: new[key] for key in figures} == {key: old[key] for key in figures}
        assert new["sets"]["same"] == {key: new[key] for key in figures}  # the same images
        assert list(new["sets"]) == ["same", "other"] and set(new["sets"]["other"]) == set(figures)
    page = (
        world.folder("report") if False else sorted(world.output.glob("report-*"), key=lambda p: p.stat().st_mtime)[-1]
    )
    text = (page / "index.html").read_text()
    assert "Further sets" in text and "other" in text
    again = world.run(sets)
    assert "all is done; nothing had to run" in again.out
    assert "all is done; nothing had to run" in world.run().out


def test_images_of_a_set_that_models_were_trained_on_are_named(world: World) -> None:
    tars.shard(world.shards / "known-000.tar", 4, labels=[0, 1, 2, 0], start=3)  # the last three of the labelled images
    ran = world.run("evaluate.sets={known: 'known-*.tar'}")
    assert "3 of 4 different images of evaluate.sets.known are labelled images too" in ran.out, ran


def test_a_shard_that_was_touched_is_tested_again(world: World) -> None:
    sets = "evaluate.sets={other: 'other-*.tar'}"
    assert world.run(sets).status == 0
    (world.shards / "other-000.tar").touch()
    ran = world.run(sets)
    assert "✓ evaluate" in ran.out and ran.out.count("done before") == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("{learned: 'labelled-*.tar'}", "evaluate.sets.learned and data.labelled both match 1 shard,"),
        ("{none: 'nothing-*.tar'}", "nothing-*.tar"),
        ("{test: 'other-*.tar'}", "evaluate.sets names a set 'test'"),
        ("{'a/b': 'other-*.tar'}", "evaluate.sets names a set 'a/b'"),
        ("{other: ''}", "evaluate.sets.other is empty"),
        ("{unlabelled: 'unlabelled-*.tar'}", "has no label"),
        ("[other-*.tar]", "evaluate.sets"),
    ],
)
def test_mistakes_in_sets_are_one_sentence(world: World, setting: str, said: str) -> None:
    ran = world.run(f"evaluate.sets={setting}")
    assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran


def test_a_pattern_that_matches_nothing_does_not_wait_for_evaluate(worlds: small.Store, tmp_path: Path) -> None:
    """Whatever is done already: neither the first stage that runs, nor a later one, begins."""
    nothing = "evaluate.sets={none: 'nothing-*.tar'}"
    for until in ("gen1-select", "index"):
        finished = worlds.finished(tmp_path / until, until)
        done = finished.done()
        ran = finished.run(nothing)
        assert ran.status == 2 and "no shard matches nothing-*.tar" in ran.err and finished.done() == done
