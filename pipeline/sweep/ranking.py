"""Ranks the combinations of a sweep by the validation top-1 of what they trained; test images have no part in it.

Combinations that differ in the seed alone are one entry: the mean of their top-1 and its standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.plan import best
from pipeline.plan.best import Best
from pipeline.plan.stage import Done
from pipeline.printable import counted
from pipeline.sweep.grid import REPEATS, label

SURE = 0.95


@dataclass(frozen=True)
class Entry:
    """Combinations with the same settings but for the seed. `top1`: their mean, a share; `error`: its standard error,
    None of a single one; `members`: numbers of those that are done, the first seed first; `failed`: how many are
    not."""

    settings: Mapping[str, str]
    top1: float
    error: float | None
    members: Sequence[int]
    failed: int


def result(done: Mapping[str, Done]) -> Best | None:
    """The best model that a combination trained, the teacher only where there is no other: what students are taught by
    is not what is compared."""
    models = {name: one for name, one in done.items() if one.model}
    return best.find(dict(list(models.items())[1:]) or models)


def entries(combinations: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The best first, those that failed in part after the others; `combinations` as sweep.json has them."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(combinations):
        groups.setdefault(label(_apart_from_seed(one)), []).append(number)
    found = []
    for numbers in groups.values():
        done = [number for number in numbers if combinations[number]["state"] == "done"]
        if not done:
            continue
        top1 = [combinations[number]["top1"] for number in done]
        error = statistics.stdev(top1) / math.sqrt(len(top1)) if len(top1) > 1 else None
        failed = sum(combinations[number]["state"] == "failed" for number in numbers)
        found.append(Entry(_apart_from_seed(combinations[numbers[0]]), statistics.fmean(top1), error, done, failed))
    return sorted(found, key=lambda entry: (entry.failed > 0, -entry.top1))


def _apart_from_seed(combination: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in combination["settings"].items() if key != REPEATS}


def sentences(ranked: Sequence[Entry], combinations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What came out, and how sure it is."""
    if not ranked:
        return ["No combination is done."]
    first = ranked[0]
    images = next(one["images"] for one in combinations if one["state"] == "done")
    name = label(first.settings) or "the job"
    found = [f"Best: {name}, with {_percent(first)} of {counted(images, 'validation image')} right."]
    if len({one["validation"] for one in combinations if one["state"] == "done"}) > 1:
        found.append("The combinations were validated on different images, so their figures do not compare.")
    if len(ranked) > 1:
        found.append(_lead(first, ranked[1:], images))
    found.append(
        f"It is the best of {len(ranked)} on the images that chose it, so its own figure flatters it a little. No "
        "combination was tested: running best.yaml does that."
    )
    return found


def _lead(first: Entry, others: Sequence[Entry], images: int) -> str:
    """Which others the best cannot be told from."""
    near = [other for other in others if first.top1 - other.top1 <= _by_chance(first, other, images)]
    by = "of seeds" if first.error is not None else f"of {counted(images, 'validation image')}"
    advice = "more seeds" if first.error is not None else "seeds (seed=0,1,2)"
    if not near:
        return f"Its lead is more than chance {by} explains (95 %)."
    them = f"{len(near):,} of the {len(others):,} others" if len(others) > 1 else "the other"
    return f"Chance {by} may explain its lead over {them} (95 %): {advice} would tell."


def _by_chance(one: Entry, other: Entry, images: int) -> float:
    """The difference that chance does not exceed in 95 % of cases: by Student's t where there are seeds, else that of
    two accuracies on so many images, which is more than that of the same images."""
    from scipy import stats

    errors = [chance(entry.top1, images) if entry.error is None else entry.error for entry in (one, other)]
    freedom = len(one.members) + len(other.members) - 2
    return math.hypot(*errors) * float(
        stats.t.ppf((1 + SURE) / 2, freedom) if freedom else stats.norm.ppf((1 + SURE) / 2)
    )


def chance(top1: float, images: int) -> float:
    """The standard error of an accuracy on so many images; of 0 and 1 as of half an image away from them."""
    share = min(max(top1, 0.5 / images), 1 - 0.5 / images)
    return math.sqrt(share * (1 - share) / images)


def _percent(entry: Entry) -> str:
    error = "" if entry.error is None else f" ± {100 * entry.error:.2f}"
    return f"{100 * entry.top1:.2f}{error} %"


def cells(entry: Entry, swept: Mapping[str, Sequence[str]]) -> list[str]:
    """Of a table: a value for each swept setting, top-1, its standard error and the seeds."""
    values = [entry.settings[key] for key in swept if key != REPEATS]
    error = "" if entry.error is None else f"{100 * entry.error:.2f}"
    seeds = f"{len(entry.members)}" + (f", {entry.failed} failed" if entry.failed else "")
    return [*values, f"{100 * entry.top1:.2f} %", *([error, seeds] if REPEATS in swept else [])]


def columns(swept: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of `cells`."""
    return [*(key for key in swept if key != REPEATS), "top-1", *(["± points", "seeds"] if REPEATS in swept else [])]
