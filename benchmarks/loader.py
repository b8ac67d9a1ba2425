"""Batches for training: our loader beside webdataset with torch's DataLoader and beside Ray Data.

    python -m benchmarks.loader                                             # all parts (half an hour on two cores)
    python -m benchmarks.loader --parts photos,stub --rounds 1 --copies 2 --workers 0,2 --peers webdataset     # a look

photos, photos_policy   crops of 224 pixels from photos, without and with RandAugment
stub                    the same files, but what becomes of an image's bytes is one ready view: all that is left is
                        reading, order, targets, collating and handing over
cifar, cifar_policy     crops of 32 pixels from CIFAR-10's labelled shards; ours keeps decoded images as small as these

Crop, flip and policy have the same distributions on every side, and all hand over uint8. Every candidate (our worker
counts; webdataset's decoders and worker counts) has a turn that does not count; the best of each side then take turns,
Ray Data after the others. images/s are of a whole pass, medians over the rounds; `first` is the longest time to the
first batch; both count from the creation of the loader, when Ray itself runs already. Prints a table; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import loader_peers
from pipeline.augment.view import Augment
from pipeline.data.index_files import make_indexer, rows_path
from pipeline.data.shards import Shard
from pipeline.loading import loader, sample_order
from pipeline.loading.loader import TrainingShard, TrainingSource
from pipeline.loading.targets import SoftTargets

POLICY = "rand-m15-mmax15-n2-p1"
PARTS = ("photos", "photos_policy", "stub", "cifar", "cifar_policy")


@dataclass(frozen=True)
class Case:
    """What is loaded: all images of the shards `epochs` times, in batches."""

    shards: tuple[TrainingShard, ...]
    classes: int
    augment: Augment
    batch: int
    epochs: int

    @property
    def paths(self) -> list[str]:
        return [shard.path for shard in self.shards]

    @property
    def images(self) -> int:
        return self.epochs * sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Turn:
    rate: float  # images/s
    first: float  # seconds to the first batch


Candidates = Mapping[str, Callable[[], Turn]]


def main() -> None:
    args = flags().parse_args()
    peers = args.peers.split(",")
    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "rounds": args.rounds}
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        cases = {part: make_case(args, part, Path(folder, part)) for part in args.parts.split(",")}
        for part, case in cases.items():
            with stubbed(case.augment.size) if part == "stub" else contextlib.nullcontext():
                sides = {"ours": our_candidates(case, args.workers)}
                if "webdataset" in peers:
                    sides["webdataset"] = webdataset_candidates(case, args.workers, stub=part == "stub")
                result[part] = race(part, case, sides, args.rounds)
        if "ray" in peers:  # last: processes that are forked beside a running Ray may hang
            for part, case in cases.items():
                if part != "stub":
                    with loader_peers.ray_data(case.paths * case.epochs, ray_view(case), case.batch) as run:
                        sides = {"ray_data": {"tasks": functools.partial(timed, run)}}
                        result[part] |= race(part, case, sides, args.rounds)
    for part in cases:
        show(part, result[part])
    print(json.dumps(result))


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("NOISY_LAMBDA_TEST_DATA") or "../shared/data")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--peers", default="webdataset,ray")
    parser.add_argument(
        "--photos", type=Path, default=data / "imagenet-sample", help="folder of labelled shards of photos"
    )
    parser.add_argument("--copies", type=int, default=8, help="how often the photos are repeated")
    parser.add_argument("--cifar", type=Path, default=data / "cifar10", help="folder with labelled-*.tar")
    parser.add_argument("--epochs", type=int, default=10, help="of CIFAR-10")
    parser.add_argument("--size", type=int, default=224, help="of the views of photos")
    parser.add_argument("--batch", type=int, default=64, help="of photos; CIFAR-10: 128")
    parser.add_argument("--workers", type=numbers, default=[0, 1, 2, 3], help="counts to choose from")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


# ---- what is loaded
# ------------------------------------------------------------------------------------------------------


def make_case(args: argparse.Namespace, part: str, folder: Path) -> Case:
    policy = POLICY if part.endswith("_policy") else ""
    if part.startswith("cifar"):
        shards = indexed(sorted(args.cifar.glob("labelled-*.tar")), folder, 10)
        augment = Augment(32, policy, scale=(0.5, 1.0), ratio=(0.8, 1.25), interpolation="bilinear")
        return Case(shards, 10, augment, 128, args.epochs)
    shards = indexed(sorted(args.photos.glob("*.tar")), folder, 1000)
    return Case(shards * args.copies, 1000, Augment(args.size, policy), args.batch, 1)


def indexed(paths: list[Path], folder: Path, classes: int) -> tuple[TrainingShard, ...]:
    """The shards with index files, as the index stage writes them."""
    index, found = make_indexer(str(folder), [str(number) for number in range(classes)]), []
    for path in paths:
        shard = Shard(path.name, str(path), path.stat().st_size, "", "labelled")
        count = int(index(("labelled", shard)).per_class.sum())
        found.append(TrainingShard(str(path), rows_path(str(folder), "labelled", path.name), None, count))
    return tuple(found)


# ---- who loads it
# --------------------------------------------------------------------------------------------------------


def our_candidates(case: Case, workers: list[int]) -> Candidates:
    segments = sample_order.segments_for(len(case.shards))
    source = TrainingSource("labelled", case.shards, case.batch, segments)

    def batches(count: int) -> Iterator[int]:
        for batch in loader.batches(
            [source], augment=case.augment, classes=case.classes, soft=SoftTargets(0.1), seed=0, start_step=0,
            stop_step=case.images // case.batch, workers=count,
        ):  # fmt: skip
            yield len(batch["images"])

    return {f"{count} workers": functools.partial(timed, functools.partial(batches, count)) for count in workers}


def webdataset_candidates(case: Case, workers: list[int], *, stub: bool) -> Candidates:
    ready = loader_peers.Constant(case.augment)
    views = {"stub": ready} if stub else {name: make(case.augment) for name, make in loader_peers.VIEWS.items()}
    return {
        f"{name}, {count} workers": functools.partial(
            timed,
            functools.partial(loader_peers.webdataset, case.paths, view, case.batch, count, case.epochs),
        )
        for name, view in views.items()
        for count in workers
    }


def ray_view(case: Case) -> loader_peers.View:
    """By the decoder that webdataset does best with where there is no policy; with one it makes no odds."""
    return loader_peers.VIEWS["torchvision"](case.augment)


@contextlib.contextmanager
def stubbed(size: int) -> Iterator[None]:
    """Our loader, with one ready view in place of what becomes of an image's bytes."""
    view = np.zeros((size, size, 3), np.uint8).transpose(2, 0, 1)
    with mock.patch.multiple(loader, read=lambda data, small: None, seeded_view=lambda *drawn: view):
        yield


