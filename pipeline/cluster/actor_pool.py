"""Runs `map` on Ray: one actor per worker, and a pull loop that writes down who died while doing what.

An actor has up to two units in flight, so that it never waits for the driver; with `overlap` it works on that many at
once. When it dies, what it was working on is charged with a try, and all that it held is tried again alone on an actor,
where the guilty one shows. When nothing is left to hand out, an idle actor gets a copy of the unit that takes far
longer than the others, in case it is the actor that is slow; the first answer counts. Who has what, and what comes
next, is in `ledger`: a turn of the loop costs the same however many units and workers there are, but for what Ray needs
to wait for all of them.

Ray Data was measured and not taken: 6 to 10 times the overhead, whole shards dropped for one bad image, duplicates on a
rerun.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline import errors
from pipeline.cluster.capacity import nothing_fits, room, waiting
from pipeline.cluster.contract import Outcome, Resources
from pipeline.cluster.inline import Try, attempt, check_names, last_line
from pipeline.cluster.ledger import Ledger, Slot, Task
from pipeline.errors import ClusterError, UserError

DIED = "its worker process died (killed, out of memory, or its machine was lost)"
LOAD_DEATHS = 3  # workers in a row that die before they can take a unit
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
        self.ledger = Ledger(units)
        self.left = len(units)
        self.load_deaths = 0
        self.overlap, self.grows, self.say = overlap, grows, say
        self.looked = time.monotonic()
        self.placed = 0  # workers that have found a place
        self.waited: dict[Any, Slot] = {}  # whose answer each reference is that Ray is asked for
        self.make_worker = ray.put(make_worker)
        self.actor_class = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=resources.memory or None,
            label_selector=dict(resources.selector) or None,
            max_concurrency=overlap,
        )(Worker)
        self.slots = {self._new_slot(): None for _ in range(min(workers, len(units)))}  # in order, as a set

    def outcomes(self) -> Iterator[Outcome[Any]]:
        """One outcome for each unit, as they finish."""
        unplaced_since, told = time.monotonic(), False
        try:
            while self.left:
                self._grow()
                self._hand_out()
                for ref in self._ready():
                    # Not of a worker that was found dead by an earlier one of these.
                    for outcome in self._take(self.waited.pop(ref), ref) if ref in self.waited else ():
                        self.left -= 1
                        yield outcome
                unplaced = time.monotonic() - unplaced_since
                if self.placed:
                    unplaced_since = time.monotonic()
                elif unplaced > self.patience:
                    raise nothing_fits(self.resources, 1, self.patience)
                if told != (unplaced > TOLD_SECONDS):  # somebody else may have the places that there are
                    told = not told
                    self.say(waiting(self.resources, 1, self.patience) if told else "")
        finally:
            for slot in self.slots:
                self._kill(slot)

    def _ready(self) -> list[Any]:
        """The answers that are there: all, for asking costs Ray as much for one as for all."""
        waited = list(self.waited)
        ready, _ = self.ray.wait(waited, num_returns=1, timeout=1.0)
        return self.ray.wait(waited, num_returns=len(waited), timeout=0)[0] if ready else []

    def _new_slot(self) -> Slot:
        actor = self.actor_class.remote()
        slot = Slot(actor, actor.place.remote(), actor.load.remote(self.make_worker))
        self.waited[slot.placing] = slot
        return slot

    def _kill(self, slot: Slot) -> None:
        with contextlib.suppress(Exception):  # dead already, or the cluster is gone
            self.ray.kill(slot.actor)

    def _grow(self) -> None:
        """A worker more for every place that the cluster has gained; none wait for a place when nothing is left to
        hand out, for each has a cluster that scales by itself add a machine."""
        if not self.grows or time.monotonic() - self.looked <= GROWTH_SECONDS:
            return
        self.looked = time.monotonic()
        if self.ledger.queue:
            more = min(room(self.resources), self.left) - len(self.slots)
            self.slots |= {self._new_slot(): None for _ in range(more)}
        elif self.placed:
            for slot in [slot for slot in self.slots if not slot.placed]:
                self._kill(slot)
                self.waited.pop(slot.placing)
                del self.slots[slot]

    def _hand_out(self) -> None:
        for slot, task in self.ledger.hand_out(len(self.slots)):
            ref = slot.actor.run.remote(task.unit)
            self.waited[ref] = slot
            self.ledger.give(slot, ref, task)

    def _take(self, slot: Slot, ref: Any) -> Iterator[Outcome[Any]]:
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
            self.placed += 1
            self.waited[slot.loading] = slot
        elif ref == slot.loading:
            if answer is not None:
                name, text = answer
                raise getattr(errors, name)(text)
            self.load_deaths = 0
            self.ledger.load(slot)
        else:
            yield from self._settle(self.ledger.take(slot, ref), answer)

    def _settle(self, task: Task, answer: Try) -> Iterator[Outcome[Any]]:
        if task.ended:  # its copy was faster
            return
        task.tries += 1
        if answer.error is None or answer.final or task.tries >= self.attempts:
            yield self._end(task, answer.value, answer.error)
        elif not task.holders:
            self.ledger.queue.append(task)

    def _end(self, task: Task, value: Any, error: str | None) -> Outcome[Any]:
        self.ledger.end(task)
        return Outcome(task.name, value, error, task.tries, self.ledger.loaded)

    def _bury(self, slot: Slot) -> Iterator[Outcome[Any]]:
        """Replace a dead actor. Units begin in order: the first `overlap` without an answer were being worked on."""
        if not slot.loaded:
            self.load_deaths += 1
            if self.load_deaths >= LOAD_DEATHS:
                raise ClusterError(
                    f"{LOAD_DEATHS} workers in a row died before they could start (killed, or out of memory); give "
                    "each more memory or use fewer workers"
                )
        self.placed -= slot.placed
        flight = self.ledger.lose(slot)
        for ref in (slot.placing, slot.loading, *flight):
            self.waited.pop(ref, None)
        answered = self.ray.wait(list(flight), num_returns=len(flight), timeout=0)[0] if flight else []
        lost = []
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
        self.ledger.alone.extend(task for task in lost if not task.ended and not task.holders)
        self._kill(slot)
        del self.slots[slot]
        self.slots[self._new_slot()] = None
