"""Job files: what may stand in them, how they are read, and what each field means for the stage folders.

A job is YAML over the dataclasses below. `base:` inside any mapping lists files (from conf/ or beside the job) that
are merged first; `key=value` from the command line comes last. Every field is declared `identity` (it changes what a
stage computes, so it is part of the stage's fingerprint) or `execution` (it changes only how, where or how often).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

REQUIRED = "???"  # OmegaConf's mark of a value that must be given
RAY_CACHE = "runtime_resources/working_dir_files"


def _setting(kind: str, default: Any, text: str, rules: dict[str, Any]) -> Any:
    metadata = {"kind": kind, "help": text, **rules}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(default: Any, text: str, **rules: Any) -> Any:
    """A field that changes what is computed. Rules: `choices`, `low`, `high`, and `neutral`: the value with
    which a field added later reproduces the old behaviour, left out of the fingerprint."""
    return _setting("identity", default, text, rules)


def execution(default: Any, text: str, **rules: Any) -> Any:
    """A field that changes only where, how fast or how often something is done."""
    return _setting("execution", default, text, rules)


@dataclass
class Prepare:
    dataset: str | None = identity(
        None, "data to write under the output first: 'digits', or nothing", choices=(None, "digits")
    )
    labels_per_class: int = identity(5, "labelled images drawn per class, by `seed`", low=1, high=100)


@dataclass
class Data:
    root: str | None = execution(None, "folder or URL before the patterns; the prepared data where it is not given")
    labelled: str = execution("labelled-*.tar", "pattern of the labelled shards (globs, braces, folders)")
    unlabelled: str | None = execution("unlabelled-*.tar", "pattern of the unlabelled shards; needed by generations")
    validation: str = execution("val-*.tar", "pattern of the labelled shards that all tuning looks at")
    test: str = execution("test-*.tar", "pattern of the labelled shards that only `evaluate` reads")
    classes: str = execution("classes.json", "class names in index order")
    max_bad_shards: int = execution(0, "unreadable unlabelled shards that are tolerated", low=0)
    max_bad_fraction: float = execution(0.01, "share of unreadable images that is tolerated", low=0.0, high=1.0)


@dataclass
class Affine:
    degrees: float = identity(0.0, "rotation within ± degrees", low=0.0, high=180.0)
    translate: float = identity(0.0, "shift within ± this share of the side", low=0.0, high=1.0)
    scale: list[float] = identity([1.0, 1.0], "least and greatest magnification", low=0.01)
    shear: float = identity(0.0, "shear within ± degrees", low=0.0, high=80.0)


@dataclass
class Train:
    model: str = identity(REQUIRED, "a name of `python -m models` or timm/<name>")
    overrides: dict[str, Any] = identity({}, "arguments of the architecture")
    pretrained: bool = identity(False, "start from timm's published weights (timm/<name> only)")
    init: str = identity(
        "scratch", "a student's first weights: new ones or the teacher's", choices=("scratch", "teacher")
    )
    resolution: int = identity(224, "pixels per side in training and evaluation", low=4, high=4096)
    crop: float = identity(0.875, "share of the resized image that the test view keeps", low=0.1, high=1.0)
    interpolation: str = identity("bicubic", "resampling of images", choices=("bilinear", "bicubic", "lanczos"))
    mean: list[float] = identity([0.485, 0.456, 0.406], "mean per channel, in 0..1")
    std: list[float] = identity([0.229, 0.224, 0.225], "standard deviation per channel, in 0..1")
    duration: str = identity("350ep", "epochs of the labelled images (30ep) or steps (2000st)")
    warmup: str = identity("5ep", "linear rise of the learning rate: 5ep or 100st")
    batch: int = identity(256, "labelled images in a global step", low=1)
    optimizer: str = identity("sgd", "sgd is Nesterov", choices=("sgd", "adamw", "lamb"))
    lr: float = identity(0.1, "peak learning rate per `lr_images` images of the step", low=0.0)
    lr_images: int = identity(256, "images that `lr` refers to; 0: `lr` is absolute", low=0)
    momentum: float = identity(0.9, "sgd's momentum", low=0.0, high=0.9999)
    weight_decay: float = identity(4e-5, "on everything but batch norm", low=0.0)
    label_smoothing: float = identity(0.1, "on hard labels", low=0.0, high=0.9)
    ema: float = identity(0.9999, "decay of the averaged weights, min(ema, (1+t)/(10+t))", low=0.0, high=0.999999)
    augment: str = identity("rand-m15-mmax15-n2-p1", "timm's policy string; '' for none")
    augment_ops: list[str] = identity([], "only these of timm's operations; []: the policy's usual set")
    affine: Affine = identity(Affine, "random affine map of training images")
    crop_scale: list[float] = identity([0.08, 1.0], "area of the random resized crop", low=0.0, high=1.0)
    crop_ratio: list[float] = identity([0.75, 1.3333333333333333], "aspect of the random resized crop", low=0.1)
    flip: float = identity(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    dropout: float = identity(0.0, "before the classifier", low=0.0, high=0.95)
    stochastic_depth: float = identity(0.0, "drop rate of the last block, growing linearly", low=0.0, high=0.95)
    unlabelled_ratio: float = identity(1.0, "pseudo-labelled images per labelled one in a step", low=0.0)
    pseudo_weight: float = identity(1.0, "weight of a pseudo-labelled image in the loss", low=0.0)
    labels: str = identity("soft", "pseudo-labels as distributions or as classes", choices=("soft", "hard"))
    temperature: float = identity(1.0, "soft labels are p^(1/T), renormalised", low=0.01, high=100.0)
    segments: int = identity(64, "parallel read positions in the order of a source", low=1, high=4096)
    window: int = identity(8, "shards mixed at a time inside a segment", low=1)
    evaluate_every: str = execution("5ep", "validation during training: 5ep, 200st, or 0st for the end only")
    checkpoint_every: str = execution("500st", "durable position: 1ep or 500st")
    keep: int = execution(2, "checkpoints kept", low=1)
    compile: bool = execution(False, "torch.compile the model")


@dataclass
class Teacher(Train):
    checkpoint: str | None = identity(None, "a stage folder or a .safetensors file to use instead of training")


@dataclass
class Label:
    batch: int = identity(256, "images in a forward batch", low=1)


@dataclass
class Select:
    threshold: float = identity(0.3, "least confidence", low=0.0, high=1.0)
    per_class: int | None = identity(None, "images per class after balancing; null: no balancing", low=1)
    max_copies: int | None = identity(None, "most copies of one image", low=1)


@dataclass
class Generation:
    student: Train = identity(Train, "the student; `student:` of the job is merged below it")
    label: Label = identity(Label, "as the job's `label`, for this generation")
    select: Select = identity(Select, "as the job's `select`, for this generation")


@dataclass
class Evaluate:
    batch: int = identity(256, "images in a forward batch, for accuracy and speed alike", low=1)
    speed_seconds: float = execution(1.0, "time spent on measuring the speed of each model", low=0.0)


@dataclass
class Workers:
    train: int = execution(1, "training processes", low=1)
    label: int | None = execution(None, "labelling processes; null: as many as fit", low=1)
    cpus: float = execution(1.0, "cores of a worker", low=0.1)
    gpus: float = execution(0.0, "accelerators of a worker", low=0.0)
    loader: int = execution(0, "image loading processes of a training worker; 0: in the worker itself", low=0)
    threads: int = execution(0, "compute threads of a training worker; 0: torch's choice", low=0)


@dataclass
class Tracking:
    enabled: bool = execution(True, "mirror the run in MLflow")
    uri: str | None = execution(None, "MLflow store; default MLFLOW_TRACKING_URI, else sqlite in the output")


@dataclass
class Job:
    name: str = execution(REQUIRED, "of the job, in messages and in MLflow")
    output: str = execution("runs/${name}", "folder or fsspec URL of everything that the run writes")
    seed: int = identity(0, "of the weights, the order, the noise, and the labels that `prepare` draws", low=0)
    cluster: str = execution("auto", "auto (RAY_ADDRESS, else an embedded Ray), inline, embedded, or HOST:PORT")
    workers: Workers = execution(Workers, "processes and what each needs")
    prepare: Prepare = identity(Prepare, "data written by the job itself")
    data: Data = execution(Data, "where the shards are")
    teacher: Teacher = identity(Teacher, "generation 0")
    generations: list[Generation] = identity([], "students, each taught by the one before")
    evaluate: Evaluate = identity(Evaluate, "the test of teacher and students")
    tracking: Tracking = execution(Tracking, "MLflow")


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
    _check_keys(raw, Job, "", path, extra=SHARED)
    shared = {name: raw.pop(name, None) or {} for name in SHARED}
    generations = raw.get("generations") or []
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
    for where, train in [
        ("teacher", job.teacher),
        *((f"generations[{i}].student", g.student) for i, g in enumerate(job.generations)),
    ]:
        for key in ("duration", "warmup", "evaluate_every", "checkpoint_every"):
            parse_duration(getattr(train, key), f"{path}: {where}.{key}")
    if job.prepare.dataset is None and job.data.root is None:
        raise ConfigError(
            f"{path}: data.root is not set and there is no `prepare.dataset`; set data.root to the folder or URL "
            "that holds the shards and classes.json"
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
    from pipeline import storage

    if storage.is_url(output):
        return output.rstrip("/")
    if not os.path.isabs(output) and RAY_CACHE in os.getcwd():
        raise ConfigError(
            f"output '{output}' is relative, and this job runs in the directory that Ray unpacked, a cache that is "
            "deleted; add an absolute path that all nodes share: output=/shared/runs/NAME, or a URL"
        )
    return os.path.abspath(os.path.expanduser(output))


def identity_of(config: Any) -> dict[str, Any]:
    """The identity fields of a settings object as plain data, without fields at their `neutral` value."""
    found: dict[str, Any] = {}
    for item in fields(config):
        if item.metadata["kind"] != "identity":
            continue
        value = getattr(config, item.name)
        if "neutral" in item.metadata and value == item.metadata["neutral"]:
            continue
        found[item.name] = identity_of(value) if is_dataclass(value) else value
    return found


def execution_of(config: Any) -> dict[str, Any]:
    """The execution fields of a settings object as plain data."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["kind"] == "execution"}


def to_plain(job: Job) -> dict[str, Any]:
    """The whole job as plain data, as it is written to job.yaml."""
    return dataclasses.asdict(job)


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
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                low, high = rules.get("low"), rules.get("high")
                if number != number or (low is not None and number < low) or (high is not None and number > high):
                    span = f"at least {low}" if high is None else f"between {low} and {high}"
                    raise ConfigError(f"{path}: {full} is {value}; it must be {span}")


def _explain(error: Exception) -> str:
    key = getattr(error, "full_key", None) or ""
    first = str(error).splitlines()[0]
    return f"{key}: {first}" if key else first
