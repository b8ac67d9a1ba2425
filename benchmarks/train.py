"""What training costs beyond the network: our loop beside its ceiling, two workers beside two runs, ours beside timm's
loop.

    python -m benchmarks.train                                        # parts a and b on the CPU: half an hour
    python -m benchmarks.train --cases cifar10 --rounds 1 --steps 8   # a look, in a minute or two
    python -m benchmarks.train --parts ac --device cuda --loader 14 --stored 256 --augment-on device --rounds 2

a   our loop (pipeline.train.loop.run with loader, moving average, journal and a checkpoint in every window) beside the
    ceiling 1/(1/c + 1/d) of a machine whose cores do both, on a GPU beside c: c is the bare
    forward-backward-optimizer loop on batches that lie ready, normalised, on the device; d is the loader alone. On a
    CPU loop and bare loop run in two
    ways: one process of all threads, and a process of one thread per core with its share of the images (those of our
    loop exchange gradients); `of_ceiling` takes the faster of either
b   two workers with one thread each beside two independent runs with one thread each, together; and these once more,
    waiting for each other after every step: what no synchronous training can beat where cores are not
    equally fast at all times
c   images/s of our loop beside timm's training loop (its dataset, transform, loader, optimizer, EMA) on timm's models,
    and model FLOPs utilisation: 3 × the FLOPs of a forward pass (models.cost) × images/s ÷ the device's dense bf16 peak

Needs neither Ray nor MLflow. All that is compared takes turns; figures are medians over the rounds, of windows that
begin after the first records. Labels are drawn at random: nothing is learned. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.multiprocessing import get_context, start_processes
from torch.nn import functional as F

from benchmarks import train_data, train_peers
from benchmarks.train_data import CASES, ON_GPU, Case
from models.cost import flops
from models.measure import wait
from models.memory_format import channels_last
from pipeline.config.settings_train import Train
from pipeline.loading.loader import TrainingShard, TrainingSource, batches
from pipeline.tracking import journal
from pipeline.train import loop
from pipeline.train.loop import run
from pipeline.train.optim import create_optimizer, set_learning_rate
from pipeline.train.spec import TrainSpec
from pipeline.train.update import update
from pipeline.weights import build_model

ROOT = Path(__file__).resolve().parents[1]
RECORDS = 4  # of the journal in a window
READY = 4  # different batches of the bare loop
OVERRIDES = {"dropout": 0.2}
RATE = 0.01  # small: the labels are random
PEAK_TFLOPS = {"H200": 989, "H100 80GB": 989, "A100": 312}  # dense bf16, by what the device's name holds
Turn = Callable[[], float]
"""Gives images/s."""


def main() -> None:
    args = flags().parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the loop takes a GPU where there is one
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as our loop does
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "device": name_of(device),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("threads", "loader", "rounds", "steps", "compile", "augment_on")},
    }
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        for name in args.cases or (list(ON_GPU) if args.device == "cuda" else ["cifar10", "50-160"]):
            case = case_of(name, args)
            shards = train_data.shards_of(args.data, case.data, Path(folder, name), case.classes, args.stored)
            title = f"{case.model} at {case.size}, {case.batch} images a step"
            found = result.setdefault(name, {"model": case.model, "size": case.size, "batch": case.batch})
            if "a" in args.parts:
                found["loop"] = show(f"{title}: our loop", beside_ceiling(case, shards, Path(folder), device, args))
            if "b" in args.parts:
                found["two"] = show(f"{title}, one thread each: two workers", race(case, shards, Path(folder), args))
            if "c" in args.parts:
                found["peers"] = show(f"{title}: beside timm", beside_timm(case, shards, Path(folder), device, args))
    print(json.dumps(result))


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("NOISY_LAMBDA_TEST_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--parts", default="ab")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[])
    parser.add_argument("--data", type=Path, default=data, help="folder of cifar10/ and imagenet-sample/")
    parser.add_argument("--stored", type=int, default=0, help="store the photos with a shorter side of so many pixels")
    parser.add_argument("--batch", type=int, default=0, help="images of a step; 0: the case's")
    parser.add_argument("--steps", type=int, default=40, help="of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that compute")
    parser.add_argument("--loader", type=int, default=2, help="processes that load, in parts a and c")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--augment-on", default="loader", choices=["loader", "device"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float, default=0, help="dense bf16 TFLOP/s of the device, where it is not known")
    return parser


def case_of(name: str, args: argparse.Namespace) -> Case:
    case = CASES[name]
    batch = args.batch or (ON_GPU.get(name, case.batch) if args.device == "cuda" else case.batch)
    augment = dataclasses.replace(case.augment, on_device=args.augment_on == "device")
    return dataclasses.replace(case, batch=batch, augment=augment)


def show(title: str, found: dict[str, float]) -> dict[str, float]:
    print(f"\n{title}", flush=True)
    for name, value in found.items():
        print(f"  {name:<24} {value:12.3f}", flush=True)
    return {name: round(value, 4) for name, value in found.items()}


def turns(candidates: Mapping[str, Turn], rounds: int) -> dict[str, float]:
    """Median images/s of each."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, turn in candidates.items():
            taken[name].append(turn())
    return {name: statistics.median(rates) for name, rates in taken.items()}


