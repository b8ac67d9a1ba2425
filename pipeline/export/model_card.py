"""Writes the model card of an export, a README.md as the Hugging Face hub reads it, from what the run knows.

What nobody has told the run (the licence, where the images come from) is said to be unknown.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import graph, storage
from pipeline.config.fields import identity_of
from pipeline.config.settings import Job
from pipeline.errors import UserError
from pipeline.plan import best
from pipeline.plan.inputs import training_of
from pipeline.plan.stage import JOB, Done, Stage, read_done
from pipeline.predict import choose
from pipeline.predict.predictor import Model
from pipeline.printable import printable

NAME = "README.md"
SHOWN = 20  # classes that are named
WORST, LEAST = 3, 10  # classes that are called the worst, and the test images that each must have for it


@dataclass(frozen=True)
class Facts:
    """What a run knows of a model; nothing of one that lies alone. `job`: with whose settings it was trained, `done`:
    the finished stages of that job, `row`: what `evaluate` says."""

    stage: Done | None = None
    job: Job | None = None
    done: Mapping[str, Done] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)


def facts_of(folder: str) -> Facts:
    """Of the model in a stage's folder."""
    own = storage.name(folder)
    run = folder.rstrip("/").removesuffix(own).rstrip("/") or "."
    stage = read_done(folder)
    if stage is None or not storage.exists(storage.join(run, JOB)):
        return Facts(stage)
    try:
        done, job = choose.finished(run)
    except UserError:  # a job.yaml of another version, say: the figures are known without it
        done, job = {}, None
    reached = {storage.name(one.folder) for one in done.values()}
    return Facts(stage, job if own in reached else None, done, best.evaluated(folder) or {})


def text_of(model: Model, facts: Facts, parameters: int, files: list[str]) -> str:
    """The whole README.md; `files` lie beside it."""
    title = f"{facts.job.name} {facts.stage.name}" if facts.job and facts.stage else model.card.architecture
    parts = [
        _front_matter(model, facts, title),
        f"# {title}",
        _summary(model, parameters),
        "## Data",
        *_data(facts),
        "## Recipe",
        *_recipe(facts),
        "## Figures",
        *_figures(facts),
        "## Calibration",
        _calibration(facts, model.card.temperature),
        "## How to use",
        *_use(model, files),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(model, facts)),
        f"Weights: sha256 {model.identity}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Model, facts: Facts, title: str) -> str:
    import yaml

    timm = model.card.architecture.startswith("timm/")
    said: dict[str, Any] = {
        "library_name": "timm" if timm else "noisy-lambda",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": [
            *(["noisy-student"] if _generation(facts) else []),
            model.card.architecture.removeprefix("timm/"),
            "onnx",
        ],
        "metrics": ["accuracy"],
    }
    figures = [("validation", facts.row.get("validation", {}).get("accuracy")), ("test", facts.row.get("top1"))]
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": f"{split} images of {title}", "type": "imagefolder", "split": split},
            "metrics": [{"type": "accuracy", "value": round(value, 4), "name": "top-1"}],
        }
        for split, value in figures
        if value is not None
    ]
    if results:
        said["model-index"] = [{"name": title, "results": results}]
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{text.replace('license: unknown', 'license: unknown  # nobody has said; set it before you publish')}---"
    )


def _summary(model: Model, parameters: int) -> str:
    card = model.card
    names = ", ".join(map(_code, card.classes[:SHOWN])) + (" …" if len(card.classes) > SHOWN else "")
    try:
        version = f"noisy-lambda {importlib.metadata.version('noisy-lambda')}"
    except importlib.metadata.PackageNotFoundError:
        version = "noisy-lambda"
    return (
        f"An image classifier: `{card.architecture}`, {parameters:,} parameters, of {len(card.classes):,} classes "
        f"({names}).\nIt looks at {card.size} x {card.size} pixels: the shorter side resized to {card.view().resize} "
        f"({card.interpolation}), the centre cut out.\nExported by {version}."
    )


def _data(facts: Facts) -> Iterator[str]:
    counts = facts.done["index"].info.get("counts", {}) if facts.job and "index" in facts.done else {}
    if counts:
        lines = [f"- {name}: {number:,} images" for name, number in counts.items()]
        select = facts.done.get(f"gen{_generation(facts)}-select")
        if select:
            lines.append(f"- pseudo-labelled for the last student: {select.info['line']}")
        if facts.job and facts.job.prepare.dataset == "digits":
            lines.append("- what they show: scikit-learn's scans of handwritten digits")
        yield "\n".join(lines)
    else:
        yield "The images that it was trained on are not known here."
    yield "Where the images come from, who may use them and what they leave out is not known to the run: say it here."


def _generation(facts: Facts) -> int:
    return _stage(facts).generation if facts.job else 0


def _stage(facts: Facts) -> Stage:
    """The stage of the job that made the model."""
    assert facts.job and facts.stage
    name = facts.stage.name
    return next(one for one in graph.stages_of(facts.job, facts.done) if one.name == name)


