"""What the driver of a labelling stage spends on handing out shards: our pull loop over a simulated Ray.

    python -m benchmarks.pull_loop [--shards 100000] [--workers 1000] [--ray]

The workers are numbers in this process: an answer comes when its simulated time has come, and no time passes
otherwise, so the loop does in seconds what it does in a night. Shards take about 10 s each (a lognormal spread of 0.3),
and workers are given two at once, as in labelling. Counted is the CPU time of the loop itself; that of the simulation
is taken off. The longest turn is the first, which gives each worker its two shards. `--ray` adds what Ray itself needs,
on a real one: to ask for the answers to two calls for each worker, and to have 2,000 units done that take no time.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from pipeline.cluster import actor_pool, ledger
from pipeline.cluster.contract import Outcome, Resources
from pipeline.cluster.inline import attempt

SIZES = (1_000, 16), (10_000, 64), (30_000, 256)  # shards, workers; what is asked for comes last


class Ref:
    """What stands for an answer of an actor."""

    def __init__(self, actor: _Actor) -> None:
        self.actor = actor


class SimulatedRay:
    """As much of Ray as a pool uses, with workers that need no time. `seconds`: how long an actor works on a unit."""

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        import ray.exceptions

        self.exceptions = ray.exceptions
        self.seconds = seconds
        self.now = 0.0
        self.spent = 0.0  # CPU seconds in here
        self.turns: list[float] = []  # CPU seconds of our loop between two waits
        self.left_at: float | None = None
        self.order = itertools.count()
        self.coming: list[tuple[float, int, Ref, Callable[[], Any]]] = []
        self.there: dict[Ref, Callable[[], Any]] = {}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda kind: SimpleNamespace(remote=lambda: _Actor(self))

    def kill(self, actor: _Actor) -> None:
        actor.killed = True
        self.there = {ref: answer for ref, answer in self.there.items() if ref.actor is not actor}

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        begun = time.process_time()
        if timeout:
            if self.left_at is not None:
                self.turns.append(begun - self.left_at - self.spent)
            if not self.there:
                self.now = min(self.coming[0][0] if self.coming else self.now + timeout, self.now + timeout)
            while self.coming and self.coming[0][0] <= self.now:
                _, _, ref, answer = heapq.heappop(self.coming)
                if not ref.actor.killed:
                    self.there[ref] = answer
            found = list(self.there)[:num_returns]
        else:
            found = list(self.there) if num_returns > 2 else [ref for ref in refs if ref in self.there]
        self.spent += time.process_time() - begun
        if timeout:
            self.left_at, self.spent = time.process_time(), 0.0
        return found, []

    def get(self, ref: Ref) -> Any:
        return self.there.pop(ref)()


class _Actor:
    """Does one thing after the other; what kills it is an exception of Ray's, which all that it still has ends in."""

    def __init__(self, ray: SimulatedRay) -> None:
        self.ray, self.free, self.dead, self.killed = ray, 0.0, False, False
        self.place, self.load, self.run = (
            SimpleNamespace(remote=call) for call in (self._nothing, self._load, self._run)
        )

    def _nothing(self) -> Ref:
        return self._answer(0.0, lambda: None)

    def _load(self, make_worker: Callable[[], Callable[[Any], Any]]) -> Ref:
        self.function = make_worker()
        return self._answer(0.0, lambda: None)

    def _run(self, unit: Any) -> Ref:
        begun = time.process_time()
        ref = self._answer(self.ray.seconds(unit), functools.partial(self._do, unit))
        self.ray.spent += time.process_time() - begun
        return ref

    def _do(self, unit: Any) -> Any:
        if not self.dead:
            try:
                return attempt(self.function, unit)
            except BaseException:  # no Exception: the process has died
                self.dead = True
        raise self.ray.exceptions.RayActorError

    def _answer(self, seconds: float, answer: Callable[[], Any]) -> Ref:
        ref, self.free = Ref(self), max(self.free, self.ray.now) + seconds
        heapq.heappush(self.ray.coming, (self.free, next(self.ray.order), ref, answer))
        return ref


