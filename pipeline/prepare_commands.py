"""Does what the commands that write shards do: a function a command, from its arguments to its exit status."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.commands import end_by_signal
from pipeline.printable import counted, redact

if TYPE_CHECKING:
    from pipeline.cluster.contract import Cluster


def prepare(args: argparse.Namespace) -> int:
    from pipeline.progress import bar, console

    with bar(console(), "writing shards") as progress:
        if args.what == "digits":
            from pipeline.prepare.digits import digits

            made = digits(args.out, seed=args.seed, labels_per_class=args.labels_per_class, progress=progress)
            counts = made["images"]
        elif args.what == "scenes":
            from pipeline.detection.digit_scenes import digit_scenes

            counts = digit_scenes(args.out, seed=args.seed, progress=progress)["images"]
        else:
            counts = _prepare_files(args, progress)
    _say_counts(counts, args.out)
    return 0


def _say_counts(counts: dict[str, Any], out: str) -> None:
    dropped = counts.pop("dropped", {})
    # The others are no nouns: labelled, bad.
    one = {"objects": "object", "shards": "shard", "images": "image", "classes": "class"}
    said = ", ".join(counted(number, one.get(name, name), name) for name, number in counts.items() if number)
    print(f"{said} in {redact(out)}")
    if dropped:
        print(f"annotations dropped: {', '.join(f'{number:,} {reason}' for reason, number in dropped.items())}")
    if counts.get("bad") or counts.get("skipped"):
        print(f"what is bad or skipped is listed in {redact(out)}/bad_files.txt")


def _prepare_files(args: argparse.Namespace, progress: Callable[[int, int], None]) -> dict[str, Any]:
    from pipeline.prepare.folders import folder
    from pipeline.prepare.split_off import shares_in
    from pipeline.prepare.tables import table

    options: dict[str, Any] = {
        "split": args.split,
        "shard_bytes": args.shard_bytes,
        "shard_samples": args.shard_images,
        "seed": args.seed,
        "workers": args.processes,
        "max_bad": args.max_bad,
        "progress": progress,
    }
    if args.what == "coco":
        from pipeline.detection.prepare_coco import coco

        return coco(args.source, args.out, image_folder=args.images, **options)
    if args.what == "folder":
        options |= {"labelled": not args.unlabelled, "split_off": shares_in(args.split_off or "")}
        return folder(args.source, args.out, **options)
    label = None if args.unlabelled else args.label
    options |= {"image": args.image, "label": label, "label_is": args.label_is, "where": args.where}
    if args.cluster is None:
        return table(args.source, args.out, **options)
    from pipeline.prepare import cluster_tables

    with _cluster(args.cluster) as cluster:
        return cluster_tables.table(args.source, args.out, cluster, **options)


def reshard(args: argparse.Namespace) -> int:
    from pipeline.prepare.reshard import reshard as shuffle
    from pipeline.progress import bar, console

    with bar(console(), "spreading, then writing shards") as progress, _cluster(args.cluster) as cluster:
        counts = shuffle(
            args.source, args.out, cluster, shards=args.shards, seed=args.seed, split=args.split, labels=args.labels,
            progress=progress,
        )  # fmt: skip
    _say_counts(counts, args.out)
    if args.labels:
        print(f"labels of these shards in {redact(args.labels)}; name the new shards in the job, and run it")
    return 0


@contextlib.contextmanager
def _cluster(where: str | None) -> Iterator[Cluster]:
    """Where the units of a command run: on Ray, or for None in this process."""
    from pipeline.cluster.inline import Inline
    from pipeline.cluster.on_ray import OnRay

    signal.signal(signal.SIGTERM, end_by_signal)
    cluster = Inline() if where is None else OnRay(where)
    try:
        yield cluster
    finally:
        cluster.close()
