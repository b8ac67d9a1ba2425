"""Draws the tables of `plan` and `status`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pipeline import graph, outlook, storage
from pipeline.config import durations
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train, peak_rate, pseudo_per_step
from pipeline.errors import ConfigError, DataError, OutputError, UserError
from pipeline.labelling.label_progress import shares
from pipeline.plan import early_stop
from pipeline.plan.corpora import Corpora, audited_of, sources_of
from pipeline.plan.inputs import training_of
from pipeline.plan.stage import AUDIT, PROGRESS, Done, Stage, read_done, read_json_file
from pipeline.printable import counted
from pipeline.progress import SILENT_SECONDS, safe
from pipeline.stages.detector import detector_of
from pipeline.sweep import record

RIGHT = ("shards", "GiB", "done", "rate", "left", "time", "disk")
FREE = ("what", "latest", "pattern")  # columns that may wrap
CLASSES = 1000  # where they are not known


def plan_rows(job: Job, found: Sequence[graph.Look] | None = None) -> list[dict[str, str]]:
    """Every stage as {stage, state, folder, what}: "done", "will run", "blocked" or "not run"; where it lies or will
    lie, "" while the stages before it decide that; what it found, would do, or what is in its way."""
    found = graph.look(job) if found is None else found
    done = _done(found)
    labelled = _labelled(job, done)
    rows = []
    for look in found:
        state = "done" if look.done else "blocked" if look.problem else "will run"
        what = str(look.done.info.get("line", "") if look.done else look.problem or _what(job, look.stage, labelled))
        rows.append({"stage": look.stage.name, "state": state, "folder": look.folder, "what": what})
    if stop := early_stop.find(job, done):
        rows.append({"stage": stop.what, "state": "not run", "folder": "", "what": str(stop)})
    return rows


def _labelled(job: Job, done: Mapping[str, Done]) -> int | None:
    """Labelled images, where they are counted already."""
    if not job.classifies:
        return None
    return outlook.labelled_images(job, done)


def plan_table(job: Job, *, measure: bool = False) -> tuple[Group, list[str]]:
    """Shards of every source, and of every stage what is done or would run, with time and room; and why the run would
    fail, on any machine that sees these shards. `measure`: find the speed of training here."""
    found = graph.look(job)
    # What is wrong with shards follows below.
    problems = [
        str(look.problem)
        for look in found
        if look.problem and (look.stage.kind == "prepare" or not isinstance(look.problem, DataError))
    ]
    done = _done(found)
    table = _table(f"{job.name} in {storage.redact(job.output)}", "stage", "state", "time", "disk", "folder", "what")
    takes: dict[str, tuple[str, str]] = {}
    total, lengths = "", list[str]()
    if job.classifies:
        stages = [look.stage for look in found]
        takes, total = outlook.takes(job, stages, done, _class_count(job, done), measure and not problems)
        lengths = outlook.lengths(job, stages, done)
    for row in plan_rows(job, found):
        unknown = "" if row["state"] == "not run" else f"{row['stage']}-…"
        folder = storage.name(row["folder"]) if row["folder"] else unknown
        table.add_row(row["stage"], row["state"], *takes.get(row["stage"], ("", "")), folder, safe(row["what"]))
    missing = _missing_gpus(job)
    if job.measure.models:
        return Group(table, *missing), problems
    data = job.detection.data if job.detects_only else job.data
    prepared = data.root is not None or bool(found[0].done)
    shards, lacking = _shards_table(job, done) if prepared else ("shards: written by the first stage", [])
    wrong, small = _notes_on_models(job, done) if job.classifies else ([], [])
    small = [*small, *lengths]
    notes: list[Any] = [*_noise_levels(job, done)]
    notes += [f"\n{total}"] if total else []
    notes += [f"\n[red]✗[/red] {safe(text)}" for text in wrong]
    notes += [f"\n! {safe(text)}" for text in (*small, *_sorted_shards(job, found), *missing)]
    return Group(shards, "", table, *notes), [*problems, *lacking, *wrong]


def _noise_levels(job: Job, done: Mapping[str, Done]) -> Iterator[RenderableType]:
    """What thresholds and noise levels would keep, of the last audit whose student is not trained yet."""
    audits = [name for name in done if name.endswith("-audit")]
    if not audits or audits[-1].replace("audit", "student") in done:
        return
    from pipeline.report import noise_levels

    for grid in noise_levels.grids(read_json_file(done[audits[-1]], AUDIT), Corpora(job, done, write=False).classes):
        table = Table(title=safe(grid.title), title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(grid.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*(safe(text) for text in row))
        yield ""
        yield table


def _class_count(job: Job, done: Mapping[str, Done]) -> int:
    try:
        return len(Corpora(job, done, write=False).classes)
    except UserError:  # the data is not there yet; the class list changes counts of all models by about the same
        return CLASSES


def _missing_gpus(job: Job) -> list[str]:
    """What the job asks of this machine and it does not have; a cluster's nodes may."""
    wanted = max(job.workers.train_gpus, job.workers.label_gpus)
    if not wanted or job.cluster not in ("inline", "embedded"):
        return []
    import torch

    if torch.cuda.device_count() >= wanted:
        return []
    here = counted(torch.cuda.device_count(), "GPU")
    return [
        f"workers.gpus is {wanted:g}, and this machine has {here}: run it where "
        "there are some, or set workers.gpus to 0"
    ]


