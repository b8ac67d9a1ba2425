"""How long a checkpoint stops training: ours beside torch's asynchronous one and beside plain torch.save.

    python -m benchmarks.checkpoint [--model lambda_resnet_50] [--rounds 10] [--folder /tmp/checkpoints]
    python -m benchmarks.checkpoint --model lambda_resnet_101 --rounds 3

The state is what the loop saves: weights, their average and SGD's momentum of a channels-last network, on a GPU where
there is one. In turns:

    ours         pipeline.train.checkpoint.Checkpoints: safetensors, sizes and CRCs in a manifest,
                 fsync, rename; the last two kept
    torch async  torch.distributed.checkpoint.async_save with a stager that keeps its host memory, as one process
    torch.save   one file, written while training waits; not fsynced

pause: until training may go on; the first save is given apart. durable: until the write is
over. Meanwhile the main thread goes on with small steps of many operations, as training does: slowed is their median
during writes over that without, longest the longest of them, in which the writer's hold of the interpreter would show.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import models
from models.memory_format import channels_last
from pipeline.train.checkpoint import Checkpoints, latest
from pipeline.train.checkpoint_files import MANIFEST

MIB = 2**20
Saved = Callable[[], bool]
"""Whether the write is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lambda_resnet_50")
    parser.add_argument("--rounds", type=int, default=10, help="saves of each after its first one")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, average, optimizer = make_training(args.model, device)
    state = {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
    total = sum(t.numel() * t.element_size() for t in tensors_of(state))
    step = make_step(device)
    alone = [timed(step) for _ in range(200)][100:]
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints = stack.enter_context(Checkpoints(str(folder / "ours"), keep=2))
        checkpoints.reserve(model, optimizer)  # as training does before its first steps
        checkpoints.wait()
        stager = DefaultStager(StagingOptions(device.type == "cuda", False, False, device.type == "cuda"))
        stack.callback(stager.close)
        ways: dict[str, Callable[[int], Saved]] = {
            "ours": lambda number: ours(checkpoints, number, state),
            "torch async": lambda number: asynchronous(folder / "async" / str(number), stager, state),
            "torch.save": lambda number: synchronous(folder / "plain.pt", state),
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, save in ways.items():
                turns[name].append(turn(save, number, step, device))
                shutil.rmtree(folder / "async", ignore_errors=True)
        checkpoints.wait()
        load = timed(lambda: latest(str(folder / "ours")))
    found = {
        "benchmark": "checkpoint",
        "model": args.model,
        "state_mib": round(total / MIB, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "rounds": args.rounds,
        "step_ms": round(1e3 * statistics.median(alone), 2),
        "longest_step_ms": round(1e3 * max(alone), 2),
        "load_ms": round(1e3 * load),
        "torch": torch.__version__,
        **{name: summary(of_one, alone) for name, of_one in turns.items()},
    }
    show(found)


def make_training(name: str, device: torch.device) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    model = channels_last(models.create_model(name, num_classes=1000)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, copy.deepcopy(model), optimizer


def tensors_of(state: Mapping[str, Any]) -> list[torch.Tensor]:
    momentum = [of_one["momentum_buffer"] for of_one in state["optimizer"]["state"].values()]
    return [*state["model"].values(), *state["ema"].values(), *momentum]


def make_step(device: torch.device) -> Callable[[], None]:
    """Some ten milliseconds of small operations on a core; a GPU takes less."""
    pairs = [(torch.randn(192, 192, device=device), torch.randn(192, 192, device=device)) for _ in range(40)]

    def step() -> None:
        for left, right in pairs:
            torch.relu(left @ right).sum()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def turn(save: Callable[[int], Saved], number: int, step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """One save, and the steps that training makes until it is durable; one more where it is at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    over = save(number)
    if device.type == "cuda":
        torch.cuda.synchronize()  # the queued copies are part of the pause
    pause, steps = time.perf_counter() - began, [timed(step)]
    durable = time.perf_counter() - began if over() else None
    while durable is None:
        steps.append(timed(step))
        durable = time.perf_counter() - began if over() else None
    return {"pause": pause, "durable": durable, "steps": steps}


def ours(checkpoints: Checkpoints, number: int, state: Mapping[str, Any]) -> Saved:
    path = checkpoints.save(number, **state, state={"architecture": {}})
    return Path(path, MANIFEST).exists


def asynchronous(path: Path, stager: DefaultStager, state: Mapping[str, Any]) -> Saved:
    writing = dcp.async_save(dict(state), checkpoint_id=path, async_stager=stager, no_dist=True)
    assert isinstance(writing, Future)
    return writing.done


def synchronous(path: Path, state: Mapping[str, Any]) -> Saved:
    torch.save(state, path)
    return lambda: True


def summary(turns: list[dict[str, Any]], alone: list[float]) -> dict[str, float]:
    first, *later = turns
    steps = [seconds for one in later for seconds in one["steps"]]
    return {
        "first_pause_ms": round(1e3 * first["pause"], 1),
        "pause_ms": round(1e3 * statistics.median(one["pause"] for one in later), 1),
        "longest_pause_ms": round(1e3 * max(one["pause"] for one in later), 1),
        "durable_ms": round(1e3 * statistics.median(one["durable"] for one in later), 1),
        "slowed": round(statistics.median(steps) / statistics.median(alone), 2),
        "longest_step_ms": round(1e3 * max(steps), 1),
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['model']}: {found['state_mib']:.0f} MiB on {found['device']}; a step alone {found['step_ms']} ms\n")
    print(f"| | {' | '.join(name.replace('_ms', ', ms').replace('_', ' ') for name in found['ours'])} |")
    print("|---" * (1 + len(found["ours"])) + "|")
    for name in ("ours", "torch async", "torch.save"):
        print(f"| {name} | {' | '.join(map(str, found[name].values()))} |")
    print(f"\nours is read again, and found to be whole, in {found['load_ms']} ms\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
