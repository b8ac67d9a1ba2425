"""Read job files: bases, overrides, and every check that can be made before anything starts.

A job is YAML over the classes of pipeline.settings. `base:` inside any mapping lists files (from conf/ or beside the job)
that are merged first; `key=value` from the command line comes last.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pipeline import config_checks, storage
from pipeline.declare import REQUIRED
from pipeline.errors import ConfigError
from pipeline.settings import Job, Label, Select
from pipeline.settings_train import Finetune, Train

RAY_CACHE = "runtime_resources/working_dir_files"
SHARED: dict[str, type] = {"student": Train, "label": Label, "select": Select}  # job-level defaults of every generation


def load(path: str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, merge its bases and `key=value` overrides, check everything; ConfigError says what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw = _read(Path(path), [])
    tree = OmegaConf.create(raw)
    for item in overrides:
        _override(tree, item)
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(tree))
    config_checks.spell_out_measured(raw, path)
    _check_keys(raw, Job, "", path, extra=SHARED)
    shared = {name: raw.pop(name, None) or {} for name in SHARED}
    generations = raw.get("generations") or []
    measuring = bool((raw.get("measure") or {}).get("models"))
    if measuring:
        config_checks.check_trains_nothing(raw, path)
        raw["teacher"] = {"model": ""}  # which every other job must name
    raw["generations"] = [
        {**generation, **{name: merge(shared[name], generation.get(name) or {}) for name in SHARED}}
        for generation in generations
    ]
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Job), raw))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    assert isinstance(job, Job)
    _check_values(job, "", path)
    for number, generation in enumerate(job.generations):
        config_checks.check_select(generation.select, f"generations[{number}].select", path)
    if job.generations and job.generations[0].label.corpus == "selected":
        raise ConfigError(
            f"{path}: generations[0].label.corpus is 'selected', but before the first generation nothing was selected; "
            "set it in the `label` of later generations only"
        )
    config_checks.check_names(job, path)
    config_checks.check_checkpoint(job, path)
    config_checks.check_workers(job, path)
    config_checks.check_finetune(job, path)
    timed: list[tuple[str, Train | Finetune]] = [
        ("teacher", job.teacher),
        ("finetune", job.finetune),
        *((f"generations[{i}].student", g.student) for i, g in enumerate(job.generations)),
    ]
    for where, settings in timed:
        for key in ("duration", "warmup", "evaluate_every", "checkpoint_every"):
            parse_duration(getattr(settings, key), f"{path}: {where}.{key}")
    if job.prepare.dataset is None and job.data.root is None and not measuring:
        raise ConfigError(
            f"{path}: data.root is not set and there is no `prepare.dataset`; set data.root to the folder or URL "
            "that holds the shards and classes.json"
        )
    if job.data.cache and "://" in job.data.cache:
        raise ConfigError(
            f"{path}: data.cache is '{job.data.cache}'; copies of shards lie on each node's own disk, so name a local folder"
        )
    job.output = resolve_output(job.output)
    return job


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_duration(text: str, where: str) -> tuple[float, str]:
    """'30ep' -> (30.0, 'ep'), '2000st' -> (2000.0, 'st')."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st)", text)
    if not match:
        raise ConfigError(f"{where} is '{text}'; write epochs of the labelled images as 30ep or steps as 2000st")
    return float(match[1]), match[2]


def steps(text: str, steps_per_epoch: float) -> int:
    """A duration in steps."""
    number, unit = parse_duration(text, "duration")
    return round(number * steps_per_epoch) if unit == "ep" else round(number)


def resolve_output(output: str) -> str:
    """An absolute path (or the URL); a relative one inside Ray's package cache is refused, for it is thrown away."""

    if output.startswith(("http://", "https://")):
        raise ConfigError(
            f"output '{storage.redact(output)}' cannot be written to: https:// is for reading shards; set `output` to a "
            "folder that all nodes share or to a URL such as s3://bucket/run"
        )
    if storage.is_url(output):
        return output.rstrip("/")
    if not os.path.isabs(output) and RAY_CACHE in os.getcwd():
        raise ConfigError(
            f"output '{output}' is relative, and this job runs in the directory that Ray unpacked, a cache that is "
            "deleted; add an absolute path that all nodes share: output=/shared/runs/NAME, or a URL"
        )
    return os.path.abspath(os.path.expanduser(output))


