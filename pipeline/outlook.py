"""Estimates what the stages of a job that are still to come take: time, and room on the disk.

Training's speed is that of a finished training of this run, else what a short measurement here finds (`measured`): the
network alone, on random images in memory, so that reading and decoding come on top. Room is counted on paper: the
weights and checkpoints of training.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config import durations
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train, pseudo_per_step
from pipeline.data import parquet_files
from pipeline.data.manifest import manifest_name
from pipeline.errors import UserError
from pipeline.plan.corpora import Corpora
from pipeline.plan.inputs import training_of
from pipeline.plan.stage import Done, Stage
from pipeline.tracking import journal

if TYPE_CHECKING:
    import torch

MEASURED_SECONDS = 20.0
AT_ONCE = 64  # images in a measured step: more do not make a network faster by much
FEW_STEPS = 200  # below this no network that we trained has learnt
MANY_EPOCHS = 1000  # three times what the longest recipes that were trained or published take
BYTES = 4  # of a number
SLOTS = {"sgd": 1, "adamw": 2, "lamb": 2, "muon": 1}  # numbers that the optimizer keeps for each weight

Network = tuple[str, str, int]
"""(model, its overrides as text, pixels per side): what decides the speed, beside the machine."""
Speeds = Mapping[Network, float]
"""Images a second."""


def network_of(settings: Train) -> Network:
    return settings.model, str(sorted(settings.overrides.items())), settings.resolution


def labelled_images(job: Job, done: Mapping[str, Done]) -> int | None:
    """As `index` counted them, or `prepare` before it; None where neither has."""
    if "index" in done:
        found: int = done["index"].info["counts"]["labelled"]
        return found
    if "prepare" in done:
        return dict(done["prepare"].info["counts"]).get("labelled")
    try:
        corpus = Corpora(job, done, write=False)
        names = {shard.name for shard in corpus["labelled"].shards}
        path = storage.join(corpus.root, manifest_name("labelled"))
        rows = parquet_files.read_table(path, ["shard"])["shard"].to_pylist() if storage.exists(path) else []
    except UserError:
        return None
    return len(rows) if names and set(rows) == names else None


def length(settings: Train, labelled: int | None, pseudo: int = 0) -> str:
    """The duration of a training in words: steps, steps an epoch, and images in all."""
    per_step = settings.batch + pseudo
    if labelled is None:
        if not settings.duration.endswith("st"):
            return settings.duration
        return f"{settings.duration} ({durations.steps(settings.duration, 1) * per_step:,} images)"
    per_epoch = labelled / settings.batch
    steps = durations.steps(settings.duration, per_epoch)
    if not steps:
        return f"{settings.duration} = 0 steps (too few: lengthen it or lower batch)"
    known = "" if settings.duration.endswith("st") else f" = {steps:,} steps"
    return f"{settings.duration}{known} ({_number(per_epoch)} an epoch, {steps * per_step:,} images)"


def advice(stage: str, settings: Train, labelled: int) -> list[str]:
    """Warnings of a recipe that was made for another number of images."""
    steps = durations.steps(settings.duration, labelled / settings.batch)
    epochs = steps * settings.batch / labelled
    found = []
    if settings.batch > labelled:
        found.append(
            f"{stage}: each step takes {settings.batch:,} labelled images, and there are {labelled:,}: lower batch"
        )
    if steps < FEW_STEPS:
        found.append(
            f"{stage}: {steps:,} steps ({settings.duration} of {labelled:,} images, {settings.batch:,} a step) are few "
            "to learn from: lower batch, or lengthen duration"
        )
    if epochs > MANY_EPOCHS and not settings.freeze:
        found.append(
            f"{stage}: {settings.duration} shows each of the {labelled:,} labelled images {epochs:,.0f} times, and "
            f"recipes up to about 350 times: shorten duration, to {_rounded(MANY_EPOCHS, settings, labelled)} or less"
        )
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _rounded(epochs: int, settings: Train, labelled: int) -> str:
    steps = epochs * labelled // settings.batch
    digits = max(0, len(str(steps)) - 2)
    return f"{steps // 10**digits * 10**digits}st"


@dataclass(frozen=True)
class Cost:
    """What a training is going to take; None: not known."""

    seconds: float | None
    bytes: int | None


def cost(settings: Train, labelled: int | None, pseudo: int, classes: int, workers: int, speeds: Speeds) -> Cost:
    """Of a training that is to come; `workers`: processes that share it, each on a device of its own."""
    return Cost(_seconds(settings, labelled, pseudo, workers, speeds), _bytes(settings, classes))


def _seconds(settings: Train, labelled: int | None, pseudo: int, workers: int, speeds: Speeds) -> float | None:
    speed = speeds.get(network_of(settings))
    if not speed or (labelled is None and not settings.duration.endswith("st")):
        return None
    if settings.freeze:  # one pass forward, about a third of a training step
        return None if labelled is None else labelled / speed / 3
    steps = durations.steps(settings.duration, (labelled or 1) / settings.batch)
    return steps * (settings.batch + pseudo) / speed / workers


def _bytes(settings: Train, classes: int) -> int | None:
    """Of the weights at the end, and of the checkpoints: weights, average and optimizer of the last and the best."""
    import torch

    from pipeline import weights
    from pipeline.train.spec import architecture_overrides

    try:
        with torch.device("meta"):
            model = weights.build_model(settings.model, classes, architecture_overrides(settings))
    except UserError:
        return None
    kept = 0 if settings.freeze else (settings.keep + 1) * (2 + SLOTS[settings.optimizer])
    return BYTES * weights.parameter_count(model) * (1 + kept)


def finished_speeds(job: Job, stages: Sequence[Stage], done: Mapping[str, Done]) -> dict[Network, float]:
    """Of the trainings of this run that are finished, as their journals have it."""
    found = {}
    for stage in stages:
        settings = training_of(job, stage) if stage.kind == "train" and stage.name in done else None
        if settings is None or settings.freeze:
            continue
        records, _ = journal.read(done[stage.name].folder)
        passed = [float(r["images_per_second"]) for r in records if r.get("images_per_second")]
        if passed:
            found[network_of(settings)] = statistics.median(passed)
    return found


def takes(
    job: Job, stages: Sequence[Stage], done: Mapping[str, Done], classes: int, measure: bool
) -> tuple[dict[str, tuple[str, str]], str]:
    """{stage: (time, room)}, of finished ones as it was, of others as far as it can be known; and what is to come in
    all. `measure`: find the speed of training here."""
    labelled, speeds = labelled_images(job, done), finished_speeds(job, stages, done)
    ahead = [stage for stage in stages if stage.name not in done]
    trainings = {stage.name: training_of(job, stage) for stage in ahead if stage.kind == "train"}
    if measure and trainings:
        speeds = measured(job, list(trainings.values()), classes) | speeds
    like = {stage.kind: float(done[stage.name].info.get("seconds", 0.0)) for stage in stages if stage.name in done}
    shown: dict[str, tuple[str, str]] = {}
    seconds, size, unknown = 0.0, 0, []
    for stage in stages:
        if finished := done.get(stage.name):
            took = finished.info.get("seconds")
            shown[stage.name] = (shown_time(took), shown_bytes(folder_bytes(finished.folder)))
            continue
        known = Cost(like.get(stage.kind), None)
        if settings := trainings.get(stage.name):
            shared = job.workers.train if job.workers.train_gpus else 1  # on CPUs they share the cores
            known = cost(settings, labelled, _pseudo(settings) if stage.generation else 0, classes, shared, speeds)
        seconds, size = seconds + (known.seconds or 0.0), size + (known.bytes or 0)
        unknown += [] if known.seconds else [stage.name]
        about = f"~{shown_time(known.seconds)}" if known.seconds else ""
        shown[stage.name] = about, f"~{shown_bytes(known.bytes)}" if known.bytes else ""
    parts = [f"about {shown_time(seconds)}"] if seconds else []
    parts += [f"{shown_bytes(size)} for weights and checkpoints"] if size else []
    without = f", without {', '.join(unknown)}" if unknown and seconds else ""
    hint = "; plan --measure times training here" if set(trainings) & set(unknown) and not measure else ""
    return shown, f"to come: {', '.join(parts)}{without}{hint}" if parts else ""


def lengths(job: Job, stages: Sequence[Stage], done: Mapping[str, Done]) -> list[str]:
    """Warnings of trainings that are too short or too long for the labelled images, once these are counted."""
    labelled = labelled_images(job, done)
    ahead = [stage for stage in stages if stage.kind == "train" and stage.name not in done]
    return [note for stage in ahead if labelled for note in advice(stage.name, training_of(job, stage), labelled)]


def measured(job: Job, trainings: Sequence[Train], classes: int) -> dict[Network, float]:
    """Of each of these networks, by training steps here for MEASURED_SECONDS in all."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and job.workers.train_gpus else "cpu")
    before = torch.get_num_threads()
    if device.type == "cpu" and job.workers.threads:
        torch.set_num_threads(min(job.workers.threads * job.workers.train, os.cpu_count() or 1))
    networks = {network_of(settings): settings for settings in trainings}
    found = {}
    try:
        for network, settings in networks.items():
            found[network] = _measure(settings, classes, device, MEASURED_SECONDS / len(networks))
    finally:
        torch.set_num_threads(before)
    return found


def _measure(settings: Train, classes: int, device: torch.device, seconds: float) -> float:
    """Images a second through forward, backward and update, after one step that is not counted."""
    import torch
    from torch.nn import functional as F

    from models.memory_format import channels_last
    from pipeline import weights
    from pipeline.train.optim import create_optimizer
    from pipeline.train.spec import architecture_overrides

    model = weights.build_model(settings.model, classes, architecture_overrides(settings))
    model = channels_last(model).to(device).train()
    optimizer = create_optimizer(model, settings.optimizer, weight_decay=0.0, momentum=settings.momentum)
    batch = min(AT_ONCE, settings.batch + _pseudo(settings))
    pixels = torch.rand(batch, 3, settings.resolution, settings.resolution, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % classes

    def step() -> None:
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * batch / (time.perf_counter() - started)


def _pseudo(settings: Train) -> int:
    try:
        return pseudo_per_step(settings)
    except UserError:
        return 0


def folder_bytes(folder: str) -> int | None:
    """Of what lies in a finished stage's folder on this machine; None of a remote one."""
    if storage.is_url(folder):
        return None
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def shown_time(seconds: float | None) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


def shown_bytes(size: int | None) -> str:
    """`3.2 MiB`, `1.2 GiB`."""
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
