"""Runs `map` on Ray: one actor per worker, a pull loop, and a ledger of who died while doing what.

An actor has up to two units in flight, so that it never waits for the driver; with `overlap` it works on that many at
once. When it dies, what it was working on is charged with a try, and all that it held is tried again alone on an actor,
where the guilty one shows. When nothing is left to hand out, an idle actor gets a copy of the unit that takes far
longer than the others, in case it is the actor that is slow; the first answer counts.

Ray Data was measured and not taken: 6 to 10 times the overhead, whole shards dropped for one bad image, duplicates on a
rerun.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import errors
from pipeline.cluster.capacity import nothing_fits, room, waiting
from pipeline.cluster.contract import Outcome, Resources
from pipeline.cluster.inline import Try, attempt, check_names, last_line
from pipeline.errors import ClusterError, UserError

DIED = "its worker process died (killed, out of memory, or its machine was lost)"
LOAD_DEATHS = 3  # workers in a row that die before they can take a unit
IN_FLIGHT = 2
SLOW = 3.0  # times the median: what takes longer is given to an idle worker too
KNOWN = 3  # units that must have ended before any is called slow
TOLD_SECONDS = 5.0  # without any worker, after which a person is told what is waited for
GROWTH_SECONDS = 15.0  # how often a cluster that may grow is looked at


class Worker:
    """Runs in the actor's process."""

    def place(self) -> None:
        """Answers as soon as the cluster has found a place."""

    def load(self, make_worker: Callable[[], Callable[[Any], Any]]) -> tuple[str, str] | None:
        """Make the function that handles units; a UserError comes back as (class name, text)."""
        try:
            self.function = make_worker()
        except UserError as error:
            return type(error).__name__, str(error)
        return None

    def run(self, unit: Any) -> Try:
        return attempt(self.function, unit)


@dataclass(eq=False)
class _Task:
    name: str
    unit: Any
    tries: int = 0
    ended: bool = False
    copied: bool = False


@dataclass
class _Slot:
    """One actor and what it was given, oldest first."""

    actor: Any
    placing: Any
    loading: Any
    placed: bool = False
    loaded: bool = False
    solo: bool = False  # its unit was in flight when an actor died: nothing beside it
    flight: dict[Any, _Task] = field(default_factory=dict)
    since: float = 0.0  # when its oldest unit became that

    def waits_for(self) -> list[Any]:
        if not self.placed:
            return [self.placing]
        if not self.loaded:
            return [self.loading]
        return list(self.flight)

    def oldest(self) -> _Task | None:
        """What it has been working on for longest, of what somebody still waits for."""
        return next((task for task in self.flight.values() if not task.ended), None)


def slowest(running: Mapping[str, float], ended: Sequence[float]) -> str | None:
    """The unit that has been running for longest, if that is over SLOW times what the others took: seconds by name of
    those that run, seconds of those that ended."""
    if len(ended) < KNOWN or not running:
        return None
    name = max(running, key=lambda name: running[name])
    return name if running[name] > SLOW * statistics.median(ended) else None


