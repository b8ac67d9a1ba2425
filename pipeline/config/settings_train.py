"""Defines the settings of training: of the teacher, of students, of the fine-tune at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.fields import REQUIRED, execution, identity
from pipeline.errors import ConfigError


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
    pretrained: Any = identity(
        False,
        "first weights: true, timm's published ones (timm/<name> only), or the stage folder or .safetensors file that "
        "holds them, of which all but the classifier is taken; resolution, crop, interpolation, mean and std are those "
        "of the weights where the job does not say them",
    )
    freeze: bool = identity(
        False,
        "train the classifier alone (a linear probe), on features that the rest of the pretrained network gives once; "
        "of a teacher only",
        neutral=False,
    )
    init: str = identity(
        "scratch", "a student's first weights: new ones or the teacher's", choices=("scratch", "teacher")
    )
    resolution: int = identity(224, "pixels per side in training and evaluation", low=4, high=4096)
    crop: float = identity(0.875, "share of the resized image that the test view keeps", low=0.1, high=1.0)
    interpolation: str = identity(
        "bicubic",
        "resampling of images; for lanczos training's views take bicubic",
        choices=("bilinear", "bicubic", "lanczos"),
    )
    mean: list[float] = identity([0.485, 0.456, 0.406], "mean per channel, in 0..1")
    std: list[float] = identity([0.229, 0.224, 0.225], "standard deviation per channel, in 0..1")
    test_views: list[str] = identity(
        [],
        "further views of an image over which the model's answer is averaged wherever it is asked (validation, "
        "labelling, test, predict): flip, its mirror image; shift, each of these also a little up left and down right",
        neutral=[],
    )
    first_layer: str = identity(
        "he",
        "first weights of the first convolution: as all others', or filters that whiten small patches of the training "
        "images",
        choices=("he", "whitening"),
        neutral="he",
    )
    duration: str = identity("350ep", "epochs of the labelled images (30ep) or steps (2000st)")
    warmup: str = identity("5ep", "linear rise of the learning rate: 5ep or 100st")
    batch: int = identity(256, "labelled images in a global step", low=1)
    optimizer: str = identity(
        "sgd",
        "sgd is Nesterov; adamw, lamb and muon take a far lower `lr`",
        choices=("sgd", "adamw", "lamb", "muon"),
    )
    lr: float = identity(0.1, "peak learning rate per `lr_images` images of the step", low=0.0)
    lr_images: int = identity(256, "images that `lr` refers to; 0: `lr` is absolute", low=0)
    momentum: float = identity(0.9, "sgd's momentum", low=0.0, high=0.9999)
    weight_decay: float = identity(4e-5, "on everything but batch norm", low=0.0)
    clip: float | None = identity(None, "largest norm of the gradient; null: none", low=1e-6, neutral=None)
    accumulate: int = identity(
        1,
        "parts in which a training worker takes its images of a step: less memory, smaller batches for batch norm",
        low=1,
        neutral=1,
    )
    rollbacks: int = identity(
        0,
        "times that a run whose loss is not finite goes back to its last checkpoint with a lower learning rate",
        low=0,
        high=20,
        neutral=0,
    )
    rollback_factor: float = identity(
        0.5, "what the learning rate is multiplied by each time", low=0.001, high=0.999, neutral=0.5
    )
    label_smoothing: float = identity(0.1, "on hard labels", low=0.0, high=0.9)
    ema: float = identity(0.9999, "decay of the averaged weights, min(ema, (1+t)/(10+t))", low=0.0, high=0.999999)
    weights: str = identity(
        "last",
        "which averaged weights the stage hands on: its last, or the best by validation top-1",
        choices=("last", "best"),
        neutral="last",
    )
    augment: str = identity("rand-m15-mmax15-n2-p1", "timm's policy string; '' for none")
    augment_ops: list[str] = identity([], "only these of timm's operations; []: the policy's usual set")
    affine: Affine = identity(Affine, "random affine map of training images")
    crop_scale: list[float] = identity([0.08, 1.0], "area of the random resized crop", low=0.0, high=1.0)
    crop_ratio: list[float] = identity([0.75, 1.3333333333333333], "aspect of the random resized crop", low=0.1)
    shift: float = identity(
        0.0,
        "shift training images by up to this share of the side each way, what comes in being mirrored, in place of the "
        "random resized crop; 0: do not",
        low=0.0,
        high=0.5,
        neutral=0.0,
    )
    flip: float = identity(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    alternate_flip: bool = identity(
        False,
        "mirror each image in every other epoch, drawn once in which, in place of a chance in each; flip stays 0.5",
        neutral=False,
    )
    cutout: float = identity(
        0.0,
        "side of a square of each training image that is hidden under the mean colour, as a share of the image's side",
        low=0.0,
        high=1.0,
        neutral=0.0,
    )
    augment_on: str = identity(
        "loader",
        "who carries out the policy: the loading processes, or the training device on whole batches",
        choices=("loader", "device"),
        neutral="loader",
    )
    mixup: float = identity(
        0.0, "blend pairs of images by Beta(mixup, mixup); 0: none", low=0.0, high=100.0, neutral=0.0
    )
    cutmix: float = identity(
        0.0, "paste a box of another image, its size by Beta(cutmix, cutmix); 0: none", low=0.0, high=100.0, neutral=0.0
    )
    dropout: float = identity(0.0, "before the classifier", low=0.0, high=0.95)
    stochastic_depth: float = identity(0.0, "drop rate of the last block, growing linearly", low=0.0, high=0.95)
    unlabelled_ratio: float = identity(1.0, "pseudo-labelled images per labelled one in a step", low=0.0)
    pseudo_weight: float = identity(1.0, "weight of a pseudo-labelled image in the loss", low=0.0)
    labels: str = identity("soft", "pseudo-labels as distributions or as classes", choices=("soft", "hard"))
    temperature: float = identity(1.0, "soft labels are p^(1/T), renormalised", low=0.01, high=100.0)
    precision: str = identity(
        "auto",
        "numbers of training: float32; bfloat16, by autocast; auto, which is bfloat16 on GPUs that have it, else "
        "float32; or fastest, whichever of the two trains this network faster, measured at the stage's first start",
        choices=("auto", "fastest", "float32", "bfloat16"),
        neutral="auto",
    )
    segments: int = identity(64, "parallel read positions in the order of a source", low=1, high=1024)
    window: int = identity(8, "shards mixed at a time inside a segment", low=1)
    evaluate_every: str = execution("5ep", "validation during training: 5ep, 200st, or 0st for the end only")
    evaluate_raw: bool = execution(False, "validate the weights themselves too, beside their moving average")
    checkpoint_every: str = execution(
        "500st", "how often a checkpoint is written: 1ep or 500st; the best validation so far saves too"
    )
    keep: int = execution(2, "last checkpoints kept, beside the best", low=1)
    compile: bool = execution(False, "torch.compile the model")
    parallel: str = execution(
        "ddp",
        "several training processes: each holds the whole model (ddp), or a part of it, slower, for models that do not "
        "fit (fsdp)",
        choices=("ddp", "fsdp"),
    )
    static_graph: bool = execution(False, "ddp plans its messages once, for models that use all weights in every step")


@dataclass
class Teacher(Train):
    checkpoint: Any = identity(
        None, "a stage folder or a .safetensors file to use instead of training; or a list of them, which are averaged"
    )


@dataclass
class Finetune:
    resolution: int | None = identity(
        None, "pixels per side, at least those of training; null: no fine-tune of the last model", low=4, high=4096
    )
    crop: float | None = identity(
        None,
        "share of the resized image that the test view keeps from here on; null: as in training",
        low=0.1,
        high=1.0,
    )
    duration: str = identity("1.5ep", "epochs of the labelled images (1.5ep) or steps (2000st)")
    warmup: str = identity("0st", "linear rise of the learning rate: 1ep or 100st")
    batch: int = identity(256, "labelled images in a global step", low=1)
    optimizer: str = identity("sgd", "sgd is Nesterov", choices=("sgd", "adamw", "lamb"))
    lr: float = identity(0.01, "peak learning rate per `lr_images` images of the step", low=0.0)
    lr_images: int = identity(256, "images that `lr` refers to; 0: `lr` is absolute", low=0)
    momentum: float = identity(0.9, "sgd's momentum", low=0.0, high=0.9999)
    weight_decay: float = identity(4e-5, "on the classifier", low=0.0)
    label_smoothing: float = identity(0.1, "on hard labels", low=0.0, high=0.9)
    ema: float = identity(0.9999, "decay of the averaged weights, min(ema, (1+t)/(10+t))", low=0.0, high=0.999999)
    evaluate_every: str = execution("0st", "validation during fine-tuning: 1ep, 200st, or 0st for the end only")
    checkpoint_every: str = execution("500st", "durable position: 1ep or 500st")


def peak_rate(settings: Train | Finetune, images: int) -> float:
    """The peak learning rate of steps of so many images, pseudo-labelled ones included."""
    return settings.lr * images / settings.lr_images if settings.lr_images else settings.lr


def pseudo_per_step(settings: Train) -> int:
    """Pseudo-labelled images in a student's global step; ConfigError where rounding leaves none of those that were
    asked for."""
    found = round(settings.unlabelled_ratio * settings.batch)
    if settings.unlabelled_ratio and not found:
        raise ConfigError(
            f"unlabelled_ratio {settings.unlabelled_ratio:g} × batch {settings.batch} is less than one pseudo-labelled "
            "image a step; raise one of them, or write unlabelled_ratio: 0 for none"
        )
    return found
