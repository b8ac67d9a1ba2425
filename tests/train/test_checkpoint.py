"""Checkpoints are absent or whole, the last ones are kept, and a damaged one is passed over."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.errors import OutputError, WeightsError
from pipeline.tracking.journal import Journal
from pipeline.train import checkpoint, checkpoint_files
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.host_copy import HostCopy

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "counter": torch.tensor(3)}
EMA = {"weight": torch.ones(2, 3), "counter": torch.tensor(3)}


def content(step):
    momentum = {0: {"momentum_buffer": torch.full((2, 3), float(step))}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.1, "params": [0]}]}
    state = {"architecture": {"model": "tiny", "classes": 4}}
    return {"model": MODEL, "ema": EMA, "optimizer": optimizer, "state": state}


def save(folder, step, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        return checkpoints.save(step, **content(step))


@pytest.fixture(params=["local", "object-store"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def steps(folder):
    return storage.listdir(f"{folder}/checkpoints")


def test_what_is_saved_comes_back(folder):
    path = save(folder, 7)
    found = checkpoint.latest(folder)
    assert (found.step, found.path) == (7, path)
    assert torch.equal(found.model["weight"], MODEL["weight"])
    assert torch.equal(found.ema["weight"], EMA["weight"])
    assert found.optimizer["state"][0]["momentum_buffer"][0, 0] == 7
    assert found.state["architecture"]["model"] == "tiny"
    assert steps(folder) == ["step-000007"]


def test_only_the_last_and_the_best_are_kept(folder):
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (5, 10, 15, 20):
            checkpoints.save(step, **content(step), also=(5,))
        checkpoints.wait()
        assert steps(folder) == ["step-000005", "step-000015", "step-000020"]
        checkpoints.save(25, **content(25), also=(20,))
    assert steps(folder) == ["step-000020", "step-000025"]
    assert checkpoint.latest(folder).optimizer["state"][0]["momentum_buffer"][0, 0] == 25


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_checkpoint_is_passed_over(folder, file, damage, caplog):
    save(folder, 5)
    path = f"{save(folder, 10)}/{file}"
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 0x80
    storage.write_bytes(path, bytes(data[: len(data) // 2] if damage == "cut" else data))
    assert checkpoint.latest(folder).step == 5
    assert "step-000010" in caplog.text
    save(folder, 10, keep=1)  # the run comes there again
    assert checkpoint.latest(folder).step == 10
    assert steps(folder) == ["step-000010"]


def test_a_lost_file_is_noticed(folder):
    path = save(folder, 5)
    storage.remove(f"{path}/ema.safetensors")
    with pytest.raises(WeightsError, match=r"has lost ema\.safetensors"):
        checkpoint.load(folder, 5)
    assert checkpoint.latest(folder) is None


def test_a_damaged_later_one_never_crowds_out_the_newest(folder):
    save(folder, 5)
    path = save(folder, 20)
    storage.write_bytes(f"{path}/state.json", b"{}")
    save(folder, 6, keep=1)
    assert checkpoint.latest(folder).step == 6
    assert steps(folder) == ["step-000006"]


def test_without_a_manifest_there_is_no_checkpoint(folder):
    """A writer that died half-way through an upload, or a deletion that did."""
    save(folder, 5)
    storage.remove(f"{save(folder, 10)}/manifest.json")
    assert checkpoint.latest(folder).step == 5
    save(folder, 15)
    assert steps(folder) == ["step-000005", "step-000015"]


THREADS = """
import os, sys, torch
from pipeline.train.checkpoint import Checkpoints
torch.set_num_threads(3)
weight = torch.ones(64, 64, 3, 3).to(memory_format=torch.channels_last)  # large enough for several threads
parts = {"single": weight, "half": weight.bfloat16()}
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.reserve(torch.nn.Linear(1, 1), torch.optim.SGD([weight], lr=1))
    checkpoints.wait()
    weight.contiguous()
    before = len(os.listdir("/proc/self/task"))
    checkpoints.save(5, model=parts, ema=parts, optimizer={}, state={})
    checkpoints.wait()
    print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_a_write_starts_no_threads_that_compute(tmp_path):
    """They would stay, and libgomp then lets training's threads sleep between operations."""
    command = [sys.executable, "-c", THREADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert (before, after) == (before, before)
    assert before >= 4  # main's three and the one that writes
    found = checkpoint.load(str(tmp_path), 5).model
    assert torch.equal(found["half"], torch.ones(64, 64, 3, 3, dtype=torch.bfloat16))


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint_files.write
    monkeypatch.setattr(checkpoint_files, "write", lambda *args: go.wait(60) and write(*args))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.zeros(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last)
    now = {"weight": weight, "counter": torch.tensor(1, device=device)}
    facts = {"architecture": {}, "validation": {"top1": 0.5}}
    optimizer = {"state": {0: {"momentum_buffer": now["weight"]}}, "param_groups": [{"lr": 0.1}]}
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(5, model=now, ema=now, optimizer=optimizer, state=facts)
        now["weight"] += 7
        now["counter"] += 1
        facts["validation"]["top1"] = 0.9
        optimizer["param_groups"][0]["lr"] = 0.01
        assert checkpoint.latest(str(tmp_path)) is None
        assert checkpoints._copy._page_locked == (device == "cuda")
        go.set()
        checkpoints.save(10, model=now, ema=now, optimizer=optimizer, state=facts)  # waits for the other
    found = [checkpoint.load(str(tmp_path), step) for step in (5, 10)]
    assert [float(one.ema["weight"].sum()) for one in found] == [0, 4 * 3 * 5 * 5 * 7]
    assert [int(one.model["counter"]) for one in found] == [1, 2]
    assert [float(one.optimizer["state"][0]["momentum_buffer"].max()) for one in found] == [0, 7]
    assert [one.optimizer["param_groups"][0]["lr"] for one in found] == [0.1, 0.01]
    assert [one.state["validation"]["top1"] for one in found] == [0.5, 0.9]


def test_a_copy_holds_any_tensor_in_memory_that_is_used_again():
    weight = torch.randn(4, 3, 5, 5)
    tree = {
        "channels last": weight.to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).expand(2, 3),
        "step": weight[::2, 1],
        "tied": [weight, weight],
        "others": (torch.tensor(True), torch.zeros(0, 3), weight.bfloat16(), torch.tensor(7), 0.5, None, "sgd"),
    }
    copies = HostCopy()
    found = copies.take(tree)
    assert found["others"][4:] == (0.5, None, "sgd")
    pairs = list(zip(*(torch.utils._pytree.tree_leaves(one) for one in (found, tree)), strict=True))
    pairs = [(mine, theirs) for mine, theirs in pairs if isinstance(mine, torch.Tensor)]
    assert len(pairs) == 9
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
        assert mine.untyped_storage().nbytes() <= max(1, theirs.numel()) * theirs.element_size()
        assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
    assert found["channels last"].stride() == tree["channels last"].stride()
    assert torch.equal(copies.take({"other": weight})["other"], weight)
    again = copies.take(tree)
    assert again["tied"][0].data_ptr() == found["tied"][0].data_ptr()


