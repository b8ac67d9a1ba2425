"""Runs a job here and shows it on the screen: chooses its cluster and its tracker, and closes both in the end.

The command `run` and `noisy_lambda.run` are this function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline import runner, storage
from pipeline.cluster import torchrun
from pipeline.cluster.contract import Cluster
from pipeline.config.settings import Job
from pipeline.errors import ConfigError
from pipeline.graph import stages_of
from pipeline.plan.stage import REVIEW
from pipeline.progress import Screen, console, results_table, safe
from pipeline.sweep import command as sweeping
from pipeline.sweep.grid import Sweep
from pipeline.tracking import ui as mlflow_ui
from pipeline.tracking.contract import NullTracker, Tracker


def run(job: Job, *, refreeze: bool = False) -> dict[str, Any]:
    """Every stage that is not done; the report's summary. UserError, RemoteError: what stopped it."""
    out = console()
    screen = Screen(out, job.output, job.name, [stage.name for stage in stages_of(job)])
    cluster, tracker = _cluster(job, lambda text: screen.say(text)), _tracker(job, screen.warn)
    try:
        summary = runner.run(job, cluster, tracker, screen, refreeze=refreeze)
    finally:
        _close(cluster, tracker, screen)
    out.print()
    out.print(results_table(summary))
    for sentence in summary.get("verdict", ()):
        out.print(safe(sentence), soft_wrap=True)
    for sentence in summary.get("warnings", ()):
        screen.warn(sentence)
    out.print(f"\nreport   {summary['report']}", soft_wrap=True)
    if "labels" in summary:
        out.print(f"labels   {summary['labels']['dir']}", soft_wrap=True)
    if job.tracking.enabled:
        out.print(f"MLflow   {mlflow_ui.command(job.output, job.tracking.uri)}", soft_wrap=True)
    if screen.nothing_ran:
        out.print("all is done; nothing had to run")
    return summary


def run_folds(job: Job, folds: int) -> None:
    """The stages that `review` needs for the labels, as `run` runs its own; how far they are lies beside its pages, for
    `status` speaks of the job's."""
    screen = Screen(
        console(), storage.join(job.output, REVIEW), job.name, [s.name for s in stages_of(job, None, folds)]
    )
    cluster, tracker = _cluster(job, lambda text: screen.say(text)), _tracker(job, screen.warn)
    try:
        runner.run_folds(job, folds, cluster, tracker, screen)
    finally:
        _close(cluster, tracker, screen)


def _close(cluster: Cluster, tracker: Tracker, screen: Screen) -> None:
    tracker.close()
    cluster.close()
    if unsent := tracker.unsent():
        screen.warn(
            f"MLflow has not got all of {', '.join(unsent)} yet; when it answers again, run the same command once "
            "more, which sends what is missing and does no work twice"
        )


def run_sweep(sweep: Sweep) -> dict[str, Any]:
    """Every combination of a sweep that is not done; what was found. What runs lies in the sweep's folder, for `status`
    speaks of the job's. UserError: what stopped it, or which combinations failed."""
    out, jobs = console(), [one.job for one in sweep.combinations]
    names = [stage.name for job in jobs for stage in stages_of(job, untested=True)]
    screen = Screen(out, sweep.folder, jobs[0].name, names)
    cluster, tracker = _cluster(jobs[0], lambda text: screen.say(text)), _tracker(jobs[0], screen.warn)
    try:
        found = sweeping.run(sweep, cluster, tracker, screen)
    finally:
        tracker.close()
        cluster.close()
    out.print()
    out.print(sweeping.table(sweep, found))
    for sentence in found["verdict"]:
        out.print(safe(sentence), soft_wrap=True)
    out.print(f"\nreport   {safe(found['report'])}", soft_wrap=True)
    if found["ranking"]:
        out.print(f"best     {safe(sweeping.next_command(sweep))}", soft_wrap=True)
    if jobs[0].tracking.enabled:
        out.print(f"MLflow   {mlflow_ui.command(jobs[0].output, jobs[0].tracking.uri)}", soft_wrap=True)
    if screen.nothing_ran:
        out.print("all is done; nothing had to run")
    return found


def _cluster(job: Job, say: Callable[[str], None]) -> Cluster:
    if torchrun.launched():
        if job.cluster not in ("auto", "inline"):
            raise ConfigError(
                f"torchrun started this job, whose `cluster` is '{job.cluster}'; start it without torchrun, or set "
                "cluster: inline to train on torchrun's processes"
            )
        return torchrun.Torchrun()
    if job.cluster == "inline":
        from pipeline.cluster.inline import Inline

        return Inline()
    from pipeline.cluster.on_ray import OnRay

    return OnRay(job.cluster, patience=job.workers.patience, say=say)


def _tracker(job: Job, warn: Callable[[str], None]) -> Tracker:
    if not job.tracking.enabled:
        return NullTracker()
    from pipeline.tracking.to_mlflow import MlflowTracker

    return MlflowTracker(job.output, uri=job.tracking.uri, warn=warn)
