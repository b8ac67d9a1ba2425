"""Does what the commands of the command line do: a function a command, from its arguments to its exit status.

Heavy modules are imported by the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.malloc import keep_memory
from pipeline.printable import counted, redact, shown

if TYPE_CHECKING:
    from pipeline.config.settings import Job


def _load(args: argparse.Namespace) -> Job:
    from pipeline.config.load import load_job

    return load_job(args.job, args.settings)


def jobs(args: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.table import Table

    from pipeline.config import shipped
    from pipeline.progress import console

    table = Table("name", "time", "what", box=None, pad_edge=False)
    for job in shipped.jobs():
        table.add_row(job.name, escape(job.time), escape(job.what))
    console().print(table)
    return 0


def init(args: argparse.Namespace) -> int:
    from pipeline.first_job import init as write

    for line in write(args.folder, args.out):
        print(line)
    return 0


def run(args: argparse.Namespace) -> int:
    keep_memory()  # before there are threads
    from pipeline.cluster import torchrun

    if torchrun.follows():
        torchrun.follow()
        return 0
    from pipeline import launch, storage
    from pipeline.plan.stage import DONE

    job = _load(args)
    signal.signal(signal.SIGTERM, _stop)
    try:
        summary = launch.run(job, refreeze=args.refreeze)
    except BaseException:
        with contextlib.suppress(Exception):  # what stopped the run goes first
            if any(storage.exists(storage.join(job.output, name, DONE)) for name in storage.listdir(job.output)):
                again = shlex.join(["noisy-lambda", "report", args.job, *args.settings])
                print(f"a report of what is finished: {shown(again)}", flush=True)
        raise
    if args.json or not sys.stdout.isatty():  # for programs
        print(json.dumps(summary), flush=True)
    return 0


def _stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def plan(args: argparse.Namespace) -> int:
    from pipeline.progress import console
    from pipeline.views import plan_table

    table, problems = plan_table(_load(args), measure=args.measure)
    console().print(table)
    if problems:
        raise UserError(f"the run would fail: {problems[0]}")
    return 0


def status(args: argparse.Namespace) -> int:
    from pipeline.progress import console
    from pipeline.views import status_table

    console().print(status_table(_load(args)))
    return 0


def report(args: argparse.Namespace) -> int:
    from pipeline import storage, unfinished

    path, missing = unfinished.report(_load(args))
    print(storage.redact(path))
    if missing:
        print(f"not finished: {', '.join(missing)}")
    return 0


def review(args: argparse.Namespace) -> int:
    keep_memory()
    from pipeline.cluster import torchrun

    if torchrun.follows():
        if args.folds:
            torchrun.follow()
        return 0
    from pipeline.review import command

    job = _load(args)
    command.check(job, args.folds, args.images)
    if args.folds:
        from pipeline import launch

        signal.signal(signal.SIGTERM, _stop)
        launch.run_folds(job, args.folds)
    command.review(job, folds=args.folds, images=args.images)
    return 0


def submit(args: argparse.Namespace) -> int:
    from pipeline.cluster.submit import submit as submit_job

    _load(args)  # a mistake in the job is cheaper to meet here
    return submit_job(
        args.job,
        args.settings,
        address=args.address,
        working_dir=args.working_dir,
        follow=not args.no_wait,
        env=args.env,
        secrets=args.secrets,
    )


def clean(args: argparse.Namespace) -> int:
    from pipeline import graph, storage
    from pipeline.storage.lock import lock

    job = _load(args)
    if not storage.exists(job.output):
        print("nothing to clean")
        return 0
    with lock(job.output):
        sizes = graph.unreachable(job)
        for name, size in sizes.items():
            print(f"{size / 2**20:10.1f} MiB  {name}")
            if args.yes:
                storage.remove(storage.join(job.output, name))
    total = f"{sum(sizes.values()) / 2**20:.1f} MiB in {counted(len(sizes), 'folder')} that this job does not use"
    print(f"deleted {total}" if args.yes else f"{total}; add --yes to delete them" if sizes else "nothing to clean")
    return 0


def ui(args: argparse.Namespace) -> int:
    from pipeline.tracking import ui as mlflow_ui

    job = _load(args)
    return mlflow_ui.ui(job.output, job.tracking.uri, args.port)


def export(args: argparse.Namespace) -> int:
    from pipeline.export import command

    return command.export(args.model, args.out, int8=args.int8, max_drop=args.max_drop)


def predict(args: argparse.Namespace) -> int:
    from pipeline.predict import command, corpus

    if corpus.wanted(args.input, args.out):
        return _predict_corpus(args)
    if args.cluster:
        raise UserError("--cluster is for shards that go into a folder (--out FOLDER)")
    return command.predict(
        args.models, args.input, args.out, top=args.top, raw=args.raw, column=args.column, batch=args.batch,
        device=args.device, contact_sheet=args.contact_sheet,
    )  # fmt: skip


def _predict_corpus(args: argparse.Namespace) -> int:
    keep_memory()  # before there are threads
    from pipeline import launch
    from pipeline.predict import corpus

    if args.top != 5:
        raise UserError("--top is of tables; label files hold all classes, or the 32 most probable of more than 128")
    job = corpus.compose(
        args.models, args.input, args.out, raw=args.raw, batch=args.batch, device=args.device, cluster=args.cluster
    )
    signal.signal(signal.SIGTERM, _stop)
    summary = launch.run(job)
    if not summary["labels"]["images"]:
        raise UserError(f"none of the images could be read; {summary['report']} says why")
    return 0


def prepare(args: argparse.Namespace) -> int:
    from pipeline.progress import bar, console

    with bar(console(), "writing shards") as progress:
        if args.what == "digits":
            from pipeline.data.prepare_digits import digits

            made = digits(args.out, seed=args.seed, labels_per_class=args.labels_per_class, progress=progress)
            counts = made["images"]
        else:
            counts = _prepare_files(args, progress)
    one = {"shards": "shard", "images": "image", "classes": "class"}  # the others are no nouns: labelled, bad
    said = ", ".join(counted(number, one.get(name, name), name) for name, number in counts.items() if number)
    print(f"{said} in {redact(args.out)}")
    if counts.get("bad") or counts.get("skipped"):
        print(f"what is bad or skipped is listed in {redact(args.out)}/bad_files.txt")
    return 0


def _prepare_files(args: argparse.Namespace, progress: Callable[[int, int], None]) -> dict[str, int]:
    from pipeline.data import prepare_files as shards_of
    from pipeline.data.split_off import shares_in

    options: dict[str, Any] = {
        "split": args.split,
        "shard_bytes": args.shard_bytes,
        "shard_samples": args.shard_images,
        "seed": args.seed,
        "workers": args.processes,
        "max_bad": args.max_bad,
        "progress": progress,
    }
    if args.what == "folder":
        options |= {"labelled": not args.unlabelled, "split_off": shares_in(args.split_off or "")}
        return shards_of.folder(args.source, args.out, **options)
    label = None if args.unlabelled else args.label
    return shards_of.table(args.source, args.out, image=args.image, label=label, label_is=args.label_is, **options)
