"""Accuracy: every image exactly once, whatever the number of workers and the size of a batch."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import nn

from pipeline.cluster.world import World
from pipeline.data import confidence_bins, images, shards
from pipeline.errors import DataError
from pipeline.train.evaluate import Marks, Memory, accuracy, read_index, score
from pipeline.train.scores import Scores
from tests.train.tiny import CLASSES, VIEW, write_shard

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Logits are the mean brightness of the four quadrants; `seen` collects the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.clone())
        return nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    return tuple(write_shard(folder / f"v{i}.tar", count, seed=i) for i, count in enumerate((11, 6)))


def test_accuracy_is_that_of_each_image_alone(validation):
    model = Brightness().train()
    result = accuracy(model, validation, VIEW, 4, World(0, 1, CPU))
    assert model.training
    alone = Brightness()
    hits, losses = [], []
    for sample in read_index(validation):
        pixels = images.load(shards.read_at(sample.path, sample.offset, sample.size), VIEW)
        logits = alone(images.normalise(torch.from_numpy(pixels[None]), VIEW))
        hits.append(logits.argmax().item() == sample.label)
        losses.append(nn.functional.cross_entropy(logits, torch.tensor([sample.label])).item())
    assert result["count"] == 17
    assert result["top1"] == pytest.approx(np.mean(hits))
    assert result["top1"] > 0.9
    assert result["top5"] == 1.0  # of four classes
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    truth = np.array([sample.label for sample in read_index(validation)])
    by_class = accuracy(model, validation, VIEW, 4, World(0, 1, CPU), classes=CLASSES)
    assert by_class.pop("per_class") == {
        "images": np.bincount(truth, minlength=CLASSES).tolist(),
        "right": np.bincount(truth[np.array(hits)], minlength=CLASSES).tolist(),
    }
    assert by_class == result


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_shares_of_the_workers_are_all_images_once(validation, monkeypatch, size, batch):
    parts = []
    monkeypatch.setattr(World, "sum", lambda self, tensor: parts.append(tensor.clone()) or tensor)
    model = Brightness()
    for rank in range(size):
        accuracy(model, validation, VIEW, batch, World(rank, size, CPU))
    whole = Brightness()
    result = accuracy(whole, validation, VIEW, 100, World(0, 1, CPU))
    total = torch.stack(parts[:-1]).sum(0)
    assert total[0] == 17
    assert total[1] == pytest.approx(result["top1"] * 17)
    assert torch.equal(torch.cat(model.seen), torch.cat(whole.seen))


def test_a_second_validation_reads_nothing(validation, monkeypatch):
    memory, world = Memory(), World(0, 1, CPU)
    first = accuracy(Brightness(), validation, VIEW, 4, world, memory=memory)
    monkeypatch.setattr(shards, "read_at", None)
    assert accuracy(Brightness(), validation, VIEW, 4, world, memory=memory) == first


def test_an_image_that_cannot_be_decoded_is_counted_and_named(tmp_path, caplog):
    shard = write_shard(tmp_path / "v.tar", 5, seed=1, broken=2)
    result = accuracy(Brightness(), [shard], VIEW, 1, World(0, 1, CPU))
    assert (result["count"], result["bad"]) == (4, 1)
    assert "0002" in caplog.text
    assert "v.tar" in caplog.text


def test_the_five_best_of_more_classes(validation):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.arange(8.0).flip(0).repeat(len(x), 1)

    labels = [sample.label for sample in read_index(validation)]
    assert max(labels) < CLASSES
    result = accuracy(Fixed(), validation, VIEW, 4, World(0, 1, CPU))
    assert result["top5"] == 1.0
    assert result["top1"] == pytest.approx(np.mean([label == 0 for label in labels]))


def test_no_images_are_no_division_by_zero():
    assert accuracy(Brightness(), [], VIEW, 4, World(0, 1, CPU))["count"] == 0


def test_only_some_classes_may_be_answered(validation):
    """As of a network that never had the others, on the images of these classes alone."""
    kept = (3, 1)
    found = score(Brightness(), validation, VIEW, 4, World(0, 1, CPU), marks=Marks(answers=kept)).figures()
    samples = [sample for sample in read_index(validation) if sample.label in kept]
    expected = Scores(0)
    for sample in samples:
        pixels = images.load(shards.read_at(sample.path, sample.offset, sample.size), VIEW)
        logits = Brightness()(images.normalise(torch.from_numpy(pixels[None]), VIEW))[:, kept]
        expected.add(logits, torch.tensor([kept.index(sample.label)]))
    assert 0 < found["count"] == len(samples) < 17
    assert found == pytest.approx(expected.figures(), rel=1e-5)


def test_several_classes_are_right_for_an_image(validation):
    samples = read_index(validation)
    marks = Marks(right=[() if place % 5 == 0 else (sample.label,) for place, sample in enumerate(samples)])
    single = score(Brightness(), validation, VIEW, 4, World(0, 1, CPU), marks=marks).figures()
    assert single["count"] == 17 - 4 and single["top1"] > 0.9
    marks = Marks(right=[() if not some else (*some, (some[0] + 1) % 4) for some in marks.right])
    several = score(Brightness(), validation, VIEW, 4, World(0, 1, CPU), marks=marks).figures()
    assert several["top1"] >= single["top1"] and several["loss"] < single["loss"]
    every = Marks(right=[range(4)] * 17)
    found = score(Brightness(), validation, VIEW, 4, World(0, 1, CPU), marks=every).figures()
    assert found["top1"] == 1 and found["loss"] == pytest.approx(0, abs=1e-6)


def test_one_right_class_of_several_is_a_label():
    logits, labels = answered(200, 5)
    one, other = Scores(0), Scores(0)
    one.add(logits, labels)
    other.add(logits, nn.functional.one_hot(labels, 10).bool())
    assert one.figures() == pytest.approx(other.figures(), rel=1e-6)
    both = nn.functional.one_hot(labels, 10).bool()
    both[:, 0] = True
    third = Scores(0)
    third.add(logits, both)
    best = logits.argmax(1)
    assert third.figures()["top1"] == pytest.approx(((best == labels) | (best == 0)).double().mean().item())


def answered(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of ten classes, too sure of themselves, and the true classes; no image of class 9."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (count,), generator=draw)
    return 3 * torch.randn(count, 10, generator=draw) + 4 * nn.functional.one_hot(labels, 10), labels


def test_calibration_error_is_that_of_the_audit():
    logits, labels = answered(500, 0)
    scores = Scores(10)
    scores.add(logits, labels)
    found = scores.figures()
    probabilities = logits.softmax(1).numpy()
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    assert found["ece"] == pytest.approx(confidence_bins.reliability(confidence, correct).ece, abs=1e-12)
    assert 0.02 < found["ece"] < 0.5
    assert found["top1"] == correct.mean()
    assert found["per_class"]["images"][9] == found["per_class"]["right"][9] == 0
    assert sum(found["per_class"]["right"]) == correct.sum()


def test_confidence_on_a_border_falls_below_it():
    """Bins are ((m-1)/15, m/15]: a confidence of exactly 1/3 and one of exactly 1 have bins of their own."""
    scores = Scores(0)
    scores.add(torch.zeros(1, 3), torch.tensor([0]))
    scores.add(torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([0]))
    assert scores.figures()["ece"] == pytest.approx((1 - 1 / 3 + 0) / 2)
    diagram = confidence_bins.reliability(np.array([1 / 3, 1.0], np.float32), np.array([True, True]))
    assert scores.figures()["ece"] == pytest.approx(diagram.ece, abs=1e-7)


def test_counts_of_parts_are_those_of_the_whole():
    logits, labels = answered(100, 1)
    whole, total = Scores(10), Scores(10)
    whole.add(logits, labels)
    for part in (slice(0, 1), slice(1, 40), slice(40, 100)):
        scores = Scores(10)
        scores.add(logits[part], labels[part])
        scores.add_bad(2)
        total.sums += scores.sums
    found, expected = total.figures(), whole.figures()
    assert found.pop("bad") == 6 and expected.pop("bad") == 0
    assert found.pop("per_class") == expected.pop("per_class")
    assert found == pytest.approx(expected)


def test_a_shard_that_has_gone_is_named(tmp_path):
    shard = write_shard(tmp_path / "v.tar", 3, seed=1)
    Path(shard.path).unlink()
    with pytest.raises(DataError, match=r"cannot read 0000 of .*v\.tar, .*FileNotFoundError.*bring the shard back"):
        accuracy(Brightness(), [shard], VIEW, 2, World(0, 1, CPU))


def rank_of_three(rank: int, port: int, sets: list, folder: Path) -> None:
    """Two evaluations by one of three gloo workers: what they give, and a checksum of every image that was seen."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    found = []
    for shards_ in sets:
        model = Brightness()
        result = accuracy(model, shards_, VIEW, 4, World(rank, 3, CPU), classes=CLASSES)
        found.append({"result": result, "seen": sums_of(model)})
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def sums_of(model: Brightness) -> list[float]:
    return [float(image.double().sum()) for batch in model.seen for image in batch]


def test_three_workers_see_every_image_once(validation, tmp_path):
    """17 images for three workers, and 2: the first of them gets none."""
    sets = [validation, (write_shard(tmp_path / "two.tar", 2, seed=9),)]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.start_processes(
        rank_of_three, (port, sets, tmp_path), nprocs=3, start_method="fork", daemon=True
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for number, (one_set, sizes) in enumerate(zip(sets, ([5, 6, 6], [0, 1, 1]), strict=True)):
        alone = Brightness()
        expected = accuracy(alone, one_set, VIEW, 4, World(0, 1, CPU), classes=CLASSES)
        assert [len(rank[number]["seen"]) for rank in ranks] == sizes
        assert [checksum for rank in ranks for checksum in rank[number]["seen"]] == sums_of(alone)
        results = [rank[number]["result"] for rank in ranks]
        assert results[0] == results[1] == results[2]
        assert results[0].pop("per_class") == expected.pop("per_class")
        assert results[0] == pytest.approx(expected)
