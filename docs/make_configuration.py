"""Writes docs/configuration.md from the settings' declarations: `python docs/make_configuration.py`. A test keeps it
fresh."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pipeline.config import settings, settings_detection, settings_evaluate, settings_train, settings_workers
from pipeline.config.fields import REQUIRED

HEAD = """# Settings of a job

A job file is YAML. `base:` inside any mapping names files, from `conf/` or beside the job, that are merged below it.
`student:`, `label:` and `select:` at the top are defaults of every generation. A student's settings come from five
places, each stronger than the one before: the `base` of the `student` at the top, that `student`, the `base` of the
generation's own `student`, that one, and the command line (`student.lr=0.2` for all generations,
`generations[1].student.lr=0.2` for the second; of two, the later counts).

An **identity** setting changes what a stage computes: change it and that stage and those after it are done again, in
new folders. An **execution** setting changes only where, how fast or how often: change it freely, nothing is done
again. (Two of them become part of what is computed where another setting asks for it: `evaluate_every` with
`weights: best`, `checkpoint_every` with `rollbacks`. Of paths, the content counts: other shards are other data.)

A setting that is not at its default and has no effect where it stands (`teacher.labels`, `temperature` with hard
labels, `momentum` without sgd) is an error if the job or the command line sets it, and a warning if a base does.

This page is written by `docs/make_configuration.py`.
"""


def page() -> str:
    sections = [HEAD]
    for title, cls in [
        ("Job", settings.Job),
        ("prepare", settings.Prepare),
        ("data", settings.Data),
        ("workers", settings_workers.Workers),
        ("teacher, student", settings_train.Teacher),
        ("affine, inside teacher and student", settings_train.Affine),
        ("label", settings.Label),
        ("select", settings.Select),
        ("finetune", settings_train.Finetune),
        ("evaluate", settings_evaluate.Evaluate),
        ("an entry of evaluate.sets", settings_evaluate.EvaluationSet),
        ("robustness, inside evaluate", settings_evaluate.Robustness),
        ("detection", settings_detection.Detection),
        ("data, inside detection", settings_detection.DetectionData),
        ("an entry of detection.detectors", settings_detection.Detector),
        ("measure", settings.Measure),
        ("an entry of measure.models", settings.Measured),
        ("tracking", settings.Tracking),
    ]:
        rows = [f"## {title}", "", "| setting | default | kind | meaning |", "|---|---|---|---|"]
        rows += [row(item, cls) for item in fields(cls)]
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


def row(item: Any, cls: type) -> str:
    default = getattr(cls(), item.name)  # every field of the settings has a default
    shown = "see below" if is_dataclass(default) else "required" if default == REQUIRED else f"`{plain(default)}`"
    rules = item.metadata
    limits = ""
    if "choices" in rules:
        limits = "; one of " + ", ".join(f"`{plain(choice)}`" for choice in rules["choices"])
    elif "low" in rules:
        limits = f"; at least {rules['low']:g}" + (f", at most {rules['high']:g}" if "high" in rules else "")
    return f"| `{item.name}` | {shown} | {rules['kind']} | {rules['help'].replace('|', chr(92) + '|')}{limits} |"


def plain(value: Any) -> str:
    """As YAML would have it."""
    return value or "''" if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
