"""Preparing tables and shuffling shards on Ray: workers and drivers that are killed with -9 lose and double nothing."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.contract import Outcome
from pipeline.cluster.inline import Inline
from pipeline.prepare import cluster_tables, reshard, tables
from tests import tiny
from tests.data.tars import END, member, picture
from tests.prepare.test_cluster_tables import bytes_table, content

pytestmark = pytest.mark.slow
DEATHS = 2  # of each pass


def make_mortal(make_worker: Callable[[], Callable[[Any], Any]], folder: str) -> Callable[[Any], Any]:
    """A worker that dies in some units, once in each, when what it has written is whole and not yet in its place."""
    work = make_worker()

    def die(*paths: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def handle(unit: Any) -> Any:
        marker = Path(folder, f"{zlib.crc32(repr(unit).encode())}")
        if len(list(Path(folder).iterdir())) < DEATHS and not marker.exists():
            marker.touch()
            os.replace = die
        return work(unit)

    return handle


class Mortal:
    """A cluster whose workers are killed."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster, self.folder, self.calls = cluster, folder, 0

    def map(self, make_worker: Any, units: Sequence[Any], **options: Any) -> Iterator[Outcome[Any]]:
        self.calls += 1
        folder = self.folder / f"{self.calls}"
        folder.mkdir(parents=True)
        yield from self.cluster.map(functools.partial(make_mortal, make_worker, str(folder)), units, **options)

    def deaths(self) -> int:
        return len(list(self.folder.glob("*/*")))


def small_shards(folder: Path, number: int) -> None:
    folder.mkdir()
    images = [picture(seed) for seed in range(8)]
    for shard in range(number):
        pairs = [(f"{one}.png", images[(shard + one) % 8]) for one in range(2)]
        whole = [member(name, data) + member(f"{name[0]}.cls", str(shard % 3).encode()) for name, data in pairs]
        (folder / f"x-{shard:05d}.tar").write_bytes(b"".join(whole) + END)


def test_a_table_of_which_workers_die(embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_tables, "UNIT_ROWS", 20)
    bytes_table(tmp_path / "in", 120)
    cluster = Mortal(embedded_ray, tmp_path / "deaths")
    options = {"image": "image", "shard_samples": 11, "seed": 2}
    there = cluster_tables.table(str(tmp_path / "in"), str(tmp_path / "there"), cluster, **options)
    assert there == tables.table(str(tmp_path / "in"), str(tmp_path / "here"), **options)
    assert cluster.deaths() >= 2 * DEATHS
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_a_shuffle_of_which_workers_die(embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard, "UNIT_BYTES", 20_000)
    small_shards(tmp_path / "in", 60)
    cluster = Mortal(embedded_ray, tmp_path / "deaths")
    reshard.reshard(str(tmp_path / "in"), str(tmp_path / "there"), cluster, shards=6)
    reshard.reshard(str(tmp_path / "in"), str(tmp_path / "here"), Inline(), shards=6)
    assert cluster.deaths() >= 2 * DEATHS
    assert content(tmp_path / "here") == content(tmp_path / "there")


@pytest.mark.parametrize("what", ["table", "reshard"])
def test_a_killed_command_goes_on(tmp_path: Path, what: str) -> None:
    """kill -9 of the driver at whatever it does, again and again until it is done before that."""
    small_shards(tmp_path / "shards", 600)
    bytes_table(tmp_path / "table", 3000)
    out = tmp_path / "out"
    words = {
        "reshard": ["reshard", f"{tmp_path}/shards", "--shards", "40"],
        "table": ["prepare", "table", f"{tmp_path}/table", "--image", "image", "--shard-images", "90"],
    }[what]
    whole = [sys.executable, "-m", "pipeline", *words]
    subprocess.run([*whole, "--out", f"{tmp_path}/whole"], cwd=tiny.ROOT, check=True)
    command = [*whole, "--out", str(out), *(["--cluster", "embedded"] if what == "table" else [])]
    for files in range(2, 1000, 13):
        process = subprocess.Popen(command, cwd=tiny.ROOT)
        while process.poll() is None and sum(len(names) for *_, names in os.walk(out)) < files:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
    assert process.wait() == 0
    assert content(out) == content(tmp_path / "whole")


def test_ten_thousand_small_shards(tmp_path: Path) -> None:
    small_shards(tmp_path / "in", 10_000)
    found = reshard.reshard(str(tmp_path / "in"), str(tmp_path / "out"), Inline(), shards=30)
    assert found == {"shards": 30, "images": 20_000, "bad": 0, "skipped": 0}
    assert len(list((tmp_path / "out").glob("x-*.tar"))) == 30
