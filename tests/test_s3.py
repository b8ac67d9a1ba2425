"""A real S3 endpoint that fails now and then: the label stage, a killed driver, and what storage promises."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.plan.stage import Done, write_done
from pipeline.storage import lock as locks
from pipeline.storage.lock import lock
from tests import label_stage, small
from tests.conftest import ROOT, S3
from tests.data import tars
from tests.flaky_proxy import Fault

SHARDS, IMAGES = 6, 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> small.World:
    """A small job with a teacher beside it, its unlabelled shards also on S3, and the rows of a local run."""
    folder = tmp_path_factory.mktemp("s3")
    made = small.make(folder)
    label_stage.make_teacher(folder / "teacher")
    for number in range(SHARDS):
        name = f"unlabelled-{number:03d}.tar"
        s3.upload(tars.shard(made.shards / name, IMAGES, start=1000 * number), f"world/{name}")
    s3.upload(made.shards / "classes.json", "world/classes.json")
    label_stage.run(str(made.shards), folder / "teacher", str(made.output))
    return made


@pytest.mark.slow
def test_a_whole_job_and_its_rerun(world: small.World, s3: S3, quick: None) -> None:
    for path in world.shards.iterdir():
        s3.upload(path, f"whole/shards/{path.name}")
    settings = f"data.root={s3.bucket}/whole/shards", f"output={s3.bucket}/whole/run"
    with s3.proxy.faults(share=0.05, seed=7):
        done = small.command("run", world.job, *settings)
    assert done.status == 0, done.err
    with s3.proxy.faults() as seen:
        assert small.command("run", world.job, *settings).status == 0
    assert len(seen) <= 60 and not requests(seen, ".tar"), "a finished job is a few small files, whatever the shards"
    others = small.command("clean", world.job, *settings, "generations[0].student.lr=0.02", "--yes")
    assert "kept, for the last run here" in others.out and others.out.endswith("nothing to clean\n"), others


@pytest.mark.slow
def test_a_job_through_the_cache_trains_the_same_weights(world: small.World, s3: S3, tmp_path: Path) -> None:
    for path in world.shards.iterdir():
        s3.upload(path, f"through/{path.name}")
    local, remote = f"output={tmp_path / 'local'}", f"output={tmp_path / 'remote'}"
    settings = f"data.root={s3.bucket}/through", f"data.cache={tmp_path / 'cache'}", "workers.loader=2"
    assert small.command("run", world.job, local).status == 0
    ran = small.command("run", world.job, remote, *settings)
    assert ran.status == 0, ran.err
    for stage in ("gen0-teacher", "gen1-student"):
        made = [next(tmp_path.glob(f"{side}/{stage}-*/model.safetensors")).read_bytes() for side in ("local", "remote")]
        assert made[0] == made[1], stage
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(list(world.shards.glob("*.tar")))


def requests(seen: list, part: str) -> Counter[str]:
    """How often each method was used on paths with this part."""
    return Counter(request.method for request in seen if part in request.path)


def test_labels_through_faults_are_those_of_a_local_run(world: small.World, s3: S3, quick: None) -> None:
    output = f"{s3.bucket}/faulty"
    with s3.proxy.faults(share=0.1, seed=3) as seen:
        result = label_stage.run(f"{s3.bucket}/world", world.job.parent / "teacher", output)
    assert result.info["images"] == SHARDS * IMAGES and result.info["failed"] == []
    assert label_stage.rows(output) == label_stage.rows(str(world.output))
    assert sum(request.fault is not None for request in seen) >= 5


def test_a_shard_costs_a_handful_of_requests(world: small.World, s3: S3) -> None:
    output = f"{s3.bucket}/counted"
    with s3.proxy.faults() as seen:
        label_stage.run(f"{s3.bucket}/world", world.job.parent / "teacher", output)
    per_shard = [requests(seen, f"unlabelled-{number:03d}") for number in range(SHARDS)]
    assert all(found["GET"] <= 4 and found["HEAD"] <= 2 and found["PUT"] == 1 for found in per_shard), per_shard
    assert len(seen) <= 8 * SHARDS + 100
    with s3.proxy.faults() as again:
        label_stage.run(f"{s3.bucket}/world", world.job.parent / "teacher", output)
    assert not requests(again, "unlabelled")["PUT"] and not requests(again, ".tar"), "no finished shard is read again"
    assert sum("list-type" in request.path for request in again) <= 10, "whatever the number of shards"


def test_the_label_files_of_another_teacher_are_not_looked_at(world: small.World, s3: S3) -> None:
    """A second generation's beside the first one's, which are gigabytes."""
    output = f"{s3.bucket}/second"
    for number in range(1, 3):
        write_done(Done("gen1-label", f"{output}/gen1-label-0000000{number}", "0", "0", {"teacher": "another"}))
    with s3.proxy.faults() as seen:
        label_stage.run(f"{s3.bucket}/world", world.job.parent / "teacher", output)
    assert {number: requests(seen, f"gen1-label-0000000{number}").total() for number in (1, 2)} == {1: 1, 2: 1}


def test_the_cache_serves_a_second_run(world: small.World, s3: S3, tmp_path: Path) -> None:
    settings = f"data.cache={tmp_path / 'cache'}", "data.cache_gb=0.01"
    for output in ("first", "second"):
        with s3.proxy.faults() as seen:
            label_stage.run(f"{s3.bucket}/world", world.job.parent / "teacher", str(tmp_path / output), *settings)
        assert requests(seen, ".tar")["GET"] == (SHARDS if output == "first" else 0)
    assert label_stage.rows(str(tmp_path / "second")) == label_stage.rows(str(world.output))


@pytest.mark.slow
def test_a_killed_driver_goes_on(world: small.World, s3: S3, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    output, teacher = f"{s3.bucket}/killed", world.job.parent / "teacher"
    folder = label_stage.files(output)
    command = [sys.executable, "-m", "tests.label_stage", f"{s3.bucket}/world", str(teacher), output]
    with s3.proxy.faults(*[Fault(pause=0.2)] * 100, only=r"GET .*\.tar"):
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while len([name for name in storage.walk(folder) if name.endswith(".parquet")]) < 2:
            assert driver.poll() is None, "it ended before it could be killed"
            time.sleep(0.1)
        driver.kill()
        driver.wait()
    before = described(folder)
    assert 2 <= len(before) < SHARDS
    with pytest.raises(OutputError, match=r"in use by another run .* if it was killed"):
        label_stage.run(f"{s3.bucket}/world", teacher, output)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.0)
    with s3.proxy.faults(share=0.1, seed=5):
        label_stage.run(f"{s3.bucket}/world", teacher, output)
    after = described(folder)
    assert len(after) == SHARDS and {name: after[name] for name in before} == before, (
        "what was finished is not written again"
    )
    assert label_stage.rows(output) == label_stage.rows(str(world.output))
    assert not [name for name in storage.walk(output) if ".lock" in name or "tmp" in name]


def described(folder: str) -> dict[str, tuple]:
    """{label file: (ETag, time of its last change)}."""
    fs, inner = storage.filesystem(folder)
    found = fs.find(inner, detail=True)
    return {
        name.rsplit("/", 1)[-1]: (info["ETag"], info["LastModified"])
        for name, info in found.items()
        if name.endswith(".parquet")
    }


def test_an_upload_that_breaks_leaves_nothing(s3: S3, quick: None) -> None:
    path = f"{s3.bucket}/upload/a.bin"
    with s3.proxy.faults(*[Fault(status=403)] * 9, only="PUT"), pytest.raises(OutputError, match=r"cannot reach s3://"):
        storage.write_bytes(path, b"x")
    with pytest.raises(RuntimeError, match="the writer fails"), storage.writing(path) as temporary:
        Path(temporary).write_bytes(b"half")
        raise RuntimeError("the writer fails")
    assert not storage.exists(path) and storage.walk(f"{s3.bucket}/upload") == {}
    faults = Fault(status=503), Fault(lost=True), Fault(status=500)
    with s3.proxy.faults(*faults, only="PUT") as seen, storage.writing(path) as temporary:
        Path(temporary).write_bytes(b"whole")
    assert storage.read_bytes(path) == b"whole" and len(seen) >= 4


def test_names_through_faults(s3: S3, quick: None) -> None:
    base = f"{s3.bucket}/names"
    for name in ("a/1.txt", "a/b/2.txt", "3.txt", ".tmp-4"):
        s3.put(f"names/{name}", name.encode())
    faults = Fault(status=500), Fault(lost=True), Fault(status=503)
    with s3.proxy.faults(*faults):
        assert storage.walk(base) == {"3.txt": 5, "a/1.txt": 7, "a/b/2.txt": 9}
    with s3.proxy.faults(*faults):
        assert storage.listdir(base) == ["3.txt", "a"] and storage.exists(f"{base}/3.txt")
    with s3.proxy.faults() as seen:
        storage.walk(base)
    assert len(seen) == 1, "one listing, however many folders"
    with s3.proxy.faults(*faults):
        storage.remove(f"{base}/a")
        storage.remove(f"{base}/nothing")
    assert storage.walk(base) == {"3.txt": 5} and storage.walk(f"{base}/none") == {} == dict.fromkeys(
        storage.listdir(f"{base}/none")
    )
    with pytest.raises(OutputError, match="no such bucket"):
        storage.write_bytes("s3://no-such-bucket/a", b"x")


def test_what_another_process_writes_is_seen(s3: S3) -> None:
    path = f"{s3.bucket}/seen/a"
    assert not storage.exists(path) and storage.listdir(f"{s3.bucket}/seen") == []
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(path, b"x")
    assert storage.exists(path) and storage.listdir(f"{s3.bucket}/seen") == ["a"]
    token = storage.write_token(f"{s3.bucket}/seen")
    storage.require_token(f"{s3.bucket}/seen", token)
    with pytest.raises(OutputError, match="not shared"):
        storage.require_token(f"{s3.bucket}/elsewhere", token)


def test_the_lock(s3: S3, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    output = f"{s3.bucket}/locked"
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.5)
    with lock(output):
        first = modified(output)
        with pytest.raises(OutputError, match=r"in use by another run \(its lock was renewed \d s ago\)"), lock(output):
            pass
        while modified(output) == first:  # the heart beats
            time.sleep(0.05)
    assert storage.walk(output) == {}
    monkeypatch.setattr(locks, "BEAT_SECONDS", 15.0)
    storage.write_bytes(f"{output}/.lock", b'{"owner": "a killed run"}')
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.0)
    with lock(output):
        assert b"killed" not in storage.read_bytes(f"{output}/.lock")
        storage.write_bytes(f"{output}/.lock", b'{"owner": "one that took it over"}')
    assert b"took it over" in storage.read_bytes(f"{output}/.lock"), "another run's lock stays"


def read_in_child(url: str, sizes: multiprocessing.Queue) -> None:
    sizes.put(len(storage.read_bytes(url)))


def test_a_forked_process_leaves_its_parent_alone(s3: S3) -> None:
    """As the image loaders of a training worker do, between two readings of their parent."""
    url = s3.put("fork/a", bytes(1000))
    assert len(storage.read_bytes(url)) == 1000
    context = multiprocessing.get_context("fork")
    sizes = context.Queue()
    children = [context.Process(target=read_in_child, args=(url, sizes)) for _ in range(2)]
    for child in children:
        child.start()
    assert [sizes.get(timeout=60) for _ in children] == [1000, 1000]
    for child in children:
        child.join()
    assert len(storage.read_bytes(url)) == 1000


def modified(output: str) -> object:
    fs, inner = storage.filesystem(f"{output}/.lock")
    return fs.modified(inner)


@pytest.mark.parametrize("round", range(6))
def test_a_stale_lock_is_taken_by_one_run_and_its_owner_finds_out(
    s3: S3, quick: None, monkeypatch: pytest.MonkeyPatch, round: int
) -> None:
    output, got, over, look = f"{s3.bucket}/stale-{round}", [], threading.Event(), locks._look
    looked, once = threading.Barrier(4), threading.local()

    def look_together(path: str) -> tuple[float | None, str | None]:
        """All have looked at the stale lock before the first one takes it."""
        found = look(path)
        if not hasattr(once, "waited"):
            once.waited = True
            looked.wait(30)
        return found

    def take() -> None:
        try:
            with lock(output) as held:
                got.append(True)
                over.wait(30)
                held.check()
        except OutputError as error:
            assert "was taken by another run just now" in str(error)
            got.append(False)
        if got.count(False) == 3:
            over.set()

    with lock(output) as slow:
        monkeypatch.setattr(locks, "STALE_SECONDS", 0.0)
        monkeypatch.setattr(locks, "_look", look_together)
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(got) == [False, False, False, True]
        slow.check()  # all have gone: it is there for the taking again
        storage.write_bytes(f"{output}/.lock", b'{"owner": "one that took it over"}')
        with pytest.raises(OutputError, match="was taken by another run while this one stood still"):
            slow.check()


def test_of_two_runs_that_start_together_one_holds_the_lock(s3: S3, quick: None) -> None:
    output, start, held = f"{s3.bucket}/together", threading.Barrier(4), []

    def one() -> None:
        start.wait()
        try:
            with lock(output):
                held.append(True)
                over.wait()
        except OutputError:
            held.append(False)
            if held.count(False) == 3:
                over.set()

    over = threading.Event()
    threads = [threading.Thread(target=one) for _ in range(4)]
    with s3.proxy.faults(Fault(lost=True), only="PUT"):  # the winner's first answer is lost
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(held) == [False, False, False, True]