def simulate(
    ray: SimulatedRay, make_worker: Callable[[], Callable[[Any], Any]], units: Sequence[tuple[str, Any]], workers: int
) -> list[Outcome[Any]]:
    """The outcomes of a pool over a simulated Ray."""
    clock = SimpleNamespace(monotonic=lambda: ray.now)
    with (
        mock.patch.dict(sys.modules, {"ray": ray}),  # type: ignore[dict-item]
        mock.patch.object(actor_pool, "time", clock),
        mock.patch.object(ledger, "time", clock),
    ):
        pool = actor_pool.Pool(make_worker, units, Resources(), 3, workers, 60.0, overlap=2)
        return list(pool.outcomes())


def nothing() -> Callable[[Any], None]:
    return lambda unit: None


def measure(shards: int, workers: int) -> dict[str, Any]:
    chance = random.Random(0)
    ray = SimulatedRay(lambda unit: 10 * chance.lognormvariate(0, 0.3))
    found = simulate(ray, nothing, [(f"shard-{number:06d}.tar", number) for number in range(shards)], workers)
    assert len(found) == shards
    return {
        "shards": shards,
        "workers": workers,
        "turns": len(ray.turns),
        "mean_turn_ms": round(1000 * statistics.fmean(ray.turns), 4),
        "one_in_1000_ms": round(1000 * statistics.quantiles(ray.turns, n=1000)[-1], 3),
        "longest_turn_ms": round(1000 * max(ray.turns), 2),
        "cpu_seconds": round(sum(ray.turns), 2),
    }


def measure_ray(workers: int) -> dict[str, Any]:
    """CPU seconds of this process with a real Ray of two workers: a question for 2 x `workers` answers that are not
    there yet, and a unit that takes no time."""
    from pipeline.cluster.on_ray import OnRay

    cluster = OnRay("embedded")
    try:
        units = [(str(number), number) for number in range(2000)]
        list(cluster.map(nothing, units[:100], resources=Resources(2)))  # Ray and its workers have started
        import ray  # not before its settings are made

        begun = time.process_time()
        list(cluster.map(nothing, units, resources=Resources(2), overlap=2))
        unit = (time.process_time() - begun) / len(units)
        sleeper = ray.remote(num_cpus=1)(lambda: time.sleep(600))
        refs = [sleeper.remote() for _ in range(2 * workers)]
        times = []
        for _ in range(20):
            begun = time.process_time()
            ray.wait(refs, num_returns=len(refs), timeout=0)
            times.append(time.process_time() - begun)
        for ref in refs:
            ray.cancel(ref, force=True)
    finally:
        cluster.close()
    return {"unit_ms": round(1000 * unit, 3), "wait_ms": round(1000 * statistics.median(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--ray", action="store_true", help="measure Ray's own part too")
    args = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "pull_loop"}
    if args.ray:
        found["ray"] = measure_ray(args.workers)
        print(
            f"Ray itself: {found['ray']['wait_ms']:.2f} ms to ask for {2 * args.workers:,} answers, "
            f"{found['ray']['unit_ms']:.2f} ms a unit in all on two workers"
        )
    rows = []
    names = (
        ("shards", 9),
        ("workers", 8),
        ("turns", 9),
        ("mean turn", 11),
        ("1 in 1,000", 11),
        ("longest", 10),
        ("CPU", 11),
    )
    print(" ".join(f"{name:>{width}}" for name, width in names))
    for shards, workers in [*(size for size in SIZES if size[0] < args.shards), (args.shards, args.workers)]:
        row = measure(shards, workers)
        rows.append(row)
        print(
            f"{shards:9,} {workers:8,} {row['turns']:9,} {row['mean_turn_ms']:8.3f} ms {row['one_in_1000_ms']:8.2f} ms "
            f"{row['longest_turn_ms']:7.2f} ms {row['cpu_seconds']:9.2f} s", flush=True,
        )  # fmt: skip
    print(json.dumps({**found, "rows": rows}))


if __name__ == "__main__":
    main()
