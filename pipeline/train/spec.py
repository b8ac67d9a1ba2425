"""Says what a training run is, as plain data that can be sent to workers, and makes it of a job's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.augment.noise import Augment, augment_of
from pipeline.config.durations import steps
from pipeline.config.settings_train import Train, peak_rate, pseudo_per_step
from pipeline.data.images import View
from pipeline.errors import ConfigError, TrainingError
from pipeline.loading.loader import TrainingShard, TrainingSource
from pipeline.loading.sample_order import segments_for
from pipeline.loading.targets import SoftTargets

SEEDS_PER_JOB = 1000  # every generation has its own order and noise


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run of a teacher, a student or a fine-tune: its settings, and what they come to on these data."""

    settings: Train
    """As the job has them; durations in them are resolved below."""
    folder: str
    """The stage folder: checkpoints, journal and final weights (local path or fsspec URL)."""
    classes: int
    sources: tuple[TrainingSource, ...]
    """`labelled` and, for a student, `pseudo`; `per_step` is their images in one global step."""
    validation: tuple[TrainingShard, ...]
    """Empty: no validation."""
    seed: int = 0
    init: str | None = None
    """A .safetensors file to start from; None: new weights."""
    only: tuple[str, ...] = ()
    """Roles of the parameters that are trained, the rest of the network being fixed (pipeline.train.freeze), on images
    as validation sees them; (): all are."""

    steps: int
    steps_per_epoch: float
    """An epoch is one pass over the labelled images; only what is shown depends on it."""
    lr: float
    """Peak, absolute: already scaled with the images of a step."""
    warmup: int = 0
    """Steps."""
    evaluate_every: int = 0
    """Steps; 0: at the end only."""
    checkpoint_every: int = 500
    """Steps; 0: at the end only. The best validation so far saves too."""

    # How it is carried out; the result does not depend on it, up to rounding.
    workers: int | None = 0
    """Image loading processes of each training worker; None: see pipeline.train.feeding."""
    threads: int | None = None
    """Compute threads of each training worker; None: torch's choice."""
    schedule: str = "cosine"
    validation_batch: int = 256
    """Images that a worker takes at once; on GPUs at most twice as many as in training."""
    log_every: int = 10
    """Steps; reading the loss waits for the device."""
    channels_last: bool = True

    @property
    def images_per_step(self) -> int:
        return sum(source.per_step for source in self.sources)

    @cached_property
    def overrides(self) -> dict[str, Any]:
        """Arguments of the architecture, dropout and stochastic depth among them."""
        return architecture_overrides(self.settings)

    @property
    def architecture(self) -> dict[str, Any]:
        return {"model": self.settings.model, "classes": self.classes, "overrides": self.overrides}

    @cached_property
    def view(self) -> View:
        """Of validation; its mean and std are those of training too."""
        return view_of(self.settings)

    @property
    def test_views(self) -> list[str]:
        """Over which the model answers; none of a probe, whose classifier is trained on features of the image alone."""
        return [] if self.settings.freeze else self.settings.test_views

    @cached_property
    def augment(self) -> Augment:
        """Of training images: the noise of the settings; none, where only a part of the network is trained."""
        return Augment(self.settings.resolution, view=self.view) if self.only else augment_of(self.settings)

    @property
    def image_bytes(self) -> int:
        """What an image and its targets take in a batch."""
        return 3 * self.augment.size**2 + 4 * self.classes

    @property
    def soft(self) -> SoftTargets:
        """Label smoothing, temperature, hard pseudo-labels."""
        found = self.settings
        return SoftTargets(found.label_smoothing, found.temperature, hard_pseudo=found.labels == "hard")


def make_spec(
    settings: Train,
    *,
    stage: str,
    folder: str,
    classes: int,
    labelled: Sequence[TrainingShard],
    pseudo: Sequence[TrainingShard] | None = None,
    validation: Sequence[TrainingShard],
    seed: int,
    generation: int,
    init: str | None = None,
    only: tuple[str, ...] = (),
    workers: int | None = 0,
    threads: int | None = None,
) -> TrainSpec:
    """The TrainSpec of settings on these shards (`pseudo` None: of a run without pseudo-labels): epochs become steps,
    the rate that of a whole step. ConfigError, TrainingError: `stage` would have no step, or too few images for one."""
    sources = [_source("labelled", labelled, settings.batch, settings)]
    if pseudo is not None:
        sources.append(_source("pseudo", pseudo, pseudo_per_step(settings), settings))
    sources = [used for used in sources if used.per_step]
    total, per_epoch = steps_of(stage, settings.duration, settings.batch, sum(shard.count for shard in labelled))
    return TrainSpec(
        settings=settings,
        folder=folder,
        classes=classes,
        sources=tuple(sources),
        validation=tuple(validation),
        seed=seed * SEEDS_PER_JOB + generation,
        init=init,
        only=only,
        steps=total,
        steps_per_epoch=per_epoch,
        lr=peak_rate(settings, sum(used.per_step for used in sources)),
        warmup=min(steps(settings.warmup, per_epoch), total // 2),
        evaluate_every=steps(settings.evaluate_every, per_epoch),
        checkpoint_every=max(1, steps(settings.checkpoint_every, per_epoch)),
        workers=workers,
        threads=threads,
    )


def steps_of(stage: str, duration: str, batch: int, labelled: int) -> tuple[int, float]:
    """(steps of a stage, steps of an epoch of so many labelled images); ConfigError for none."""
    found = steps(duration, labelled / batch)
    if found < 1:
        raise ConfigError(
            f"{stage}: duration {duration} is less than one step of {batch} images "
            f"({labelled} labelled images); lengthen it or lower batch"
        )
    return found, labelled / batch


def _source(name: str, shards: Sequence[TrainingShard], per_step: int, settings: Train) -> TrainingSource:
    """These shards in the order of `settings`. TrainingError: too few images for a step."""
    held = sum(shard.count for shard in shards)
    if name == "pseudo" and per_step > held:
        raise TrainingError(
            f"each step takes {per_step:,} pseudo-labelled images (unlabelled_ratio {settings.unlabelled_ratio:g} × "
            f"batch {settings.batch}), but the selection holds {held:,}, copies included; lower unlabelled_ratio or "
            "batch, or let `select` keep more (a lower threshold, a higher per_class)"
        )
    return TrainingSource(name, tuple(shards), per_step, segments_for(len(shards), settings.segments), settings.window)


def view_of(settings: Train) -> View:
    """How models that are trained with these settings look at images."""
    mean, std = tuple(settings.mean), tuple(settings.std)
    return View(settings.resolution, settings.crop, settings.interpolation, mean, std)


def architecture_overrides(settings: Train) -> dict[str, Any]:
    """`overrides` with dropout and stochastic depth under the names that ours and timm's architectures use."""
    timm = settings.model.startswith("timm/")
    noise = {
        "drop_rate" if timm else "dropout": settings.dropout,
        "drop_path_rate" if timm else "stochastic_depth": settings.stochastic_depth,
    }
    return {**settings.overrides, **{name: rate for name, rate in noise.items() if rate}}