def _done(found: Sequence[graph.Look]) -> dict[str, Done]:
    return {look.stage.name: look.done for look in found if look.done}


def _sorted_shards(job: Job, found: Sequence[graph.Look]) -> list[str]:
    """Warnings about orders that hardly mix the classes; they are known once `index` is done."""
    indexed = next((look.done for look in found if look.stage.kind == "index"), None)
    if indexed is None:
        return []
    from pipeline.loading import shuffle_quality

    training = [training_of(job, look.stage) for look in found if look.stage.kind == "train"]
    notes = [shuffle_quality.advice_on(indexed.folder, settings, job.seed) for settings in training]
    return [note for note in dict.fromkeys(notes) if note]


def _notes_on_models(job: Job, done: Mapping[str, Done]) -> tuple[list[str], list[str]]:
    """(models that cannot be trained as the job says, students that are smaller than their teachers)."""
    from pipeline import preflight  # seconds of imports

    classes = _class_count(job, done)
    stages = graph.stages_of(job, done)
    return preflight.mistakes(job, stages, classes, done), preflight.too_small(job, stages, classes, done)


def _shards_table(job: Job, done: Mapping[str, Done]) -> tuple[Table, list[str]]:
    """The table, and what is wrong with the shards; nothing where there are none at all: the data is elsewhere then."""
    corpora = Corpora(job, done, write=False)
    table, wrong, here = _table("", "source", "pattern", "shards", "GiB"), [], False
    for source in sources_of(job):
        pattern = corpora.pattern(source) or ""
        try:
            shards = corpora[source].shards
            here = True
            corpora.check_source(source)
            table.add_row(source, safe(pattern), f"{len(shards):,}", f"{sum(s.size for s in shards) / 2**30:.3f}")
        except UserError as error:
            table.add_row(source, safe(pattern), "none", "", safe(str(error)))
            wrong.append(str(error))
    return table, wrong if here else []


def _table(title: str, *columns: str) -> Table:
    table = Table(title=safe(title) or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=column not in FREE)
    return table


def _what(job: Job, stage: Stage, labelled: int | None) -> str:
    """What a stage would do; `labelled`: images, once they are known."""
    if stage.kind == "measure":
        return ", ".join(measured.name for measured in job.measure.models)
    if stage.kind == "audit":
        return f"{' and '.join(audited_of(job))}, labelled by {stage.needs[-1]}"
    if stage.kind == "finetune":
        tuned = job.finetune
        length = _length(tuned.duration, tuned.batch, labelled)
        return f"{stage.needs[-1]} at {tuned.resolution} pixels, head and last norm, {length}, batch {tuned.batch}"
    if stage.kind == "detector":
        one = detector_of(job, stage)
        rate = one.lr * one.batch / one.lr_images if one.lr_images else one.lr
        canvas = f"{one.canvas} x {one.canvas} pixels"
        return f"{one.model}, {canvas}, {one.duration}, batch {one.batch:,}, learning rate {rate:.3g}"
    if stage.kind != "train":
        return ""
    train = training_of(job, stage)
    pseudo = _pseudo(train) if stage.generation else 0
    images = f"batch {train.batch:,}{f' + {pseudo:,} pseudo-labelled' if stage.generation else ''}"
    rate = peak_rate(train, train.batch + pseudo)
    workers = counted(job.workers.train, "worker")
    length = outlook.length(train, labelled, pseudo)
    return f"{train.model} at {train.resolution} pixels, {length}, {images}, learning rate {rate:.3g}, {workers}"


