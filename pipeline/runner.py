"""Runs a job: each stage that is not done, in order, each into its own folder, `done.json` last.

Nothing that is done is done again, nothing is overwritten, and a run that dies anywhere is continued by running the
same command. Ray and MLflow are started only when a stage has to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import graph, storage
from pipeline.cluster.contract import Cluster
from pipeline.config import job_file
from pipeline.config.settings import Job, to_plain
from pipeline.errors import OutputError, UserError
from pipeline.plan import early_stop, tracked
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import (
    JOB,
    PROGRESS,
    SUMMARY,
    SWEEP,
    Done,
    check_files,
    files_of,
    read_json_file,
    write_done,
)
from pipeline.printable import redacted
from pipeline.progress import Screen
from pipeline.storage.lock import Held, lock
from pipeline.tracking.contract import StageRecord, Tracker


@dataclass(frozen=True)
class Shared:
    """What the jobs of a sweep, which run one after the other, know of each other's stages."""

    known: set[str] = field(default_factory=set)
    """Folders of finished stages that were met."""
    unchecked: list[Done] = field(default_factory=list)
    """Stages of them whose files are still to be compared with what was left."""
    failed: dict[str, UserError] = field(default_factory=dict)
    """Folders of stages that failed, and would again."""


def run(job: Job, cluster: Cluster, tracker: Tracker, screen: Screen, *, refreeze: bool = False) -> dict[str, Any]:
    """Bring every stage of the job to its end and return the last one's summary."""
    with running(job, tracker, screen) as held:
        done = run_stages(job, cluster, tracker, screen, held, refreeze=refreeze)
        last = graph.stages_of(job)[-1].name
        summary: dict[str, Any] = read_json_file(done[last], SUMMARY)
        tracker.end_job("finished", **tracked.results(job, done, last))
    return summary


def run_folds(job: Job, folds: int, cluster: Cluster, tracker: Tracker, screen: Screen) -> None:
    """Bring the stages that `review` needs for the labels of this many folds to their end."""
    with running(job, tracker, screen) as held:
        run_stages(job, cluster, tracker, screen, held, folds=folds)
        tracker.end_job("finished", {}, ())


@contextlib.contextmanager
def running(
    job: Job,
    tracker: Tracker,
    screen: Screen,
    folder: str = "",
    params: Mapping[str, Any] | None = None,
    title: str = "",
) -> Iterator[Held]:
    """The output is ours, and both the tracker and the screen hear how it ends. `folder`, `params` and `title` of the
    tracker's run: the job's, or those of a sweep over jobs like this one."""
    check_place(job.output)
    with lock(job.output) as held:
        storage.sweep(job.output, f"{graph.stage_folders()}|{SWEEP}")
        params = tracked.flatten(to_plain(job)) if params is None else params
        tracker.start_job(job.name, folder or job.output, params, tracked.job_tags(job), title)
        try:
            yield held
        except BaseException as error:
            failed = isinstance(error, Exception)
            screen.write("failed" if failed else "stopped")
            tracker.end_job("failed" if failed else "killed", {}, ())
            raise
        screen.write("finished")


