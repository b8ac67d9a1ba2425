"""Says what a tracker is told: a stage's title, settings and data, the figures of models, and a job's results."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.config.fields import execution_of
from pipeline.config.settings import Job
from pipeline.plan import best
from pipeline.plan.corpora import SET, Corpora
from pipeline.plan.inputs import training_of
from pipeline.plan.stage import EVALUATION, PAGE, SPEED_ACCURACY, SUMMARY, Done, Stage, read_file, read_json_file
from pipeline.tracking.contract import COMMIT, OURS, SOURCE, Dataset, StageRecord

DIGITS = 16  # of a hash are enough to tell data apart
CONTEXT = {"labelled": "training", "audit_only": "validation"}  # else the source's own name
MADE = {"label": "pseudo-labels", "select": "selection"}  # the stages whose files a student is trained on


def job_tags(job: Job) -> dict[str, str]:
    return {f"{OURS}cluster": job.cluster, **_commit(commit())}


def stage_record(
    job: Job, stage: Stage, folder: str, inputs: Mapping[str, Any], done: Mapping[str, Done], corpora: Corpora
) -> StageRecord:
    """What is known of a stage when its turn has come; `inputs`: its identity."""
    hashes = _hashes(inputs)
    others = {name: value for name, value in inputs.items() if isinstance(value, (int, float, str))}  # seed, generation
    workers = {f"workers.{name}": value for name, value in execution_of(job.workers).items() if value is not None}
    named = {"job": job.name, "stage": stage.name} | workers | hashes
    tags = {f"{OURS}{name}": str(value) for name, value in named.items()}
    finished = done.get(stage.name)
    tags |= _commit(str(finished.info.get("commit", "")) if finished else commit())
    params = flatten(inputs.get("settings", {}))
    params |= {name: value for name, value in others.items() if name not in hashes}
    datasets = _datasets(stage, inputs, done, corpora)
    return StageRecord(stage.name, folder, params, tags, title(job, stage, finished), datasets)


def _hashes(inputs: Mapping[str, Any]) -> dict[str, str]:
    """What goes into a stage, by what its identity calls it."""
    found = {name: str(value) for name, value in flatten(inputs).items()}
    return {name: value[:DIGITS] for name, value in found.items() if re.fullmatch("[0-9a-f]{64}", value)}


def title(job: Job, stage: Stage, finished: Done | None) -> str:
    """The stage, and the model that it leaves; which one was adopted is known in the end."""
    if not stage.model:
        return stage.name
    model = finished.info.get("model") if finished else training_of(job, stage).model
    return f"{stage.name} · {model}" if model else stage.name


def _commit(found: str) -> dict[str, str]:
    return {COMMIT: found, **SOURCE} if found else {}


def commit_info(record: StageRecord) -> dict[str, str]:
    """What done.json keeps of it, for MLflow may be told later."""
    return {"commit": record.tags[COMMIT]} if COMMIT in record.tags else {}


@functools.cache  # what is checked out later is not what this process runs
def commit() -> str:
    """The commit that is checked out in the working folder; "" where that is no git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _datasets(stage: Stage, inputs: Mapping[str, Any], done: Mapping[str, Done], corpora: Corpora) -> list[Dataset]:
    """The data that a stage reads: the sources whose content is part of its identity, and what was made of them."""
    if stage.kind == "report":
        return []
    hashes = set(_hashes(inputs).values())
    made = [(name, done[name]) for name in stage.needs if name.rpartition("-")[2] in MADE]
    indexed = {
        k: v for name in ("index", "detect-index") if name in done for k, v in done[name].info["content"].items()
    }
    found = []
    for source, corpus in corpora.found.items():
        known = [one[:DIGITS] for one in (indexed.get(source, ""), corpus.fingerprint)]
        digest = next((one for one in known if one in hashes), known[1] if source == "unlabelled" and made else "")
        if digest:
            facts = {"shards": len(corpus.shards), "bytes": sum(shard.size for shard in corpus.shards)}
            context = "test" if source.startswith(SET) else CONTEXT.get(source, source)
            found.append(Dataset(source, digest, corpora.where(source), context, facts))
    for name, one in made:
        found.append(Dataset(name, one.output[:DIGITS], storage.redact(one.folder), MADE[name.rpartition("-")[2]]))
    return found


