"""Makes the combinations of a sweep from lists of values on the command line: each is a job of its own.

`select.threshold=0.3,0.5` has two values; commas in brackets, braces and quotes belong to a value: `[1,2],[3,4]` has
two. A value means what it means after `run`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import graph, storage
from pipeline.config import effect
from pipeline.config.load import load_job
from pipeline.config.settings import Job, to_plain
from pipeline.errors import ConfigError

REPEATS = "seed"  # the setting whose values are repetitions, over which results are averaged
# Settings of a job that decide what it trains; `finetune` and `min_gain` among them, tests and workers not.
TRAINED = ("seed", "prepare", "data", "corrections", "teacher", "generations", "min_gain", "finetune")
CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Combination:
    """One value of each swept setting, as they were written, and the job that this makes."""

    settings: Mapping[str, str]
    job: Job

    def __str__(self) -> str:
        return label(self.settings)


@dataclass(frozen=True)
class Sweep:
    """`given`: the job file or name; `fixed`: the settings that have one value; `folder`: where the sweep writes what
    it found."""

    given: str
    fixed: Sequence[str]
    swept: Mapping[str, Sequence[str]]
    combinations: Sequence[Combination]
    folder: str

    @property
    def output(self) -> str:
        return self.combinations[0].job.output


def label(settings: Mapping[str, str]) -> str:
    """'select.threshold=0.3 seed=1', as it is written on a command line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def read(given: str, settings: Sequence[str]) -> Sweep:
    """The sweep over a job file or shipped job; everything that can be checked before anything runs is. ConfigError."""
    lists = [(item.partition("=")[0].strip(), *_values_of(item)) for item in settings]
    swept = {key: values for key, *values in lists if len(values) > 1}
    for key in swept:
        if [name for name, *_ in lists].count(key) > 1:
            raise ConfigError(
                f"{key} is given twice; give all its values at once, such as {key}={','.join(swept[key])}"
            )
    if not swept:
        raise ConfigError(
            "nothing is swept: give at least one setting several values, such as select.threshold=0.3,0.5,0.7; "
            "`noisy-lambda run` runs a job as it is"
        )
    combinations = []
    with _warning_once():
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            said = [
                f"{key}={chosen[key]}" if key in chosen else item
                for (key, *_), item in zip(lists, settings, strict=True)
            ]
            combinations.append(Combination(chosen, load_job(given, said)))
    _check(combinations)
    fixed = [item for (key, *_), item in zip(lists, settings, strict=True) if key not in swept]
    digest = hashlib.sha256(json.dumps([trained(one.job) for one in combinations], sort_keys=True).encode()).hexdigest()
    folder = storage.join(combinations[0].job.output, f"sweep-{digest[:8]}")
    return Sweep(given, fixed, swept, combinations, folder)


def trained(job: Job) -> dict[str, Any]:
    """All settings that can decide what a job trains, and on which data."""
    return {name: value for name, value in to_plain(job).items() if name in TRAINED}


def _values_of(item: str) -> list[str]:
    key, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"'{item}' is not of the form key=value or key=value,value, such as teacher.lr=0.1,0.2")
    values = split(text)
    if values is None:
        raise ConfigError(f"cannot read the values of {key.strip()}, '{text}': a bracket or a quote is not closed")
    values = [value.strip() for value in values]
    if len(values) > 1 and not all(values):
        raise ConfigError(
            f"cannot read the values of {key.strip()}, '{text}': one of them is empty; write null for no value, and a "
            "list of values without spaces, such as 1,2,3"
        )
    return values


def split(text: str) -> list[str] | None:
    """The text at those of its commas that stand outside brackets, braces and quotes; None where one is not closed."""
    values, closing, quote, before = [""], list[str](), "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and (not values[-1].strip() or before == char or (closing and before in " [{,:")):
            quote = char
        elif char in CLOSING:
            closing.append(CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            values.append("")
            before = ""
            continue
        values[-1] += char
        before = char
    return None if quote or closing else values


def _check(combinations: Sequence[Combination]) -> None:
    first = combinations[0]
    known: dict[str, Combination] = {}
    for one in combinations:
        if not any(stage.kind in ("train", "finetune") for stage in graph.stages_of(one.job)):
            raise ConfigError(
                f"with {one} {one.job.name} trains no model, so there is nothing to rank; sweep over a job that does"
            )
        if one.job.output != first.job.output:
            raise ConfigError(
                f"{first} writes to {storage.redact(first.job.output)} and {one} to {storage.redact(one.job.output)}; "
                "a sweep has one output, where the combinations share what is equal: give output=FOLDER, and only once"
            )
        same = known.setdefault(json.dumps(trained(one.job), sort_keys=True), one)
        if same is not one:
            raise ConfigError(
                f"{same} and {one} train the same models; sweep over settings that change them, with each value once"
            )


@contextmanager
def _warning_once() -> Iterator[None]:
    """What every combination's job would warn of is said once."""
    said: set[str] = set()

    def first(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said
        said.add(text)
        return new

    effect.log.addFilter(first)
    try:
        yield
    finally:
        effect.log.removeFilter(first)
