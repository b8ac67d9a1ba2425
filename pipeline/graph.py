"""Lists the stages of a job, and finds out how each of them stands.

    prepare? ─ index ─ gen0-teacher ─ gen1-audit ─ gen1-label ─ gen1-select ─ gen1-student ─ gen2-audit ─ …
      … ─ gen2-student ─ gen2-finetune? ─ evaluate ─ robustness? ─ report
    index? ─ gen0-teacher ─ gen1-audit? ─ gen1-label ─ report      (a job that only labels)
    … detect-prepare? ─ detect-index ─ detector-NAME ─ … ─ detect-evaluate ─ report   (with `detection`)
    measure      (all that a job with `measure.models` has)
    prepare? ─ index ─ fold1of2 ─ fold2of2      (for `review` with two folds)
    prepare? ─ index ─ gen0-teacher ─ … ─ gen2-finetune?      (for `sweep`: what trains models, and no test)

A stage's fingerprint hashes its kind, its format and what its kind calls its identity: settings, the frozen corpora,
the class list, the sha256 of the weights it uses, the fingerprints of the folders it reads. It is known once its inputs
are done. Nothing here imports torch, ray or mlflow: a rerun of a finished job reads a few JSON files and ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.config.settings import Job
from pipeline.errors import OutputError, UserError
from pipeline.plan import early_stop
from pipeline.plan.corpora import Corpora, audited_of, indexed_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import DONE, Done, Stage, fingerprint, folder_of, read_done
from pipeline.stages import (
    adopt,
    audit,
    detect_evaluate,
    detect_index,
    detect_prepare,
    detector,
    evaluate,
    finetune,
    fold,
    index,
    label,
    measure,
    prepare,
    report,
    robustness,
    select,
    train,
)

STAGES = (
    prepare, index, train, adopt, audit, label, select, finetune,
    evaluate, robustness, detect_prepare, detect_index, detector, detect_evaluate, report, measure, fold,
)  # fmt: skip
KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in STAGES}


def stage_folders() -> str:
    """Regular expression of the names of stages' folders."""
    return f"({'|'.join(kind.stages for kind in KINDS.values())})-[0-9a-f]{{8}}"


def stages_of(job: Job, done: Mapping[str, Done] | None = None, folds: int = 0, untested: bool = False) -> list[Stage]:
    """The stages of a job in the order in which they run, without generations after an early stop that `done` tells of;
    the last one leaves summary.json. `folds`: the stages that `review` runs instead, for its doubtful labels;
    `untested`: those up to the last model, which is all that `sweep` runs."""
    line = Line(job)

    def add(kind: str, name: str | None = None, generation: int = 0) -> None:
        found = KINDS[kind]
        line.stages.append(Stage(name or kind, kind, found.needs(line, generation), generation, found.model))

    if job.measure.models:
        add("measure")
        return line.stages

    def add_detection() -> None:
        if not job.detection.detectors:
            return
        if job.detection.data.dataset:
            add("detect-prepare")
        add("detect-index")
        for settings in job.detection.detectors:
            add("detector", f"detector-{settings.name}")
        add("detect-evaluate")

    if job.detects_only:
        add_detection()
        add("report")
        return line.stages
    if job.prepare.dataset:
        add("prepare")
    if indexed_of(job):
        add("index")
    if folds:
        for number in range(1, folds + 1):
            add("fold", fold.name_of(number, folds))
        return line.stages
    add("adopt" if job.teacher.checkpoint else "train", "gen0-teacher")
    if job.labels_only:
        if audited_of(job):
            add("audit", "gen1-audit", 1)
        add("label", "gen1-label", 1)
        add("report")
        return line.stages
    stop = early_stop.find(job, done or {})
    last = stop.generation if stop else len(job.generations)
    for number in range(1, last + 1):
        add("audit", f"gen{number}-audit", number)
        add("label", f"gen{number}-label", number)
        add("select", f"gen{number}-select", number)
        add("train", f"gen{number}-student", number)
    if stop and stop.audited:
        add("audit", f"gen{last + 1}-audit", last + 1)  # which found that out
    if job.finetune.resolution:
        add("finetune", f"gen{last}-finetune", last)
    if untested:
        return line.stages
    add("evaluate")
    if job.evaluate.robustness.corruptions:
        add("robustness")
    add_detection()
    add("report")
    return line.stages