def _pseudo(settings: Train) -> int:
    """Pseudo-labelled images of a step; where there would be none of those asked for, a note below the table says
    so."""
    try:
        return pseudo_per_step(settings)
    except ConfigError:
        return 0


def _length(duration: str, batch: int, labelled: int | None) -> str:
    if labelled is None or duration.endswith("st"):
        return duration
    steps = durations.steps(duration, labelled / batch)
    return f"{duration} = {counted(steps, 'step')}" + ("" if steps else " (too few: lengthen it or lower batch)")


def status_table(job: Job) -> Group:
    """How far every stage is, from progress.json, the label files' counts and done.json; starts nothing."""
    try:
        progress = storage.read_json(storage.join(job.output, PROGRESS))
        age, state, stages = time.time() - progress["time"], str(progress["state"]), dict(progress["stages"])
    except FileNotFoundError:
        return Group(f"{job.name} has not run in {storage.redact(job.output)}", *_sweeps(job))
    except (ValueError, TypeError, KeyError):
        path = storage.redact(storage.join(job.output, PROGRESS))
        raise OutputError(f"{path} is damaged; delete it, a run writes it anew") from None
    if state == "running" and age > SILENT_SECONDS:
        state = f"killed (silent for {age:.0f} s); run the same command to continue"
    table = _table(f"{job.name}: {state}", "stage", "state", "done", "rate", "left", "latest")
    done: dict[str, Done] = {}
    for stage in graph.in_order(job, done):
        facts = stages.get(stage.name, {})
        finished = read_done(facts["folder"]) if "folder" in facts else None
        if finished:
            done[stage.name] = finished
        step, total = facts.get("step"), facts.get("total")
        running = facts.get("state") == "running" and not finished
        table.add_row(
            stage.name,
            "done" if finished else facts.get("state", "missing"),
            f"{step:,}/{total:,}" if step is not None and total else "",
            f"{facts['rate']:,.1f}/s" if running and facts.get("rate") else "",
            f"{facts['eta']:,.0f} s" if running and facts.get("eta") is not None else "",
            safe(str(finished.info.get("line", "")))
            if finished
            else safe(facts.get("error") or _latest(stage, facts.get("latest", {}))),
        )
        if stage.kind in ("label", "index", "detect-index"):
            for number, text in _details(facts.get("latest", {}), finished.info if finished else {}):
                table.add_row("", "", number, "", "", safe(text))
    stop = early_stop.find(job, done)
    if stop:
        table.add_row(stop.what, "not run", "", "", "", safe(str(stop)))
    return Group(table, *_sweeps(job))


def _sweeps(job: Job) -> list[str]:
    """The sweeps in the job's output, below its own stages."""
    return [safe(line) for line in record.lines(job.output)]


def _details(latest: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What else there is to tell of a stage that reads images, as (number, text): bad samples by reason, the worst
    shards, where the time went; of one that runs from its journal's latest record, of a finished one from its
    done.json."""
    bad = info.get("bad") or {name[4:]: value for name, value in latest.items() if name.startswith("bad_")}
    for reason, count in bad.items():
        yield f"{count:,.0f}", f"bad samples: {reason}"
    if latest.get("failed") and not info:
        yield f"{latest['failed']:,}", "failed shards"
    if latest.get("worst"):
        yield "", f"worst shards: {latest['worst']}"
    seconds = {name[8:]: value for name, value in latest.items() if name.startswith("seconds_")}
    if info.get("where") or seconds:
        yield "", f"time: {info.get('where') or shares(seconds)}"


def _latest(stage: Stage, values: Mapping[str, Any]) -> str:
    if stage.kind == "label" and values:
        about = f" of about {values['images_total']:,}" if "images_total" in values else ""
        workers = values.get("workers", 0)
        return (
            f"{values.get('images', 0):,.0f}{about} images, {values.get('images_per_second', 0):,.0f}/s now and "
            f"{values.get('images_per_second_average', 0):,.0f}/s on average, {counted(workers, 'worker')}"
        )
    words = {name.replace("_", " "): value for name, value in values.items()}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in words.items()
    )
