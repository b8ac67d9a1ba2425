"""What may stand in a job file: the settings, their defaults, their rules, and what each means for the stage folders.

Every field is declared `identity` (it changes what a stage computes, so it is part of the stage's fingerprint) or
`execution` (it changes only how, where or how often). pipeline.config reads job files into these classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

REQUIRED = "???"  # OmegaConf's mark of a value that must be given


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
