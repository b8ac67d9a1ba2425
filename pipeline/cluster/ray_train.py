"""Runs `fit` on Ray: Ray Train V2 places the workers, restarts them and carries the process group.

It never sees a checkpoint: the loop writes its own and resumes from them.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable
from typing import Any

from pipeline import errors, storage
from pipeline.cluster import interface
from pipeline.cluster.capacity import bundle, nothing_fits, room, wait_for_room, waiting
from pipeline.cluster.contract import Resources
from pipeline.cluster.inline import innermost
from pipeline.cluster.ray_session import environment
from pipeline.errors import ClusterError, UserError

log = logging.getLogger(__name__)

RESTARTS = 3
START_TRIES = 3  # a worker group that finds no place is tried again while nodes are replaced
ELASTIC_RESTARTS = 30  # where machines come and go by the day
ELASTIC_START_SECONDS = 20.0  # Ray may count machines that have just gone: soon it counts again
RESIZE_SECONDS = 60.0  # how often an elastic group looks whether it can grow


def fit_here(loop: Callable[[Any], dict[str, Any]], spec: Any) -> dict[str, Any]:
    """Ray Train's local mode: the loop in this process, without the 12 s that a worker group takes to start."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray").setLevel(logging.ERROR)  # no session may have been started, which would have said so
    trainer = TorchTrainer(
        lambda: loop(spec),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(storage_path=tempfile.gettempdir()),  # never written; the default is in the home
    )
    return trainer.fit().return_value


def fit_on_workers(
    loop: Callable[..., dict[str, Any]],
    spec: Any,
    resources: Resources,
    folder: str,
    patience: float,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The loop on `resources.workers` Ray actors, or as few as `resources.least`; rank 0's result."""
    import ray
    import ray.train
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    least, most = resources.least or 1, resources.workers or 1
    elastic = least < most
    restarts, start_tries = (ELASTIC_RESTARTS, ELASTIC_RESTARTS) if elastic else (RESTARTS, START_TRIES)
    if elastic:  # Ray would wait for ever; once it has begun, it asks for `most` itself
        wait_for_room(resources, least, most, patience, say)
    elif room(resources) < most:
        say(waiting(resources, most, patience))
    ray_settings = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(ELASTIC_START_SECONDS if elastic else patience / START_TRIES),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(resources.notice)),
    }
    arguments = (spec, _leaving) if resources.notice else (spec,)
    note = _note()
    with tempfile.TemporaryDirectory(prefix="nltrain-") as scratch, environment(ray_settings):

        def train() -> Any:
            return TorchTrainer(
                lambda: _on_one_rank(functools.partial(loop, *arguments), check, note),
                scaling_config=ScalingConfig(
                    num_workers=(least, most) if elastic else most,
                    elastic_resize_monitor_interval_s=RESIZE_SECONDS,
                    use_gpu=resources.gpus > 0,
                    resources_per_worker=bundle(resources),
                    label_selector=dict(resources.selector) or None,
                ),
                torch_config=_torch_config(),
                run_config=RunConfig(
                    name=f"noisy-lambda-{uuid.uuid4().hex[:12]}",  # a name used before would make Ray resume that run
                    storage_path=scratch,  # only the controller, which runs beside the driver, writes there
                    failure_config=FailureConfig(max_failures=restarts, controller_failure_limit=start_tries - 1),
                    logging_config=LoggingConfig("CRITICAL"),
                ),
            ).fit()

        try:
            answer = _repeated(train, restarts).return_value
        except ray.train.TrainingFailedError as error:
            answer = ray.get(note.read.remote())
            if answer is None:
                raise _explain(error, resources, restarts, folder, patience) from error
        finally:
            ray.kill(note)
    if "user_error" in answer:
        kind, text = answer["user_error"]
        raise getattr(errors, kind)(text)
    return answer["result"]


def _torch_config() -> Any:
    """Ray's, whose workers first choose the interface on which they meet."""
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(interface.take_rays)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config()


def _leaving() -> bool:
    """Whether Ray says that it will take a machine of these workers away; all of them call it."""
    import ray.train

    return ray.train.get_preemption_info() is not None


class _Note:
    """What one worker found wrong, for all of them to read when Ray has started them again. It is kept by Ray, not in
    the storage: that all see the same may be just what is wrong."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] | None = None

    def write(self, answer: dict[str, Any]) -> None:
        self.answer = self.answer or answer

    def read(self) -> dict[str, Any] | None:
        return self.answer


def _note() -> Any:
    """An actor on the driver's machine, which lives as long as the driver does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Note).remote()


def _on_one_rank(work: Callable[[], dict[str, Any]], check: Callable[[], None], note: Any) -> dict[str, Any]:
    """Run in a training worker. Ray would repeat a loop that raised; a user's error it shall only report.

    What `check` finds in one worker all of them hear, and end. Later the others may wait for this one inside a
    collective. So it leaves a note and raises: Ray tears the group down and starts it again, and there every rank
    reads the note and ends.
    """
    import ray
    import torch.distributed

    from pipeline.cluster.world import gathered

    if (answer := ray.get(note.read.remote())) is not None:
        return answer
    if (problem := gathered(check)) is not None:
        return {"user_error": list(problem)}
    try:
        return {"result": work()}
    except UserError as error:
        answer = {"user_error": [type(error).__name__, str(error)]}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            ray.get(note.write.remote(answer))
            raise
        return answer


def _repeated(train: Callable[[], Any], times: int) -> Any:
    """Train again where a lost machine ended Ray's controller: Ray repeats what its workers raise, but not that a
    worker cannot be reached when the controller asks for something else than its state."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    for _ in range(times):
        try:
            return _interruptible(train)
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError):
                raise
            log.warning("a training worker was lost, training starts again from the last checkpoint")
    return _interruptible(train)


def _interruptible(function: Callable[[], Any]) -> Any:
    """Call on a thread of its own: on the main one Ray would take Ctrl-C, and answer it by waiting."""
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            done["value"] = function()
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if "error" in done:
        raise done["error"]
    return done["value"]


def _explain(error: Exception, resources: Resources, restarts: int, folder: str, patience: float) -> Exception:
    """A worker group that found no place or kept dying is the cluster's; an exception in the loop is a bug."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", None)
    if failures is None:
        failures = {0: getattr(error, "controller_failure", error)}
        if "Timeout" in type(failures[0]).__name__:
            return nothing_fits(resources, resources.least or 1, patience)
        if not isinstance(failures[0], RayActorError):
            cause = innermost(error)
            hint = f"; {interface.HINT}" if "gloo" in cause.lower() else ""
            return ClusterError(f"Ray cannot start {resources.least} training workers: {cause[:300]}{hint}")
    died = any(isinstance(failure, RayActorError) for failure in failures.values())
    if not died:  # otherwise what the other ranks raised only follows from it
        return RuntimeError(f"training in {storage.redact(folder)} failed {restarts + 1} times; {error}")
    return ClusterError(
        f"training in {storage.redact(folder)} was given up after its workers died {restarts + 1} times (killed, out "
        "of memory, or machines were lost); run the job again to continue from the last checkpoint"
    )
