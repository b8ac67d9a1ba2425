"""Finds whether the generations end early: where a student gains less than `min_gain` points over its teacher, or the
audit finds no threshold that keeps the noise of a teacher's labels below `select.max_noise`.

Gains are judged on the validation shards. All is decided by what is in done.json, so a rerun decides the same. A
teacher that was not trained here is judged by the first audit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.settings import Job
from pipeline.plan.stage import AUDIT, Done, read_json_file


@dataclass(frozen=True)
class Stop:
    """After generation `generation` of `planned`; 0: no student is trained. `facts`: what decided it."""

    generation: int
    planned: int
    why: str
    facts: Mapping[str, float]

    @property
    def what(self) -> str:
        """The generations that are not run."""
        first = self.generation + 1
        return f"generation {first}" if first == self.planned else f"generations {first} to {self.planned}"

    @property
    def audited(self) -> bool:
        """The first generation that is not run has been audited, and that is why."""
        return "max_noise" in self.facts

    def __str__(self) -> str:
        return self.why

    def plain(self) -> dict[str, Any]:
        return {"after_generation": self.generation, **self.facts}


def find(job: Job, done: Mapping[str, Done]) -> Stop | None:
    """The early stop that is certain from the stages that are `done`, or None: there is none, or not yet."""
    planned = len(job.generations)
    for number in range(1, planned + 1):
        audit = done.get(f"gen{number}-audit")
        if audit and "too_noisy" in audit.info:
            return _noisy(number - 1, planned, audit.info["too_noisy"])
        if job.min_gain is None or number == planned:
            continue
        student, teacher = (_top1(done, generation) for generation in (number, number - 1))
        if student is None or teacher is None:
            return None
        gain = round(100 * (student - teacher), 6)
        if gain < job.min_gain:
            return _small_gain(number, planned, gain, job.min_gain)
    return None


def _noisy(generation: int, planned: int, most: float) -> Stop:
    who = f"student {generation}" if generation else "the teacher"
    why = (
        f"in no class does a threshold keep the share of wrong labels by {who} below max_noise {most:g}; raise it, "
        "train longer, or give more validation images to judge by"
    )
    return Stop(generation, planned, why, {"max_noise": most})


def _small_gain(generation: int, planned: int, gain: float, wanted: float) -> Stop:
    why = (
        f"student {generation} gained {gain:+.2f} points of validation top-1 over its teacher, less than min_gain "
        f"{wanted:g}"
    )
    return Stop(generation, planned, why, {"gain_points": gain, "min_gain": wanted})


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
