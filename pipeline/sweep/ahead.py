"""Plans a sweep: which stages each combination adds, and which it shares with those before it or finds done.

A stage whose inputs are done has a fingerprint, and shares by it, as the run will. Of the others the settings that can
decide them are compared, so more may turn out to be shared than was planned, and never less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from pipeline import graph, storage
from pipeline.config.settings import Job, to_plain
from pipeline.errors import ConfigError, UserError
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, Stage
from pipeline.printable import counted
from pipeline.progress import safe
from pipeline.sweep.grid import Sweep

SETTINGS = {"audit": ("label", "select"), "label": ("label",), "select": ("label", "select")}
"""The settings of a generation that can decide a stage of it; every other one depends on all."""


@dataclass(frozen=True)
class Ahead:
    """Of one combination: the stages that are done, that an earlier combination will have made, and that it adds."""

    done: Sequence[str]
    shared: Sequence[str]
    new: Sequence[str]


def plan(sweep: Sweep) -> list[Ahead]:
    """What each combination is going to do. UserError: what would stop one of them, which it names."""
    made, right = set[str](), set[str]()
    found = []
    for one in sweep.combinations:
        looks = graph.look(one.job, untested=True)
        try:
            _check(one.job, looks, right)
        except UserError as error:
            raise type(error)(f"the sweep would fail with {one}: {error}") from error
        ahead: dict[str, list[str]] = {"done": [], "shared": [], "new": []}
        for look in looks:
            known = look.folder or json.dumps(deciding(one.job, look.stage), sort_keys=True)
            ahead["done" if look.done else "shared" if known in made else "new"].append(look.stage.name)
            made.add(known)
        found.append(Ahead(**ahead))
    return found


def deciding(job: Job, stage: Stage) -> Any:
    """The settings that can decide what a stage makes."""
    plain = to_plain(job)
    found: list[Any] = [stage.name, plain["prepare"], plain["data"], job.corrections]
    if stage.kind in ("prepare", "index"):
        return [*found, job.seed if job.prepare.dataset else None]
    found += [job.seed, plain["teacher"], job.min_gain]
    for number, generation in enumerate(plain["generations"][: stage.generation], 1):
        names = SETTINGS.get(stage.kind, generation) if number == stage.generation else generation
        found.append({name: generation[name] for name in names})
    return [*found, plain["finetune"]] if stage.kind == "finetune" else found


def _check(job: Job, looks: Sequence[graph.Look], right: set[str]) -> None:
    """What `plan` would say is wrong, where it is certain; `right` gets the shards and models that were looked at."""
    from pipeline import preflight  # seconds of imports

    for look in looks:
        if look.problem:
            raise look.problem
    done: dict[str, Done] = {look.stage.name: look.done for look in looks if look.done}
    corpora = Corpora(job, done, write=False)
    plain = to_plain(job)
    shards = json.dumps(["shards", plain["prepare"], plain["data"], plain["evaluate"]["sets"]])
    if shards not in right:
        corpora.check()
    students = [generation["student"] for generation in plain["generations"]]
    models = json.dumps([shards, plain["teacher"], students, sorted(done)])
    if models in right:
        return
    right |= {shards, models}
    classes = len(corpora.classes) if corpora.root else 2  # any number: `prepare` will write the list
    for text in preflight.mistakes(job, [look.stage for look in looks], classes, done):
        raise ConfigError(text)


def table(sweep: Sweep, ahead: Sequence[Ahead]) -> Group:
    """The plan for a person."""
    title = f"{safe(sweep.combinations[0].job.name)}: {counted(len(ahead), 'combination')} in {safe(sweep.output)}"
    rows = Table("combination", "stages that it adds", box=None, pad_edge=False)
    for one, its in zip(sweep.combinations, ahead, strict=True):
        rows.add_row(safe(str(one)), ", ".join(its.new) or "none")
    new, shared, done = (sum(len(getattr(one, name)) for one in ahead) for name in ("new", "shared", "done"))
    text = f"\n{counted(new, 'stage')} to run; {shared:,} shared with an earlier combination, {done:,} done before"
    return Group(title, rows, f"{text}\nwhat is found goes to {safe(storage.join(sweep.folder, ''))}")
