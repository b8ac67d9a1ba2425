"""What the pull loop hands out to whom, at what cost; its workers are numbers (benchmarks/pull_loop.py)."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.pull_loop import SimulatedRay, nothing, simulate
from pipeline.cluster import ledger
from pipeline.cluster.ledger import IN_FLIGHT, Ledger, Median, Slot
from tests.operations import lines


def test_the_median_is_that_of_all_numbers() -> None:
    chance, median, numbers = random.Random(0), Median(), []
    for _ in range(300):
        numbers.append(float(chance.choice([chance.randrange(5), chance.lognormvariate(0, 2)])))
        median.add(numbers[-1])
        assert median.value() == statistics.median(numbers) and len(median) == len(numbers)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ledger, "time", made)
    return made


def slots(book: Ledger, number: int) -> list[Slot]:
    made = [Slot(None, None, None, placed=True) for _ in range(number)]
    for slot in made:
        book.load(slot)
    return made


def hand_out(book: Ledger, workers: int) -> list[tuple[Slot, str]]:
    given = []
    for slot, task in book.hand_out(workers):
        book.give(slot, object(), task)
        given.append((slot, task.name))
    return given


@pytest.mark.parametrize(
    ("ended", "running", "slow"),
    [
        ([], 100.0, False),
        ([1.0, 1.0], 100.0, False),  # too few to know
        ([1.0, 1.0, 50.0], 3.1, True),
        ([1.0, 1.0, 1.0], 3.0, False),
        ([1.0, 5.0, 5.0, 5.0], 9.0, False),
    ],
)
def test_what_counts_as_slow(clock: Clock, ended: list[float], running: float, slow: bool) -> None:
    book = Ledger([("a", None)])
    busy, idle = slots(book, 2)
    [(first, name)] = hand_out(book, 2)
    assert first is busy and name == "a"
    for seconds in ended:
        book.took.add(seconds)
    clock.now = running
    assert hand_out(book, 2) == ([(idle, "a")] if slow else [])
    assert hand_out(book, 2) == [], "a third worker gets no copy"


def test_the_one_that_has_been_at_it_for_longest_is_copied_first(clock: Clock) -> None:
    book = Ledger([(str(number), None) for number in range(3)])
    for number in range(3):
        clock.now = float(number)
        slots(book, 1)
        hand_out(book, 3)
    for _ in range(5):
        book.took.add(1.0)
    clock.now = 5.5
    helpers = slots(book, 3)
    assert hand_out(book, 6) == [(helpers[0], "0"), (helpers[1], "1"), (helpers[2], "2")]


def make_worker() -> Callable[[tuple[int, str]], int]:
    tried: Counter[int] = Counter()

    def handle(unit: tuple[int, str]) -> int:
        number, act = unit
        tried[number] += 1
        if act == "raise" or (act == "raise once" and tried[number] == 1):
            raise ValueError("bad")
        if act == "kill" or (act == "kill once" and tried[number] == 1):
            raise SystemExit
        return number

    return handle


@pytest.mark.parametrize("seed", range(20))
def test_every_unit_ends_once_whatever_dies_when(seed: int) -> None:
    chance = random.Random(seed)
    acts = ["", "", "", "", "raise", "raise once", "kill once", *(["kill"] if seed % 2 else [])]
    units = [(str(number), (number, chance.choice(acts))) for number in range(chance.randrange(1, 60))]
    handle = make_worker()  # its memory outlives workers
    ray = SimulatedRay(lambda unit: chance.choice([0.0, 1.0, chance.lognormvariate(0, 2)]))
    found = simulate(ray, lambda: handle, units, workers=chance.randrange(1, 12))
    assert Counter(outcome.name for outcome in found) == Counter(name for name, _ in units)
    by_name = {outcome.name: outcome for outcome in found}
    for name, (number, act) in units:
        if act in ("raise", "kill"):
            assert by_name[name].error and by_name[name].attempts <= 3
        elif act != "kill once" or by_name[name].error is None:  # a neighbour's deaths may be charged to it
            assert by_name[name].value == number or "kill" in acts


class Watched(Ledger):
    """Looks after every change whether the short ways lead where the long ones do."""

    def _sort_in(self, slot: Slot) -> None:
        super()._sort_in(slot)
        self.known = {**getattr(self, "known", {}), slot: None}
        loaded = [one for one in self.known if one.loaded]
        assert set(self._idle) == {one for one in loaded if not one.flight}
        assert set(self._half) == {one for one in loaded if 0 < len(one.flight) < IN_FLIGHT and not one.solo}
        running = [one for one in loaded if (task := one.oldest()) and not task.copied and not one.solo]
        assert set(self._running) == set(running)
        assert [one.since for one in self._running] == sorted(one.since for one in running)
        assert self.loaded == len(loaded)
        for one in loaded:
            assert all(one in task.holders for task in one.flight.values())


@pytest.mark.parametrize("seed", range(10))
def test_the_short_ways_lead_where_the_long_ones_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cluster import actor_pool

    monkeypatch.setattr(actor_pool, "Ledger", Watched)
    test_every_unit_ends_once_whatever_dies_when(seed)


def cost(units: int, workers: int) -> float:
    """Lines of our code for each unit, the end of the stage included, where workers idle and others are slow."""
    chance = random.Random(1)
    ray = SimulatedRay(lambda unit: chance.lognormvariate(0, 1))
    work: list[tuple[str, Any]] = [(str(number), number) for number in range(units)]
    return lines(lambda: simulate(ray, nothing, work, workers), "pipeline/cluster/") / units


def test_a_unit_costs_the_same_however_many_units_and_workers_there_are() -> None:
    few, many, wide = cost(200, 5), cost(1500, 5), cost(1500, 500)
    assert few < 150
    assert many < 1.2 * few
    assert wide < 1.5 * few, "half of the time all but a few workers are idle"
