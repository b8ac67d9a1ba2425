"""How much of the machine labelling leaves unused, and how it does beside Ray Data and timm's inference loop.

    python -m benchmarks.label                                     # all parts, on the CPU (an hour on two cores)
    python -m benchmarks.label --parts bc --rounds 1 --copies 1 --small 1000     # a look, in a minute
    python -m benchmarks.label --parts a --device cuda --model lambda_resnet_152 --size 288 --copies 40 --threads 16
    python -m benchmarks.label --parts m                                   # memory alone, five minutes

a   model-bound: the rate against the ceiling 1/(1/c + 1/d) of a machine whose cores do both (on a GPU: against c),
    where c is the bare forward loop on ready batches and d is reading and decoding alone
b   decode-bound: a network of one pooling layer, against d
c   the feed: tiny JPEGs and a stand-in for the device that sleeps 45 ms per 64 images: the share of a warm pass that it
    was asleep (busy), and the rate against that of sleeps of exactly 45 ms, which no machine gives
d   the same images and teacher through Ray Data (read_webdataset, map_batches, write_parquet) and through timm's
    dataset, transform, DataLoader and inference loop, decode-bound and model-bound
m   the photos under so many names that they make 1,000 shards, through a network of one pooling layer: the process's
    resident memory on the way

All that is compared takes turns; figures are medians over the rounds. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import label_peers
from benchmarks.label_images import Corpus, copies, merged, small_jpegs
from models import create_model
from models.memory_format import channels_last
from pipeline.cluster.contract import Resources
from pipeline.cluster.inline import Inline
from pipeline.data import images, shards
from pipeline.labelling import labeller
from pipeline.labelling.labeller import IN_FLIGHT, Labeller, LabelSpec
from pipeline.labelling.read_ahead import Ahead
from pipeline.labelling.teacher import Answer, Teacher

CLASSES = 1000
MANY = 1000  # shards of part m
SLEEP_SECONDS, SLEEP_IMAGES = 0.045, 64  # of the stand-in for a device


class Pool(nn.Module):
    """A network that costs next to nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, CLASSES // 3 + 1)[:, :CLASSES]


class StandIn(Teacher):
    """In place of a device: busy for a known time, and the cores are left alone."""

    asleep = 0.0  # seconds

    def launch(self, batch: torch.Tensor) -> Answer:
        start = time.perf_counter()
        time.sleep(SLEEP_SECONDS * len(batch) / SLEEP_IMAGES)
        seconds = time.perf_counter() - start
        StandIn.asleep += seconds
        probs = np.full((len(batch), CLASSES), 1 / CLASSES, np.float32)
        return lambda: (probs, seconds)