def _recipe(facts: Facts) -> Iterator[str]:
    import yaml

    if facts.job is None:
        yield "The settings of its training are not known here" + (
            f"; its stage was `{facts.stage.name}`: {facts.stage.info.get('line', '')}." if facts.stage else "."
        )
        return
    own = _stage(facts)
    stages = graph.stages_of(facts.job, facts.done)
    line = [one for one in stages[: stages.index(own) + 1] if one.model and one.name in facts.done]
    if any(one.generation for one in line):
        yield "Noisy Student training: each student learns from labelled images and from labels of the model before it."
    rows = [f"| {one.name} | {_cell(str(facts.done[one.name].info.get('line', '')))} |" for one in line]
    yield "\n".join(["| stage | what it became |", "|---|---|", *rows])
    if own.kind == "adopt":
        yield "Its weights were given to the job; how they were trained is not known here."
        return
    settings = facts.job.finetune if own.kind == "finetune" else training_of(facts.job, own)
    said = {name: value for name, value in identity_of(settings).items() if name != "checkpoint"}
    text = yaml.safe_dump({**said, "seed": facts.job.seed}, sort_keys=False, allow_unicode=True)
    yield f"Settings of {own.name}:\n\n```yaml\n{text}```"


def _figures(facts: Facts) -> Iterator[str]:
    row, validation = facts.row, facts.row.get("validation", {})
    rows = []
    if validation:
        rows.append(f"| validation | {validation['images']:,} | {_percent(validation['accuracy'])} | |")
    if row:
        rows.append(f"| test | {row['count']:,} | {_percent(row['top1'])} | {_percent(row['top5'])} |")
        rows += [
            f"| {_cell(name)} | | {_percent(some['top1'])} | {_percent(some['top5'])} |"
            for name, some in row.get("sets", {}).items()
        ]
    elif facts.stage and (seen := facts.stage.info.get("validation")):
        rows.append(f"| validation | | {_percent(seen['top1'])} | {_percent(seen['top5'])} |")
    if not rows:
        yield "Its accuracy is not known here: no stage has tested it."
        return
    yield "\n".join(["| images | number | top-1 | top-5 |", "|---|---|---|---|", *rows])
    if row:
        how = f"{row['device']}, {row['dtype']}, batch {row['batch']}"
        yield f"Speed: {row['images_per_second']:,.0f} images/s ({how})."


def _calibration(facts: Facts, temperature: float | None) -> str:
    if temperature is None:
        why = "`evaluate` has not run on it" if facts.stage and not facts.row else "no validation images were looked at"
        return f"Not calibrated: {why}, so a confidence of 90 % need not mean 90 % right."
    said = f"Its logits are divided by {temperature:g}, the temperature found on the validation images"
    validation = facts.row.get("validation")
    if not validation:
        return f"{said}."
    before, after = validation["ece"], validation["calibrated_ece"]
    return f"{said}: the expected calibration error there falls from {_percent(before)} to {_percent(after)}."


def _use(model: Model, files: list[str]) -> Iterator[str]:
    yield (
        '```python\nimport noisy_lambda\n\nmodel = noisy_lambda.load("this/folder")\n'
        'print(model.predict("photo.jpg")[0].label)\n```'
    )
    if "config.json" in files:
        load = 'timm.create_model("local-dir:this/folder", pretrained=True)'
        yield f"```python\nimport timm\n\nmodel = {load}.eval()\n```"
    if "model.onnx" in files:
        yield (
            "`model.onnx` takes `images`, float32 [batch, 3, size, size], RGB from 0 to 1, minus mean, divided by std, "
            "and gives `logits`; classes, size, crop, interpolation, mean, std and temperature are in its metadata."
        )
    if "model.int8.onnx" in files:
        yield "`model.int8.onnx` is the same in 8-bit integers."


def _limits(model: Model, facts: Facts) -> Iterator[str]:
    yield f"It knows its {len(model.card.classes):,} classes and nothing else: whatever is shown gets one of them."
    if facts.row or (facts.stage and facts.stage.info.get("validation")):
        yield "Its figures hold for images like those it was tested on, and for no others."
    if facts.row.get("validation"):
        yield "Models and temperature were chosen by the validation images: the test figure is the fairer one."
    per_class = facts.row.get("per_class")
    if per_class:
        images, right = np.array(per_class["images"]), np.array(per_class["right"])
        share = np.where(images >= LEAST, right / np.maximum(images, 1), np.inf)
        worst = [number for number in np.argsort(share, kind="stable")[:WORST] if share[number] < 1]
        if worst:
            named = (f"{_code(model.card.classes[n])} ({right[n]} of {images[n]} right)" for n in worst)
            yield f"Its worst classes in the test: {', '.join(named)}."
    if _generation(facts):
        yield "A student learns from labels that a model gave; some of those are wrong, and unevenly over the classes."


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _cell(text: str) -> str:
    """Text in a Markdown table."""
    return printable(text).replace("|", "\\|").replace("\n", " ")


def _code(name: str) -> str:
    """A class name as Markdown shows it, whatever is in it."""
    return f"`{_cell(name).replace('`', chr(39))}`"