class Pool:
    def __init__(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        units: Sequence[tuple[str, Any]],
        resources: Resources,
        attempts: int,
        workers: int,
        patience: float,
        *,
        overlap: int = 1,
        grows: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        import ray

        check_names(units)
        self.ray = ray
        self.resources, self.attempts, self.patience = resources, attempts, patience
        self.queue = deque(_Task(name, unit) for name, unit in units)
        self.alone: deque[_Task] = deque()
        self.left = len(units)
        self.load_deaths = 0
        self.overlap, self.grows, self.say = overlap, grows, say
        self.looked = time.monotonic()
        self.took: list[float] = []  # seconds of every unit that ended
        self.make_worker = ray.put(make_worker)
        self.actor_class = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=resources.memory or None,
            label_selector=dict(resources.selector) or None,
            max_concurrency=overlap,
        )(Worker)
        self.slots = [self._new_slot() for _ in range(min(workers, len(units)))]

    def outcomes(self) -> Iterator[Outcome[Any]]:
        """One outcome for each unit, as they finish."""
        unplaced_since, told = time.monotonic(), False
        try:
            while self.left:
                self._grow()
                self._hand_out()
                waited = {ref: slot for slot in self.slots for ref in slot.waits_for()}
                ready, _ = self.ray.wait(list(waited), num_returns=1, timeout=1.0)
                for ref in ready:
                    for outcome in self._take(waited[ref], ref):
                        self.left -= 1
                        yield outcome
                unplaced = time.monotonic() - unplaced_since
                if any(slot.placed for slot in self.slots):
                    unplaced_since = time.monotonic()
                elif unplaced > self.patience:
                    raise nothing_fits(self.resources, 1, self.patience)
                if told != (unplaced > TOLD_SECONDS):  # somebody else may have the places that there are
                    told = not told
                    self.say(waiting(self.resources, 1, self.patience) if told else "")
        finally:
            for slot in self.slots:
                self._kill(slot)

    def _new_slot(self) -> _Slot:
        actor = self.actor_class.remote()
        return _Slot(actor, actor.place.remote(), actor.load.remote(self.make_worker))

    def _kill(self, slot: _Slot) -> None:
        with contextlib.suppress(Exception):  # dead already, or the cluster is gone
            self.ray.kill(slot.actor)

    def _grow(self) -> None:
        """A worker more for every place that the cluster has gained; none wait for a place when nothing is left to
        hand out, for each has a cluster that scales by itself add a machine."""
        if not self.grows or time.monotonic() - self.looked <= GROWTH_SECONDS:
            return
        self.looked = time.monotonic()
        if self.queue:
            more = min(room(self.resources), self.left) - len(self.slots)
            self.slots += [self._new_slot() for _ in range(more)]
        elif any(slot.placed for slot in self.slots):
            for slot in [slot for slot in self.slots if not slot.placed]:
                self._kill(slot)
                self.slots.remove(slot)

    def _hand_out(self) -> None:
        idle = [slot for slot in self.slots if slot.loaded and not slot.flight]
        for slot in idle:
            slot.solo = bool(self.alone)
            if self.alone:
                self._send(slot, self.alone.popleft())
            elif self.queue:
                self._send(slot, self.queue.popleft())
            elif (task := self._slow_one()) is not None:
                task.copied = True
                self._send(slot, task)
        for slot in self.slots:
            # Near the end a unit waits for whichever worker is free first.
            if (
                slot.loaded
                and not slot.solo
                and 1 <= len(slot.flight) < IN_FLIGHT
                and len(self.queue) >= len(self.slots)
            ):
                self._send(slot, self.queue.popleft())

    def _slow_one(self) -> _Task | None:
        """What an idle worker shall do a second time."""
        now = time.monotonic()
        tasks = {
            task.name: (task, now - slot.since)
            for slot in self.slots
            if not slot.solo and (task := slot.oldest()) is not None and not task.copied
        }
        name = slowest({name: seconds for name, (_, seconds) in tasks.items()}, self.took)
        return None if name is None else tasks[name][0]

    def _send(self, slot: _Slot, task: _Task) -> None:
        if slot.oldest() is None:
            slot.since = time.monotonic()
        slot.flight[slot.actor.run.remote(task.unit)] = task

    def _take(self, slot: _Slot, ref: Any) -> Iterator[Outcome[Any]]:
        from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

        try:
            answer = self.ray.get(ref)
        except RuntimeEnvSetupError as error:
            raise ClusterError(f"Ray cannot prepare its workers: {last_line(error)[:300]}") from error
        except RayTaskError as error:
            if ref not in slot.flight:
                raise  # a bug in make_worker
            answer = Try(error=last_line(error.cause or error))
        except RayError:
            yield from self._bury(slot)
            return
        if ref == slot.placing:
            slot.placed = True
        elif ref == slot.loading:
            if answer is not None:
                name, text = answer
                raise getattr(errors, name)(text)
            slot.loaded, self.load_deaths = True, 0
        else:
            now, task = time.monotonic(), slot.flight[ref]
            if task is slot.oldest():
                self.took.append(now - slot.since)
                slot.since = now
            del slot.flight[ref]
            yield from self._settle(task, answer)

    def _settle(self, task: _Task, answer: Try) -> Iterator[Outcome[Any]]:
        if task.ended:  # its copy was faster
            return
        task.tries += 1
        if answer.error is None or answer.final or task.tries >= self.attempts:
            yield self._end(task, answer.value, answer.error)
        elif not any(task in other.flight.values() for other in self.slots):
            self.queue.append(task)

    def _end(self, task: _Task, value: Any, error: str | None) -> Outcome[Any]:
        task.ended = True
        for slot in self.slots:
            if task in slot.flight.values():  # what it holds besides is the oldest from now on
                slot.since = time.monotonic()
        return Outcome(task.name, value, error, task.tries, sum(slot.loaded for slot in self.slots))

    def _bury(self, slot: _Slot) -> Iterator[Outcome[Any]]:
        """Replace a dead actor. Units begin in order: the first `overlap` without an answer were being worked on."""
        if not slot.loaded:
            self.load_deaths += 1
            if self.load_deaths >= LOAD_DEATHS:
                raise ClusterError(
                    f"{LOAD_DEATHS} workers in a row died before they could start (killed, or out of memory); give "
                    "each more memory or use fewer workers"
                )
        answered = self.ray.wait(list(slot.flight), num_returns=len(slot.flight), timeout=0)[0] if slot.flight else []
        lost = []
        flight, slot.flight = slot.flight, {}
        for ref, task in flight.items():
            try:
                answer = self.ray.get(ref) if ref in answered else None
            except self.ray.exceptions.RayError:
                answer = None
            if answer is not None:
                yield from self._settle(task, answer)
            elif not task.ended:
                lost.append(task)
        for task in lost[: self.overlap]:
            task.tries += 1
            if task.tries >= self.attempts:
                yield self._end(task, None, DIED)
        held = [task for other in self.slots for task in other.flight.values()]
        self.alone.extend(task for task in lost if not task.ended and task not in held)
        self._kill(slot)
        self.slots[self.slots.index(slot)] = self._new_slot()
