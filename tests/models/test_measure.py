"""Measuring: who runs when, what counts as peak memory, where the search for a batch ends, and memory that runs out."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor, nn

from models.measure import alternate, best_batch, if_it_fits, most_that_fits, peak_bytes, rate_at
from models.measure import turns as rounds_of
from models.measure_model import Setup, measure_models

MEBIBYTE = 1 << 20


def allocate(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.uint8)


def too_much() -> Tensor:
    return allocate(1 << 60)


def turns(calls: list[str]) -> list[str]:
    """Whose turn it was, one after the other."""
    return [name for name, _ in itertools.groupby(calls)]


def test_candidates_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    alternate(candidates, rounds=4, seconds=0)
    assert calls == [*"aabbcc", *"abc" * 4]
    calls.clear()
    alternate(candidates, rounds=4, seconds=1e-4)
    assert turns(calls) == [*"abc" * 5] and len(calls) > 18


def test_each_round_has_its_time() -> None:
    found = rounds_of({"ok": lambda: torch.ones(100).sum(), "never": too_much}, rounds=4, seconds=0)
    assert len(found["ok"]) == 4 and 0 < min(found["ok"]) <= max(found["ok"]) < math.inf
    assert found["never"] == [math.inf]


def test_a_time_is_that_of_one_call_not_of_a_turn() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        torch.ones(1000).sum()

    start = time.perf_counter()
    found = alternate({"": call}, rounds=1, seconds=0.02)[""]
    assert calls > 10
    assert 0 < found * (calls - 2) <= time.perf_counter() - start


def test_a_candidate_that_runs_out_of_memory_has_infinite_time_and_no_further_turns() -> None:
    calls: list[str] = []

    def late() -> None:
        calls.append("late")
        if calls.count("late") > 3:  # in the second round
            too_much()

    candidates = {"late": late, "never": too_much, "ok": lambda: calls.append("ok")}
    found = alternate(candidates, rounds=5, seconds=0)
    assert found["late"] == found["never"] == math.inf
    assert 0 < found["ok"] < math.inf
    assert (calls.count("late"), calls.count("ok")) == (4, 7)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        alternate({"": lambda: torch.ones(2) + torch.ones(3)}, rounds=1, seconds=0)
    with pytest.raises(ValueError, match="no"):
        if_it_fits(lambda: [].index("no"), None)
    assert if_it_fits(too_much, None) is None


def test_peak_is_the_most_that_is_held_at_a_time() -> None:
    assert peak_bytes(lambda: allocate(3 * MEBIBYTE)) == 3 * MEBIBYTE

    def one_after_the_other() -> None:
        for _ in range(3):
            allocate(MEBIBYTE)

    def all_together() -> None:
        _ = [allocate(MEBIBYTE) for _ in range(3)]

    assert peak_bytes(one_after_the_other) == MEBIBYTE
    assert peak_bytes(all_together) == 3 * MEBIBYTE
    before = allocate(8 * MEBIBYTE)
    assert peak_bytes(before.clone) == before.nbytes  # what was there before does not count


def test_peak_of_a_backward_pass_holds_what_was_saved_for_it() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    x = torch.ones(1024, 256)

    def step() -> None:
        ((x @ weight).exp().exp()).sum().backward()
        weight.grad = None

    saved = 2 * x.nbytes  # of both exponentials
    assert saved <= peak_bytes(step) <= 2 * saved


def test_the_batch_is_doubled_while_that_pays() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 36.0, 8: 37.0, 16: 100.0}  # 8 is 3 % faster than 4: not worth it
    assert best_batch(rates.__getitem__) == 4
    assert best_batch(lambda batch: 1.0) == 1
    assert best_batch(lambda batch: batch, most=8) == 8
    assert best_batch(lambda batch: batch, most=15) == 8
    assert best_batch(lambda batch: batch, first=3, most=12) == 12


def test_the_batch_stops_at_the_end_of_memory() -> None:
    assert best_batch(lambda batch: batch if batch < 4 else 0.0) == 2
    assert best_batch(lambda batch: 0.0) == 0
    assert rate_at(lambda batch: too_much, 1) == 0
    assert rate_at(lambda batch: too_much(), 1) == 0  # already its images do not fit


def test_a_rate_is_in_images_per_second() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        torch.ones(1000).sum()

    start = time.perf_counter()
    found = rate_at(lambda batch: call, 50, seconds=0.03)
    assert calls > 10
    assert found >= 50 * (calls - 2) / (time.perf_counter() - start)  # no slower than all turns together


def test_most_that_fits_goes_by_the_peak_of_the_first_batch() -> None:
    assert most_that_fits(lambda batch: lambda: allocate(batch * MEBIBYTE), 10 * MEBIBYTE) == 10
    assert most_that_fits(lambda batch: lambda: allocate(batch * MEBIBYTE), 10 * MEBIBYTE - 1, first=2) == 9
    assert most_that_fits(lambda batch: too_much, 10 * MEBIBYTE) == 0


class Classifier(nn.Module):
    """Notes who is called and how."""

    def __init__(self, name: str, calls: list[tuple[str, str, int]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.classifier = nn.Linear(4, 1000)

    def forward(self, x: Tensor) -> Tensor:
        mode = f"{'train' if self.training else 'eval'} {'graph' if torch.is_grad_enabled() else 'none'}"
        self.calls.append((self.name, mode, len(x)))
        assert x.is_contiguous(memory_format=torch.channels_last)
        return self.classifier(self.norm(self.conv(x).mean((2, 3))))


CPU = torch.device("cpu")


def test_models_take_turns_in_inference_in_latency_and_in_training() -> None:
    calls: list[tuple[str, str, int]] = []
    models = {name: (Classifier(name, calls), size) for name, size in {"a": 8, "b": 12}.items()}
    before = {name: [p.clone() for p in model.parameters()] for name, (model, _) in models.items()}
    ticks: list[tuple[int, int]] = []
    found = measure_models(models, Setup(device=CPU, batch=4, rounds=3, seconds=0), lambda *done: ticks.append(done))
    assert ticks == [(done, 7) for done in range(1, 8)]
    for kind, batch in (("eval none", 4), ("eval none", 1), ("train graph", 4)):
        names = [name for name, mode, images in calls if (mode, images) == (kind, batch)]
        assert names[-6:] == [*"ababab"]  # before them the peak of each, and warming up
    assert {mode for _, mode, _ in calls} == {"eval none", "train graph"}
    for name, (model, size) in models.items():
        figures = found[name]
        assert figures.latency and figures.inference.images_per_second and figures.training.images_per_second
        assert (figures.inference.batch, figures.training.batch) == (4, 4)
        features = 4 * 4 * 4 * (size - 2) ** 2  # bytes of the convolution's output
        assert figures.inference.peak_bytes and features <= figures.inference.peak_bytes < 2 * features + 2 * 4 * 4000
        assert all(p.equal(old) and p.grad is None for p, old in zip(model.parameters(), before[name], strict=True))


def test_training_looks_for_a_batch_from_two_images_on() -> None:
    """Batch norm cannot train on one value per channel."""
    calls: list[tuple[str, str, int]] = []
    found = measure_models({"a": (Classifier("a", calls), 8)}, Setup(device=CPU, most=2, rounds=1, seconds=0))
    assert found["a"].training.batch == 2
    assert {images for _, mode, images in calls if mode == "train graph"} == {2}


def test_what_does_not_fit_is_a_result() -> None:
    calls: list[tuple[str, str, int]] = []
    models = {"a": (Classifier("a", calls), 8)}
    found = measure_models(models, Setup(device=CPU, rounds=1, seconds=0, memory=1))["a"]
    assert (found.inference.batch, found.training.batch, found.latency) == (1, 2, None)
    assert found.inference.images_per_second is found.training.images_per_second is found.inference.peak_bytes is None
    found = measure_models(models, Setup(device=CPU, rounds=1, seconds=0, batch=1 << 40))["a"]
    assert (found.inference.batch, found.inference.images_per_second) == (1 << 40, None)
