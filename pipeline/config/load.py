"""Loads a job: its file, bases and overrides, with every check that can be made before anything starts.

A job is YAML (pipeline.config.job_file) over the classes of pipeline.config.settings; `key=value` from the command line
comes last.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import adopted, checks, checks_evaluate, detection, durations, job_file, pretrained, shipped
from pipeline.config.effect import check_effect, names_in
from pipeline.config.fields import REQUIRED
from pipeline.config.overrides import override
from pipeline.config.settings import THRESHOLD, Generation, Job, Label, Select
from pipeline.config.settings_detection import Detector
from pipeline.config.settings_train import Finetune, Teacher, Train
from pipeline.errors import ConfigError

RAY_CACHE = "runtime_resources/working_dir_files"
RUN_JOB = "job.yaml"
# What every job.yaml of a run has at its top, since 0.1.0.
SPELLED_OUT = {"name", "output", "seed", "cluster", "workers", "prepare", "data", "teacher", "generations", "min_gain"}
SPELLED_OUT |= {"finetune", "evaluate", "measure", "tracking"}
SHARED: dict[str, type] = {"student": Train, "label": Label, "select": Select}  # job-level defaults of every generation


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, merge its bases and `key=value` overrides, check everything; ConfigError says what is wrong.

    A run's folder stands for the settings of its last run, in the place where it lies now."""
    if shipped.named(Path(path)) is None and (Path(path) / RUN_JOB).is_file():
        path, overrides = os.path.join(path, RUN_JOB), [f"output={json.dumps(os.path.abspath(path))}", *overrides]
    try:
        return _load(path, overrides)
    except ConfigError as error:
        # The file is right where what is wrong was said on the command line.
        what = str(error).removeprefix(f"{path}: ")
        keys = [item.partition("=")[0].strip() for item in overrides]
        found = what.partition(";")[0]  # behind it is advice
        said = [key for key in keys if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", found)]
        if not said or what == str(error):
            raise
        raise ConfigError(f"{path}, with {', '.join(said)} from the command line: {what}") from error


def _load(path: str, overrides: Sequence[str]) -> Job:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw = job_file.read(Path(path))
    tree = OmegaConf.create(raw)
    for item in overrides:
        override(tree, item, path, SHARED)
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(tree))
    checks.spell_out_measured(raw, path)
    checks_evaluate.spell_out_sets(raw)
    _check_keys(raw, Job, "", path, extra=SHARED)
    shared = {name: raw.pop(name, None) or {} for name in SHARED}
    generations = raw.get("generations") or []
    measuring = bool((raw.get("measure") or {}).get("models"))
    detecting = checks.detects_only(raw)
    if measuring:
        checks.check_trains_nothing(raw, path)
        raw["teacher"] = {"model": ""}  # which every other job must name
    elif detecting:
        raw["teacher"] = {"model": ""}
    else:
        checks.spell_out_labelling(raw, shared, path)
    raw["generations"] = [
        {**generation, **{name: job_file.merge(shared[name], generation.get(name) or {}) for name in SHARED}}
        for generation in generations
    ]
    adopted.fill_in(raw, path)
    pretrained.fill_in(raw)
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Job), raw))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    assert isinstance(job, Job)
    _check_values(job, "", path)
    checks.check_job(job, path)
    timed: list[tuple[str, Train | Finetune | Detector]] = [
        ("teacher", job.teacher),
        ("finetune", job.finetune),
        *((f"generations[{i}].student", g.student) for i, g in enumerate(job.generations)),
        *((f"detection.detectors[{i}]", detector) for i, detector in enumerate(job.detection.detectors)),
    ]
    for where, settings in timed:
        for key in ("duration", "warmup", "evaluate_every", "checkpoint_every"):
            durations.parse(getattr(settings, key), f"{path}: {where}.{key}")
    if job.prepare.dataset is None and job.data.root is None and job.classifies:
        raise ConfigError(
            f"{path}: data.root is not set and there is no `prepare.dataset`; set data.root to the folder or URL "
            "that holds the shards and classes.json"
        )
    if job.data.cache and "://" in job.data.cache:
        raise ConfigError(
            f"{path}: data.cache is '{job.data.cache}'; copies of shards lie on "
            "each node's own disk, so name a local folder"
        )
    for number, generation in enumerate(job.generations):
        checks.check_training(generation.student, f"generations[{number}].student", path)
    if job.classifies:
        checks.check_training(job.teacher, "teacher", path)
    detection.check(job, path)
    check_effect(job, _said_in(path), _said_by(overrides), path)
    for generation in job.generations:
        if generation.select.threshold is None and generation.select.max_noise is None:
            generation.select.threshold = THRESHOLD
    for data in (job.data, job.detection.data):
        if data.root and not storage.is_url(data.root):
            data.root = os.path.expanduser(data.root)
    job.output = resolve_output(job.output)
    return job


