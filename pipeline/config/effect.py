"""Finds settings that have no effect where they stand, and refuses them or warns of them.

They stay part of what fingerprints hash, so that folders keep their names.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pipeline.config.settings import Job
from pipeline.config.settings_detection import Detector
from pipeline.config.settings_train import Finetune, Train
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

SHARED = ("student", "label", "select")  # job-level settings of every generation
OF_ALL = r"^generations\[\d+\]\."
OF_STUDENTS = ("unlabelled_ratio", "pseudo_weight", "labels", "temperature")
OF_WHOLE_NETWORKS = (
    "clip", "accumulate", "rollbacks", "weights", "augment", "augment_ops", "affine", "crop_scale", "crop_ratio",
    "flip", "augment_on", "mixup", "cutmix", "dropout", "stochastic_depth", "segments", "window", "evaluate_every",
    "evaluate_raw", "checkpoint_every", "keep", "compile", "parallel", "static_graph", "shift", "alternate_flip",
    "cutout", "test_views", "first_layer",
)  # fmt: skip
Idle = tuple[str, Any, str, Iterable[str], str]
"""(where, the settings there, the one that decides or "", the names of those that have no effect, why)"""


def check_effect(job: Job, in_file: Collection[str], on_line: Collection[str], path: str) -> None:
    """ConfigError for a setting without effect that is not at its default and is said by the job file itself
    (`in_file`, dotted names) or by the command line (`on_line`); a warning for one that a base brings. Where the
    command line switches something off (`finetune.resolution=null`), the job file may go on speaking of it."""
    _check_shared(job, in_file, on_line, path)
    idle = {
        f"{where}.{name}": (getattr(settings, name), f"{where}.{switch}", why)
        for where, settings, switch, names, why in _idle(job)
        for name in names
        if getattr(settings, name) != getattr(type(settings)(), name)
    }
    for name, (value, switch, why) in idle.items():
        found = f"{name} is {value!r}, which has no effect: {why}"
        shared = re.sub(OF_ALL, "", name)
        switched = {switch, re.sub(OF_ALL, "", switch)} & set(on_line)
        said = set(on_line) if switched else {*in_file, *on_line}
        if switched and name not in said and shared not in said:
            continue
        everywhere = all(f"generations[{number}].{shared}" in idle for number in range(len(job.generations)))
        if name in said or (
            shared in said and everywhere
        ):  # what is said of all students counts if it is in vain for all
            raise ConfigError(f"{path}: {found}; drop it")
        if shared not in said:
            log.warning("%s: %s (a base of the job sets it)", path, found)


def _check_shared(job: Job, in_file: Collection[str], on_line: Collection[str], path: str) -> None:
    """ConfigError for a setting of all generations on the command line of a job that has none; a warning for those of
    the file, where `generations: []` may be said for a while."""
    if job.generations or job.measure.models:
        return
    for said in (on_line, in_file if "generations" in in_file else ()):
        vain = sorted(name for name in said if name.split(".")[0] in SHARED)
        if vain and said is on_line:
            raise ConfigError(f"{path}: {vain[0]} has no effect: `generations` is empty; drop it, or name a generation")
        if vain:
            log.warning("%s: %s: no effect, for `generations` is empty", path, ", ".join(vain))


def _idle(job: Job) -> Iterator[Idle]:
    if not job.measure.models:
        yield "measure", job.measure, "models", _others(job.measure, "models"), "measure.models names no model"
        if not job.teacher.checkpoint:
            yield from _idle_in_training("teacher", job.teacher)
        yield "teacher", job.teacher, "", OF_STUDENTS, "a teacher has no pseudo-labels"
    for number, detector in enumerate(job.detection.detectors):
        yield from _idle_in_optimizer(f"detection.detectors[{number}]", detector)
    if not job.detection.detectors:
        names = [item.name for item in dataclasses.fields(job.detection.data)]
        yield "detection.data", job.detection.data, "", names, "detection.detectors names none"
    if job.detects_only:
        why = "a job of detectors alone trains and tests no classifier"
        names = ["labelled", "unlabelled", "validation", "test", "audit_only", "classes"]
        yield "data", job.data, "", names, why
        yield "evaluate", job.evaluate, "", _others(job.evaluate), why
    if job.labels_only:
        why = "a job that only labels reads unlabelled shards, and those of data.validation and data.audit_only"
        yield "data", job.data, "", [name for name in ("labelled", "test") if getattr(job.data, name)], why
        yield "evaluate", job.evaluate, "", _others(job.evaluate), "a job that only labels tests no model"
    for number, generation in enumerate(job.generations):
        where, student, select = f"generations[{number}]", generation.student, generation.select
        yield from _idle_in_training(f"{where}.student", student)
        if student.labels == "hard":
            yield f"{where}.student", student, "labels", ["temperature"], "it is for soft labels, and these are hard"
        if not select.per_class:
            yield f"{where}.select", select, "per_class", ["max_copies"], "without per_class nothing is copied"
    if not job.finetune.resolution:
        names = _others(job.finetune, "resolution")
        yield "finetune", job.finetune, "resolution", names, "without finetune.resolution there is no fine-tune"
    else:
        yield from _idle_in_optimizer("finetune", job.finetune)
    of_folder = ["source", "split_off"]
    if not job.prepare.dataset:
        names, why = ["labels_per_class", *of_folder], "prepare.dataset names no data to write"
        yield "prepare", job.prepare, "dataset", names, why
    elif job.prepare.dataset == "folder":
        why = "prepare.dataset is folder, which has the labels that it has"
        yield "prepare", job.prepare, "dataset", ["labels_per_class"], why
    else:
        yield "prepare", job.prepare, "dataset", of_folder, f"prepare.dataset is {job.prepare.dataset}"
    if not job.evaluate.robustness.corruptions:
        names = _others(job.evaluate.robustness, "corruptions")
        why = "evaluate.robustness.corruptions names none"
        yield "evaluate.robustness", job.evaluate.robustness, "corruptions", names, why
    if not job.data.cache:
        yield "data", job.data, "cache", ["cache_gb"], "without data.cache there are no copies"


def _idle_in_training(where: str, settings: Train) -> Iterator[Idle]:
    yield from _idle_in_optimizer(where, settings)
    if settings.freeze:
        why = "with freeze only the classifier is trained, on features that do not change"
        yield where, settings, "freeze", OF_WHOLE_NETWORKS, why
    if settings.shift:
        why = "with shift there is no random resized crop"
        yield where, settings, "shift", ["crop_scale", "crop_ratio"], why
    if settings.init == "teacher" or (settings.pretrained and not settings.freeze):
        yield where, settings, "init", ["first_layer"], "the first weights are given"
    if not settings.rollbacks:
        yield where, settings, "rollbacks", ["rollback_factor"], "with rollbacks 0 no run goes back"


def _idle_in_optimizer(where: str, settings: Train | Finetune | Detector) -> Iterator[Idle]:
    if settings.optimizer != "sgd":
        yield where, settings, "optimizer", ["momentum"], f"only sgd has it, and the optimizer is {settings.optimizer}"


def _others(settings: Any, *but: str) -> list[str]:
    return [item.name for item in dataclasses.fields(settings) if item.name not in but]


def names_in(tree: Any, prefix: str = "") -> set[str]:
    """Dotted names of all settings in a tree of plain data, as `generations[0].student.lr`."""
    if isinstance(tree, Mapping):
        return {
            name for key, value in tree.items() for name in names_in(value, f"{prefix}.{key}" if prefix else str(key))
        }
    if isinstance(tree, list) and any(isinstance(entry, Mapping) for entry in tree):
        return {name for number, entry in enumerate(tree) for name in names_in(entry, f"{prefix}[{number}]")}
    return {prefix}
