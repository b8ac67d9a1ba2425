"""Defines what a cluster does for the stages: `map` over units and `fit` a training loop, in three back ends.

inline     everything in this process, no Ray
torchrun   the same, with training on all the processes that torchrun started
on_ray     on an embedded, a running or a remote Ray
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

Unit = TypeVar("Unit")
Value = TypeVar("Value")
Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Resources:
    """What one worker needs, and for `fit` what happens when machines come and go. `workers` None: as many as fit (Ray)
    or one (inline)."""

    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0
    """Bytes that Ray sets aside for it; 0: none in particular."""
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that its machine must have, in Ray's words: a value, `!value`, `in(a, b)` or `!in(a, b)`."""
    most: int | None = None
    """Of `map` without `workers`: ask a cluster that scales by itself for places until there are so many."""
    least: int | None = None
    """Train with as few workers as this while there is no room for `workers`; None: with exactly `workers`."""
    notice: bool = False
    """Tell the training loop when the cluster is about to take a machine away: see `fit`."""


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """How one unit ended: `value`, or `error` (the last exception's text) after `attempts` tries. `workers`: how many
    were alive then."""

    name: str
    value: Value | None
    error: str | None
    attempts: int
    workers: int = field(default=1, compare=False)


class Cluster(Protocol):
    def map(
        self,
        make_worker: Callable[[], Callable[[Unit], Value]],
        units: Sequence[tuple[str, Unit]],
        *,
        resources: Resources,
        attempts: int = 3,
        overlap: int = 1,
        check: Callable[[], None] | None = None,
    ) -> Iterator[Outcome[Value]]:
        """Run every (name, unit); yield outcomes as they finish, in any order, one for each unit.

        `make_worker` runs once in each worker process (load the model there) and returns the function that
        handles a unit. A unit whose function raises, or whose worker dies, is tried again, after a death alone on
        its worker, at most `attempts` times in all, then reported with its error; other units are not touched.
        A `UserError` raised by a unit is not retried.

        Units must be idempotent, also side by side: one that takes far longer than the others may be given to a
        second worker, and the first answer counts. With `overlap` above 1 a worker handles that many units at once,
        each on a thread of its own, so the function must bear that. If it has a method `close`, that is called when
        the caller stops early, while units run: they shall end soon, however they end.

        `check` is called on every machine before the work begins there: a UserError says what workers would miss.
        """
        ...

    def fit(
        self,
        loop: Callable[..., dict[str, Any]],
        spec: Spec,
        *,
        resources: Resources,
        folder: str,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Run `loop(spec)` on every training worker (torch.distributed set up where there are several) and
        return rank 0's result. The loop checkpoints itself into `folder` and resumes from there: a worker that
        dies has all of them started again, at most three times. A `UserError` in the loop is raised here as it is.
        `check` is called on every machine, and by every worker before the loop: one that it stops stops all of them.

        With `resources.least` the number of workers follows the machines that there are; every change starts the loop
        again. With `resources.notice` it may be called as `loop(spec, leaving)`: what `leaving()` returns, the same on
        all workers, all of which must call it, is whether a machine under them is about to be taken away.
        """
        ...

    def describe(self) -> str:
        """One phrase for people: 'inline', 'embedded Ray', 'Ray at HOST:PORT'."""
        ...

    def close(self) -> None:
        """Release what was started; nothing is started before the first `map` or `fit`."""
        ...
