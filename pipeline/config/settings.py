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
from pipeline.config.settings_train import Finetune, Teacher, Train


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
class Robustness:
    corruptions: Any = identity(
        None,
        "ways to spoil the test images, on which every model is tested then: all, or a list of names; null: none",
    )
    severities: list[int] = identity([1, 2, 3, 4, 5], "how strongly", low=1, high=5)
    images: int | None = identity(None, "so many of the test images, drawn by their bytes; null: all", low=1)
    reference: str = identity("teacher", "whose errors count as 100 %", choices=("teacher", "alexnet"))


@dataclass
class Evaluate:
    batch: int = identity(256, "images in a forward batch, for accuracy and speed alike", low=1)
    sizes: list[int] = identity(
        [], "further image sizes, in pixels per side, at which every model is tested", low=4, high=4096, neutral=[]
    )
    sets: dict[str, str] = execution(
        {},
        "further labelled sets by name, such as {v2: v2-*.tar}, on which every model is tested; a pattern is one as in "
        "`data`",
    )
    raw: bool = identity(
        False, "test the weights themselves too, beside their moving average, which is the model", neutral=False
    )
    # Of a stage of its own, so no part of `evaluate`'s identity.
    robustness: Robustness = execution(Robustness, "the test on corrupted images")
    speed_seconds: float = execution(
        1.0, "time spent on measuring the speed of each model, and as much on its latency", low=0.0
    )


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
class Needs:
    cpus: float | None = execution(None, "cores; null: `workers.cpus`", low=0.1)
    gpus: float | None = execution(None, "accelerators; null: `workers.gpus`", low=0.0)
    memory: float | None = execution(
        None, "gigabytes (10^9 bytes) that Ray sets aside for each; null: none in particular", low=0.0
    )
    selector: dict[str, str] = execution(
        {},
        "labels that Ray knows its machine by, such as {ray.io/accelerator-type: H100}; also !H100, in(A100, H100)",
    )


@dataclass
class Workers:
    train: int = execution(1, "training processes", low=1)
    train_least: int | None = execution(
        None,
        "on a running cluster: train with as few processes as this while it has no room for `train`, and with more as "
        "it grows; null: always `train`",
        low=1,
    )
    preemption: bool = execution(
        False, "on a running cluster: save a checkpoint when it says that it will take a machine away (spot machines)"
    )
    label: int | None = execution(None, "labelling processes; null: as many as fit", low=1)
    label_most: int | None = execution(
        None,
        "on a running cluster that scales by itself, where `label` is null: ask it for places for so many labelling "
        "processes; null: only use what there is, and what is added",
        low=1,
    )
    patience: float = execution(
        180.0, "seconds that work waits for room on a running cluster before it is given up", low=0.0
    )
    labelling: Needs = execution(Needs, "what each labelling process needs, and every other one that does not train")
    training: Needs = execution(Needs, "what each training process needs")
    cpus: float = execution(1.0, "cores of a worker", low=0.1)
    gpus: float = execution(0.0, "accelerators of a worker", low=0.0)
    loader: int | None = execution(
        None,
        "image loading processes of a training worker; 0: in the worker itself; null: with a GPU, its share of the "
        "machine's cores but one, at most 8, and 0 without",
        low=0,
    )
    threads: int = execution(0, "compute threads of a training worker; 0: torch's choice", low=0)

    @property
    def label_gpus(self) -> float:
        """Accelerators of a process that labels, or does anything else but train."""
        return self.gpus if self.labelling.gpus is None else self.labelling.gpus

    @property
    def train_gpus(self) -> float:
        return self.gpus if self.training.gpus is None else self.training.gpus


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
    measure: Measure = identity(Measure, "speed, memory and accuracy of models side by side, in place of training")
    tracking: Tracking = execution(Tracking, "MLflow")

    @property
    def labels_only(self) -> bool:
        """`teacher.checkpoint` labels the unlabelled shards, and that is all."""
        return bool(self.generations) and not self.generations[0].student.model


def to_plain(job: Job) -> dict[str, Any]:
    """The whole job as plain data, as it is written to job.yaml."""
    plain = dataclasses.asdict(job)
    if job.labels_only:  # a student that is not there has no settings
        del plain["generations"][0]["student"]
    return plain
