"""Runs `noisy-lambda sweep`: the combinations one after the other, in the job's output and under its lock.

Each is brought to its last model by the runner, so what has the same fingerprint is made once, and a sweep that was
stopped anywhere goes on when it is run again. A combination that fails by a user's error is named and the next one is
begun; what would stop them all (the output, the cluster), and a bug, ends the sweep.
"""

from __future__ import annotations

import shlex
from typing import Any

from rich.table import Table

from pipeline import runner, storage
from pipeline.cluster.contract import Cluster
from pipeline.config import job_file
from pipeline.config.settings import to_plain
from pipeline.errors import ClusterError, DataError, OutputError, UserError
from pipeline.plan import tracked
from pipeline.plan.stage import PAGE
from pipeline.printable import redacted
from pipeline.progress import Screen, safe
from pipeline.sweep import ranking, record
from pipeline.sweep.grid import Combination, Sweep, label
from pipeline.sweep.record import BEST
from pipeline.tracking.contract import Tracker

OF_ALL = (OutputError, ClusterError)


def run(sweep: Sweep, cluster: Cluster, tracker: Tracker, screen: Screen) -> dict[str, Any]:
    """Every combination that is not done; what was found, as it is in sweep.json. `screen` writes into the sweep's
    folder. UserError: what stopped the sweep."""
    first = sweep.combinations[0].job
    with runner.running(first, tracker, screen, sweep.folder, _params(sweep), f"{first.name} · sweep") as held:
        found = record.begin(sweep)
        record.write(sweep, found)
        shared = runner.Shared()
        for number, one in enumerate(sweep.combinations):
            screen.state["stages"], screen.state["combination"] = {}, str(one)
            screen.console.print(f"\n[bold]{number + 1} of {len(sweep.combinations)}[/bold]  {safe(str(one))}")
            entry = found["combinations"][number]
            try:
                done = runner.run_stages(one.job, cluster, tracker, screen, held, shared=shared)
                entry |= {"state": "done", "error": "", **_result(done)}
            except OF_ALL:
                raise
            except UserError as error:
                entry |= {"state": "failed", "error": storage.redact(str(error)), "top1": None, "stage": ""}
                screen.warn(f"failed, and the sweep goes on: {error}")
            _remember(entry, screen.state["stages"])
            _write(sweep, found)
        tracker.end_job("finished", **_told(sweep, found))
    return found


def _result(done: Any) -> dict[str, Any]:
    best = ranking.result(done)
    if best is None or best.top1 is None:
        raise DataError("no model of it was validated, so it cannot be ranked")
    index = done["index"].info
    return {
        "top1": best.top1,
        "stage": storage.name(best.model.folder),
        "images": index["counts"]["validation"],
        "validation": index["content"]["validation"],
    }


def _remember(entry: dict[str, Any], stages: dict[str, Any]) -> None:
    """The folders of a combination, and which stages ran for it, in an earlier process or in this one."""
    entry["folders"] = sorted({*entry["folders"], *record.folders_of(stages)})
    ran = [name for name, facts in stages.items() if facts["state"] == "finished"]
    entry["ran"] = list(dict.fromkeys([*entry["ran"], *ran]))


def _write(sweep: Sweep, found: dict[str, Any]) -> None:
    """The record, the page and, of what there is so far, the best job."""
    from pipeline.report import sweep_page  # matplotlib takes a second

    ranked = ranking.entries(found["combinations"])
    found["ranking"] = [
        {"settings": dict(one.settings), "top1": one.top1, "error": one.error, "members": list(one.members)}
        for one in ranked
    ]
    found["verdict"] = ranking.sentences(ranked, found["combinations"])
    found["report"] = storage.redact(storage.join(sweep.folder, PAGE))
    if ranked:
        best = sweep.combinations[ranked[0].members[0]]
        storage.write_bytes(storage.join(sweep.folder, BEST), _job_file(best).encode())
    points = [(one["settings"], one["top1"]) for one in found["combinations"] if one["state"] == "done"]
    page = sweep_page.Sweep(
        found["job"],
        found["verdict"],
        ranking.columns(sweep.swept),
        [ranking.cells(one, sweep.swept) for one in ranked],
        [_shown(one) for one in found["combinations"]],
        sweep_page.effects(found["swept"], points),
        next_command(sweep),
    )
    storage.write_bytes(storage.join(sweep.folder, PAGE), sweep_page.render(page))
    record.write(sweep, found)


def _shown(one: dict[str, Any]) -> tuple[str, str, str, str]:
    ran = ", ".join(one["ran"]) or "nothing: all of it was there"
    top1 = "" if one["top1"] is None else f"{100 * one['top1']:.2f} %"
    return (
        label(one["settings"]),
        one["state"],
        top1,
        one["error"] or (f"{one['stage']}; {ran}" if one["stage"] else ""),
    )


def _job_file(best: Combination) -> str:
    text = job_file.dump(redacted(to_plain(best.job)))
    return f"# {' '.join(redacted(str(best)).split())}: the best of a sweep by validation top-1.\n{text}"


def next_command(sweep: Sweep) -> str:
    """What tests the best combination."""
    return f"noisy-lambda run {shlex.quote(storage.redact(storage.join(sweep.folder, BEST)))}"


def _params(sweep: Sweep) -> dict[str, Any]:
    """What all combinations have in common, and the swept values."""
    all_of = [tracked.flatten(to_plain(one.job)) for one in sweep.combinations]
    common = {name: value for name, value in all_of[0].items() if all(one.get(name) == value for one in all_of)}
    return common | {f"sweep.{key}": ", ".join(values) for key, values in sweep.swept.items()}


def _told(sweep: Sweep, found: dict[str, Any]) -> dict[str, Any]:
    """What a tracker is told at the end."""
    ranked, columns = ranking.entries(found["combinations"]), ranking.columns(sweep.swept)
    lines = [columns, ["--:"] * len(columns), *(ranking.cells(one, sweep.swept) for one in ranked)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    metrics = {"best_validation_top1": ranked[0].top1} if ranked else {}
    paths = [storage.join(sweep.folder, name) for name in (PAGE, BEST)]
    return {
        "metrics": metrics | {"combinations": float(len(sweep.combinations))},
        "artifacts": [path for path in paths if storage.exists(path)],
        "note": "\n\n".join([table, *found["verdict"]]),
    }


def table(sweep: Sweep, found: dict[str, Any]) -> Table:
    """The ranking for a screen."""
    rows = Table("rank", box=None, pad_edge=False, header_style="bold", title="validation", title_justify="left")
    for name in ranking.columns(sweep.swept):
        rows.add_column(safe(name), justify="right")
    for number, one in enumerate(ranking.entries(found["combinations"]), 1):
        rows.add_row(str(number), *map(safe, ranking.cells(one, sweep.swept)))
    return rows
