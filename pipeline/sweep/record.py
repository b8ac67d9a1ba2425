"""Remembers what a sweep found, and which stage folders it uses, for those who look at the output later.

    <output>/sweep-1a2b3c4d/    the digits: of all that its combinations train
    ├── sweep.json               the swept values, and of each combination its state, top-1, folders and error
    ├── best.yaml                every setting of the best combination, a job file
    ├── index.html               ranking and effects
    ├── progress.json            how far the combination is that runs
    └── mlflow.json              the id of its run in MLflow

It is a view: a sweep goes on by what is in the stage folders.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.plan.stage import PAGE, PROGRESS, SWEEP
from pipeline.printable import redacted
from pipeline.progress import SILENT_SECONDS
from pipeline.sweep import ranking
from pipeline.sweep.grid import Sweep, label

RECORD, BEST = "sweep.json", "best.yaml"


def begin(sweep: Sweep) -> dict[str, Any]:
    """The record of a sweep that begins, or goes on: then with what was found before. Nothing in it is secret."""
    settings: list[dict[str, str]] = redacted([dict(one.settings) for one in sweep.combinations])
    with contextlib.suppress(FileNotFoundError, OutputError):
        known = _read(sweep.folder)
        if [one["settings"] for one in known["combinations"]] == settings:
            known["begun"] = sorted({*known["begun"], *folders_of(_progress(sweep.folder).get("stages", {}))})
            return known
    waiting: dict[str, Any] = {"state": "waiting", "top1": None, "stage": "", "folders": [], "ran": [], "error": ""}
    return {
        "job": sweep.combinations[0].job.name,
        "given": redacted([sweep.given, *sweep.fixed]),
        "swept": redacted({key: list(values) for key, values in sweep.swept.items()}),
        "combinations": [{"settings": one, **waiting} for one in settings],
        "begun": [],  # folders that an earlier process left in the middle of a combination
    }


def write(sweep: Sweep, record: dict[str, Any]) -> None:
    storage.write_record(storage.join(sweep.folder, RECORD), record)


def _read(folder: str) -> dict[str, Any]:
    return storage.read_record(storage.join(folder, RECORD), "run the sweep again, which writes it anew")


def _progress(folder: str) -> dict[str, Any]:
    """What its last process wrote of the combination at which it was; {} where it wrote nothing."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return dict(storage.read_json(storage.join(folder, PROGRESS)))
    return {}


def all_in(output: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(folder, record, progress) of every sweep in an output. OutputError: a record is damaged."""
    for name in storage.listdir(output):
        folder = storage.join(output, name)
        if re.fullmatch(SWEEP, name) and storage.exists(storage.join(folder, RECORD)):
            yield folder, _read(folder), _progress(folder)


def folders(output: str) -> set[str]:
    """Names of the stage folders that sweeps in an output use, of the combination that was running too."""
    used: set[str] = set()
    for _, record, progress in all_in(output):
        used.update(record["begun"], *(one["folders"] for one in record["combinations"]))
        used.update(folders_of(progress.get("stages", {})))
    return used


def folders_of(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the folders in progress.json's `stages`."""
    return [storage.name(facts["folder"]) for facts in stages.values() if "folder" in facts]


def lines(output: str) -> Iterator[str]:
    """A sentence or two of each sweep in an output, for `status`."""
    for folder, record, progress in all_in(output):
        states = [one["state"] for one in record["combinations"]]
        text = f"{storage.name(folder)}: {states.count('done')} of {len(states)} combinations are done"
        text += f", {states.count('failed')} failed" if "failed" in states else ""
        if ranked := ranking.entries(record["combinations"]):
            text += f"; best {label(ranked[0].settings) or 'over the seeds'} with {100 * ranked[0].top1:.2f} %"
        if progress.get("state") == "running":
            age = time.time() - float(progress.get("time", 0))
            what = progress.get("combination", "")
            text += f"; running: {what}" if age < SILENT_SECONDS else f"; killed while at {what}: run it again to go on"
        yield text
        if storage.exists(storage.join(folder, PAGE)):
            yield f"  {storage.redact(storage.join(folder, PAGE))}"
