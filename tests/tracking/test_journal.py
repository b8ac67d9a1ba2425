"""The journal: append, follow, truncate, survive a kill; on a disk and in an object store."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal, read


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "stage")
    else:
        url = f"memory://journal-{uuid.uuid4().hex}/stage"
        yield url
        storage.remove(url)


def steps(folder: str) -> list[int]:
    return [record["step"] for record in read(folder)[0]]


def test_records_come_back_with_step_total_time_and_values(folder: str) -> None:
    book = Journal(folder)
    book.log(1, 10, loss=0.5, images=64, phase="warmup")
    book.close()
    [record] = read(folder)[0]
    assert record.pop("time") > 1.7e9
    assert record == {"step": 1, "total": 10, "loss": 0.5, "images": 64, "phase": "warmup"}


def test_no_journal_yet(folder: str) -> None:
    assert read(folder) == ([], 0)


def test_following_returns_each_record_once(folder: str) -> None:
    book, position, seen = Journal(folder), 0, []
    for step in range(25):
        book.log(step)
        if step % 7 == 0:
            book.flush()
            new, position = read(folder, position)
            seen += [record["step"] for record in new]
    book.close()
    new, position = read(folder, position)
    assert seen + [record["step"] for record in new] == list(range(25))
    assert read(folder, position) == ([], position)


def test_opened_again_it_continues(folder: str) -> None:
    for step in range(3):
        book = Journal(folder)
        book.log(step)
        book.close()
    assert steps(folder) == [0, 1, 2]


@pytest.mark.parametrize("again", [2, 30])
def test_a_follower_survives_a_truncation_however_far_the_journal_has_grown_since(folder: str, again: int) -> None:
    book = Journal(folder)
    for step in range(10):
        book.log(step, loss=1.0)
        book.flush()
    _, position = read(folder)
    book.truncate(4)
    assert steps(folder) == [0, 1, 2, 3, 4]
    for step in range(5, 5 + again):
        book.log(step, loss=2.0)
        book.flush()
    new, position = read(folder, position)
    assert [record["step"] for record in new] == list(range(5 + again))
    book.log(99)
    book.close()
    assert [record["step"] for record in read(folder, position)[0]] == [99]


def test_truncation_includes_what_was_not_yet_written(folder: str) -> None:
    book = Journal(folder)
    for step in range(6):
        book.log(step)
    book.truncate(2)
    book.log(3)
    book.close()
    assert steps(folder) == [0, 1, 2, 3]


def test_a_torn_last_line_is_not_read_and_is_gone_after_reopening(tmp_path: Path) -> None:
    folder = str(tmp_path)
    book = Journal(folder)
    book.log(1)
    book.close()
    with (tmp_path / journal.NAME).open("ab") as file:
        file.write(b'{"step": 2, "loss": 0.' + b"0" * 9000)
    assert steps(folder) == [1]
    _, position = read(folder)
    book = Journal(folder)
    book.log(2)
    book.close()
    assert steps(folder) == [1, 2]
    assert [record["step"] for record in read(folder, position)[0]] == [2]
    assert all(json.loads(line) for line in (tmp_path / journal.NAME).read_text().splitlines())


def test_a_journal_of_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(b'{"step"')
    book = Journal(str(tmp_path))
    book.log(0)
    book.close()
    assert steps(str(tmp_path)) == [0]


def test_zero_bytes_after_a_power_cut_are_skipped(tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(b'{"step": 1, "total": null, "time": 1}\n\0\0\0\0\n')
    assert steps(str(tmp_path)) == [1]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    import numpy as np

    book = Journal(str(tmp_path))
    book.log(1, a=float("nan"), b=float("-inf"), c=np.float32("nan"), d=np.float32(0.5), e=np.int64(3))
    book.close()
    text = (tmp_path / journal.NAME).read_text()
    assert not {"NaN", "Infinity"} & set(text.replace(":", " ").replace(",", " ").split())
    [record] = read(str(tmp_path))[0]
    assert [record[name] for name in "abcde"] == [None, None, None, 0.5, 3]


def test_records_survive_a_kill_without_close(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pipeline.tracking.journal import Journal; book = Journal(sys.argv[1])\n"
        "for step in range(5): book.log(step)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert steps(str(tmp_path)) == [0, 1, 2, 3, 4]


def test_an_object_store_gets_a_part_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"memory://journal-{uuid.uuid4().hex}"
    now = 0.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    book = Journal(folder)
    for step in range(25):
        now = float(step)
        book.log(step)
    parts = [name for name in storage.listdir(folder) if name.startswith("metrics-")]
    assert parts == ["metrics-000001.jsonl", "metrics-000002.jsonl"]
    assert steps(folder) == list(range(21))
    book.close()
    assert steps(folder) == list(range(25))
    storage.remove(folder)
