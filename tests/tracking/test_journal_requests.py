"""What it costs an object store that a stage is watched: requests are counted, on a clock that the test moves."""

from __future__ import annotations

import http.client
import itertools
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from pipeline import progress, storage
from pipeline.storage import lock as locks
from pipeline.storage.lock import lock
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal
from tests.conftest import S3

MOST = 30  # requests a minute, whatever the number of shards
BEAT = 2  # requests: is it still mine? it is

numbers = itertools.count()
clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, time=time.time)


def fill(s3: S3, folder: str, files: int) -> None:
    """Put label files there, by the shortest way."""
    server = http.client.HTTPConnection(*s3.proxy.target)
    for number in range(files):
        server.request("PUT", f"/{folder.removeprefix('s3://')}/part-{number:06d}.parquet", b"x")
        answer = server.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    server.close()
    assert len(storage.walk(folder)) == files


def watch(s3: S3, monkeypatch: pytest.MonkeyPatch, folder: str, seconds: int, *, here: bool) -> Counter[str]:
    """The requests of a stage that is written (`here`: in this process) and followed by two for so long."""
    monkeypatch.setattr(journal, "time", clock)
    # What is said of a folder of another spelling this process does not know of the first one.
    book, positions, seen_steps = Journal(folder if here else f"{folder}/"), [0, 0], [set(), set()]
    for _ in range(80):  # it has begun
        clock.now += 0.5
        book.log(0)
        positions = [journal.read(folder, position, follow=True)[1] for position in positions]
    with s3.proxy.faults() as seen:
        for step in range(1, 1 + 2 * seconds):
            clock.now += 0.5
            if step % 10 == 0:
                book.log(step)
            for number in range(2):
                records, positions[number] = journal.read(folder, positions[number], follow=True)
                seen_steps[number].update(record["step"] for record in records)
    late = 2 * round(5 + journal.PART_SECONDS + journal.ASK_SECONDS)  # steps, of which one in ten is a record
    assert all(known >= set(range(10, 2 * seconds - late, 10)) for known in seen_steps), "they know all but the latest"
    book.close()
    for number in range(2):
        records, _ = journal.read(folder, positions[number])
        seen_steps[number].update(record["step"] for record in records)
    assert all(known >= set(range(10, 1 + 2 * seconds, 10)) for known in seen_steps)
    return Counter("LIST" if "list-type" in request.path else request.method for request in seen)


def check(s3: S3, monkeypatch: pytest.MonkeyPatch, files: int, *minutes: int) -> None:
    # The lock's beats and the state of the run come to it, in every stage.
    besides = 60 / locks.BEAT_SECONDS * BEAT + 60 / progress.WRITE_SECONDS
    for here, minute in itertools.product((True, False), minutes):
        folder = f"{s3.bucket}/watched-{next(numbers)}/gen1-label-00000000"
        fill(s3, folder, files)
        found = watch(s3, monkeypatch, folder, 60 * minute, here=here)
        assert found["LIST"] == 0, "the folder holds the label files too"
        assert found.total() / minute + besides <= MOST, found
        assert found["GET"] == 0 or not here, "nobody asks for what was written here"


@pytest.mark.parametrize("files", [0, 20])
def test_a_stage_that_is_watched_lists_nothing_and_asks_seldom(
    s3: S3, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    check(s3, monkeypatch, files, 2)


@pytest.mark.slow
def test_so_it_is_with_many_files_however_long_it_takes(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    check(s3, monkeypatch, 3500, 1, 10)


@pytest.mark.slow
def test_the_whole_journal_costs_one_page_of_names(s3: S3) -> None:
    folder = f"{s3.bucket}/paged-{next(numbers)}/gen1-label-00000000"
    fill(s3, folder, 1050)
    for step in range(3):
        with Journal(folder) as book:
            book.log(step)
    with s3.proxy.faults() as seen:
        assert [record["step"] for record in journal.read(folder)[0]] == [0, 1, 2]
    pages = sum("list-type" in request.path for request in seen)
    assert pages == 1 and len(seen) <= 1 + 2 * 3, "and two requests for each of its parts"


def test_a_beat_of_the_lock_costs_two_requests(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    with lock(f"{s3.bucket}/beating-{next(numbers)}"), s3.proxy.faults() as seen:
        before = len(s3.proxy.seen)
        while len(s3.proxy.seen) - before < 10 * BEAT:
            time.sleep(0.01)
    puts = sum(request.method == "PUT" for request in seen)
    assert len(seen) <= BEAT * (puts + 1)
