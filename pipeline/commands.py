"""Does what the commands of the command line do: a function a command, from its arguments to its exit status.

Those that write shards are in pipeline.prepare_commands.

Heavy modules are imported by the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.malloc import keep_memory
from pipeline.printable import counted, shown

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
    signal.signal(signal.SIGTERM, end_by_signal)
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


def end_by_signal(number: int, frame: Any) -> None:
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
    from pipeline.sweep import record

    job = _load(args)
    for line in record.lines(job.output):
        print(shown(line))
    path, missing = unfinished.report(job)
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

        signal.signal(signal.SIGTERM, end_by_signal)
        launch.run_folds(job, args.folds)
    command.review(job, folds=args.folds, images=args.images)
    return 0


def sweep(args: argparse.Namespace) -> int:
    keep_memory()
    from pipeline.cluster import torchrun

    if torchrun.follows():
        if not args.plan:
            torchrun.follow()
        return 0
    from pipeline.progress import console
    from pipeline.sweep import ahead, grid

    wanted = grid.read(args.job, args.settings)
    console().print(ahead.table(wanted, ahead.plan(wanted)))
    if args.plan:
        return 0
    from pipeline import launch

    signal.signal(signal.SIGTERM, end_by_signal)
    found = launch.run_sweep(wanted)
    if not sys.stdout.isatty():  # for programs
        print(json.dumps(found), flush=True)
    failed = [str(one) for one, its in zip(wanted.combinations, found["combinations"], strict=True) if its["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {counted(len(wanted.combinations), 'combination')} failed, {failed[0]} first; "
            f"{found['report']} says why, and the same command tries again what failed"
        )
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


def _last_run(job: Job) -> Job:
    """What the output's job.yaml says, or the job itself where that is not there or cannot be read any more."""
    from pipeline.config.load_run import load_run

    with contextlib.suppress(UserError):
        return load_run(job.output)
    return job


def clean(args: argparse.Namespace) -> int:
    from pipeline import graph, storage
    from pipeline.storage.lock import lock
    from pipeline.sweep import record

    job = _load(args)
    if not storage.exists(job.output):
        print("nothing to clean")
        return 0
    with lock(job.output):
        sizes = graph.unreachable(job)
        kept = sizes.keys() - graph.unreachable(_last_run(job)).keys() if sizes else set()
        if kept:  # forgotten settings must not cost a trained model
            print(f"kept, for the last run here, with other settings, uses them: {', '.join(sorted(kept))}")
        sizes = {name: size for name, size in sizes.items() if name not in kept}
        swept = {} if args.sweeps else {name: sizes.pop(name) for name in record.folders(job.output) & sizes.keys()}
        for name, size in sizes.items():
            print(f"{size / 2**20:10.1f} MiB  {name}")
            if args.yes:
                storage.remove(storage.join(job.output, name))
    total = f"{sum(sizes.values()) / 2**20:.1f} MiB in {counted(len(sizes), 'folder')} that this job does not use"
    if not sizes:
        print("nothing to clean")
    else:
        print(f"deleted {total}" if args.yes else f"{total}; add --yes to delete them")
    if swept:
        held = f"{sum(swept.values()) / 2**20:.1f} MiB in {counted(len(swept), 'folder')}"
        print(f"{held} of sweeps are kept; --sweeps cleans them too")
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

    if corpus.wanted(args.input, args.out) and not any(map(command.is_detector, args.models)):
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
    signal.signal(signal.SIGTERM, end_by_signal)
    summary = launch.run(job)
    if not summary["labels"]["images"]:
        raise UserError(f"none of the images could be read; {summary['report']} says why")
    return 0
