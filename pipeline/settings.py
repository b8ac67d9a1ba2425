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
    labelled: str = execution("labelled-*.tar", "pattern of the labelled shards: globs, braces, a folder, a .txt list")
    unlabelled: str | None = execution("unlabelled-*.tar", "pattern of the unlabelled shards; needed by generations")
    validation: str = execution("val-*.tar", "pattern of the labelled shards that all tuning looks at")
    test: str = execution("test-*.tar", "pattern of the labelled shards that only `evaluate` reads")
    audit_only: str | None = execution(
        None, "pattern of labelled shards like the unlabelled ones, on which labels are audited and nothing is trained"
    )
    classes: str = execution("classes.json", "class names in index order")
    cache: str | None = execution(
        None, "folder on each node's own disk for copies of remote shards, shared by its processes; null: none"
    )
    cache_gb: float = execution(100.0, "gigabytes (10^9 bytes) that the copies on a node may take", low=0.0)
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
    checkpoint: Any = identity(
        None, "a stage folder or a .safetensors file to use instead of training; or a list of them, which are averaged"
    )


@dataclass
class Label:
    batch: int = identity(256, "images in a forward batch; halved by a worker whose memory it does not fit", low=1)
    flip: bool = identity(
        False, "average the probabilities of each image and its mirror image, for twice the time", neutral=False
    )
    compile: bool = execution(False, "torch.compile the teacher")
    calibrate: bool = identity(
        False,
        "divide the logits by the temperature that the audit finds, so that confidences are honest",
        neutral=False,
    )
    corpus: str = identity(
        "all",
        "label all unlabelled images, or only those that the generation before selected (from the second one on)",
        choices=("all", "selected"),
        neutral="all",
    )


@dataclass
class Select:
    threshold: float = identity(0.3, "least confidence", low=0.0, high=1.0)
    thresholds: dict[str, float] = identity(
        {}, "least confidence by class name, where it is another one", low=0.0, high=1.0, neutral={}
    )
    per_class: int | None = identity(None, "images per class after balancing; null: no balancing", low=1)
    top_fraction: float | None = identity(
        None,
        "share of each class's confident images to keep, the best; not with per_class",
        low=1e-6,
        high=1.0,
        neutral=None,
    )
    max_copies: int | None = identity(None, "most copies of one image", low=1)
    weight: str = identity(
        "copies",
        "what makes an image count more: copies up to per_class, or its confidence in the loss, uncopied",
        choices=("copies", "confidence"),
        neutral="copies",
    )


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
class Measured:
    model: str = identity(REQUIRED, "a name of `python -m models` or timm/<name>")
    size: int = identity(REQUIRED, "pixels per side", low=4, high=4096)
    overrides: dict[str, Any] = identity({}, "arguments of the architecture")
    label: str | None = identity(None, "what tables and plot call it; null: model@size")

    @property
    def name(self) -> str:
        return self.label or f"{self.model}@{self.size}"


@dataclass
class Measure:
    models: list[Measured] = identity(
        [], "what to measure side by side, each also written model@size; such a job does no more"
    )
    batch: int | None = identity(
        None, "images in a batch; null: doubled while that pays and fits, for each model", low=1
    )
    max_batch: int = identity(256, "largest batch that doubling looks at", low=1)
    rounds: int = identity(7, "rounds in which all models take turns; figures are medians over them", low=1)
    seconds: float = identity(0.5, "of a turn, which is at least one step", low=0.0)
    dtype: str = identity("auto", "auto is bfloat16 on a GPU that has it", choices=("auto", "float32", "bfloat16"))
    compile: str | None = identity(
        None, "torch.compile's mode", choices=(None, "default", "reduce-overhead", "max-autotune")
    )
    published: str = identity(
        "imagenet",
        "which published accuracies are shown: of training on ImageNet alone, or with extra data",
        choices=("imagenet", "extra"),
    )
    accuracy_from: str | None = execution(
        None, "an evaluate-… folder, whose measured accuracies are shown for the models that it names"
    )
    map_batch: int | None = identity(
        None, "adds the fp32 memory of attention maps or position embeddings at this batch, on paper", low=1
    )


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
    measure: Measure = identity(Measure, "speed, memory and accuracy of models side by side, in place of training")
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
        found[item.name] = _plain_identity(value)
    return found


def _plain_identity(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_identity(entry) for entry in value]
    return identity_of(value) if is_dataclass(value) else value


def execution_of(config: Any) -> dict[str, Any]:
    """The execution fields of a settings object as plain data."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["kind"] == "execution"}


def to_plain(job: Job) -> dict[str, Any]:
    """The whole job as plain data, as it is written to job.yaml."""
    return dataclasses.asdict(job)