def main() -> None:
    args = flags().parse_args()
    if args.compute:
        torch.set_num_threads(args.compute)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="label-") as folder:
        photos = copies(merged(args.photos, Path(folder, "merged")), Path(folder, "photos"), args.copies)
        result: dict[str, Any] = {
            "cores": len(os.sched_getaffinity(0)),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "threads": args.threads,
            "compute_threads": torch.get_num_threads(),
            "rounds": args.rounds,
            "images": photos.images,
        }
        view = images.View(args.size)
        name = f"{args.model} at {args.size}"
        if "a" in args.parts:
            result["model_bound"] = bound(args, photos, create_model(args.model, num_classes=CLASSES), view, name)
        if "b" in args.parts:
            result["decode_bound"] = bound(args, photos, Pool(), view, "one pooling layer")
        if "c" in args.parts:
            result["feed"] = feed(args, small_jpegs(Path(folder, "small"), args.small))
        if "d" in args.parts:
            for key, module in (("decode", Pool()), ("model", create_model(args.model, num_classes=CLASSES))):
                result[f"peers_{key}_bound"] = beside(args, photos, module, view, Path(folder, key))
        if "m" in args.parts:
            times = math.ceil(MANY / len(list(args.photos.glob("*.tar"))))
            result["memory"] = memory(args, copies(args.photos, Path(folder, "many"), times), view)
    print(json.dumps(result))


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("NOISY_LAMBDA_TEST_DATA") or "../shared/data")
    parser.add_argument("--parts", default="abcdm")
    parser.add_argument("--photos", type=Path, default=data / "imagenet-sample", help="folder of shards of photos")
    parser.add_argument(
        "--copies", type=int, default=4, help="how often the photos, which make one shard, are repeated"
    )
    parser.add_argument("--small", type=int, default=20_000, help="generated JPEGs of part c, in shards of 1,000")
    parser.add_argument("--model", default="lambda_resnet_50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    parser.add_argument("--compute", type=int, default=0, help="threads of the forward pass; 0: torch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


# ---- what is timed
# -------------------------------------------------------------------------------------------------------


def alternate(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median images/s of each; all have one turn that does not count, then `rounds`."""
    for call in candidates.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            taken[name].append(call())
    return {name: statistics.median(rates) for name, rates in taken.items()}


def label_spec(out: str, batch: int, threads: int, teacher: Teacher) -> LabelSpec:
    return LabelSpec(
        load=lambda _: (nn.Identity(), None), weights="", teacher="", classes=tuple(map(str, range(CLASSES))),
        out=out, batch=batch, threads=threads, device=teacher.device.type,
    )  # fmt: skip


@contextlib.contextmanager
def labels_of(corpus: Corpus, teacher: Teacher, batch: int, threads: int) -> Iterator[Callable[[], float]]:
    """A call labels the corpus into a new folder, as the label stage does, and gives images/s."""
    with tempfile.TemporaryDirectory(prefix="label-out-") as out:
        made = Labeller(label_spec(out, batch, threads, teacher), teacher)

        def run() -> float:
            shutil.rmtree(out)
            Path(out).mkdir()
            start = time.perf_counter()
            units = [(shard.name, shard) for shard in corpus.shards]
            for outcome in Inline().map(lambda: made, units, resources=Resources(), overlap=IN_FLIGHT):
                assert outcome.error is None, outcome.error
            return corpus.images / (time.perf_counter() - start)

        yield run


def decode_only(corpus: Corpus, view: images.View, threads: int) -> float:
    """Images/s of reading and decoding with nobody to wait for."""
    start, seconds = time.perf_counter(), dict[str, float]()
    ahead = Ahead(threads, 512)
    for shard in corpus.shards:
        for _ in ahead.run(shards.stream(shard.path), lambda item: labeller._prepare(view, None, item), seconds):
            pass
    ahead.close()
    return corpus.images / (time.perf_counter() - start)


def forward_only(teacher: Teacher, batch: int, count: int) -> float:
    """Images/s of the bare forward loop on batches that are ready."""
    ready = torch.randint(0, 256, (batch, teacher.view.size, teacher.view.size, 3), dtype=torch.uint8)
    ready = (ready.pin_memory() if teacher.device.type == "cuda" else ready).permute(0, 3, 1, 2)
    batches = max(1, count // batch)
    start = time.perf_counter()
    answers = [teacher.launch(ready) for _ in range(batches)]
    for answer in answers:
        answer()
    return batches * batch / (time.perf_counter() - start)


def teacher_of(module: nn.Module, view: images.View, device: str) -> Teacher:
    module = channels_last(module.eval().requires_grad_(False)).to(device)
    return Teacher(module, view, torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)


# ---- the parts
# -----------------------------------------------------------------------------------------------------------


def bound(args: argparse.Namespace, corpus: Corpus, module: nn.Module, view: images.View, name: str) -> dict[str, Any]:
    teacher = teacher_of(module, view, args.device)
    with labels_of(corpus, teacher, args.batch, args.threads) as labelling:
        rates = alternate(
            {
                "labelling": labelling,
                "forward": lambda: forward_only(teacher, args.batch, corpus.images),
                "decoding": lambda: decode_only(corpus, view, args.threads),
            },
            args.rounds,
        )
    together = args.device == "cpu"
    forward, decoding = rates["forward"], rates["decoding"]
    ceiling = 1 / (1 / forward + 1 / decoding) if together else min(forward, decoding)
    found = {**rates, "ceiling": ceiling, "of_ceiling": rates["labelling"] / ceiling}
    found["of_decoding"] = rates["labelling"] / rates["decoding"]
    print(f"\n{name}, {corpus.images} images")
    for key, rate in found.items():
        print(f"  {key:<12} {rate:10.3f}" + (" images/s" if not key.startswith("of_") else ""))
    return {key: round(value, 4) for key, value in found.items()}


def feed(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    teacher = StandIn(Pool(), images.View(64, crop=1.0), torch.device("cpu"), torch.float32)
    shares: list[float] = []

    def turn() -> float:
        StandIn.asleep = 0.0
        rate = labelling()
        shares.append(StandIn.asleep * rate / corpus.images)
        return rate

    with labels_of(corpus, teacher, SLEEP_IMAGES, args.threads) as labelling:
        rate = alternate({"labelling": turn}, args.rounds)["labelling"]
    busy = statistics.median(shares[1:])
    nominal = SLEEP_IMAGES / SLEEP_SECONDS
    print(f"\na device of {nominal:.0f} images/s, {corpus.images} JPEGs of 64 pixels")
    print(f"  labelling    {rate:10.1f} images/s\n  of nominal   {rate / nominal:10.3f}\n  busy         {busy:10.3f}")
    return {
        "labelling": round(rate, 1),
        "of_nominal": round(rate / nominal, 4),
        "busy": round(busy, 4),
        "images": corpus.images,
    }


def memory(args: argparse.Namespace, corpus: Corpus, view: images.View) -> dict[str, Any]:
    """Resident MiB of this process after so many shards."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="label-out-") as out:
        teacher = teacher_of(Pool(), view, args.device)
        made = Labeller(label_spec(out, args.batch, args.threads, teacher), teacher)
        units = [(shard.name, shard) for shard in corpus.shards[:MANY]]
        done = Inline().map(lambda: made, units, resources=Resources(), overlap=IN_FLIGHT)
        print(f"\nresident memory of a labelling process, {len(units)} shards of photos")
        for number, outcome in enumerate(done, 1):
            assert outcome.error is None, outcome.error
            if number in (10, 30, 100, 300, MANY):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                found[str(number)] = round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 1)
                print(f"  {number:>5} shards {found[str(number)]:10.1f} MiB", flush=True)
    return found


def beside(
    args: argparse.Namespace, corpus: Corpus, module: nn.Module, view: images.View, folder: Path
) -> dict[str, Any]:
    teacher = teacher_of(module, view, args.device)
    paths = [shard.path for shard in corpus.shards]
    with (
        labels_of(corpus, teacher, args.batch, args.threads) as labelling,
        label_peers.ray_data(paths, teacher, args.batch, corpus.images, folder / "ray") as ray_data,
        label_peers.timm_loop(paths, teacher, args.batch, corpus.images, args.threads, folder / "timm") as timm_loop,
    ):
        rates = alternate({"labelling": labelling, "ray_data": ray_data, "timm": timm_loop}, args.rounds)
    found = {**rates, **{f"over_{name}": rates["labelling"] / rates[name] for name in ("ray_data", "timm")}}
    print(f"\nbeside others, {type(module).__name__}, {corpus.images} images")
    for key, rate in found.items():
        print(f"  {key:<14} {rate:10.2f}" + (" images/s" if not key.startswith("over_") else " ×"))
    return {key: round(value, 3) for key, value in found.items()}


if __name__ == "__main__":
    main()
