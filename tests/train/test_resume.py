"""However often a run is stopped, and whoever goes on, it trains on the same images to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline import weights
from pipeline.loading.loader import TrainingData, batches
from pipeline.train import checkpoint, classification
from pipeline.train.loop import run
from tests.train.tiny import difference, make_spec, record, recorded, samples_of, without_noise

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20  # two epochs: 48 labelled images, 5 a step; 78 pseudo-labelled ones with their copies, 8 a step
SAVING = without_noise(steps=STEPS, checkpoint_every=3)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Folder of a run of one worker, and of the record of its batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = classification.batches
    record(folder / "record")
    run(make_spec(data, folder / "run", **SAVING))
    classification.batches = before
    return folder


def command(data: Path, folder: Path, changes: dict[str, object], *more: object, workers: int = 1) -> list[str]:
    """A run in processes of its own: under torchrun where there are several workers."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    script = str(Path(__file__).with_name("run_tiny.py"))
    return [sys.executable, *launch, script, str(data), str(folder), json.dumps(changes), *map(str, more)]


def execute(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=200)


def final(folder: Path) -> dict:
    return weights.read_state(f"{folder}/model.safetensors")


def global_batches(data: Path, first: int, last: int, world: int) -> dict[int, Counter]:
    """What the global batches first … last-1 hold, as the loaders of so many workers give them out."""
    spec = make_spec(data, "unused")
    found = {step: Counter() for step in range(first, last)}
    same = {"augment": spec.augment, "classes": spec.classes, "soft": spec.soft, "seed": spec.seed}
    for rank in range(world):
        known = {**same, "rank": rank, "world": world}
        place = TrainingData(spec.sources, **known)
        for batch in batches(spec.sources, start_step=first, stop_step=last, **known):
            found[batch["step"]].update(samples_of(place, batch))
    return found


def test_two_then_one_then_three_workers_train_on_what_one_would_have(data):
    alone = global_batches(data, 0, STEPS, 1)
    resumed = global_batches(data, 0, 7, 2) | global_batches(data, 7, 13, 1) | global_batches(data, 13, STEPS, 3)
    assert resumed == alone
    over = sum(alone.values(), Counter())
    assert max(over.values()) == 1  # no image is seen twice with one augmentation seed
    twice = Counter((shard, index) for source, shard, index, *_ in over if source == "labelled")
    assert len(twice) == 48
    assert set(twice.values()) == {2, 3}  # two epochs, and the four images with which the third begins
    assert sum(twice.values()) == 5 * STEPS


@pytest.mark.slow
def test_under_torchrun_a_killed_worker_loses_nothing_and_any_number_goes_on(data, undisturbed, tmp_path):
    """2 workers, one killed with -9; 1 worker, killed; 3 workers to the end."""
    notes = [tmp_path / f"record-{number}" for number in range(3)]
    folder = tmp_path / "run"
    assert execute(command(data, folder, SAVING, 7, "--record", notes[0], workers=2)).returncode != 0
    assert checkpoint.latest(str(folder)).step == 6
    killed = execute(command(data, folder, SAVING, 13, "--record", notes[1]))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(str(folder)).step == 12
    ended = execute(command(data, folder, SAVING, "--record", notes[2], workers=3))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[0])["step"] == STEPS
    assert difference(final(undisturbed / "run"), final(folder)) < 1e-5
    two, one, three = map(recorded, notes)
    assert (min(one), max(one), min(three), max(three)) == (6, 12, 12, STEPS - 1)
    assert (two[6], one[12]) == (one[6], three[12])  # done again
    trained_on = {step: (two if step < 6 else one if step < 12 else three)[step] for step in range(STEPS)}
    assert trained_on == recorded(undisturbed / "record")


@pytest.mark.slow
def test_two_workers_killed_in_the_middle_come_to_the_same_weights(data, tmp_path):
    """20 steps = 10, kill -9, 10; with dropout and stochastic depth."""
    changes = {"steps": 20, "checkpoint_every": 10}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, kill in ((whole, ()), (cut, (13,)), (cut, ())):
        ended = execute(command(data, folder, changes, *kill, workers=2))
        assert (ended.returncode != 0) == bool(kill), ended.stderr
    assert difference(final(whole), final(cut)) < 1e-6
    assert checkpoint.read_result(str(whole)) == checkpoint.read_result(str(cut))


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers, parallel, loading, saved", [(1, "ddp", 0, 7), (2, "ddp", 0, 7), (2, "ddp", 2, 7), (2, "fsdp", 1, 8)]
)
def test_sigterm_saves_where_the_run_is(data, undisturbed, tmp_path, workers, parallel, loading, saved):
    """Alone and under torchrun, which passes it on to all processes; another number of workers goes on from there.
    FSDP's agree at a record."""
    changes = SAVING | {"checkpoint_every": 0, "parallel": parallel, "workers": loading, "log_every": 4}
    stopped = execute(command(data, tmp_path, changes, "--terminate", 6, workers=workers))
    assert stopped.returncode != 0
    assert f"stopped by SIGTERM after saving step {saved} of 20" in stopped.stderr
    assert checkpoint.latest(str(tmp_path)).step == saved
    ended = execute(command(data, tmp_path, changes, workers=3 - workers))
    assert ended.returncode == 0, ended.stderr
    assert difference(final(undisturbed / "run"), final(tmp_path)) < 1e-5
