"""`label.corpus: selected`: generation 2 labels what generation 1 kept, and nothing else."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from pipeline import graph
from pipeline.config.load import load_job
from pipeline.data import parquet_files
from tests import small
from tests.data import tars
from tests.small import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of two generations, of which the first kept one image of each class at most; shard 2 holds copies
    of a validation image, of which none can be kept, and shard 3 is no tar."""
    generations = [{"student": {}}, {"student": {}, "label": {"corpus": "selected"}, "select": {"top_fraction": 1.0}}]
    world = small.make(
        tmp_path_factory.mktemp("selected"), generations=generations, select={"threshold": 0.0, "top_fraction": 0.3}
    )
    tars.make(world.shards / "unlabelled-002.tar", {f"{n}.png": tars.picture(100) for n in range(3)})
    (world.shards / "unlabelled-003.tar").write_bytes(b"no tar" * 512)
    tars.make(world.shards / "unlabelled-004.tar", {"good.png": tars.picture(500), "bad.png": b"<html>"})
    ran = world.run("data.max_bad_shards=1", "data.max_bad_fraction=0.1")
    assert ran.status == 0, ran
    return world


def files(world: World, stage: str) -> dict[str, list[dict[str, Any]]]:
    folder = world.folder(stage)
    return {path.stem: parquet_files.read_table(str(path)).to_pylist() for path in sorted(folder.glob("*.parquet"))}


def kept(world: World, stage: str) -> set[tuple[str, int]]:
    return {(name, row["index"]) for name, rows in files(world, stage).items() for row in rows}


def info(world: World, stage: str) -> dict[str, Any]:
    return dict(json.loads((world.folder(stage) / "done.json").read_text())["info"])


def test_only_what_was_kept_is_labelled_again_and_every_sample_has_its_row(world: World) -> None:
    first, second = files(world, "gen1-label"), files(world, "gen2-label")
    before = kept(world, "gen1-select")
    assert list(first) == list(second) == [f"unlabelled-{number:03d}" for number in (0, 1, 2, 4)]
    assert before and "unlabelled-002" not in {name for name, _ in before}
    assert any(0 < sum((name, n) in before for n in range(len(rows))) < len(rows) for name, rows in first.items())
    place = ("index", "key", "offset", "size")
    for name, rows in second.items():
        assert [[row[key] for key in place] for row in rows] == [[row[key] for key in place] for row in first[name]]
        for row, old in zip(rows, first[name], strict=True):
            if (name, row["index"]) in before:
                assert row["status"] == "ok" and row["image_hash"] == old["image_hash"]
                assert row["label"] is not None
            else:
                assert row["status"] == "skipped" and row["label"] is row["confidence"] is row["image_hash"] is None
    again = kept(world, "gen2-select")
    assert again and again <= before


def test_what_was_skipped_is_not_bad(world: World) -> None:
    total, chosen = sum(map(len, files(world, "gen2-label").values())), len(kept(world, "gen1-select"))
    found = info(world, "gen2-label")
    assert (found["images"], found["bad"], found["skipped"]) == (chosen, {}, total - chosen)
    assert f"{chosen} images of 4 shards labelled, {total - chosen} skipped" in found["line"]
    assert info(world, "gen1-label")["bad"] == {"not_an_image": 1} and info(world, "gen1-label")["skipped"] == 0
    facts = json.loads((world.output / "progress.json").read_text())["stages"]
    assert facts["gen2-label"]["latest"]["images"] == chosen and not facts["gen2-label"]["latest"].get("bad")
    assert (world.folder("report") / "index.html").read_text().count("1 bad sample") == 1  # of the first generation


def test_a_file_says_which_selection_it_follows_and_fits_no_other(world: World) -> None:
    selection = json.loads((world.folder("gen1-select") / "done.json").read_text())["fingerprint"]
    for stage, expected in (("gen1-label", ("all", None)), ("gen2-label", ("selected", selection))):
        for path in world.folder(stage).glob("*.parquet"):
            metadata = parquet_files.read_metadata(str(path))
            assert (metadata["corpus"], metadata["selection"]) == expected
    failed = json.loads((world.folder("gen2-label") / "unlabelled-003.failed.json").read_text())
    assert "unlabelled-003.tar could not be labelled in the generation before" in failed["error"]


def test_a_shard_of_which_nothing_was_kept_is_not_read(world: World) -> None:
    """Its rows come from the label file of the generation before: they are there though the tar holds nothing but
    zeros."""
    folder, shard = world.folder("gen2-label"), world.shards / "unlabelled-002.tar"
    path = folder / "unlabelled-002.parquet"
    rows, stamp, data = parquet_files.read_table(str(path)), shard.stat().st_mtime_ns, shard.read_bytes()
    (folder / "done.json").unlink()
    path.unlink()
    shard.write_bytes(bytes(len(data)))
    os.utime(shard, ns=(stamp, stamp))
    ran = world.run("data.max_bad_shards=1", "data.max_bad_fraction=0.1")
    assert ran.status == 0, ran
    assert parquet_files.read_table(str(path)).equals(rows)
    shard.write_bytes(data)
    os.utime(shard, ns=(stamp, stamp))


def test_only_the_labels_and_what_follows_them_depend_on_it(world: World) -> None:
    def look(*settings: str) -> dict[str, bool]:
        job = load_job(str(world.job), [f"output={world.output}", "data.max_bad_shards=1", *settings])
        return {look.stage.name: look.done is not None for look in graph.look(job)}

    job = load_job(str(world.job), [f"output={world.output}"])
    needs = {stage.name: stage.needs for stage in graph.stages_of(job)}
    assert needs["gen1-label"] == ("gen0-teacher",)
    assert needs["gen2-label"] == ("gen1-label", "gen1-select", "gen1-student")
    assert all(look().values())
    states = look("generations[1].label.corpus=all")
    assert states["gen2-audit"] and not states["gen2-label"]
