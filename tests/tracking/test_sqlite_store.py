"""The sqlite file of a job without a server: wherever it lies and whatever happens, it has what the journals have."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from pipeline.tracking import journal, sqlite_store
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.journal import Journal
from pipeline.tracking.to_mlflow import MlflowTracker

ODD = ["?", "%", "%41", "%3F", "#", " ", "&a=b", "+", "@", ":", "ä", "'", '"', ";", "~", "x"]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def run_job(output: Path, *, begin: bool, store: Path | None = None) -> list[str]:
    """A job of one stage, tracked; its warnings. `begin`: the stage runs, in place of having run before."""
    warnings: list[str] = []
    stage = StageRecord("teacher", str(output / "teacher"), {"width": 8}, {})
    tracker = MlflowTracker(str(output), uri=store and str(store), warn=warnings.append)
    tracker.start_job("digits", str(output), {}, {})
    if begin:
        tracker.start_stage(stage)
        with Journal(stage.folder) as log:
            for step in range(1, 6):
                log.log(step, 5, kind="train", loss=1 / step, images_per_second=9.0)
            log.log(5, 5, kind="validation", validation_loss=7.0, top1=0.5)
    tracker.end_stage(stage, "finished", {"loss": 7.0, "best_validation_top1": 0.5}, ())
    tracker.end_job("finished", {"gain_points": 1.0}, ())
    tracker.close()
    return warnings


def points(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric of the stage, asked of sqlite itself."""
    with contextlib.closing(sqlite3.connect(path)) as store:
        query = (
            "SELECT step, value FROM metrics JOIN runs USING (run_uuid) WHERE runs.name = 'teacher' AND key = ? "
            "AND lifecycle_stage = 'active' ORDER BY step"
        )
        return store.execute(query, (name,)).fetchall()


def test_a_store_is_opened_where_it_lies_whatever_the_path_holds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        path = "/" + "/".join("".join(rng.choices(ODD, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        assert make_url(sqlite_store.address(f"sqlite:///{path}")).database == path


def spoil_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4096)
    path.write_bytes(data)


def half_made(path: Path) -> None:
    """As kill -9 left it while tables were made."""
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        for table in ("latest_metrics", "metrics", "tags", "params", "runs"):
            store.execute(f"DELETE FROM {table}")
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


DAMAGES: list[Callable[[Path], object]] = [
    Path.unlink,
    spoil_pages,
    half_made,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"no store"),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
]


@pytest.mark.parametrize("damages", [DAMAGES[:2], pytest.param(DAMAGES[2:], marks=pytest.mark.slow)])
def test_a_store_that_is_gone_or_damaged_is_filled_from_the_journals_even_when_nothing_has_to_run(
    tmp_path: Path, damages: list[Callable[[Path], object]]
) -> None:
    output = tmp_path / "run? %41#1"
    path = output / "mlflow.db"
    assert run_job(output, begin=True) == []
    losses = [(step, 1 / step) for step in range(1, 6)]
    for damage in (None, *damages):
        if damage:
            damage(path)
            warnings = run_job(output, begin=False)
            *damaged, sent = warnings
            assert len(damaged) == (damage is not Path.unlink), damage
            assert all("is damaged" in one and "journals" in one for one in damaged)
            assert "of earlier runs; it has them all now" in sent
        # The training's curve is whole: a validation's loss does not end it.
        assert points(path, "loss") == losses, damage
        assert points(path, "validation_top1") == points(path, "best_validation_top1") == [(5, 0.5)]
        assert points(path, "validation_loss") == [(5, 7.0)]
        assert len(points(path, "training_images_per_second")) == 5
    assert len(list(output.glob("mlflow.db.damaged-*"))) == len(damages) - (Path.unlink in damages)
    assert [entry.name for entry in tmp_path.iterdir()] == [output.name]
    assert not list(output.glob(".tmp-*"))


def test_a_store_that_another_process_made_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"

    def make(temporary: Path) -> None:
        temporary.write_bytes(b"second")
        path.write_bytes(b"first")

    sqlite_store.create(path, make)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


WRITER = """
import sys, time
from pathlib import Path
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.journal import Journal
from pipeline.tracking.to_mlflow import MlflowTracker
output = Path(sys.argv[1])
tracker = MlflowTracker(str(output), warn=print)
tracker.start_job("digits", str(output), {}, {})
stage = StageRecord("teacher", str(output / "teacher"), {}, {})
tracker.start_stage(stage)
log = Journal(stage.folder)
first = int(sys.argv[2])
log.truncate(first)
print("begun", flush=True)
for step in range(first + 1, first + 100000):
    log.log(step, kind="train", loss=1 / (step + 1), rate=0.1)
    time.sleep(0.002)
"""


@pytest.mark.slow
def test_fifty_kills_leave_no_step_out_and_none_twice(tmp_path: Path) -> None:
    rng, last = random.Random(7), -1
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for kill in range(50):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(last)], env=environment, stdout=subprocess.PIPE
        )
        assert writer.stdout and writer.stdout.readline() == b"begun\n"
        # The first ones while MLflow is imported and makes its tables, for which it takes four seconds.
        time.sleep(rng.uniform(0.0, 5.0 if kill % 2 else 8.0))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        records, _ = journal.read(str(tmp_path / "teacher"))
        last = records[-1]["step"] - rng.randrange(50) if records else -1  # as if resumed from a checkpoint
        last = max(last, -1)
    stage = StageRecord("teacher", str(tmp_path / "teacher"), {}, {})
    tracker = MlflowTracker(str(tmp_path), warn=pytest.fail)
    tracker.start_job("digits", str(tmp_path), {}, {})
    tracker.start_stage(stage)
    tracker.end_stage(stage, "finished", {}, ())
    tracker.end_job("finished", {}, ())
    tracker.close()
    records, _ = journal.read(stage.folder)
    assert len(records) > 1000
    assert points(tmp_path / "mlflow.db", "loss") == [(record["step"], record["loss"]) for record in records]
    assert not list(tmp_path.glob("*.damaged-*"))


@pytest.mark.slow
def test_a_store_that_is_locked_for_a_while_gets_all_in_the_next_run(tmp_path: Path) -> None:
    run_job(tmp_path / "first", begin=True, store=tmp_path)  # so that the store is there
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        code = (
            "import sys; from pathlib import Path; from tests.tracking import test_sqlite_store as t\n"
            "print(*t.run_job(Path(sys.argv[1]) / 'second', begin=True, store=Path(sys.argv[1])))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0 and "locked" in done.stdout, done
        other.execute("ROLLBACK")
    assert run_job(tmp_path / "second", begin=False, store=tmp_path) == []
    assert len(points(tmp_path / "mlflow.db", "loss")) == 2 * 5
    assert sorted(itertools.chain(*points(tmp_path / "mlflow.db", "best_validation_top1"))) == [0.5, 0.5, 5, 5]