def _read(path: Path, trail: list[Path]) -> dict[str, Any]:
    import yaml

    if path in trail:
        raise ConfigError(f"{path}: its `base` leads back to itself ({' -> '.join(map(str, [*trail, path]))})")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}; name one of jobs/*.yaml") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a job file is a mapping of settings")
    return _with_bases(raw, path, [*trail, path])


def _with_bases(raw: dict[str, Any], path: Path, trail: list[Path]) -> dict[str, Any]:
    own = {key: _with_bases(v, path, trail) if isinstance(v, dict) else v for key, v in raw.items() if key != "base"}
    own = {
        key: [_with_bases(v, path, trail) if isinstance(v, dict) else v for v in value]
        if isinstance(value, list)
        else value
        for key, value in own.items()
    }
    merged: dict[str, Any] = {}
    bases = raw.get("base") or []
    for name in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _read(_find_base(str(name), path), trail))
    return merge(merged, own)


def _find_base(name: str, path: Path) -> Path:
    package = Path(__file__).resolve().parents[1] / "conf"
    for folder in (path.parent, path.parent.parent / "conf", package):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted(p.relative_to(package).as_posix() for p in package.rglob("*.yaml"))
    close = difflib.get_close_matches(name, known, 3, 0.3)
    raise ConfigError(
        f"{path}: base '{name}' is neither beside the job nor in conf/; did you mean {', '.join(close or known)}?"
    )


def _override(tree: Any, item: str) -> None:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{item}' is not of the form key=value, such as seed=1 or teacher.lr=0.2")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            value = float(value)  # YAML 1.1 reads 1e-3 as a string
        OmegaConf.update(tree, key.strip(), value, merge=False, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot set '{key}': {' '.join(str(error).split())}; see `plan JOB` for the settings of a job"
        ) from error


def _nested(annotation: Any) -> tuple[type | None, bool]:
    """(settings class inside an annotation, whether it stands in a list)."""
    origin = typing.get_origin(annotation)
    if origin in (list, Sequence):
        inner, _ = _nested(typing.get_args(annotation)[0])
        return inner, True
    if origin in (typing.Union, types.UnionType):
        return next((found for found in (_nested(a) for a in typing.get_args(annotation)) if found[0]), (None, False))
    return (annotation, False) if is_dataclass(annotation) and isinstance(annotation, type) else (None, False)


def _check_keys(raw: Any, schema: Any, where: str, path: str, extra: Mapping[str, type] | None = None) -> None:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: {where or 'the job'} is {raw!r}; it takes a mapping of settings")
    hints = typing.get_type_hints(schema)
    known: dict[str, Any] = {item.name: hints[item.name] for item in fields(schema)} | dict(extra or {})
    for key, value in raw.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown key '{full}'; {hint}")
        nested, in_list = _nested(known[key])
        if nested is None or value is None:
            continue
        if in_list:
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
        if value == REQUIRED:
            raise ConfigError(f"{path}: {full} is not set; it takes {rules['help']}")
        if "choices" in rules and value not in rules["choices"]:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in rules["choices"])
            close = difflib.get_close_matches(str(value), [str(c) for c in rules["choices"]], 1, 0.5)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise ConfigError(f"{path}: {full} is '{value}'{hint}; allowed are {allowed}")
        for key, number in _elements(full, value):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                low, high = rules.get("low"), rules.get("high")
                if number != number or (low is not None and number < low) or (high is not None and number > high):
                    span = f"at least {low}" if high is None else f"between {low} and {high}"
                    found = number if isinstance(value, dict) else value
                    raise ConfigError(f"{path}: {key} is {found}; it must be {span}")


def _elements(name: str, value: Any) -> list[tuple[str, Any]]:
    """What the limits of a setting apply to, each with its name."""
    if isinstance(value, dict):
        return [(f"{name}.{key}", entry) for key, entry in value.items()]
    return [(name, entry) for entry in (value if isinstance(value, list) else [value])]


def _explain(error: Exception) -> str:
    from omegaconf.errors import KeyValidationError, MissingMandatoryValue

    key = getattr(error, "full_key", None) or ""
    if isinstance(error, KeyValidationError):
        return f'{key}: a name that is a number stands in quotes, such as "3": 0.5'
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not set, and has no default"
    first = str(error).splitlines()[0]
    return f"{key}: {first}" if key else first
