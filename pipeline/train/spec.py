"""What a training run is: plain data, so that it can be sent to workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.augment.view import Augment
from pipeline.data.images import View
from pipeline.loading.loader import SoftTargets, TrainingShard, TrainingSource


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run of a teacher, a student or a fine-tune."""

    folder: str
    """The stage folder: checkpoints, journal and final weights (local path or fsspec URL)."""

    # What is trained.
    model: str
    classes: int
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture, dropout and stochastic depth among them."""
    init: str | None = None
    """A .safetensors file to start from; None: new weights."""
    pretrained: bool = False
    """Start from timm's published weights."""
    only: tuple[str, ...] = ()
    """Roles of the parameters that are trained, the rest of the network being fixed (pipeline.train.freeze); (): all are."""
    seed: int = 0

    # On what.
    sources: tuple[TrainingSource, ...]
    """`labelled` and, for a student, `pseudo`; `per_step` is their images in one global step."""
    augment: Augment
    view: View
    """Of validation; its mean and std are those of training too."""
    soft: SoftTargets = field(default_factory=SoftTargets)
    """Label smoothing, temperature, hard pseudo-labels."""
    mixup: float = 0.0
    """Both parameters of mixup's Beta distribution; 0: none."""
    cutmix: float = 0.0
    """The same of CutMix."""
    validation: tuple[TrainingShard, ...]
    """Empty: no validation."""

    # For how long, and how fast.
    steps: int
    steps_per_epoch: float
    """An epoch is one pass over the labelled images; only what is shown depends on it."""
    lr: float
    """Peak, absolute: already scaled with the images of a step."""
    warmup: int = 0
    """Steps."""
    schedule: str = "cosine"
    optimizer: str = "sgd"
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 4e-5
    clip: float | None = None
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Parts in which each worker takes its images of a step through the network; their gradients are added up."""
    pseudo_weight: float = 1.0
    ema: float = 0.9999
    rollbacks: int = 0
    """How often a run whose loss is not finite may go back to its last checkpoint."""
    rollback_factor: float = 0.5
    """What the learning rate is multiplied by each time."""
    weights: str = "last"
    """Which averaged weights the run ends with: `last`, or `best` by top-1 on `validation`."""

    # How it is carried out; the result does not depend on it, up to rounding.
    validation_batch: int = 256
    """Images that a worker takes at once; on GPUs at most twice as many as in training."""
    evaluate_every: int = 0
    """Steps; 0: at the end only."""
    evaluate_raw: bool = False
    """Validate the weights themselves too, beside their moving average."""
    checkpoint_every: int = 500
    """Steps; 0: at the end only. The best validation so far saves too."""
    keep: int = 2
    """The last ones that are kept, beside the best."""
    log_every: int = 10
    """Steps; reading the loss waits for the device."""
    workers: int | None = 0
    """Image loading processes of each training worker; None: see pipeline.train.feeding."""
    threads: int | None = None
    """Compute threads of each training worker; None: torch's choice."""
    precision: str = "auto"
    """auto (bfloat16 where the GPU has it, else float32), fastest (where the CPU has it too), float32 or bfloat16."""
    channels_last: bool = True
    compile: bool = False
    parallel: str = "ddp"
    """Where the weights are (pipeline.train.parallel): ddp, on every worker; fsdp, cut up among them."""
    static_graph: bool = False
    """DDP plans its messages once."""

    @property
    def images_per_step(self) -> int:
        return sum(source.per_step for source in self.sources)

    @property
    def architecture(self) -> dict[str, Any]:
        return {"model": self.model, "classes": self.classes, "overrides": self.overrides}
