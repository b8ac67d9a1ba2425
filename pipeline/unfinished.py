"""Shows what there is of a run that is not finished: a report from the stages that are.

<output>/unfinished-report/index.html   written anew at each call, also while the run goes on; no stage's folder
"""

from __future__ import annotations

import time
from typing import Any

from pipeline import graph, storage
from pipeline.cluster.inline import Inline
from pipeline.config.settings import Job
from pipeline.errors import OutputError
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import PAGE, PROGRESS, SUMMARY, Done, Stage, read_json_file
from pipeline.progress import SILENT_SECONDS

FOLDER = "unfinished-report"


def report(job: Job) -> tuple[str, list[str]]:
    """The path of the report, and the stages that it lacks: none of a finished run, whose own report it is. OutputError
    where no stage is done."""
    done: dict[str, Done] = {}
    corpora = Corpora(job, done, write=False)
    found = list(graph.walk(job, done, corpora))
    folder = storage.join(job.output, FOLDER)
    if all(look.done for look in found):
        storage.remove(folder)
        return str(read_json_file(done[found[-1].stage.name], SUMMARY)["report"]), []
    if not done:
        raise OutputError(
            f"no stage of {job.name} is finished in {storage.redact(job.output)}, so there is nothing to report; run "
            "the job, or name its output as it was run (output=…)"
        )
    from pipeline.report import so_far  # matplotlib takes a second
    from pipeline.report.page import State

    known = _progress(job)
    states = [State(look.stage.name, *_stands(look, known)) for look in found]
    stages = [look.stage for look in found]
    stage = Stage(FOLDER, "report", ())
    context = Context(job, stage, stages, folder, "", done, corpora, Inline(), lambda _: None, "")
    training = {look.stage.name: look.folder for look in found if look.folder and look.stage.model}
    page = so_far.render(context, states, training)
    path = storage.join(folder, PAGE)
    storage.make_folder(folder)
    storage.write_bytes(path, page)
    missing = [state.stage if state.state == "not begun" else f"{state.stage} ({state.state})" for state in states]
    return path, [text for text, look in zip(missing, found, strict=True) if not look.done]


def _progress(job: Job) -> dict[str, Any]:
    """What the last run wrote of its stages, by folder; it is a view, so nothing depends on it."""
    try:
        progress = storage.read_json(storage.join(job.output, PROGRESS))
        alive = progress["state"] == "running" and time.time() - progress["time"] < SILENT_SECONDS
        return {facts["folder"]: facts | {"alive": alive} for facts in progress["stages"].values() if "folder" in facts}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _stands(look: graph.Look, known: dict[str, Any]) -> tuple[str, str]:
    """(state, what it found, or how far it is)."""
    if look.done:
        return "done", str(look.done.info.get("line", ""))
    if look.problem:
        return "blocked", str(look.problem)
    facts = known.get(look.folder)
    if not facts:
        return "not begun", ""
    state = str(facts.get("state", ""))
    if state == "running" and not facts["alive"]:
        state = "stopped"
    if facts.get("error"):
        return state, str(facts["error"])
    return state, f"{facts['step']:,} of {facts['total']:,}" if facts.get("total") else ""
