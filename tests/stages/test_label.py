"""The label stage as a whole: growth of the corpus, shards that change, and what `status` tells."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import parquet_files
from pipeline.data.shards import Shard
from pipeline.labelling.label_progress import Progress
from pipeline.tracking import journal
from tests import small
from tests.data import tars
from tests.small import World, command


def label_folders(world: World) -> list[Path]:
    return sorted(world.output.glob("gen1-label-*"), key=lambda path: path.stat().st_mtime_ns)


def test_refreeze_labels_only_what_is_new_or_has_changed(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.shard(world.shards / "unlabelled-002.tar", 4, start=500)
    assert "the selection keeps no image" in world.run("select.threshold=1.0").err  # labelled, that is
    [old] = label_folders(world)
    tars.shard(world.shards / "unlabelled-003.tar", 5, start=600)
    os.utime(world.shards / "unlabelled-001.tar", ns=(1, 1))  # touched, the same bytes
    tars.shard(world.shards / "unlabelled-002.tar", 4, start=700)  # the same size, other bytes
    ran = world.run()
    assert "1 new shards are not used (unlabelled-003.tar); --refreeze takes them in" in ran.out
    assert ran.status == 2 and "unlabelled-002.tar has other bytes than when it was indexed or labelled" in ran.err
    ran = world.run("--refreeze")
    assert (ran.status, ran.err) == (0, ""), ran
    [new] = [path for path in label_folders(world) if path != old]
    names = [f"unlabelled-{number:03d}.parquet" for number in range(4)]
    assert sorted(path.name for path in new.glob("*.parquet")) == names
    taken = [name for name in names[:3] if (old / name).samefile(new / name)]
    assert taken == names[:2]
    assert parquet_files.read_table(str(new / names[2])) != parquet_files.read_table(str(old / names[2]))
    assert json.loads((new / "done.json").read_text())["info"]["images"] == 17
    assert "all is done" in world.run().out


def test_a_shard_that_changed_while_the_stage_was_not_done_is_an_error_that_names_it(
    worlds: small.Store, tmp_path: Path
) -> None:
    world = worlds.finished(tmp_path)
    folder = world.folder("gen1-label")
    (folder / "done.json").unlink()
    (folder / "unlabelled-001.parquet").unlink()
    path = world.shards / "unlabelled-000.tar"
    os.utime(path, ns=(1, 1))
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran  # touched alone
    (folder / "done.json").unlink()
    tars.shard(path, 4, start=800)
    ran = world.run()
    assert ran.status == 2 and "unlabelled-000.tar changed under the run" in ran.err and "other content" in ran.err
    assert (folder / "unlabelled-000.failed.json").exists()


def test_status_tells_where_the_time_went_and_what_was_bad(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.make(world.shards / "unlabelled-002.tar", {"a.png": tars.picture(1), "b.png": b"<html>", "c.png": b""})
    ran = world.run("data.max_bad_fraction=1.0")
    assert (ran.status, ran.err) == (0, ""), ran
    info = json.loads((world.folder("gen1-label") / "done.json").read_text())["info"]
    assert set(info["time"]) == {"read", "decode", "wait", "device", "forward", "write", "total"}
    assert info["bad"] == {"empty": 1, "not_an_image": 1} and info["batches"] == {"128": 3}
    facts = json.loads((world.output / "progress.json").read_text())["stages"]["gen1-label"]
    assert facts["latest"]["images"] == facts["latest"]["images_total"] == 11
    assert facts["latest"]["worst"] == "unlabelled-002.tar (66.7 % bad)"
    shown = " ".join(command("status", world.job, f"output={world.output}").out.split())
    for text in ("bad samples: not_an_image", "worst shards: unlabelled-002.tar", "time: reading", "forward"):
        assert text in shown, shown


@pytest.fixture
def shards() -> list[Shard]:
    return [Shard(f"{number}.tar", "", 100 * (1 + number), "", "unlabelled") for number in range(4)]


def told(rows: int, **bad: int) -> dict[str, Any]:
    counts = {"ok": rows - sum(bad.values()), **bad}
    return {"rows": rows, "counts": counts, "seconds": {"forward": 2.0, "total": 4.0}, "skipped": False}


def test_progress_adds_up_over_attempts(tmp_path: Path, shards: list[Shard]) -> None:
    with journal.Journal(str(tmp_path)) as log:
        progress = Progress(log, shards, shards, {})
        progress.add("3.tar", told(40), 2)
        progress.add("2.tar", told(30, truncated=3), 2)
        values = progress.values(progress.started + 10)
        assert (values["images"], values["images_total"], values["bad_truncated"]) == (70, 100, 3)
        assert values["images_per_second_average"] == 7.0 and values["left"] == pytest.approx(300 * 10 / 700, abs=0.1)
        assert values["seconds_forward"] == 4.0 and values["workers"] == 2
        assert values["worst"] == "2.tar (10.0 % bad)"
        log.log(2, 4, **values)
    with journal.Journal(str(tmp_path)) as log:
        records, _ = journal.read(str(tmp_path))
        again = Progress(log, shards, shards[:2], records[-1])
        assert again.values(again.started + 1)["images_total"] == 100
        again.add("1.tar", None, 1)
        again.add("0.tar", told(10), 1)
        values = again.values(again.started + 10)
        assert (values["images"], values["failed"], values["images_per_second_average"]) == (80, 1, 1.0)
        assert values["left"] == 0
    records, _ = journal.read(str(tmp_path))
    assert (records[-1]["step"], records[-1]["total"], records[-1]["images"]) == (4, 4, 80)


def same_size(path: Path, members: dict[str, bytes]) -> None:
    """A shard with these members, as large as the one that is there."""
    size = path.stat().st_size
    tars.make(path, members)
    assert path.stat().st_size <= size
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


@pytest.mark.parametrize(
    "how",
    [
        "a bad image",
        "an old time stamp",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("a damaged shard", "a good one", "before the end")),
    ],
)
def test_a_shard_that_was_mended_is_labelled_again_and_it_alone(tmp_path: Path, how: str) -> None:
    world = small.make(tmp_path)
    path, allowed = world.shards / "unlabelled-001.tar", "data.max_bad_fraction=0.5"
    broken = {f"{letter}.png": tars.picture(50 + number) for number, letter in enumerate("abcd")}
    if how == "a damaged shard":
        tars.make(path, broken)
        path.write_bytes(b"no tar" + path.read_bytes()[6:])
        allowed = "data.max_bad_shards=1"
    elif how != "a good one":
        tars.make(path, broken | {"d.png": b"<html>"})
    before = world.run(allowed, *(["data.max_bad_fraction=0.01"] if how == "before the end" else []))
    assert before.status == (2 if how == "before the end" else 0), before
    [old] = label_folders(world)
    stamp = path.stat().st_mtime_ns
    whole = dict(broken) if how != "a good one" else {f"{n}.png": tars.picture(900 + n) for n in range(4)}
    same_size(path, whole)
    refreeze = []
    if how in ("an old time stamp", "a good one"):
        if how == "an old time stamp":
            os.utime(path, ns=(stamp, stamp))
        assert label_folders(world) == [old] and "replaced" not in world.run(allowed).out
        refreeze = ["--refreeze"]
    ran = world.run(allowed, *refreeze)
    assert (ran.status, ran.err) == (0, ""), ran
    assert "source 'unlabelled': unlabelled-001.tar was replaced since the labelling" in ran.out
    [new] = [folder for folder in label_folders(world) if folder != old]
    assert (old / "unlabelled-000.parquet").samefile(new / "unlabelled-000.parquet")
    info = json.loads((new / "done.json").read_text())["info"]
    assert info["images"] == 8 and not info["bad"] and not info["failed"]
    # It stays so, whatever is run again; and a run from scratch on what is there now labels the same.
    for again in (world.run(allowed), world.run(allowed, "--refreeze")):
        assert again.status == 0 and "all is done" in again.out and "replaced" not in again.out, again
    scratch = dataclasses.replace(world, output=tmp_path / "scratch")
    assert scratch.run(allowed).status == 0
    for name in ("unlabelled-000.parquet", "unlabelled-001.parquet"):
        [fresh] = scratch.output.glob(f"gen1-label-*/{name}")
        assert parquet_files.read_table(str(new / name)) == parquet_files.read_table(str(fresh))


def test_images_that_would_take_too_much_memory_are_bad_by_a_setting_that_counts(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    large = {"large.png": tars.picture(1, 200, 200), "small.png": tars.picture(2)}  # 160 kB as pixels, and 480 B
    tars.make(world.shards / "unlabelled-001.tar", large)
    members = [(name, large[name]) for name in large]
    for at, label in ((1, b"0"), (3, b"1")):
        members.insert(at, (members[at - 1][0].replace(".png", ".cls"), label))
    tars.make(world.shards / "labelled-001.tar", members)
    assert world.run().status == 0
    limited = world.run("data.max_image_gb=0.0001", "data.max_bad_fraction=0.5")
    assert limited.status == 0, limited
    [_, new] = label_folders(world)
    table = parquet_files.read_table(str(new / "unlabelled-001.parquet"))
    assert dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)) == {
        "large": "too_large",
        "small": "ok",
    }
    found = [json.loads(path.read_text())["info"] for path in world.output.glob("index-*/done.json")]
    assert sorted(sum(info["bad"].values()) for info in found) == [0, 1]
    assert {"labelled: too_large": 1} in [info["bad"] for info in found]