def run_stages(
    job: Job,
    cluster: Cluster,
    tracker: Tracker,
    screen: Screen,
    held: Held,
    *,
    refreeze: bool = False,
    folds: int = 0,
    shared: Shared | None = None,
) -> dict[str, Done]:
    """Bring the stages of a job to their end; with `shared`, of a sweep, those up to its last model."""
    untested, shared = shared is not None, shared or Shared()
    done: dict[str, Done] = {}
    corpora = Corpora(job, done, refreeze=refreeze)
    token, stop = "", None
    for look in graph.walk(job, done, corpora, folds, untested):
        stage, folder = look.stage, look.folder
        if not stop and (stop := early_stop.find(job, done)):
            screen.line(stop.what, "not run", str(stop))
        if look.problem:
            raise look.problem
        while corpora.changes:
            screen.warn(corpora.changes.pop(0))
        record = tracked.stage_record(job, stage, folder, look.inputs, done, corpora)
        finished = look.done
        if finished:
            screen.line(stage.name, "done before", str(finished.info.get("line", "")))
            screen.note(stage.name, folder=folder, state="done before")
            if folder not in shared.known:
                shared.unchecked.append(finished)
        elif folder in shared.failed:
            raise shared.failed[folder]
        else:
            if look.superseded:
                screen.warn(
                    f"{stage.name} was begun in {storage.name(look.superseded)} by an earlier version; it is begun anew"
                )
            held.check()
            check_files(shared.unchecked)
            corpora.check()
            if not token:
                if not folds and not untested:
                    _write_job(job)
                token = storage.write_token(job.output)
            needs, stages = {name: done[name] for name in stage.needs}, graph.stages_of(job, done, folds, untested)
            context = Context(job, stage, stages, folder, look.fingerprint, needs, corpora, cluster, screen.warn, token)
            try:
                finished = _run_stage(context, record, tracker, screen, held)
            except UserError as error:
                shared.failed[folder] = error
                raise
        shared.known.add(folder)
        record = dataclasses.replace(record, title=tracked.title(job, stage, finished))
        artifacts = [storage.join(folder, name) for name in finished.artifacts]
        model = folder if finished.model and not job.labels_only else None  # a copy of what was given is no news
        tracker.end_stage(record, "finished", finished.metrics, artifacts, model)
        done[stage.name] = finished
        if stage.kind == "evaluate":
            for model, figures, temperature in tracked.model_figures(done):
                tracker.add_figures(model, figures, temperature)
    if token:  # where nothing ran, nothing is read
        check_files(shared.unchecked)
    elif not folds and not untested:
        _write_job(job)
    return done


def _run_stage(context: Context, record: StageRecord, tracker: Tracker, screen: Screen, held: Held) -> Done:
    stage, folder = context.stage, context.folder
    started = time.monotonic()
    storage.make_folder(folder)
    tracker.start_stage(record)
    try:
        with screen.following(stage.name, folder):
            result = graph.KINDS[stage.kind].run(context)
            held.check()
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "stopped"
        screen.line(stage.name, state, folder)
        screen.note(stage.name, state=state, error=str(error))
        tracker.end_stage(record, "failed" if state == "failed" else "killed", {}, ())
        raise
    seconds = time.monotonic() - started
    info = {**result.info, "seconds": round(seconds, 3), **tracked.commit_info(record)}
    done = Done(
        stage.name,
        folder,
        context.fingerprint,
        result.output or context.fingerprint,
        info,
        result.metrics,
        result.artifacts,
        result.model,
        files_of(folder),
    )
    write_done(done)
    screen.line(stage.name, "finished", f"{seconds:6.1f} s  {info.get('line', '')}")
    screen.note(stage.name, state="finished", seconds=seconds)
    screen.nothing_ran = False
    return done


def check_place(output: str) -> None:
    """OutputError where a local output lies inside another run's, or has one directly inside it: each deletes what its
    killed writers left, and counts what lies there as its own."""
    if storage.is_url(output):
        return
    here = Path(output)
    inside = [path for path in (here.iterdir() if here.is_dir() else ()) if path.is_dir()]
    for other, place in [*((path, "lies inside") for path in here.parents), *((path, "holds") for path in inside)]:
        if (other / JOB).is_file() and (other / PROGRESS).is_file():
            raise OutputError(f"output {output} {place} {other}, the output of another run; name a folder beside it")


def _write_job(job: Job) -> None:
    """Not before a stage has to run, or all are done: a mistake in a rerun leaves what the folder is known for. What
    `review` and `sweep` run is not the job."""
    storage.write_bytes(storage.join(job.output, JOB), job_file.dump(redacted(to_plain(job))).encode())
