"""Checkpoints are absent or whole, the last ones are kept, and a damaged one is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.errors import WeightsError
from pipeline.train import checkpoint

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "counter": torch.tensor(3)}
EMA = {"weight": torch.ones(2, 3), "counter": torch.tensor(3)}


def save(folder, step, keep=2):
    momentum = {0: {"momentum_buffer": torch.full((2, 3), float(step))}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.1, "params": [0]}]}
    state = {"architecture": {"model": "tiny", "classes": 4}}
    return checkpoint.save(folder, step, model=MODEL, ema=EMA, optimizer=optimizer, state=state, keep=keep)


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


def test_only_the_last_are_kept(folder):
    for step in (5, 10, 15):
        save(folder, step)
    assert steps(folder) == ["step-000010", "step-000015"]


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


def test_a_writer_that_dies_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(str(tmp_path), 5)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save(str(tmp_path), 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    path = save(str(tmp_path), 5)
    torch.save({"state": Bomb()}, f"{path}/optimizer.pt")
    manifest = json.loads(Path(path, "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = checkpoint._describe(Path(path, "optimizer.pt").read_bytes())
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
