"""Detectors on two workers and on three: the same steps' images, every image scored once, the same AP."""

from __future__ import annotations

import functools

import pytest
import torch

from pipeline.cluster.world import World
from pipeline.detection import figures
from pipeline.detection.find import find_in
from pipeline.detection.rows import load_rows
from pipeline.detection.task import DETECTION, to_device
from pipeline.loading.sample_order import share
from pipeline.train import loop
from pipeline.train.start import start
from tests.detection import world

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    world.write(folder)
    return folder


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run at its beginning, and its spec."""
    spec = world.spec(scenes, scenes / "index", tmp_path_factory.mktemp("alone"), duration="8st")
    return spec, start(spec, ALONE, DETECTION.build)


def train(rank, spec):
    return loop.run(spec, None, DETECTION)


def validate(rank, spec):
    here = World(rank, 2, torch.device("cpu"))
    trainee = start(spec, here, DETECTION.build)
    return DETECTION.validate(trainee, spec, here)[0]


@pytest.mark.slow
def test_two_workers_end_with_one_result_and_score_every_image_once(scenes, gloo_pair, tmp_path):
    spec = world.spec(scenes, scenes / "index", tmp_path, duration="6st", checkpoint_every="6st")
    one, other = gloo_pair.call(train, spec)
    assert one == other and one["step"] == 6
    resumed = start(spec, ALONE, DETECTION.build)  # the average as it was validated
    alone = DETECTION.validate(resumed, spec, ALONE)[0]
    assert alone == pytest.approx({name: one[name] for name in alone}, abs=1e-9)
    assert gloo_pair.call(validate, spec) == [pytest.approx(alone, abs=1e-9)] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_the_images_give_the_figures_of_all(trained, size):
    spec, trainee = trained
    net, card = trainee.average.module, spec.card
    net.roi_heads.score_thresh = 0.0  # it has learnt nothing yet
    rows = [load_rows(shard) for shard in spec.validation]
    units = [(shard, of, n) for shard, of in zip(spec.validation, rows, strict=True) for n in range(len(of.texts))]
    find = functools.partial(find_in, net, card, batch=2, device=ALONE.device)
    whole = find(units)
    assert len(whole) == 5 and sum(map(len, whole)) > 20
    parts = [answer for rank in range(size) for answer in find(units[share(len(units), rank, size)])]
    truth = [of.scene(n, card.classes) for _, of, n in units]
    ours, theirs = (figures.measure(truth, found, card.classes) for found in (whole, parts))
    for kind in figures.KINDS:
        for name in figures.FIGURES:
            assert ours[kind][name] == pytest.approx(theirs[kind][name], abs=1e-9), name


def test_a_workers_losses_are_weighted_by_its_images(trained):
    spec, trainee = trained
    batch = next(iter(DETECTION.batches(spec, ALONE, 0)))
    for rows in (slice(None), slice(0, 1), slice(1, None)):
        torch.manual_seed(3)
        loss_of = DETECTION.losses(trainee, batch, 3, spec, ALONE)
        found = loss_of(rows).item()
        torch.manual_seed(3)
        images, targets = to_device(batch, ALONE.device)
        mean = sum(trainee.network(images[rows], targets[rows]).values()).item()
        assert found == pytest.approx(mean * len(images[rows]), rel=1e-5)
