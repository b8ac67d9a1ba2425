"""What the cluster tests run in workers; importable there by name, like the stages' own code."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, WeightsError


@dataclass(frozen=True)
class Unit:
    number: int
    act: str = ""  # what to do instead of only answering
    folder: str = ""  # where tries are recorded


def tried(unit: Unit) -> int:
    """How often this unit has been tried, this try included; known across processes."""
    folder = Path(unit.folder)
    (folder / f"{unit.number}-{time.monotonic_ns()}-{os.getpid()}").touch()
    return len(list(folder.glob(f"{unit.number}-*")))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def make_worker() -> Callable[[Unit], int]:
    here = {"handled": 0}

    def handle(unit: Unit) -> int:
        here["handled"] += 1
        tries = tried(unit) if unit.folder else 1
        if unit.act == "raise" or (unit.act == "raise once" and tries == 1):
            raise ValueError(f"unit {unit.number} is bad")
        if unit.act == "user error":
            raise DataError(f"shard {unit.number} is missing; check `data.root`")
        if unit.act == "meet":  # another unit in this process
            wait_for(lambda: len(list(Path(unit.folder).glob(f"*-{os.getpid()}"))) > 1)
        if unit.act == "slow once" and tries == 1:  # until somebody else has a go
            wait_for(lambda: len(list(Path(unit.folder).glob(f"{unit.number}-*"))) > 1)
            time.sleep(3600)
        if unit.act == "kill" or (unit.act == "kill once" and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return unit.number**2

    return handle


def make_worker_of(text: str) -> Callable[[], Callable[[Unit], int]]:
    """A make_worker that fails: with a user's error, or by dying."""

    def make() -> Callable[[Unit], int]:
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise WeightsError(text)

    return make


def make_counter() -> Callable[[Unit], tuple[int, int]]:
    """Answers (process, how many units this worker has handled)."""
    calls: list[Unit] = []

    def handle(unit: Unit) -> tuple[int, int]:
        calls.append(unit)
        return os.getpid(), len(calls)

    return handle


@dataclass(frozen=True)
class Training:
    folder: str
    steps: int = 3
    act: str = ""
    rank: int = 0  # the rank that acts


def loop(spec: Training) -> dict[str, Any]:
    """A training loop in the small: sums ranks at each step, checkpoints itself, resumes."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    folder = Path(spec.folder)
    (folder / f"start-{rank}-{time.monotonic_ns()}").touch()
    saved = folder / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start, spec.steps):
        total = torch.tensor(float(rank + 1))
        if world > 1:
            dist.all_reduce(total)
        marker = folder / "acted"
        if step == 1 and rank == spec.rank and spec.act:
            if spec.act == "user error":
                raise DataError("labels of shard 7 are missing; run `label` first")
            if spec.act == "raise":
                raise ValueError("a bug")
            if spec.act == "kill once" and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            saved.write_text(str(step + 1))
        if world > 1:
            dist.barrier()
    return {
        "rank": rank,
        "world": world,
        "backend": dist.get_backend() if world > 1 else None,
        "started_at": start,
        "process": os.getpid(),
    }


def train_and_die(spec: Any) -> dict[str, Any]:
    """The real training loop; its last worker is killed with -9 at step 7, once, when the checkpoint of step 6 is
    there."""
    import torch.distributed as dist

    from pipeline.train.loop import run
    from tests.train.tiny import die_at

    rank, world = dist.get_rank(), dist.get_world_size()
    folder = Path(spec.folder)
    (folder / f"start-{rank}-{time.time():.3f}").touch()
    if rank == world - 1 and len(list(folder.glob(f"start-{rank}-*"))) == 1:
        die_at(7, once=folder / "checkpoints" / "step-000006" / "manifest.json")
    return run(spec)


def train_and_kill_driver(spec: Any) -> dict[str, Any]:
    """The real training loop; whoever is in the file `driver` is killed with -9 as above."""
    import torch.distributed as dist

    from pipeline.train import classification, loop

    driver, given = Path(spec.folder) / "driver", classification.batches
    saved = Path(spec.folder) / "checkpoints" / "step-000006" / "manifest.json"

    def killing(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        for batch in given(*args, **kwargs):
            if batch["step"] == 7 and dist.get_rank() == 0 and driver.exists():
                wait_for(saved.exists)
                os.kill(int(driver.read_text()), signal.SIGKILL)
                time.sleep(3600)  # ended with the driver
            yield batch

    classification.batches = killing
    return loop.run(spec)


def until_noticed(folder: str, leaving: Callable[[], bool]) -> dict[str, Any]:
    """Work until the cluster says that a machine will be taken away."""
    import torch.distributed as dist

    (Path(folder) / f"start-{dist.get_rank()}").touch()
    steps = 0
    while not leaving():
        steps += 1
        time.sleep(0.1)
    return {"world": dist.get_world_size(), "steps": steps}


def until_second_time_alone(folder: str) -> dict[str, Any]:
    """Work until this is the only worker, having had company before."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        (Path(folder) / f"world-{world}-{time.time():.3f}").touch()
    while world > 1 or not list(Path(folder).glob("world-2-*")):
        if world > 1:
            dist.all_reduce(torch.ones(1))
        time.sleep(0.1)
    return {"world": world}


def make_meeting_worker() -> Callable[[str], str]:
    """Answers the id of the machine that it is on, when units have begun on two of them."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def handle(folder: str) -> str:
        (Path(folder) / node).touch()
        end = time.monotonic() + 120
        while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        return node

    return handle
