"""The training loop in one process: it learns, records, resumes to the bit, and stops cleanly."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from models.precision import is_bfloat16_fast
from pipeline import storage, weights
from pipeline.errors import ConfigError, TrainingError, WeightsError
from pipeline.loading.loader import batches
from pipeline.tracking import journal
from pipeline.train import checkpoint, classification, loop, update
from pipeline.train.loop import run
from pipeline.train.precision import RECORD
from tests.tiny import FORKS
from tests.train import tiny
from tests.train.tiny import die_at, difference, make_spec, without_noise

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("time", "images_per_second", "waited_for_images")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Folder of a run of 20 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(make_spec(data, folder))
    return folder


def final(folder):
    return weights.read_state(f"{folder}/model.safetensors")


LEARNING = {"model": "timm/test_resnet", "overrides": {}, "steps": 60, "evaluate_every": 30, "lr": 0.1}


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    """Folder of a run that learnt its task."""
    folder = tmp_path_factory.mktemp("learned")
    run(make_spec(data, folder, **LEARNING))
    return folder


def test_it_learns(data, learned, tmp_path):
    before = dataclasses.replace(make_spec(data, tmp_path, **LEARNING), lr=0.0, steps=1)
    assert run(before)["top1"] < 0.7
    result = checkpoint.read_result(str(learned))
    assert result["step"] == 60
    assert result["count"] == 30
    assert result["top1"] > 0.9
    assert result["top5"] == 1.0
    records, _ = journal.read(str(learned))
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.2
    assert [r["step"] for r in records if r["kind"] == "validation"] == [30, 60]


def test_the_journal_says_what_an_epoch_is_and_how_far_the_run_is(undisturbed):
    start, *records = journal.read(str(undisturbed))[0]
    assert start["epoch_is"] == "one pass over the labelled images"
    assert (start["labelled_per_step"], start["pseudo_per_step"]) == (5, 8)
    train = [r for r in records if r["kind"] == "train"]
    assert [(r["step"], r["total"]) for r in train] == [(10, 20), (20, 20)]
    assert train[0]["epoch"] == pytest.approx(10 / 9.6, abs=1e-3)
    assert train[0]["images_per_second"] > 0 and 0 < train[0]["waited_for_images"] < 1
    result = checkpoint.read_result(str(undisturbed))
    assert (records[-1]["top1"], records[-1]["validation_loss"]) == (result["top1"], result["loss"])
    assert "loss" not in records[-1]  # or a tracker would mix it with that of training


def run_and_die(data: Path, folder: Path) -> None:
    """In a process of its own: kill -9 at step 13, once the checkpoint before it is there."""
    die_at(13, once=folder / "checkpoints" / "step-000010" / "manifest.json")
    run(make_spec(data, folder))


def test_a_killed_run_goes_on_to_the_same_bits(data, undisturbed, tmp_path):
    killed = FORKS.Process(target=run_and_die, args=(data, tmp_path))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert checkpoint.latest(str(tmp_path)).step == 10
    result = run(make_spec(data, tmp_path))
    assert result == checkpoint.read_result(str(undisturbed))
    ours, theirs = final(tmp_path), final(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    raw = checkpoint.load(str(tmp_path), 20), checkpoint.load(str(undisturbed), 20)
    assert difference(raw[0].model, raw[1].model) == 0
    assert difference(raw[0].model, raw[0].ema) > 0
    both = [journal.read(str(folder))[0] for folder in (tmp_path, undisturbed)]
    untimed = [[{k: v for k, v in r.items() if k not in TIMED} for r in rs] for rs in both]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lamb", "lr": 0.01},
        {"optimizer": "muon", "lr": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "accumulate": 2},
        {"model": "timm/test_resnet", "overrides": {"drop_rate": 0.2}},
        {"clip": 1.0, "workers": 1, "mixup": 0.2, "cutmix": 1.0},
    ],
    ids=["lamb", "muon", "adamw-in-parts", "batch-norm", "clip-mix-and-loader-process"],
)
def test_every_state_is_in_the_checkpoint(data, tmp_path, changes):
    runs = [make_spec(data, tmp_path / name, steps=8, checkpoint_every=4, **changes) for name in ("a", "b")]
    run(runs[0])
    die_at(6, "raise")
    with pytest.raises(InterruptedError):
        run(runs[1])
    die_at(-1)
    run(runs[1])
    assert difference(final(tmp_path / "a"), final(tmp_path / "b")) == 0


def test_a_finished_run_returns_its_result_without_training(data, undisturbed, monkeypatch):
    monkeypatch.setattr(classification, "build_model", None)
    assert run(make_spec(data, undisturbed)) == checkpoint.read_result(str(undisturbed))


def test_noise_changes_with_the_seed_and_pseudo_labels_weigh(data, undisturbed, tmp_path):
    reference = final(undisturbed)
    for name, changes in {"seed": {"seed": 1}, "weight": {"pseudo_weight": 0.5}, "clip": {"clip": 0.01}}.items():
        run(make_spec(data, tmp_path / name, **changes))
        assert difference(final(tmp_path / name), reference) > 1e-4


def test_a_loss_that_is_not_finite_names_its_step_and_the_last_good_checkpoint(data, tmp_path):
    spec = make_spec(data, tmp_path, checkpoint_every=5, **without_noise())
    real = classification.batch_loss
    calls = []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 8 else 1.0)

    classification.batch_loss = poisoned
    try:
        with pytest.raises(TrainingError, match=r"nan at step 8,.*last good checkpoint is .*step-000005"):
            run(spec)
    finally:
        classification.batch_loss = real
    assert checkpoint.latest(str(tmp_path)).step == 5
    assert run(spec)["step"] == 20


@pytest.mark.parametrize(
    ("model", "again"), [("lambda_resnet_tiny", ", set `overrides.checkpointing: true`"), ("timm/test_resnet", "")]
)
def test_a_step_without_room_says_what_to_do_and_what_is_kept(data, tmp_path, monkeypatch, model, again):
    spec = make_spec(data, tmp_path, model=model, overrides={}, steps=4, checkpoint_every=2, accumulate=2)

    def full(trainee, *rest):
        if trainee.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return update.update(trainee, *rest)

    with monkeypatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(loop, "update", full)
        run(spec)
    assert str(caught.value) == (
        f"step 4 does not fit into the memory of cpu, with 7 images at once; raise `accumulate` (now 2){again}, or "
        "lower "
        f"`batch` (the last good checkpoint is {tmp_path}/checkpoints/step-000002)"
    )
    assert run(tiny.change(spec, accumulate=3))["step"] == 4


def test_an_update_that_is_not_finite_is_not_saved(data, tmp_path):
    with pytest.raises(TrainingError, match=r"weights are not finite after step 1,.*no checkpoint yet"):
        run(make_spec(data, tmp_path, lr=float("inf"), warmup=0, checkpoint_every=1))


RISING = {  # rates that undo what has been learnt
    "model": "timm/test_resnet", "overrides": {}, "lr": 1.0, "warmup": 10, "steps": 10, "evaluate_every": 2, "keep": 1,
    "weights": "best",
}  # fmt: skip


def test_the_best_weights_are_kept_and_handed_on(data, learned, tmp_path):
    spec = make_spec(data, tmp_path, init=f"{learned}/model.safetensors", evaluate_raw=True, **RISING)
    result = run(spec)
    records = [record for record in journal.read(spec.folder)[0] if record["kind"] == "validation"]
    best = max(records, key=lambda record: (record["top1"], -record["validation_loss"]))
    assert best["step"] < 10
    assert (result["best_step"], result["top1"]) == (best["step"], best["top1"])
    assert storage.listdir(f"{tmp_path}/checkpoints") == [f"step-{best['step']:06d}", "step-000010"]
    kept, last = (checkpoint.load(spec.folder, step) for step in (best["step"], 10))
    assert difference(final(tmp_path), kept.ema) == 0
    assert last.state["validation"]["top1"] == records[-1]["top1"] < best["top1"]
    assert difference(final(tmp_path), last.ema) > 1e-3
    # The weights themselves, which have gone further astray than their average.
    raw = [(record["raw_top1"], record["raw_validation_loss"]) for record in records]
    assert raw[-1] != (records[-1]["top1"], records[-1]["validation_loss"])
    assert raw[1][1] > records[1]["validation_loss"]


def test_a_best_that_made_room_before_the_run_went_back_is_forgotten(data, learned, tmp_path, caplog):
    spec = make_spec(data, tmp_path, init=f"{learned}/model.safetensors", **RISING)
    step = run(spec)["best_step"]
    storage.remove(f"{tmp_path}/result.json")
    shutil.rmtree(f"{tmp_path}/checkpoints/step-{step:06d}")
    assert "best_step" not in run(spec)
    assert f"the best weights so far, of step {step}, are gone" in caplog.text


def test_lost_best_weights_are_named(data, learned, tmp_path):
    spec = make_spec(data, tmp_path, init=f"{learned}/model.safetensors", **RISING)
    step = run(spec)["best_step"]
    storage.remove(f"{tmp_path}/result.json")
    storage.remove(f"{tmp_path}/checkpoints/step-{step:06d}/ema.safetensors")
    with pytest.raises(
        WeightsError, match=r"has lost ema.safetensors, and it held the best weights; delete .*`weights: last`"
    ):
        run(spec)


def test_a_step_in_parts_is_the_same_update(data, tmp_path):
    changes = without_noise(steps=6, pseudo_weight=0.5, clip=1.0)
    run(make_spec(data, tmp_path / "whole", **changes))
    run(make_spec(data, tmp_path / "parts", accumulate=3, **changes))
    assert 0 < difference(final(tmp_path / "whole"), final(tmp_path / "parts")) < 1e-5
    losses = [
        [r["loss"] for r in journal.read(str(tmp_path / name))[0] if r["kind"] == "train"]
        for name in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with pytest.raises(ConfigError, match=r"`accumulate` is 14, but a worker's share of a step may be 13 images"):
        run(make_spec(data, tmp_path / "few", accumulate=14, **changes))


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_weights(data, tmp_path):
    """Checkpoints and weights have the names of the network itself, so either goes on from the other."""
    changes = without_noise(model="lambda_resnet_tiny", overrides={}, steps=6, checkpoint_every=3, warmup=1, lr=0.01)
    run(make_spec(data, tmp_path / "eager", **changes))
    die_at(4, "raise")
    with pytest.raises(InterruptedError):
        run(make_spec(data, tmp_path / "compiled", **changes, compile=True))
    classification.batches = batches
    run(make_spec(data, tmp_path / "compiled", **changes, compile=True))
    assert checkpoint.latest(str(tmp_path / "compiled")).step == 6
    assert difference(final(tmp_path / "eager"), final(tmp_path / "compiled")) < 1e-4


def test_a_machine_about_to_be_taken_away_saves_once(data, tmp_path):
    asked = []

    def leaving():
        asked.append(1)
        return len(asked) >= 2

    die_at(7, "raise")
    with pytest.raises(InterruptedError):
        run(make_spec(data, tmp_path, log_every=2, checkpoint_every=0), leaving)
    assert checkpoint.latest(str(tmp_path)).step == 4
    assert len(asked) == 2


@pytest.mark.parametrize("step, saved", [(6, 7), (19, 20)])  # the last step has its validation still
def test_sigterm_saves_where_the_run_is(data, undisturbed, tmp_path, monkeypatch, step, saved):
    real, before = classification.batches, signal.getsignal(signal.SIGTERM)

    def interrupted(*args, **kwargs):
        for batch in real(*args, **kwargs):
            if batch["step"] == step:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(classification, "batches", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(make_spec(data, tmp_path))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.latest(str(tmp_path)).step == saved
    monkeypatch.setattr(classification, "batches", real)
    assert run(make_spec(data, tmp_path)) == checkpoint.read_result(str(undisturbed))
    assert difference(final(tmp_path), final(undisturbed)) == 0


def test_it_runs_outside_the_main_thread(data, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(make_spec(data, tmp_path, steps=2))))
    thread.start()
    thread.join()
    assert results[0]["step"] == 2


def test_a_run_starts_from_given_weights_and_refuses_those_of_another_network(data, undisturbed, tmp_path):
    init = f"{undisturbed}/model.safetensors"
    run(make_spec(data, tmp_path / "same", init=init, steps=1, lr=0.0))
    assert difference(final(tmp_path / "same"), final(undisturbed)) == 0
    with pytest.raises(WeightsError, match=r"pos_embed|blocks|shape"):
        run(make_spec(data, tmp_path / "other", init=init, overrides={**tiny.VIT, "embed_dim": 32}))


def test_a_checkpoint_of_another_architecture_is_refused(data, tmp_path):
    die_at(12, "raise")
    with pytest.raises(InterruptedError):
        run(make_spec(data, tmp_path))
    with pytest.raises(WeightsError, match=r"another architecture: its overrides"):
        run(make_spec(data, tmp_path, overrides={**tiny.VIT, "depth": 1}))


def test_an_object_store_serves_as_folder(data, undisturbed):
    folder = "memory://bucket/train"
    die_at(12, "raise")
    with pytest.raises(InterruptedError):
        run(make_spec(data, folder))
    die_at(-1)
    run(make_spec(data, folder))
    assert difference(final(folder), final(undisturbed)) == 0
    assert storage.listdir(folder) == sorted(
        {"checkpoints", "model.safetensors", "result.json"}
        | {n for n in storage.listdir(folder) if n.startswith("metrics-")}
    )


def test_unknown_precision_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match=r"'fp8'; allowed are auto, fastest, float32, bfloat16"):
        run(make_spec(data, tmp_path, precision="fp8"))


def test_bfloat16_trains(data, tmp_path):
    assert run(make_spec(data, tmp_path, precision="bfloat16", steps=3))["loss"] > 0
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 3


@pytest.mark.parametrize("winner", ["float32", "bfloat16"])
def test_fastest_goes_on_in_what_the_first_start_found_fastest(winner, data, tmp_path):
    for name in ("float32", "bfloat16"):
        run(make_spec(data, tmp_path / name, precision=name, steps=2))
    storage.write_json(str(tmp_path / "fastest" / RECORD), {"precision": winner})
    run(make_spec(data, tmp_path / "fastest", precision="fastest", steps=2))
    for name in ("float32", "bfloat16"):
        assert (difference(final(tmp_path / "fastest"), final(tmp_path / name)) == 0) == (name == winner)


def test_fastest_is_measured_at_the_first_start(data, tmp_path):
    run(make_spec(data, tmp_path, precision="fastest", steps=1))
    record = json.loads((tmp_path / RECORD).read_text())
    assert set(record["seconds"]) == {"float32", "bfloat16"} and min(record["seconds"].values()) > 0
    assert record["precision"] == min(record["seconds"], key=record["seconds"].get)


def test_bfloat16_warns_where_the_cpu_only_emulates_it(data, tmp_path, caplog):
    run(make_spec(data, tmp_path, precision="bfloat16", steps=1))
    warned = [r.getMessage() for r in caplog.records if "only emulates" in r.getMessage()]
    assert len(warned) == (0 if is_bfloat16_fast(torch.device("cpu")) else 1)
