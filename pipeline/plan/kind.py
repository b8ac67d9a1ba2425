"""Defines what all stages of one kind have in common: a `Kind`, whose record stands in the stage's own file.

The one dict of all kinds is `pipeline.graph.KINDS`. The shape is that of marin's step records: what a stage needs, what
identifies it and the function that runs it stand beside each other, so that nothing central has to know every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.settings import Job
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.stage import Result, Stage


@dataclass
class Line:
    """The stages of a job so far, in order: what the next one may need."""

    job: Job
    stages: list[Stage] = field(default_factory=list)

    def names(self, kind: str) -> tuple[str, ...]:
        """All stages of a kind so far."""
        return tuple(stage.name for stage in self.stages if stage.kind == kind)

    def last(self, kind: str) -> str:
        """The latest stage of a kind."""
        return self.names(kind)[-1]

    @property
    def models(self) -> tuple[str, ...]:
        """All stages that leave weights."""
        return tuple(stage.name for stage in self.stages if stage.model)

    @property
    def model(self) -> str:
        """The latest of them."""
        return self.models[-1]


@dataclass(frozen=True)
class Kind:
    """One kind of stage."""

    name: str
    """Part of every fingerprint, so it never changes."""
    stages: str
    """Regular expression of the names that its stages can have."""
    needs: Callable[[Line, int], tuple[str, ...]]
    """(stages so far, generation) -> the stages that must be done before; the model that it works on comes last."""
    identity: Callable[[Inputs], dict[str, Any]]
    """Everything that decides what the stage computes, as plain data; the fingerprint is a hash of it."""
    run: Callable[[Context], Result]
    """The work. It imports what takes long itself: a finished job only reads a few JSON files."""
    format: int = 1
    """Raised when the stage's files change their meaning. A folder that was finished under an earlier number stays
    done; one that was not is begun anew."""
    model: bool = False
    """Its stages leave weights."""
