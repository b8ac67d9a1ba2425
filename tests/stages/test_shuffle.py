"""Labelled shards that are sorted by class: said by `plan` once they are indexed, and when training begins."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from pipeline.plan.stage import CLASS_COUNTS
from tests import small
from tests.data import tars

SORTED = "! gen0-teacher: the labelled shards are sorted by class: with window 1"


def test_a_small_window_over_sorted_shards(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    (world.shards / "labelled-000.tar").unlink()
    for label in range(3):
        tars.shard(world.shards / f"labelled-{label:03d}.tar", 4, labels=[label] * 4, start=10 * label)
    narrow = (world.job, f"output={world.output}", "teacher.segments=1", "teacher.window=1")
    wide = (*narrow[:3], "teacher.window=3")
    assert "sorted by class" not in small.command("plan", *narrow).out, "nobody knows yet"
    ran = small.command("run", *narrow)
    assert ran.status == 0 and SORTED in " ".join(ran.out.split())
    rows = pq.read_table(world.folder("index") / CLASS_COUNTS).to_pylist()
    assert rows == [{"shard": label, "label": label, "images": 4} for label in range(3)]
    planned = " ".join(small.command("plan", *narrow).out.split())
    assert planned.count("the labelled shards are sorted by class") == 1
    assert "of about 1 class (drawn at random: 3)" in planned and "raise `window` to" in planned
    assert "sorted by class" not in small.command("plan", *wide).out
    (world.folder("index") / CLASS_COUNTS).unlink()  # as an earlier version left it
    assert small.command("plan", *narrow).status == 0