def _said_in(path: str) -> set[str]:
    """Names of the settings that the job file itself has; of a run's job.yaml, which spells out every setting, none."""
    own = job_file.read_own(Path(path))
    return set() if own.keys() >= SPELLED_OUT else names_in(own)


def _said_by(overrides: Sequence[str]) -> set[str]:
    """Names of the settings that the command line has."""
    said: set[str] = set()
    for item in overrides:
        key, _, text = item.partition("=")
        said |= names_in(job_file.parse(text), key.strip())
    return said


def resolve_output(output: str) -> str:
    """An absolute path (or the URL); a relative one inside Ray's package cache is refused, for it is thrown away."""
    if not output.strip() or os.path.normpath(output) == ".":
        raise ConfigError(
            f"output is '{output}', the working directory itself; name a folder of its own, such as runs/NAME"
        )
    if output.startswith(("http://", "https://")):
        raise ConfigError(
            f"output '{storage.redact(output)}' cannot be written to: https:// is for reading shards; set `output` to "
            "a folder that all nodes share or to a URL such as s3://bucket/run"
        )
    if storage.is_url(output):
        return output.rstrip("/")
    if not os.path.isabs(output) and RAY_CACHE in os.getcwd():
        raise ConfigError(
            f"output '{output}' is relative, and this job runs in the directory that Ray unpacked, a cache that is "
            "deleted; add an absolute path that all nodes share: output=/shared/runs/NAME, or a URL"
        )
    return os.path.abspath(os.path.expanduser(output))


def _nested(annotation: Any) -> tuple[type | None, type | None]:
    """(settings class inside an annotation, what it stands in: list, dict or None)."""
    origin = typing.get_origin(annotation)
    if origin in (list, dict):
        inner, _ = _nested(typing.get_args(annotation)[-1])
        return inner, origin
    if origin in (typing.Union, types.UnionType):
        return next((found for found in (_nested(a) for a in typing.get_args(annotation)) if found[0]), (None, None))
    return (annotation, None) if is_dataclass(annotation) and isinstance(annotation, type) else (None, None)


# What other tools call some settings.
MEANT = {
    "learning_rate": "lr",
    "epochs": "duration",
    "max_epochs": "duration",
    "steps": "duration",
    "batch_size": "batch",
    "image_size": "resolution",
    "img_size": "resolution",
    "architecture": "model",
    "arch": "model",
    "name": "model",
}


def _other_container(annotation: Any, value: Any) -> str | None:
    """What a setting takes that was given a list for a mapping, or the other way round."""
    for kind, word, wrong in ((dict, "mapping", list), (list, "list", Mapping)):
        if typing.get_origin(annotation) is kind and isinstance(value, wrong):
            return word
    return None


