"""Run a job: each stage that is not done, in order, each into its own folder, `done.json` last.

Nothing that is done is done again, nothing is overwritten, and a run that dies anywhere is continued by running the
same command. Ray and MLflow are started only when a stage has to run.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.cluster.contract import Cluster
from pipeline.config.fields import execution_of
from pipeline.config.settings import Job, to_plain
from pipeline.errors import UserError
from pipeline.plan import early_stop, graph
from pipeline.plan.context import Context, Result
from pipeline.plan.corpora import Sources
from pipeline.plan.graph import Done, Stage
from pipeline.progress import Screen
from pipeline.storage.lock import lock
from pipeline.tracking.contract import StageRecord, Tracker

STAGE_FOLDER = re.compile(
    r"(prepare|index|evaluate|report|measure|gen\d+-(?:teacher|audit|label|select|student|finetune))-[0-9a-f]{8}"
)


def run(job: Job, cluster: Cluster, tracker: Tracker, screen: Screen, *, refreeze: bool = False) -> dict[str, Any]:
    """Bring every stage of the job to its end and return the last one's summary."""
    with lock(job.output):
        storage.sweep(job.output)
        _write_job(job)
        tracker.start_job(job.name, job.output, flatten(to_plain(job)), {"cluster": job.cluster})
        try:
            done = _run_stages(job, cluster, tracker, screen, refreeze)
            last = graph.stages_of(job)[-1].name
            summary: dict[str, Any] = storage.read_json(storage.join(done[last].folder, "summary.json"))
        except BaseException as error:
            failed = isinstance(error, Exception)
            screen.write("failed" if failed else "stopped")
            tracker.end_job("failed" if failed else "killed", {}, ())
            raise
        screen.write("finished")
        tracker.end_job("finished", {k: summary[k] for k in ("gain_points",) if k in summary}, ())
        return summary


def _run_stages(job: Job, cluster: Cluster, tracker: Tracker, screen: Screen, refreeze: bool) -> dict[str, Done]:
    done: dict[str, Done] = {}
    sources = Sources(job, job.data.root or "", refreeze)
    token = ""
    stop = None
    for stage in graph.in_order(job, done):
        if not stop and (stop := early_stop.find(job, done)):
            screen.line(stop.what, "not run", str(stop))
        sources.root = sources.root or (graph.data_root(job, done) if done else "")
        inputs = graph.inputs_of(job, stage, done, sources)
        while sources.changes:
            screen.warn(sources.changes.pop(0))
        print_ = graph.fingerprint(stage.kind, inputs)
        folder = graph.folder_of(job, stage, print_)
        record = StageRecord(
            stage.name, folder, flatten(inputs), {k: str(v) for k, v in execution_of(job.workers).items()}
        )
        finished = graph.read_done(folder)
        if finished:
            screen.line(stage.name, "done before", str(finished.info.get("line", "")))
            screen.note(stage.name, folder=folder, state="done before")
        else:
            token = token or storage.write_token(job.output)
            needs = {name: done[name] for name in stage.needs}
            context = Context(job, stage, folder, print_, needs, sources, cluster, screen.warn, token)
            finished = _run_stage(context, record, tracker, screen)
        artifacts = [storage.join(folder, name) for name in finished.artifacts]
        tracker.end_stage(record, "finished", finished.metrics, artifacts, folder if finished.model else None)
        done[stage.name] = finished
    return done


def _run_stage(context: Context, record: StageRecord, tracker: Tracker, screen: Screen) -> Done:
    stage, folder = context.stage, context.folder
    started = time.monotonic()
    storage.make_folder(folder)
    tracker.start_stage(record)
    work: Callable[[Context], Result] = importlib.import_module(f"pipeline.stages.{stage.kind}").run
    try:
        with screen.following(stage.name, folder):
            result = work(context)
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "stopped"
        screen.line(stage.name, state, folder)
        screen.note(stage.name, state=state, error=str(error))
        tracker.end_stage(record, "failed" if state == "failed" else "killed", {}, ())
        raise
    seconds = time.monotonic() - started
    info = {**result.info, "seconds": round(seconds, 3)}
    done = Done(
        stage.name,
        folder,
        context.fingerprint,
        result.output or context.fingerprint,
        info,
        result.metrics,
        result.artifacts,
        result.model,
    )
    graph.write_done(done)
    screen.line(stage.name, "finished", f"{seconds:6.1f} s  {info.get('line', '')}")
    screen.note(stage.name, state="finished", seconds=seconds)
    screen.nothing_ran = False
    return done


@dataclass(frozen=True)
class Look:
    """A stage as it stands. `folder` is None while its inputs are not done, or where a `problem` hides them."""

    stage: Stage
    folder: str | None
    done: Done | None
    problem: str = ""


def look(job: Job) -> list[Look]:
    """How every stage stands, without starting or writing anything."""
    done: dict[str, Done] = {}
    found: list[Look] = []
    sources = Sources(job, job.data.root or "", write=False)
    for stage in graph.in_order(job, done):
        folder, finished, problem = None, None, ""
        if all(name in done for name in stage.needs):
            try:
                sources.root = sources.root or (graph.data_root(job, done) if done else "")
                print_ = graph.fingerprint(stage.kind, graph.inputs_of(job, stage, done, sources))
            except UserError as error:
                problem = str(error)
            else:
                folder = graph.folder_of(job, stage, print_)
                finished = graph.read_done(folder)
        if finished:
            done[stage.name] = finished
        found.append(Look(stage, folder, finished, problem))
    return found


def unreachable(job: Job) -> dict[str, int]:
    """{stage folder that the job as it stands does not use: bytes}."""
    found = look(job)
    used = {storage.name(look.folder) for look in found if look.folder}
    # While the inputs of a stage are not done, any of its folders may still be the one.
    undecided = {look.stage.name for look in found if not look.folder}
    sizes: dict[str, int] = {}
    for name in storage.listdir(job.output):
        match = STAGE_FOLDER.fullmatch(name)
        if match and name not in used and match[1] not in undecided:
            sizes[name] = sum(storage.walk(storage.join(job.output, name)).values())
    return sizes


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as 'a.b.0.c' -> value."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(entry, (Mapping, list)) for entry in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _write_job(job: Job) -> None:
    import yaml

    plain = _redacted(to_plain(job))
    storage.write_bytes(storage.join(job.output, "job.yaml"), yaml.safe_dump(plain, sort_keys=False).encode())


def _redacted(value: Any) -> Any:
    """Settings as they may be recorded: no URL anywhere in them keeps its password."""
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redacted(inner) for inner in value]
    return storage.redact(value) if isinstance(value, str) else value
