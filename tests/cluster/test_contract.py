"""The cluster contract, the same for both back ends, and for small work, which a stage does without its cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.contract import Outcome, Resources
from pipeline.cluster.inline import Inline
from pipeline.config.load import load_job
from pipeline.errors import DataError, WeightsError
from pipeline.plan.context import Context
from tests.cluster.units import Training, Unit, loop, make_counter, make_worker, make_worker_of


class Small(Inline):
    """`map` as a stage with small work has it; its cluster would fail."""

    def map(self, make_worker: Any, units: Any, *, resources: Resources, attempts: int = 3, overlap: int = 1) -> Any:
        assert attempts == 3  # which no stage changes
        unused: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Context))
        context = Context(**unused | {"job": load_job("smoke")})
        return context.map(make_worker, units, resources.workers, small=True, overlap=overlap)


@pytest.fixture(params=["inline", "small", "ray"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "inline":
        yield Inline()
    elif request.param == "small":
        yield Small()
    else:
        yield request.getfixturevalue("embedded_ray")


def run(cluster: Any, units: list[Unit], workers: int = 2, attempts: int = 3) -> dict[str, Outcome[int]]:
    named = [(f"unit-{unit.number:03d}", unit) for unit in units]
    outcomes = list(cluster.map(make_worker, named, resources=Resources(workers=workers), attempts=attempts))
    assert sorted(outcome.name for outcome in outcomes) == [name for name, _ in named]
    return {outcome.name: outcome for outcome in outcomes}


def test_every_unit_has_one_outcome_with_its_value(cluster: Any) -> None:
    outcomes = run(cluster, [Unit(number) for number in range(40)])
    for number in range(40):
        assert outcomes[f"unit-{number:03d}"] == Outcome(f"unit-{number:03d}", number**2, None, 1)


def test_no_units_is_no_work(cluster: Any) -> None:
    assert list(cluster.map(make_worker_of("never made"), [], resources=Resources())) == []


def test_two_units_of_one_name_are_refused(cluster: Any) -> None:
    with pytest.raises(ValueError, match="same name"):
        list(cluster.map(make_worker, [("a", Unit(1)), ("a", Unit(2))], resources=Resources()))


def test_a_raising_unit_is_retried_then_reported_and_takes_no_neighbour(cluster: Any, tmp_path: Path) -> None:
    units = [Unit(n, act={3: "raise", 4: "raise once"}.get(n, ""), folder=str(tmp_path)) for n in range(12)]
    outcomes = run(cluster, units)
    assert outcomes.pop("unit-003") == Outcome("unit-003", None, "ValueError: unit 3 is bad", 3)
    assert outcomes.pop("unit-004") == Outcome("unit-004", 16, None, 2)
    assert len(list(tmp_path.glob("3-*"))) == 3
    assert all(outcome.error is None and outcome.attempts == 1 for outcome in outcomes.values())


def test_a_user_error_is_reported_at_once(cluster: Any, tmp_path: Path) -> None:
    outcomes = run(cluster, [Unit(0), Unit(1, "user error", str(tmp_path)), Unit(2)])
    assert outcomes["unit-001"] == Outcome("unit-001", None, "shard 1 is missing; check `data.root`", 1)
    assert len(list(tmp_path.glob("1-*"))) == 1
    assert outcomes["unit-000"].value == 0 and outcomes["unit-002"].value == 4


def test_a_user_error_of_make_worker_is_raised(cluster: Any) -> None:
    with pytest.raises(WeightsError, match=r"^no weights in x; check `teacher.checkpoint`$"):
        list(
            cluster.map(
                make_worker_of("no weights in x; check `teacher.checkpoint`"),
                [("a", Unit(1))],
                resources=Resources(workers=1),
            )
        )


def test_a_worker_is_made_once_and_handles_many_units(cluster: Any) -> None:
    units = [(str(number), Unit(number)) for number in range(10)]
    values = [outcome.value for outcome in cluster.map(make_counter, units, resources=Resources(workers=1))]
    assert len({process for process, _ in values}) == 1
    assert sorted(count for _, count in values) == list(range(1, 11))


def test_outcomes_come_as_units_finish(cluster: Any, tmp_path: Path) -> None:
    units = [(str(number), Unit(number, folder=str(tmp_path))) for number in range(30)]
    outcomes = cluster.map(make_worker, units, resources=Resources(workers=1))
    next(outcomes)
    assert len(list(tmp_path.iterdir())) < 30
    outcomes.close()


def test_a_worker_handles_as_many_units_at_once_as_may_overlap(cluster: Any, tmp_path: Path) -> None:
    units = [(str(n), Unit(n, act="meet" if n < 2 else "", folder=str(tmp_path))) for n in range(6)]
    outcomes = list(cluster.map(make_worker, units, resources=Resources(workers=1), overlap=2))
    assert {outcome.name: outcome.value for outcome in outcomes} == {str(n): n**2 for n in range(6)}
    assert all(outcome.workers == 1 and outcome.attempts == 1 for outcome in outcomes)


def test_overlapping_units_fail_alone(cluster: Any, tmp_path: Path) -> None:
    acts = {1: "raise", 2: "raise once", 3: "user error"}
    units = [(str(n), Unit(n, acts.get(n, ""), str(tmp_path))) for n in range(8)]
    outcomes = {o.name: o for o in cluster.map(make_worker, units, resources=Resources(workers=2), overlap=2)}
    assert {name: o.attempts for name, o in outcomes.items() if o.error} == {"1": 3, "3": 1}
    assert outcomes["2"].value == 4 and outcomes["2"].attempts == 2 and len(outcomes) == 8


def test_fit_returns_what_the_loop_returned(cluster: Any, tmp_path: Path) -> None:
    result = cluster.fit(loop, Training(str(tmp_path)), resources=Resources(workers=1), folder=str(tmp_path))
    assert (result["rank"], result["world"], result["started_at"]) == (0, 1, 0)


def test_a_user_error_in_the_loop_is_raised_as_it_is(cluster: Any, tmp_path: Path) -> None:
    spec = Training(str(tmp_path), act="user error")
    with pytest.raises(DataError, match=r"^labels of shard 7 are missing; run `label` first$"):
        cluster.fit(loop, spec, resources=Resources(workers=1), folder=str(tmp_path))
    assert len(list(tmp_path.glob("start-0-*"))) == 1


def test_an_exception_in_the_loop_keeps_its_text(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"):
        cluster.fit(loop, Training(str(tmp_path), act="raise"), resources=Resources(workers=1), folder=str(tmp_path))