def in_order(job: Job, done: Mapping[str, Done], folds: int = 0, untested: bool = False) -> Iterator[Stage]:
    """The stages, one after the other; which one is next is decided by what is in `done` by then."""
    place = 0
    while place < len(stages := stages_of(job, done, folds, untested)):
        yield stages[place]
        place += 1


@dataclass(frozen=True)
class Look:
    """A stage as it stands. `folder` is "" while its inputs are not done, or where a `problem` hides them."""

    stage: Stage
    folder: str = ""
    fingerprint: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    done: Done | None = None
    problem: UserError | None = None
    superseded: str = ""
    """A folder with the same inputs that was begun, but not finished, under an earlier format of the stage."""


def walk(
    job: Job, done: MutableMapping[str, Done], corpora: Corpora, folds: int = 0, untested: bool = False
) -> Iterator[Look]:
    """Every stage when its turn has come. `done` gets those that are finished; whoever finishes one meanwhile adds
    it."""
    for stage in in_order(job, done, folds, untested):
        found = _look(job, stage, done, corpora)
        if found.done:
            done[stage.name] = found.done
        yield found


def look(job: Job, folds: int = 0, untested: bool = False) -> list[Look]:
    """How every stage stands, without starting or writing anything."""
    done: dict[str, Done] = {}
    return list(walk(job, done, Corpora(job, done, write=False), folds, untested))


def inputs_of(job: Job, stage: Stage, done: Mapping[str, Done], corpora: Corpora) -> dict[str, Any]:
    """Everything that decides what a stage computes; its needs must be done."""
    return KINDS[stage.kind].identity(Inputs(job, stage, done, corpora))


def _look(job: Job, stage: Stage, done: Mapping[str, Done], corpora: Corpora) -> Look:
    if not all(name in done for name in stage.needs):
        return Look(stage)
    kind = KINDS[stage.kind]
    try:
        inputs = inputs_of(job, stage, done, corpora)
    except UserError as error:
        return Look(stage, problem=error)
    formats = range(kind.format, 0, -1)
    prints = [fingerprint(stage.kind, inputs, number) for number in formats]
    folders = [folder_of(job, stage, print_) for print_ in prints]
    for print_, folder in zip(prints, folders, strict=True):
        if finished := read_done(folder):
            if (finished.name, finished.fingerprint) != (stage.name, print_):
                raise OutputError(
                    f"{storage.redact(storage.join(folder, DONE))} is that of {finished.name}-"
                    f"{finished.fingerprint[:8]}; bring the right one back, or delete it: the next run ends the stage "
                    "again with what is in its folder"
                )
            return Look(stage, folder, print_, inputs, finished)
    superseded = next((folder for folder in folders[1:] if storage.listdir(folder)), "")
    return Look(stage, folders[0], prints[0], inputs, superseded=superseded)


def unreachable(job: Job) -> dict[str, int]:
    """{stage folder that the job as it stands does not use, nor a review of it: bytes}."""
    names = storage.listdir(job.output)
    found = look(job)
    for folds in fold.counts(names):
        found += look(job, folds)
    used = {storage.name(look.folder) for look in found if look.folder}
    # While the inputs of a stage are not done, any of its folders may still be the one.
    undecided = {look.stage.name for look in found if not look.folder}
    stage_folder = re.compile(stage_folders())
    sizes: dict[str, int] = {}
    for name in names:
        match = stage_folder.fullmatch(name)
        if match and name not in used and match[1] not in undecided:
            sizes[name] = sum(storage.walk(storage.join(job.output, name)).values())
    return sizes