# ---- what is timed
# -------------------------------------------------------------------------------------------------------


def timed(batches: Callable[[], Iterable[int]]) -> Turn:
    """One pass; `batches` gives the images of every batch that arrives."""
    start = time.perf_counter()
    arriving = iter(batches())
    count = next(arriving)
    first = time.perf_counter() - start
    count += sum(arriving)
    return Turn(count / (time.perf_counter() - start), first)


def race(part: str, case: Case, sides: Mapping[str, Candidates], rounds: int) -> dict[str, Any]:
    """Of each side the best candidate's medians over the rounds, which the sides take in turns."""
    best: dict[str, tuple[str, Callable[[], Turn]]] = {}
    for side, candidates in sides.items():
        rates = {name: call().rate for name, call in candidates.items()}
        print(f"  {part} {side}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()), flush=True)
        name = max(rates, key=lambda name: rates[name])
        best[side] = (name, candidates[name])
    turns: dict[str, list[Turn]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (_, call) in best.items():
            turns[side].append(call())
    found: dict[str, Any] = {"images": case.images, "batch": case.batch}
    for side, (name, _) in best.items():
        rate = statistics.median(turn.rate for turn in turns[side])
        found[side] = {"rate": round(rate, 1), "first": round(max(turn.first for turn in turns[side]), 3), "with": name}
    return found


def show(part: str, found: Mapping[str, Any]) -> None:
    print(f"\n{part}, {found['images']:,} images in batches of {found['batch']}")
    for side in ("ours", "webdataset", "ray_data"):
        if side in found:
            rate, first = found[side]["rate"], found[side]["first"]
            times = found["ours"]["rate"] / rate
            print(
                f"  {side:<12} {rate:10,.1f} images/s   ours × {times:5.2f}   first batch {first:5.2f} s   "
                f"{found[side]['with']}"
            )


if __name__ == "__main__":
    main()