def _check_keys(raw: Any, schema: Any, where: str, path: str, extra: Mapping[str, type] | None = None) -> None:
    if not isinstance(raw, Mapping):
        such = f", such as {{model: {raw}}}" if schema in (Train, Teacher) and isinstance(raw, str) and raw else ""
        raise ConfigError(f"{path}: {where or 'the job'} is {raw!r}; it takes a mapping of settings{such}")
    hints = typing.get_type_hints(schema)
    known: dict[str, Any] = {item.name: hints[item.name] for item in fields(schema)} | dict(extra or {})
    for key, value in raw.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(sorted(known))}"
            if (meant := MEANT.get(str(key))) in known:
                hint = f"it is called '{meant}' here"
            if schema in (Job, Generation) and key in (item.name for item in fields(Train)):
                hint = f"it is a setting of models, such as student.{key}"
            raise ConfigError(f"{path}: unknown key '{full}'; {hint}")
        if isinstance(value, (list, Mapping)) and (wanted := _other_container(known[key], value)):
            raise ConfigError(f"{path}: {full} is {value!r}; it takes a {wanted}")
        nested, container = _nested(known[key])
        if nested is None or value is None:
            continue
        if container is dict and isinstance(value, Mapping):
            for name, entry in value.items():
                _check_keys(entry, nested, f"{full}.{name}", path)
        elif container is list:
            if not isinstance(value, list):
                raise ConfigError(f"{path}: {full} is {value!r}; it takes a list")
            for number, entry in enumerate(value):
                _check_keys(entry, nested, f"{full}[{number}]", path)
        else:
            _check_keys(value, nested, full, path)


def _check_values(config: Any, where: str, path: str) -> None:
    for item in fields(config):
        full = f"{where}.{item.name}" if where else item.name
        value, rules = getattr(config, item.name), item.metadata
        if is_dataclass(value):
            _check_values(value, full, path)
            continue
        if isinstance(value, list) and value and is_dataclass(value[0]):
            for number, entry in enumerate(value):
                _check_values(entry, f"{full}[{number}]", path)
            continue
        if isinstance(value, dict) and value and is_dataclass(next(iter(value.values()))):
            for name, entry in value.items():
                _check_values(entry, f"{full}.{name}", path)
            continue
        if value == REQUIRED:
            raise ConfigError(f"{path}: {full} is not set; it takes {rules['help']}")
        if "choices" in rules and value not in rules["choices"]:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in rules["choices"])
            close = difflib.get_close_matches(str(value), [str(c) for c in rules["choices"]], 1, 0.6)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise ConfigError(f"{path}: {full} is '{value}'{hint}; allowed are {allowed}")
        for key, number in _elements(full, value):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                low, high = rules.get("low"), rules.get("high")
                finite = math.isfinite(number)
                if not finite or (low is not None and number < low) or (high is not None and number > high):
                    span = f"at least {low}" if high is None else f"between {low} and {high}"
                    span = span if finite else "a finite number"
                    found = number if isinstance(value, dict) else value
                    raise ConfigError(f"{path}: {key} is {found}; it must be {span}")


def _elements(name: str, value: Any) -> list[tuple[str, Any]]:
    """What the limits of a setting apply to, each with its name."""
    if isinstance(value, dict):
        return [(f"{name}.{key}", entry) for key, entry in value.items()]
    return [(name, entry) for entry in (value if isinstance(value, list) else [value])]


TYPES = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "String": "text"}


def _explain(error: Exception) -> str:
    from omegaconf.errors import KeyValidationError, MissingMandatoryValue

    key = getattr(error, "full_key", None) or ""
    first = str(error).splitlines()[0]
    if isinstance(error, KeyValidationError):
        return f'{key}: a name that is a number stands in quotes, such as "3": 0.5'
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not set, and has no default; docs/configuration.md says what it takes"
    if match := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", first):
        return f"{key} is '{match[1]}'; it takes {TYPES.get(match[2], match[2])}"
    if "is not a ListConfig" in first:
        return f"{key} is a single value; it takes a list, such as [1, 2]"
    if match := re.match(r"Cannot convert '(List|Dict)Config' to string", first):
        return f"{key} is a {'list' if match[1] == 'List' else 'mapping'}; it takes text"
    if "Incompatible value 'None'" in first or "is not Optional" in first:
        return f"{key} is null; it takes a value, or drop it for its default"
    return f"{key}: {first}" if key else first
