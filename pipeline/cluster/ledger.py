"""Remembers which unit is with which worker of a pool, and says what is handed out next; no Ray in here.

No question costs more where there are more units or more workers, but for the median, which costs the logarithm of the
units that ended: with 1,000 workers every answer is a question.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

IN_FLIGHT = 2
SLOW = 3.0  # times the median: what takes longer is given to an idle worker too
KNOWN = 3  # units that must have ended before any is called slow


@dataclass(eq=False)
class Task:
    name: str
    unit: Any
    tries: int = 0
    ended: bool = False
    copied: bool = False
    holders: list[Slot] = field(default_factory=list)  # whoever it is with now


@dataclass(eq=False)
class Slot:
    """One actor and what it was given, oldest first."""

    actor: Any
    placing: Any
    loading: Any
    placed: bool = False
    loaded: bool = False
    solo: bool = False  # its unit was in flight when an actor died: nothing beside it
    flight: dict[Any, Task] = field(default_factory=dict)
    since: float = 0.0  # when its oldest unit became that

    def oldest(self) -> Task | None:
        """What it has been working on for longest, of what somebody still waits for."""
        return next((task for task in self.flight.values() if not task.ended), None)


class Median:
    """The median of the numbers that were added: two heaps, of the lower half (negated) and of the upper."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []

    def __len__(self) -> int:
        return len(self.lower) + len(self.upper)

    def add(self, number: float) -> None:
        heapq.heappush(self.upper, -heapq.heappushpop(self.lower, -number))
        if len(self.upper) > len(self.lower):
            heapq.heappush(self.lower, -heapq.heappop(self.upper))

    def value(self) -> float:
        low = -self.lower[0]
        return low if len(self.lower) > len(self.upper) else (low + self.upper[0]) / 2


class Ledger:
    """`queue`: what nobody has yet; `alone`: what shall have a worker to itself."""

    def __init__(self, units: Sequence[tuple[str, Any]]) -> None:
        self.queue = deque(Task(name, unit) for name, unit in units)
        self.alone: deque[Task] = deque()
        self.took = Median()  # seconds of every unit that ended
        self.loaded = 0  # workers that can be given something
        self._idle: OrderedDict[Slot, None] = OrderedDict()  # those with nothing to do
        self._half: OrderedDict[Slot, None] = OrderedDict()  # those that may have a unit more
        # Those whose oldest unit may become slow: `since` is always the time at which they come in, so the first one
        # has been at it for longest.
        self._running: OrderedDict[Slot, None] = OrderedDict()

    def load(self, slot: Slot) -> None:
        """It can be given something from now on."""
        slot.loaded = True
        self.loaded += 1
        self._sort_in(slot)

    def hand_out(self, workers: int) -> Iterator[tuple[Slot, Task]]:
        """Who is to be given what, of so many workers; `give` is called for each pair before the next is asked for."""
        while self._idle:
            solo, task = bool(self.alone), self._next()
            if task is None:
                break
            slot, _ = self._idle.popitem(last=False)
            slot.solo = solo
            yield slot, task
        # Near the end a unit waits for whichever worker is free first.
        while self._half and len(self.queue) >= workers:
            yield self._half.popitem(last=False)[0], self.queue.popleft()

    def _next(self) -> Task | None:
        """For a worker with nothing to do: last of all what takes another one too long, in case it is that one which
        is slow."""
        if self.alone:
            return self.alone.popleft()
        if self.queue:
            return self.queue.popleft()
        slot = next(iter(self._running), None)
        if slot is None or len(self.took) < KNOWN or time.monotonic() - slot.since <= SLOW * self.took.value():
            return None
        del self._running[slot]
        task = slot.oldest()
        assert task is not None  # or it would not be running
        task.copied = True
        return task

    def give(self, slot: Slot, key: Any, task: Task) -> None:
        """The worker has the task from now on; `key` stands for its answer."""
        first = slot.oldest() is None
        slot.flight[key] = task
        task.holders.append(slot)
        if first:
            self._begin(slot)
        self._sort_in(slot)

    def take(self, slot: Slot, key: Any) -> Task:
        """The worker has answered: the task, which it no longer has."""
        task = slot.flight[key]
        oldest = task is slot.oldest()
        if oldest:
            self.took.add(time.monotonic() - slot.since)
        del slot.flight[key]
        task.holders.remove(slot)
        if oldest:
            self._begin(slot)
        self._sort_in(slot)
        return task

    def end(self, task: Task) -> None:
        """Nobody waits for the task any more; what its holders have besides is their oldest from now on."""
        olds = [slot for slot in task.holders if slot.oldest() is task]
        task.ended = True
        for slot in olds:
            self._begin(slot)

    def lose(self, slot: Slot) -> dict[Any, Task]:
        """The worker is dead: what it had, oldest first."""
        self.loaded -= slot.loaded
        slot.loaded = False
        flight, slot.flight = slot.flight, {}
        for task in flight.values():
            task.holders.remove(slot)
        self._running.pop(slot, None)
        self._sort_in(slot)
        return flight

    def _begin(self, slot: Slot) -> None:
        """Its oldest unit is another one now."""
        slot.since = time.monotonic()
        self._running.pop(slot, None)
        task = slot.oldest()
        if task is not None and not task.copied and not slot.solo:
            self._running[slot] = None

    def _sort_in(self, slot: Slot) -> None:
        self._idle.pop(slot, None)
        self._half.pop(slot, None)
        if slot.loaded and not slot.flight:
            self._idle[slot] = None
        elif slot.loaded and not slot.solo and len(slot.flight) < IN_FLIGHT:
            self._half[slot] = None
