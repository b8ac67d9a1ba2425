"""Accuracy: every image exactly once, whatever the number of workers and the size of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data import images, shards
from pipeline.train.dist import World
from pipeline.train.evaluate import Memory, accuracy, read_index
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
