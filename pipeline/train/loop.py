"""The training loop of teachers, students and fine-tunes: `run(spec)`.

It is called alike in one process, by torchrun's processes and by Ray Train's workers, checkpoints itself and
goes on from what it finds in its folder, on any number of workers, as if nothing had happened: everything
random is a function of (seed, step) or of (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data import images
from pipeline.data.loader import batches
from pipeline.errors import ConfigError
from pipeline.tracking.journal import Journal
from pipeline.train import checkpoint
from pipeline.train.dist import World, average_buffers, join, noise_seed
from pipeline.train.ema import Average
from pipeline.train.evaluate import Memory, accuracy
from pipeline.train.health import check_weights, checked_mean, termination
from pipeline.train.loss import batch_loss
from pipeline.train.optim import create_optimizer, learning_rate, set_learning_rate
from pipeline.train.spec import TrainSpec
from pipeline.weights import build_model, load_state, read_state

__all__ = ["TrainSpec", "run"]

log = logging.getLogger(__name__)

SYNC_BELOW = 32  # images of a worker in a step: below this, batch norm on GPUs sees those of all workers


def run(spec: TrainSpec) -> dict[str, Any]:
    """Train, or go on training, until `spec.steps`; returns `step` and the last validation (see `accuracy`).

    A run that has ended returns its stored result. TrainingError: the loss or the weights are not finite.
    """
    with join() as world, _threads(spec.threads), termination() as stopping:
        result = checkpoint.read_result(spec.folder) if world.main else None
        if world.agree(int(result is not None)):
            return result or checkpoint.read_result(spec.folder) or {}
        if world.size > max(source.per_step for source in spec.sources):
            raise ConfigError(
                f"{world.size} training workers share {spec.images_per_step} images a step, so that some may "
                "get none; lower `workers.train` or raise `batch`"
            )
        return _train(spec, world, stopping)


def _train(spec: TrainSpec, world: World, stopping: threading.Event) -> dict[str, Any]:
    precision = choose_precision(spec.precision, world.device)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    on_gpu = world.device.type == "cuda"

    # ---- network, optimizer, average -----------------------------------------------------------------------
    # Where the weights come from; the order is important:
    # 1. the newest whole checkpoint in the folder: an interrupted run goes on
    # 2. spec.init: a student of its teacher, a fine-tune
    # 3. timm's published weights (spec.pretrained), or new ones drawn from the seed
    resumed = _find_checkpoint(spec, world)
    torch.manual_seed(spec.seed)
    model = build_model(spec.model, spec.classes, spec.overrides, spec.pretrained and not (resumed or spec.init))
    if resumed:
        load_state(model, resumed.model, resumed.path)
    elif spec.init:
        load_state(model, read_state(spec.init), spec.init)
    state: dict[str, Any] = resumed.state if resumed else {"sync_batch_norm": _sync_batch_norm(spec, model, world)}
    if state["sync_batch_norm"] and on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device).to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = create_optimizer(model, spec.optimizer, weight_decay=spec.weight_decay, momentum=spec.momentum)
    average = Average(model, spec.ema)
    first = 0
    if resumed:
        load_state(average.module, resumed.ema, resumed.path)
        optimizer.load_state_dict(resumed.optimizer)
        first, resumed = resumed.step, None
    network: nn.Module = model
    if world.size > 1:
        devices = [world.device] if on_gpu else None
        network = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    if spec.compile:
        network = cast(nn.Module, torch.compile(network))

    # ---- journal and checkpoints: rank 0 alone writes ------------------------------------------------------
    journal = Journal(spec.folder) if world.main else None
    if journal:
        journal.cut(first or -1)
        if first == 0:
            images_of = {f"{source.name}_per_step": source.per_step for source in spec.sources}
            epoch: dict[str, Any] = {
                "epoch_is": "one pass over the labelled images",
                "steps_per_epoch": spec.steps_per_epoch,
            }
            journal.log(0, spec.steps, kind="start", **images_of, **epoch)

    def save(step: int) -> None:
        if journal:
            journal.flush()  # a checkpoint promises that all before it is on record
            facts = {**state, "architecture": spec.architecture, "world_size": world.size}
            weights, averaged = model.state_dict(), average.module.state_dict()
            checkpoint.save(
                spec.folder,
                step,
                model=weights,
                ema=averaged,
                optimizer=optimizer.state_dict(),
                state=facts,
                keep=spec.keep,
            )

    # ---- steps ---------------------------------------------------------------------------------------------
    decoded = Memory()
    losses: list[torch.Tensor] = []  # since the last record, on the device: reading one waits for it
    clock, clock_step = time.perf_counter(), first
    loader = batches(
        spec.sources, augment=spec.augment, classes=spec.classes, soft=spec.soft, seed=spec.seed,
        start_step=first, stop_step=spec.steps, rank=world.rank, world=world.size, workers=spec.workers,
        pin_memory=on_gpu,
    )  # fmt: skip
    with contextlib.ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(contextlib.closing(cast(Generator, loader)))
        if journal:
            open_until_the_end.enter_context(contextlib.closing(journal))
        for batch in loader:
            # One update: both sources in one forward pass, the loss over the images of all workers.
            step = batch["step"]  # updates made before this one
            rate = learning_rate(step, peak=spec.lr, steps=spec.steps, warmup=spec.warmup, schedule=spec.schedule)
            set_learning_rate(optimizer, rate)
            torch.manual_seed(noise_seed(spec.seed, step, world.rank))
            pixels, targets, source = (
                batch[name].to(world.device, non_blocking=True) for name in ("images", "targets", "source")
            )
            inputs = images.normalise(pixels, spec.view, precision).contiguous(memory_format=layout)
            with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                logits = network(inputs)
            loss = batch_loss(logits, targets, source, spec.pseudo_weight) / spec.images_per_step
            # DDP takes the mean of the workers' gradients; times their number it is the sum, and so, whatever
            # the sizes of the slices, the gradient of the global sum over the global number of images.
            (loss * world.size).backward()
            if spec.clip:
                nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            losses.append(loss.detach())
            step += 1

            # Now and then: record, validate, save; and stop when told to.
            if stopping.is_set() and world.main:  # without the other workers: there is no time to agree
                save(step)
                log.warning("stopped by SIGTERM after saving step %d of %d", step, spec.steps)
                sys.exit(128 + signal.SIGTERM)
            validates = bool(spec.validation) and _due(step, spec.evaluate_every, spec.steps)
            saves = _due(step, spec.checkpoint_every, spec.steps)
            if not (validates or saves or step % spec.log_every == 0):
                continue
            mean_loss = checked_mean(losses, step, rate, spec.folder, world)
            losses.clear()
            if journal:
                speed = (step - clock_step) * spec.images_per_step / (time.perf_counter() - clock)
                passed = {
                    "epoch": round(step / spec.steps_per_epoch, 4),
                    "images_per_second": round(speed, 2),
                }
                journal.log(step, spec.steps, kind="train", loss=mean_loss, lr=rate, **passed)
            if validates or saves:
                average_buffers(world, model, average.module)
            if validates:
                state["validation"] = accuracy(
                    average.module, spec.validation, spec.view, spec.validation_batch, world,
                    precision=precision, memory=decoded,
                )  # fmt: skip
                if journal:
                    # A tracker knows names, not kinds: `loss` is that of training.
                    shown = {name: state["validation"][name] for name in ("top1", "top5", "bad")}
                    validation_loss = state["validation"]["loss"]
                    journal.log(step, spec.steps, kind="validation", validation_loss=validation_loss, **shown)
            if saves:
                check_weights(model, step, rate, spec.folder)
                save(step)
            clock, clock_step = time.perf_counter(), step  # the speed is that of training alone

    # ---- end -----------------------------------------------------------------------------------------------
    result = {"step": spec.steps, **state.get("validation", {})}
    if world.main:
        checkpoint.write_final(spec.folder, average.module.state_dict(), result)
    world.agree(0)  # nobody leaves before the weights are there
    return result


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the GPU has it, else float32; or one of them by name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in known:
        raise ConfigError(f"precision is '{name}'; allowed are auto, {', '.join(known)}")
    return known[name]


def _find_checkpoint(spec: TrainSpec, world: World) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: chosen by rank 0, the same on every worker."""
    found = checkpoint.latest(spec.folder) if world.main else None
    step = world.agree(found.step if found else -1)
    if step < 0:
        return None
    found = found or checkpoint.load(spec.folder, step)
    checkpoint.check_architecture(found, spec.architecture)
    return found


def _sync_batch_norm(spec: TrainSpec, model: nn.Module, world: World) -> bool:
    """Whether batch norm sees the images of all workers; decided once, and kept in the checkpoints."""
    if world.size == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return False
    share = spec.images_per_step // world.size
    if world.device.type != "cuda" and world.main:
        log.warning(
            "on CPUs batch norm sees only the %d images of one worker: torch cannot synchronise it there",
            share,
        )
    return share < SYNC_BELOW and world.device.type == "cuda"


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