# ---- models and results ------------------------------------------------------------------------------------------


def model_figures(done: Mapping[str, Done]) -> Iterator[tuple[str, dict[str, float], float | None]]:
    """(folder, figures, temperature) of each model that `evaluate` tested."""
    for row in _rows(done):
        yield done[row["stage"]].folder, _figures(row), row.get("validation", {}).get("temperature")


def results(job: Job, done: Mapping[str, Done], last: str) -> dict[str, Any]:
    """What `Tracker.end_job` is told of a finished job, whose last stage is `last`: the figures of its best model, its
    folder, the pages, and a description in Markdown."""
    if job.measure.models:
        page, picture = f"{SPEED_ACCURACY}.md", f"{SPEED_ACCURACY}.png"
        names = [page, picture]
        found: dict[str, Any] = {"metrics": {}}
        if storage.exists(storage.join(done[last].folder, page)):
            found["note"] = read_file(done[last], page).decode()
    elif job.labels_only or job.detects_only:
        names = [PAGE]
        note = "\n\n".join(read_json_file(done[last], SUMMARY).get("verdict", ()))
        found = {"metrics": dict(done[last].metrics), "note": note}
    else:
        names = [PAGE, f"{SPEED_ACCURACY}.png"]
        summary, rows = read_json_file(done[last], SUMMARY), _rows(done)
        chosen = best.find(done)
        assert chosen  # the teacher at least
        row = next(row for row in rows if row["stage"] == chosen.model.name)
        metrics = {**_figures(row), "gain_points": summary["gain_points"]}
        if chosen.top1 is not None:
            metrics["best_validation_top1"] = chosen.top1
        # The table first: pages show the first lines alone until they are clicked.
        note = "\n\n".join([_table(rows, chosen.model.name), *summary.get("verdict", ()), NOTES])
        found = {"metrics": metrics, "note": note, "champion": chosen.model.folder}
    paths = [storage.join(done[last].folder, name) for name in names]
    return found | {"artifacts": [path for path in paths if storage.exists(path)]}  # people delete pages


def _rows(done: Mapping[str, Done]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json_file(done["evaluate"], EVALUATION)["models"]
    return found


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of evaluate.json by the names that MLflow shows; earlier versions measured less."""
    called = {f"test_{name}": row[name] for name in ("top1", "top5", "ece")}
    called |= {"inference_images_per_second": row["images_per_second"]}
    called |= {name: row.get(name) for name in ("latency_ms", "parameters", "flops")}
    return {name: float(value) for name, value in called.items() if value is not None}


Row = Mapping[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "validation": lambda row: f"{100 * row['validation']['accuracy']:.2f} %" if "validation" in row else "",
    "gain": lambda row: _gain(row.get("validation", {}).get("gain")),
    "test top-1": lambda row: f"{100 * row['top1']:.2f} %",
    "parameters": lambda row: f"{row['parameters']:,}",
    "FLOPs": lambda row: f"{row['flops'] / 1e6:,.1f} M" if row.get("flops") else "",
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "latency": lambda row: f"{row['latency_ms']:.1f} ms" if "latency_ms" in row else "",
}
NOTES = (
    "Validation: top-1, by which the best model (bold) is chosen. Gain: points of it over the model before, with the "
    "95 % interval. FLOPs: two per multiply-add, of one image. Images/s and latency (one image): inference."
)


def _table(rows: Sequence[Row], chosen: str) -> str:
    lines = [["model", *COLUMNS], ["---", *("--:" for _ in COLUMNS)]]
    for row in rows:
        model = f"{row['stage']} · {row['model']}"
        cells = [model, *(cell(row) for cell in COLUMNS.values())]
        lines.append([f"**{cell}**" if row["stage"] == chosen and cell else cell for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _gain(gain: Mapping[str, float] | None) -> str:
    return f"{gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})" if gain else ""


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
