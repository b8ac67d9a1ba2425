"""Finds whether the generations end early: where a student gains less than `min_gain` points over its teacher.

Both are judged on the validation shards, by what is in their done.json, so a rerun decides the same. A teacher that was
not trained here is judged by the first audit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.settings import Job
from pipeline.plan.stage import AUDIT, Done, read_json_file


@dataclass(frozen=True)
class Stop:
    """After generation `generation` of `planned`, whose student gained `gain` points."""

    generation: int
    planned: int
    gain: float
    wanted: float

    @property
    def what(self) -> str:
        """The generations that are not run."""
        first = self.generation + 1
        return f"generation {first}" if first == self.planned else f"generations {first} to {self.planned}"

    def __str__(self) -> str:
        return (
            f"student {self.generation} gained {self.gain:+.2f} points of validation top-1 over its teacher, "
            f"less than min_gain {self.wanted:g}"
        )

    def plain(self) -> dict[str, Any]:
        return {"after_generation": self.generation, "gain_points": self.gain, "min_gain": self.wanted}


def find(job: Job, done: Mapping[str, Done]) -> Stop | None:
    """The early stop that is certain from the stages that are `done`, or None: there is none, or not yet."""
    if job.min_gain is None:
        return None
    planned = len(job.generations)
    for number in range(1, planned):
        student, teacher = (_top1(done, generation) for generation in (number, number - 1))
        if student is None or teacher is None:
            return None
        gain = round(100 * (student - teacher), 6)
        if gain < job.min_gain:
            return Stop(number, planned, gain, job.min_gain)
    return None


def _top1(done: Mapping[str, Done], generation: int) -> float | None:
    """Validation top-1 of a generation's student, or of the teacher, 0; None while it is not known."""
    found = done.get(f"gen{generation}-student" if generation else "gen0-teacher")
    if found is None:
        return None
    top1: float | None = found.info.get("validation", {}).get("top1")
    audit = done.get("gen1-audit")
    if top1 is None and generation == 0 and audit:
        top1 = read_json_file(audit, AUDIT)["sources"]["validation"]["accuracy"]
    return top1