def test_memory_is_reserved_for_what_an_optimizer_keeps(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 7, 3))
    model.to(memory_format=torch.channels_last)
    for name, kind in {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}.items():
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        with Checkpoints(str(tmp_path / name), keep=1) as checkpoints:
            checkpoints.reserve(model, optimizer)
            checkpoints.wait()
            block = checkpoints._copy._block
            weights = model.state_dict()
            checkpoints.save(1, model=weights, ema=weights, optimizer=optimizer.state_dict(), state={})
            assert checkpoints._copy._block is block
        found = checkpoint.load(str(tmp_path / name), 1)
        assert all(torch.equal(found.model[key], value) for key, value in weights.items())


LARGE = 1 << 20


@contextlib.contextmanager
def full_disk():
    """No file may grow to LARGE bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_too_much(checkpoints, what):
    """A save of step 10 that fails while the model or the optimizer's state is written."""
    given = content(10)
    if what == "model":
        given["model"] = {"weight": torch.zeros(LARGE)}
    else:
        given["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(LARGE)
    with full_disk():
        checkpoints.save(10, **given)
        checkpoints.wait()


def test_a_full_disk_is_one_sentence_for_the_weights_and_the_journal_too(tmp_path):
    told = r"^cannot write {}: file too large.*; make room there and run again"
    with full_disk(), pytest.raises(OutputError, match=told.format(".*model.safetensors")):
        checkpoint.write_final(str(tmp_path), {"weight": torch.zeros(LARGE)}, {"step": 1})
    assert checkpoint.read_result(str(tmp_path)) is None and storage.listdir(str(tmp_path)) == []
    journal = Journal(str(tmp_path))
    with full_disk(), pytest.raises(OutputError, match=told.format(".*metrics.jsonl")):
        journal.log(1, text="x" * LARGE)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, what):
    save(str(tmp_path), 5)
    sentence = r"^cannot write checkpoint .*step-000010: file too large.*; make room there and run again: "
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        with pytest.raises(OutputError, match=sentence):
            save_too_much(checkpoints, what)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
        checkpoints.save(15, **content(15))  # there is room again
    assert steps(str(tmp_path)) == ["step-000005", "step-000015"]


