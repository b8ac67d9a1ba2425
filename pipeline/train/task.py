"""Names what the training loop leaves to a task: its network, batches, update, validation and what is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.cluster.world import World
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee

Found = dict[str, Any]


class Task(Protocol):
    """Everything else (checkpoints, journal, optimizer, average, precision, SIGTERM, rollbacks) is the loop's own."""

    def build(self, spec: TrainSpec, fresh: bool) -> nn.Module:
        """The network on the CPU, drawn from torch's generator. `fresh`: no checkpoint replaces its first weights."""
        ...

    def batches(self, spec: TrainSpec, world: World, start_step: int) -> Iterator[Mapping[str, Any]]:
        """This worker's parts of the global steps from `start_step` on. A generator: the loop closes it."""
        ...

    def losses(
        self, trainee: Trainee, batch: Mapping[str, Any], seed: int, spec: TrainSpec, world: World
    ) -> Callable[[slice], Tensor]:
        """Takes a batch to the device; what comes back gives, for some of its images, the sum of their losses, scalar:
        never a mean, for workers' parts differ in size. `seed` is this step's of this worker, as torch's generator."""
        ...

    def validate(self, trainee: Trainee, spec: TrainSpec, world: World) -> tuple[Found, Found]:
        """(figures of the averaged weights, which are kept; what the journal shows). Every worker calls it and gets the
        same. A `loss` among the figures that is not finite means that the run has diverged."""
        ...

    def better(self, found: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether a validation beats the best before it, if there is one."""
        ...
