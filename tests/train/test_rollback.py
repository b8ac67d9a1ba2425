"""A learning rate that diverges: it is named, or the run goes back and lowers it. The divergence is a real one: weight
decay times rate grows until every update overshoots, and the weights with it, until they overflow."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from pipeline import storage, weights
from pipeline.errors import TrainingError
from pipeline.tracking import journal
from pipeline.train import checkpoint, classification
from pipeline.train.loop import run
from tests.train.tiny import difference, make_spec, without_noise


def explosive(data, folder, **changes):
    settings = {
        "weight_decay": 200.0,
        "warmup": 20,
        "schedule": "constant",
        "checkpoint_every": 4,
        "rollback_factor": 0.1,
    }
    return make_spec(data, folder, **without_noise(**{**settings, **changes}))


@pytest.fixture(scope="module")
def went_back(data, tmp_path_factory):
    """(folder of a run that went back, the steps at which it was started or started again)"""
    folder = tmp_path_factory.mktemp("went_back")
    starts = []
    real = classification.batches
    classification.batches = lambda *args, **kwargs: starts.append(kwargs["start_step"]) or real(*args, **kwargs)
    try:
        run(explosive(data, folder, rollbacks=5))
    finally:
        classification.batches = real
    return str(folder), starts


def final(folder):
    return weights.read_state(f"{folder}/model.safetensors")


def test_a_rate_that_diverges_is_named_and_the_last_good_checkpoint_kept(data, tmp_path):
    with pytest.raises(
        TrainingError, match=r" at step \d+, .*rate 0\.0\d+; lower `lr`.*good checkpoint is .*step-0000"
    ):
        run(explosive(data, tmp_path))
    kept = checkpoint.latest(str(tmp_path))
    assert all(torch.isfinite(value).all() for value in (*kept.model.values(), *kept.ema.values()))


def test_a_run_that_diverges_goes_back_with_a_lower_rate_and_further_back_if_that_is_not_enough(went_back):
    folder, starts = went_back
    result = checkpoint.read_result(folder)
    assert (result["step"], result["rollbacks"]) == (20, len(starts) - 1)
    assert math.isfinite(result["loss"])
    # The first time to the checkpoint before the divergence, which was already ill, and then before that.
    assert starts[0] == 0
    assert starts[1] > starts[2] == starts[-1]
    records = journal.read(folder)[0]
    back = [record for record in records if record["kind"] == "rollback"][-1]
    assert (back["step"], back["rollbacks"]) == (starts[-1], len(starts) - 1)
    assert back["diverged_at"] > starts[1]
    assert back["rate_factor"] == pytest.approx(0.1 ** (len(starts) - 1))
    for record in records:
        if record["kind"] == "train":
            lowered = back["rate_factor"] if record["step"] > back["step"] else 1
            assert record["lr"] == pytest.approx(lowered * 0.05 * record["step"] / 20)
    assert checkpoint.latest(folder).state["rollbacks"] == len(starts) - 1


@pytest.mark.parametrize("saved_since", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_killed_after_it_went_back_goes_on_to_the_same_bits(data, went_back, tmp_path, saved_since):
    folder, starts = went_back
    real, begun = classification.batches, []

    def dying(*args, **kwargs):
        begun.append(kwargs["start_step"])
        for batch in real(*args, **kwargs):
            if len(begun) == len(starts) and batch["step"] == starts[-1] + (5 if saved_since else 1):
                raise InterruptedError
            yield batch

    classification.batches = dying
    with pytest.raises(InterruptedError):
        run(explosive(data, tmp_path, rollbacks=5))
    classification.batches = real
    assert begun == starts
    assert checkpoint.latest(str(tmp_path)).state["rollbacks"] == (len(starts) - 1 if saved_since else 0)
    assert run(explosive(data, tmp_path, rollbacks=5)) == checkpoint.read_result(folder)
    assert difference(final(tmp_path), final(folder)) == 0


def test_without_a_checkpoint_it_goes_back_to_the_start(data, tmp_path):
    changes = {"weight_decay": 1e4, "warmup": 0, "checkpoint_every": 0, "rollback_factor": 1e-3, "steps": 6}
    run(explosive(data, tmp_path / "back", rollbacks=1, **changes))
    run(explosive(data, tmp_path / "low", lr=0.05 * 1e-3, **changes))
    assert difference(final(tmp_path / "back"), final(tmp_path / "low")) < 1e-6
    first, second = journal.read(str(tmp_path / "back"))[0][:2]
    assert (first["kind"], second["kind"], second["step"]) == ("start", "rollback", 0)


def test_it_gives_up_when_it_has_gone_back_often_enough(data, tmp_path):
    changes = {"weight_decay": 1e4, "warmup": 0, "checkpoint_every": 0, "rollback_factor": 0.9}
    with pytest.raises(
        TrainingError, match=r"after going back 2 times; lower `lr`, lengthen `warmup` \(there is no checkpoint yet"
    ):
        run(explosive(data, tmp_path, rollbacks=2, **changes))


def test_a_validation_that_is_not_finite_is_a_divergence(data, tmp_path):
    """The average may overflow where the weights do not."""
    changes = {"model": "timm/test_resnet", "overrides": {}, "lr": 1e7, "warmup": 0, "evaluate_every": 1}
    with pytest.raises(TrainingError, match=r"validation loss became (nan|inf) at step \d"):
        run(make_spec(data, tmp_path, **changes))


def test_sigterm_does_not_save_what_has_diverged(data, tmp_path):
    real = classification.batches

    def interrupted(*args, **kwargs):
        for batch in real(*args, **kwargs):
            if batch["step"] == 6:
                batch["targets"] *= float("nan")
                signal.raise_signal(signal.SIGTERM)
            yield batch

    classification.batches = interrupted
    with pytest.raises(SystemExit):
        run(make_spec(data, tmp_path, checkpoint_every=4))
    assert storage.listdir(f"{tmp_path}/checkpoints") == ["step-000004"]