def test_a_failed_write_is_raised_once_at_the_next_occasion(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no reason")

    monkeypatch.setattr(checkpoint_files, "write", fail)
    with pytest.raises(RuntimeError, match="no reason"), Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(5, **content(5))
        with pytest.raises(RuntimeError, match="no reason"):
            checkpoints.save(10, **content(10))
        checkpoints.wait()
        checkpoints.save(15, **content(15))  # raised by the end of the block
    with pytest.raises(KeyError), Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(5, **content(5))
        raise KeyError  # says more than the write that failed
    assert "the last checkpoint was not written: no reason" in caplog.text


class Killed(BaseException):
    pass


def die_in_write(folder, moment, how, monkeypatch):
    """Save steps 5 and 10; die as the file number `moment` of the latter is about to get its name."""
    save(folder, 5)
    files, writing = itertools.count(1), storage.writing

    @contextlib.contextmanager
    def dying(path):
        with writing(path) as temporary:
            yield temporary
            if next(files) == moment:
                how()

    with monkeypatch.context() as patch:
        patch.setattr(storage, "writing", dying)
        patch.setattr(storage.files, "writing", dying)  # what writes JSON
        save(folder, 10, keep=1)


def test_a_kill_in_a_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    """Whenever it comes; real processes and kill -9."""

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    fork = multiprocessing.get_context("fork")
    for moment in itertools.count(1):
        folder = str(tmp_path / str(moment))
        process = fork.Process(target=die_in_write, args=(folder, moment, kill, monkeypatch))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert checkpoint.latest(folder).step == 5
        save(folder, 10)  # the run comes there again
        assert checkpoint.latest(folder).step == 10
    assert moment == 6  # the five files, and none
    assert checkpoint.latest(folder).step == 10
    assert not list(tmp_path.rglob(".tmp-*"))


def test_an_upload_that_stops_half_way_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    def killed():
        raise Killed

    for moment in itertools.count(1):
        folder = f"memory://{tmp_path.name}/{moment}"
        try:
            die_in_write(folder, moment, killed, monkeypatch)
        except Killed:
            assert checkpoint.latest(folder).step == 5
            save(folder, 10)
            assert checkpoint.latest(folder).step == 10
        else:
            break
    assert moment == 11  # five files in a local folder, the same five sent, and none


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    path = save(str(tmp_path), 5)
    torch.save({"state": Bomb()}, f"{path}/optimizer.pt")
    manifest = json.loads(Path(path, "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = checkpoint_files.describe(Path(path, "optimizer.pt").read_bytes())
    Path(path, "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"[Uu]nsupported|[Ww]eights"):
        checkpoint.latest(str(tmp_path))
    assert not (tmp_path / "boom").exists()


def test_another_architecture_is_named(tmp_path):
    save(str(tmp_path), 5)
    found = checkpoint.latest(str(tmp_path))
    checkpoint.check_architecture(found, {"model": "tiny", "classes": 4})
    with pytest.raises(WeightsError, match=r"its classes is 4, this stage's is 10"):
        checkpoint.check_architecture(found, {"model": "tiny", "classes": 10})


def test_a_result_counts_once_the_weights_are_there(folder):
    assert checkpoint.read_result(folder) is None
    checkpoint.write_final(folder, MODEL, {"step": 5})
    assert checkpoint.read_result(folder) == {"step": 5}
    storage.remove(f"{folder}/model.safetensors")
    assert checkpoint.read_result(folder) is None