# ---- what is timed
# -------------------------------------------------------------------------------------------------------


def spec_of(case: Case, shards: Sequence[TrainingShard], folder: str, images_per_step: int, **more: Any) -> TrainSpec:
    """A run of one window and what goes before it, with a checkpoint inside the window."""
    steps = more.pop("steps")
    every = max(1, steps // RECORDS)
    total = every * (RECORDS + 1)
    segments = min(64, len(shards))
    noise = case.augment
    settings = Train(
        model=case.model, overrides=OVERRIDES, resolution=case.size, label_smoothing=0.1,
        augment=noise.policy, augment_ops=list(noise.ops), augment_on="device" if noise.on_device else "loader",
        crop_scale=list(noise.scale), crop_ratio=list(noise.ratio), flip=noise.flip, interpolation=noise.interpolation,
        mean=list(noise.mean), compile=more.pop("compile", False),
    )  # fmt: skip
    return TrainSpec(
        folder=folder, settings=settings, classes=case.classes,
        sources=(TrainingSource("labelled", tuple(shards), images_per_step, segments),), validation=(),
        steps=total, steps_per_epoch=sum(shard.count for shard in shards) / images_per_step,
        lr=RATE, log_every=every, checkpoint_every=total // 2 + 1, **more,
    )  # fmt: skip


def rate_of(folder: str, images_per_step: int) -> float:
    """Images/s between the first and the last record of a run, whatever was done between them."""
    records = [record for record in journal.read(folder)[0] if record["kind"] == "train"]
    first, last = records[0], records[-1]
    return (last["step"] - first["step"]) * images_per_step / (last["time"] - first["time"])


def our_loop(case: Case, shards: Sequence[TrainingShard], parent: Path, args: argparse.Namespace) -> Turn:
    def turn() -> float:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            more = {"workers": args.loader, "threads": args.threads, "compile": args.compile, "steps": args.steps}
            run(spec_of(case, shards, folder, case.batch, **more))
            return rate_of(folder, case.batch)

    return turn


def our_loop_per_core(case: Case, shards: Sequence[TrainingShard], parent: Path, args: argparse.Namespace) -> Turn:
    def turn() -> float:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            spec = spec_of(case, shards, folder, case.batch, steps=args.steps, threads=1)
            start_processes(work, ([spec], args.threads, free_port(), None), args.threads, start_method="spawn")
            return rate_of(folder, case.batch)

    return turn


def bare_loop_per_core(case: Case, args: argparse.Namespace) -> Turn:
    def turn() -> float:
        context = get_context("spawn")
        meeting, found = context.Barrier(args.threads), context.Array("d", args.threads)
        start_processes(bare_alone, (case, args, meeting, found), args.threads, start_method="spawn")
        return sum(found)

    return turn


def bare_alone(rank: int, case: Case, args: argparse.Namespace, meeting: Barrier, found: Any) -> None:
    torch.set_num_threads(1)
    share = dataclasses.replace(case, batch=case.batch // args.threads)
    turn = bare_loop(share, torch.device("cpu"), args)
    meeting.wait()
    found[rank] = turn()


def bare_loop(case: Case, device: torch.device, args: argparse.Namespace) -> Turn:
    """Forward, backward and optimizer on batches that lie on the device as the network takes them."""
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = channels_last(build_model(case.model, case.classes, OVERRIDES)).to(device).train()
    optimizer = create_optimizer(model, "sgd", weight_decay=4e-5, momentum=0.9)
    set_learning_rate(optimizer, RATE)
    network = cast(nn.Module, torch.compile(model)) if args.compile else model
    shape = (case.batch, 3, case.size, case.size)
    ready = [
        torch.randn(shape, device=device, dtype=precision).contiguous(memory_format=torch.channels_last)
        for _ in range(READY)
    ]
    targets = torch.full((case.batch, case.classes), 1 / case.classes, device=device)

    def step(number: int) -> None:
        with torch.autocast(device.type, precision, enabled=device.type == "cuda"):
            logits = network(ready[number % READY])
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def turn() -> float:
        for number in range(max(2, args.steps // RECORDS)):
            step(number)
        wait(device)
        start = time.perf_counter()
        for number in range(args.steps):
            step(number)
        wait(device)
        return args.steps * case.batch / (time.perf_counter() - start)

    return turn


def loader_alone(case: Case, shards: Sequence[TrainingShard], args: argparse.Namespace) -> Turn:
    """With nobody to wait for, once what was read ahead is used up."""
    spec = spec_of(case, shards, "", case.batch, steps=args.steps)
    before = 4 * args.loader + 2

    def turn() -> float:
        loader = batches(
            spec.sources, augment=spec.augment, classes=spec.classes, soft=spec.soft, seed=spec.seed, start_step=0,
            stop_step=before + args.steps, workers=args.loader, pin_memory=args.device == "cuda",
        )  # fmt: skip
        with closing(cast(Any, loader)):
            for _ in islice(loader, before):
                pass
            start = time.perf_counter()
            count = sum(1 for _ in loader)
            return count * case.batch / (time.perf_counter() - start)

    return turn


# ---- the parts
# -----------------------------------------------------------------------------------------------------------


def beside_ceiling(
    case: Case, shards: Sequence[TrainingShard], folder: Path, device: torch.device, args: argparse.Namespace
) -> dict[str, float]:
    candidates = {
        "loop": our_loop(case, shards, folder, args),
        "bare": bare_loop(case, device, args),
        "loader": loader_alone(case, shards, args),
    }
    if device.type == "cuda":
        found = turns(candidates, args.rounds)
        return {**found, "time_over_bare": found["bare"] / found["loop"]}
    if args.threads > 1:
        candidates["loop_per_core"] = our_loop_per_core(case, shards, folder, args)
        candidates["bare_per_core"] = bare_loop_per_core(case, args)
    found = turns(candidates, args.rounds)
    best = {way: max(found[way], found.get(f"{way}_per_core", 0)) for way in ("loop", "bare")}
    ceiling = 1 / (1 / best["bare"] + 1 / found["loader"])
    return {**found, "ceiling": ceiling, "of_ceiling": best["loop"] / ceiling}


def race(case: Case, shards: Sequence[TrainingShard], parent: Path, args: argparse.Namespace) -> dict[str, float]:
    def turn(runs: int, in_step: bool = False) -> float:
        """One run of two workers, or two runs of one; each process has as many images a step."""
        per_step = case.batch * (3 - runs)
        meeting = get_context("spawn").Barrier(2) if in_step else None
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            folders = [str(Path(folder, str(number))) for number in range(runs)]
            specs = [spec_of(case, shards, folder, per_step, steps=args.steps, threads=1) for folder in folders]
            start_processes(work, (specs, 2, free_port(), meeting), 2, start_method="spawn")
            return sum(rate_of(folder, per_step) for folder in folders)

    candidates = {"workers": lambda: turn(1), "runs": lambda: turn(2), "runs_in_step": lambda: turn(2, in_step=True)}
    found = turns(candidates, args.rounds)
    return {
        **found,
        "of_runs": found["workers"] / found["runs"],
        "of_runs_in_step": found["workers"] / found["runs_in_step"],
    }


def work(rank: int, specs: Sequence[TrainSpec], size: int, port: int, meeting: Barrier | None) -> None:
    """One of `size` processes: the only one of its own run, or a worker of the one run, told as torchrun tells it."""
    if len(specs) == 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    if meeting:

        def update_and_meet(*given: Any) -> torch.Tensor:
            loss = update(*given)
            meeting.wait()
            return loss

        loop.update = update_and_meet
    run(specs[rank % len(specs)])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def beside_timm(
    case: Case, shards: Sequence[TrainingShard], folder: Path, device: torch.device, args: argparse.Namespace
) -> dict[str, float]:
    candidates: dict[str, Turn] = {case.model: our_loop(case, shards, folder, args)}
    files = train_data.as_files(shards, folder / f"files-{case.size}", images=case.batch * (args.steps + 8))
    for peer in case.peers:
        candidates[peer] = train_peers.timm_loop(
            peer, files, case.augment, case.batch, case.classes, device, workers=args.loader, steps=args.steps,
            compiled=args.compile,
        )  # fmt: skip
    found = turns(candidates, args.rounds)
    for peer in case.peers:
        found[f"over {peer}"] = found[case.model] / found[peer]
    peak = args.peak or next((peak for name, peak in PEAK_TFLOPS.items() if name in name_of(device)), 0)
    for name in [case.model, *case.peers] if peak else []:
        if "lambda" in name and name in case.peers:
            continue  # models.cost does not know timm's lambda layers
        with torch.device("meta"):
            network = build_model(name if name == case.model else f"timm/{name}", case.classes)
        found[f"MFU of {name}"] = 3 * flops(network, case.size) * found[name] / (peak * 1e12)
    return found


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
