"""Runs the training loop of teachers, students, fine-tunes and detectors: `run(spec)`.

It is called alike in one process, by torchrun's processes and by Ray Train's workers, checkpoints itself and
goes on from what it finds in its folder, on any number of workers, as if nothing had happened: everything
random is a function of (seed, step) or of (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch

from pipeline import storage
from pipeline.cluster.world import World, join
from pipeline.errors import ConfigError, TrainingError, WeightsError
from pipeline.tracking.journal import Journal
from pipeline.train import checkpoint
from pipeline.train.classification import CLASSIFICATION
from pipeline.train.dist import average_buffers
from pipeline.train.divergence import Diverged, advice, check_weights, checked_mean, does_not_fit, finite
from pipeline.train.feeding import Waited
from pipeline.train.optim import learning_rate
from pipeline.train.parallel import parts, state_of
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee, start
from pipeline.train.task import Task
from pipeline.train.termination import termination
from pipeline.train.update import update

log = logging.getLogger(__name__)


def run(spec: TrainSpec, leaving: Callable[[], bool] | None = None, task: Task = CLASSIFICATION) -> dict[str, Any]:
    """Train, or go on training, until `spec.steps`; returns `step` and the validation of the weights that it ends with
    (see `accuracy`), with their `best_step` where `spec.settings.weights` is best, and the number of `rollbacks` if
    there were any.

    A run that has ended returns its stored result. `leaving`: whether this machine is about to be taken away; all
    workers ask at every record, and the first yes saves a checkpoint. TrainingError: the loss or the weights are not
    finite, or the device has no room for a step.
    """
    with join() as world, threads(spec.threads), termination() as stopping:
        ended = checkpoint.read_result(spec.folder) if world.main else None
        if world.agree(int(ended is not None)):
            return ended or checkpoint.read_result(spec.folder) or {}
        _check_shares(spec, world)
        torch.backends.cudnn.benchmark = True  # batches are of one size
        result = _train(spec, world, task, stopping, leaving)
        if world.device.type == "cuda":  # for the process that labels next
            gc.collect()
            torch.cuda.empty_cache()
        if stopping.is_set():  # too late to leave, but what called this would go on
            _stop(spec.steps, spec, world)
        return result


def _train(
    spec: TrainSpec, world: World, task: Task, stopping: threading.Event, leaving: Callable[[], bool] | None
) -> dict[str, Any]:
    """To the end, going back to the last checkpoint with a lower rate as often as `spec.settings.rollbacks` allows; to
    the one before it, if the run diverges from there again.

    The rate of a step depends on how often the run went back before, and that is in the checkpoint: a run killed before
    it has saved another one meets the same divergence again and answers it in the same way.
    """
    diverged: Diverged | None = None
    rollbacks, before = 0, math.inf
    while True:
        trainee = start(spec, world, task.build, before)
        first = trainee.step
        rollbacks = trainee.state["rollbacks"] = max(rollbacks, trainee.state.get("rollbacks", 0))
        try:
            return _run_steps(trainee, spec, world, task, stopping, leaving, diverged)
        except torch.OutOfMemoryError as error:
            raise TrainingError(does_not_fit(spec, trainee.step, world)) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "batch norm cannot learn from one image of one position, and a worker's share of a step is one image; "
                "raise `batch`, or lower `workers.train` or `accumulate`"
            ) from error
        except Diverged as error:
            if rollbacks >= spec.settings.rollbacks:
                tried = f" after going back {rollbacks} times" if rollbacks else ""
                known = math.inf if trainee.saved else first  # newer ones were ill
                raise TrainingError(f"{error}{tried}; {advice(spec, known)}") from None
            before = first if diverged and not trainee.saved else math.inf
            diverged = error.with_traceback(None)  # which holds on to the trainee
        rollbacks += 1
        del trainee  # a device may have no room for two
        gc.collect()  # FSDP's modules are in cycles


def _run_steps(
    trainee: Trainee,
    spec: TrainSpec,
    world: World,
    task: Task,
    stopping: threading.Event,
    leaving: Callable[[], bool] | None,
    diverged: Diverged | None,
) -> dict[str, Any]:
    """The updates that are left, and the end. `diverged`: why the run went back to where it is now."""
    model, average, state = trainee.model, trainee.average, trainee.state
    lowered = spec.settings.rollback_factor ** state["rollbacks"]
    split_up = world.size > 1 and spec.settings.parallel == "fsdp"  # saving takes all workers
    with contextlib.ExitStack() as open_until_the_end:
        # ---- journal and checkpoints: rank 0 alone writes --------------------------------------------------
        journal, checkpoints = None, None
        if world.main:
            journal = open_until_the_end.enter_context(Journal(spec.folder))
            _begin(journal, trainee, spec, diverged)
            checkpoints = open_until_the_end.enter_context(checkpoint.Checkpoints(spec.folder, spec.settings.keep))
            checkpoints.reserve(model, trainee.optimizer)

        def settle(rate: float) -> None:
            check_weights(model, trainee.step, rate, world)
            average_buffers(world, model, average.module)

        def save() -> None:
            weights, optimizer = state_of(model, trainee.optimizer)
            averaged, _ = state_of(average.module)
            if journal and checkpoints:
                journal.flush()  # a checkpoint promises that all before it is on record
                facts = {**state, "architecture": spec.architecture, "world_size": world.size}
                best = {state["best"]["step"]} if "best" in state else set()
                checkpoints.save(trainee.step, model=weights, ema=averaged, optimizer=optimizer, state=facts, also=best)
                if stopping.is_set():
                    checkpoints.wait()  # before it is said to be saved
            trainee.saved = True

        # ---- steps -----------------------------------------------------------------------------------------
        losses: list[torch.Tensor] = []  # since the last record, on the device: reading one waits for it
        clock, clock_step = time.perf_counter(), trainee.step
        loader = task.batches(spec, world, trainee.step)
        open_until_the_end.enter_context(contextlib.closing(cast(Generator, loader)))
        arriving = Waited(loader)
        for batch in arriving:
            rate = lowered * learning_rate(
                trainee.step, peak=spec.lr, steps=spec.steps, warmup=spec.warmup, schedule=spec.schedule
            )
            losses.append(update(trainee, batch, rate, spec, world, task))
            step = trainee.step

            # Now and then: record, validate, save; and stop when told to.
            validates = bool(spec.validation) and _due(step, spec.evaluate_every, spec.steps)
            saves = _due(step, spec.checkpoint_every, spec.steps)
            if not (validates or saves or step % spec.log_every == 0):
                if stopping.is_set() and world.main and not split_up:
                    _leave(trainee, losses, spec, world, save)
                continue
            mean_loss = checked_mean(losses, step, rate, world)
            losses.clear()
            if journal:
                seconds = time.perf_counter() - clock
                speed = (step - clock_step) * spec.images_per_step / seconds
                passed = {
                    "epoch": round(step / spec.steps_per_epoch, 4),
                    "images_per_second": round(speed, 2),
                    "waited_for_images": round(arriving.seconds / seconds, 4),
                }
                journal.log(step, spec.steps, kind="train", loss=mean_loss, lr=rate, **passed)
            if leaving and world.any(leaving()):
                leaving, saves = None, True
            if validates:
                settle(rate)
                found, shown = task.validate(trainee, spec, world)
                if not math.isfinite(found.get("loss", 0.0)):
                    raise Diverged(
                        f"the validation loss became {found['loss']} at step {step}, at learning rate {rate:.3g}", step
                    )
                state["validation"] = found
                if task.better(found, state["best"]["validation"] if "best" in state else None):
                    state["best"] = {"step": step, "validation": found}
                    saves = True
                if journal:
                    journal.log(step, spec.steps, kind="validation", **shown)
            if stops := world.any(stopping.is_set()):
                stopping.set()
            if saves or stops:
                if not validates:
                    settle(rate)
                save()
            if stops:
                _stop(trainee.step, spec, world)
            clock, clock_step, arriving.seconds = time.perf_counter(), step, 0.0  # the speed is that of training alone
    return _end(trainee, spec, world)


def _begin(journal: Journal, trainee: Trainee, spec: TrainSpec, diverged: Diverged | None) -> None:
    """The journal as it was at this step, and what is new there."""
    step, rollbacks = trainee.step, trainee.state["rollbacks"]
    journal.truncate(step or -1)
    if step == 0:
        images_of = {f"{source.name}_per_step": source.per_step for source in spec.sources}
        epoch: dict[str, Any] = {
            "epoch_is": "one pass over the labelled images",
            "steps_per_epoch": spec.steps_per_epoch,
        }
        journal.log(0, spec.steps, kind="start", **images_of, **epoch)
    if diverged:
        factor = spec.settings.rollback_factor**rollbacks
        log.warning(
            "%s: back to step %d, with the learning rate times %.3g (rollback %d of %d)",
            diverged, step, factor, rollbacks, spec.settings.rollbacks,
        )  # fmt: skip
        facts = {"reason": str(diverged), "diverged_at": diverged.step, "rate_factor": factor}
        journal.log(step, spec.steps, kind="rollback", rollbacks=rollbacks, **facts)


def _leave(
    trainee: Trainee, losses: Sequence[torch.Tensor], spec: TrainSpec, world: World, save: Callable[[], None]
) -> NoReturn:
    """SIGTERM between two records: rank 0 saves what it can without the others, whom it would have to wait for, and
    ends."""
    if not finite([*losses, *parts(trainee.model)]):
        log.warning("stopped by SIGTERM at step %d of %d, not saved: it has diverged", trainee.step, spec.steps)
        sys.exit(128 + signal.SIGTERM)
    save()
    _stop(trainee.step, spec, world)


def _stop(step: int, spec: TrainSpec, world: World) -> NoReturn:
    if world.main:
        log.warning("stopped by SIGTERM after saving step %d of %d", step, spec.steps)
    sys.exit(128 + signal.SIGTERM)


def _end(trainee: Trainee, spec: TrainSpec, world: World) -> dict[str, Any]:
    """Leave the weights and the result. Every worker calls it."""
    state = trainee.state
    averaged, _ = state_of(trainee.average.module)
    result = {"step": spec.steps, **state.get("validation", {})}
    if spec.settings.weights == "best" and "best" in state:
        step = state["best"]["step"]
        result = {"step": spec.steps, "best_step": step, **state["best"]["validation"]}
        if world.main and step != spec.steps:
            averaged = _best(spec.folder, step)
    if state["rollbacks"]:
        result["rollbacks"] = state["rollbacks"]
    if world.main:
        checkpoint.write_final(spec.folder, averaged, result)
    world.agree(0)  # nobody leaves before the weights are there
    return result


def _best(folder: str, step: int) -> dict[str, torch.Tensor]:
    try:
        return checkpoint.load(folder, step).ema
    except WeightsError as error:
        raise WeightsError(
            f"{error}, and it held the best weights; delete "
            f"{storage.redact(folder)} to train again, or set `weights: last`"
        ) from error


def _check_shares(spec: TrainSpec, world: World) -> None:
    if world.size > max(source.per_step for source in spec.sources):
        raise ConfigError(
            f"{world.size} training workers share {spec.images_per_step} images a step, so that some may "
            "get none; lower `workers.train` or raise `batch`"
        )
    least = sum(source.per_step // world.size for source in spec.sources)
    if least < spec.settings.accumulate:
        raise ConfigError(
            f"`accumulate` is {spec.settings.accumulate}, but a worker's share of a step may be {least} images; lower "
            "it or `workers.train`, or raise `batch`"
        )


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
