"""Defines the settings of a job: defaults, rules, and what each means for the stage folders.

Every field is declared `identity` (it changes what a stage computes, so it is part of the stage's fingerprint) or
`execution` (it changes only how, where or how often). pipeline.config.load reads job files into these classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.fields import REQUIRED, execution, identity
from pipeline.config.settings_detection import Detection
from pipeline.config.settings_evaluate import Evaluate
from pipeline.config.settings_train import Finetune, Teacher, Train
from pipeline.config.settings_workers import Workers


@dataclass
class Prepare:
    dataset: str | None = identity(
        None,
        "data to write as shards under the output first: the digits of the demo, or the images of a folder (`source`)",
        choices=(None, "digits", "folder"),
    )
    labels_per_class: int = identity(5, "of digits: labelled images drawn per class, by `seed`", low=1, high=100)
    source: Any = execution(
        None,
        "of folder: the folder whose sub-folders are the classes; or several, {labelled: …, unlabelled: …, "
        "validation: …, test: …}",
    )
    split_off: dict[str, float] = identity(
        {},
        "of folder: shares of each class of the labelled images to validate and test on, such as {validation: 0.15, "
        "test: 0.15}; identical images stay together",
        low=0.001,
        high=0.9,
        neutral={},
    )

    @property
    def sources(self) -> dict[str, str]:
        """`source` by what the images are for."""
        named = {"labelled": self.source} if isinstance(self.source, str) else self.source or {}
        return {name: str(Path(folder).expanduser()) for name, folder in named.items()}


MAX_IMAGE_GB = 2.2  # Pillow's own limit on pixels lets none take more


@dataclass
class Data:
    root: str | None = execution(None, "folder or URL before the patterns; the prepared data where it is not given")
    labelled: str | None = execution(
        "labelled-*.tar", "pattern of the labelled shards: globs, braces, a folder, a .txt list"
    )
    unlabelled: str | None = execution("unlabelled-*.tar", "pattern of the unlabelled shards; needed by generations")
    validation: str | None = execution(
        "val-*.tar",
        "pattern of the labelled shards that all tuning looks at; a job that only labels audits on them where they are "
        "given",
    )
    test: str | None = execution("test-*.tar", "pattern of the labelled shards that only `evaluate` reads")
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
    max_image_gb: float = execution(
        MAX_IMAGE_GB,
        "gigabytes of memory that decoding one image may take; one that would take more is bad, and not decoded",
        low=0.0,
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
        "divide the logits by the temperature that the audit finds, so that confidences are honest; a job that only "
        "labels and has no audit takes what the checkpoint's own run found",
        neutral=False,
    )
    corpus: str = identity(
        "all",
        "label all unlabelled images, or only those that the generation before selected (from the second one on)",
        choices=("all", "selected"),
        neutral="all",
    )


THRESHOLD = 0.3  # where nothing else decides


@dataclass
class Select:
    threshold: float | None = identity(
        None, "least confidence; null: 0.3, or what the audit finds for max_noise", low=0.0, high=1.0
    )
    max_noise: float | None = identity(
        None,
        "share of wrong labels to expect in each class at most: the audit finds thresholds that keep below it; where "
        "it finds none in any class, the generation is not run; not with threshold",
        low=0.001,
        high=1.0,
        neutral=None,
    )
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
class Tracking:
    enabled: bool = execution(True, "mirror the run in MLflow")
    uri: str | None = execution(None, "MLflow store; default MLFLOW_TRACKING_URI, else sqlite in the output")


@dataclass
class Job:
    name: str = execution(REQUIRED, "of the job, in messages and in MLflow")
    output: str = execution("runs/${name}", "folder or fsspec URL of everything that the run writes")
    seed: int = identity(0, "of the weights, the order, the noise, and the labels that `prepare` draws", low=0)
    cluster: str = execution(
        "auto", "auto (torchrun's processes, else RAY_ADDRESS, else an embedded Ray), inline, embedded, or HOST:PORT"
    )
    workers: Workers = execution(Workers, "processes and what each needs")
    prepare: Prepare = identity(Prepare, "data written by the job itself")
    data: Data = execution(Data, "where the shards are")
    corrections: str | None = execution(
        None, "CSV of labels that people have corrected, as `noisy-lambda review` writes it; its rows change the data"
    )
    teacher: Teacher = identity(Teacher, "generation 0")
    generations: list[Generation] = identity(
        [], "students, each taught by the one before; one without a student: a job that only labels"
    )
    min_gain: float | None = identity(
        None,
        "points of validation top-1 that a student must gain over its teacher, or no generation follows; null: all run",
        low=-100.0,
        high=100.0,
        neutral=None,
    )
    finetune: Finetune = identity(
        Finetune,
        "the last student (or the teacher, where there is none) at a higher resolution: head and last norm only",
    )
    evaluate: Evaluate = identity(Evaluate, "the test of teacher and students")
    detection: Detection = identity(
        Detection, "detectors on bodies of ours, of timm or of this job's own models; a job may have nothing else"
    )
    measure: Measure = identity(Measure, "speed, memory and accuracy of models side by side, in place of training")
    tracking: Tracking = execution(Tracking, "MLflow")

    @property
    def labels_only(self) -> bool:
        """`teacher.checkpoint` labels the unlabelled shards, and that is all."""
        return bool(self.generations) and not self.generations[0].student.model

    @property
    def detects_only(self) -> bool:
        """It trains detectors, and no classifier."""
        return bool(self.detection.detectors) and not (self.teacher.model or self.teacher.checkpoint)

    @property
    def classifies(self) -> bool:
        """It trains classifiers, or labels with them."""
        return not (self.measure.models or self.detects_only)


def to_plain(job: Job) -> dict[str, Any]:
    """The whole job as plain data, as it is written to job.yaml."""
    plain = dataclasses.asdict(job)
    if job.labels_only:  # a student that is not there has no settings
        del plain["generations"][0]["student"]
    return plain
