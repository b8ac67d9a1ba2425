"""Shows a person how a run goes: a line per stage, a bar inside it, and `progress.json` for `status`.

The bar and progress.json follow the stage's journal, so they are the same whether the stage works in this process
or on a cluster.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from pipeline import storage
from pipeline.plan.stage import PROGRESS
from pipeline.printable import redacted, shown
from pipeline.tracking import journal

FOLLOW_SECONDS, WRITE_SECONDS = 0.5, 15.0
LOG_SECONDS = 60.0  # between two lines about a stage that runs, where there is no terminal
SILENT_SECONDS = 45.0  # after which a driver that wrote nothing is dead
MARKS = {"done before": "·", "not run": "·", "finished": "✓", "running": "▸", "failed": "✗", "stopped": "✗"}
RESERVED = ("step", "total", "time", "kind")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for the command line to end with; rich would say that we were stopped


def console() -> Console:
    """One that writes to standard output; into a file, or a job's log, tables need not fit a screen."""
    return _Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def safe(text: str) -> str:
    """Text from data or settings, for a console: without secrets, nothing in it is markup or moves the cursor."""
    return escape(shown(text))


class Times(ProgressColumn):
    """0:37 elapsed, 2:10 left."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        text = f"{clock(task.elapsed or 0)} elapsed"
        left = None if task.finished else task.time_remaining
        return Text(text if left is None else f"{text}, {clock(left)} left")


class Facts(ProgressColumn):
    """What gives way on a narrow terminal, after the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    """130 -> '2:10', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _to_nobody(text: str) -> None:
    pass


class Screen:
    """One run's view. `console` writes to standard output; stages are shown in the order in which they are met."""

    def __init__(self, console: Console, output: str, job: str, names: Sequence[str]) -> None:
        self.console, self.output, self.names = console, output, names
        self.width = max(len(name) for name in names)
        self.nothing_ran = True
        self.say: Callable[[str], None] = _to_nobody  # what takes a while, beside the bar of the stage that runs
        self.state: dict[str, Any] = {
            "job": job,
            "state": "running",
            "pid": os.getpid(),
            "time": time.time(),
            "stages": {},
        }

    def line(self, name: str, state: str, detail: str = "") -> None:
        text = f"{MARKS[state]} {name:<{self.width}}  {state:<11}  {detail}"
        self.console.print(safe(text.rstrip()), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]! {safe(text)}[/yellow]", highlight=False, soft_wrap=True)

    def note(self, name: str, **facts: Any) -> None:
        """Record facts of a stage in progress.json."""
        self.state["stages"].setdefault(name, {}).update(facts)
        self.write()

    def write(self, state: str | None = None) -> None:
        self.state["time"] = time.time()
        if state:
            self.state["state"] = state
        with contextlib.suppress(Exception):  # a view must never stop the work it shows
            storage.write_json(storage.join(self.output, PROGRESS), redacted(self.state))

    @contextlib.contextmanager
    def following(self, name: str, folder: str) -> Iterator[None]:
        """Show the journal in `folder` as it grows."""
        quiet = not self.console.is_terminal
        columns = [
            TextColumn(f"▸ {name:<{self.width}}  running    ", table_column=Column(no_wrap=True)),
            BarColumn(24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            Facts(),
            Times(),
        ]
        if quiet:
            self.line(name, "running")
        started, stop = time.time(), threading.Event()
        self.note(name, folder=folder, state="running", started=started, error="")
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            task = progress.add_task("", total=None, facts="")
            self.say = self._log if quiet else lambda text: progress.update(task, facts=text)

            def follow() -> None:
                position, written, logged = 0, time.monotonic(), time.monotonic()
                while True:
                    ending = stop.wait(FOLLOW_SECONDS)
                    with contextlib.suppress(Exception):
                        records, position = journal.read(folder, position, follow=not ending)
                        for record in records:
                            self._show(name, record, started)
                        if records:
                            progress.update(
                                task, completed=records[-1]["step"], total=records[-1]["total"], facts=_facts(records)
                            )
                    if ending:
                        return
                    if quiet and time.monotonic() - logged >= LOG_SECONDS:
                        logged += LOG_SECONDS
                        self._log(f"{name}  {standing(self.state['stages'][name])}")
                    if time.monotonic() - written > WRITE_SECONDS:
                        written = time.monotonic()
                        self.write()

            thread = threading.Thread(target=follow, daemon=True, name="screen")
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                self.say = _to_nobody

    def _log(self, text: str) -> None:
        """A line for who reads the log of a job later."""
        if text:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self.console.print(f"{stamp}  {safe(text)}", highlight=False, soft_wrap=True)

    def _show(self, name: str, record: Mapping[str, Any], started: float) -> None:
        facts = self.state["stages"].setdefault(name, {})
        step, total = record["step"], record["total"]
        first_step, first_time = facts.setdefault("first", [step, started])
        rate = (step - first_step) / max(record["time"] - first_time, 1e-6)
        eta = (total - step) / rate if total and rate > 0 else None
        facts.update(step=step, total=total, rate=rate, eta=record.get("left", eta))  # a stage may know better
        facts.setdefault("latest", {}).update({k: v for k, v in record.items() if k not in RESERVED})


def standing(facts: Mapping[str, Any]) -> str:
    """How far a stage is, by its facts in progress.json: '1,200/10,000  845 images/s  ETA 1:02:10  3 bad'."""
    latest = facts.get("latest", {})
    said = [f"{facts['step']:,}/{facts['total']:,}" if facts.get("total") else "nothing done yet", _facts([latest])]
    said += [f"ETA {clock(facts['eta'])}"] if facts.get("eta") else []
    said += [f"{latest['bad']:,} bad"] if isinstance(latest.get("bad"), int) else []
    return "  ".join(one for one in said if one)


def _facts(records: Sequence[Mapping[str, Any]]) -> str:
    latest: dict[str, Any] = {}
    for record in records:
        latest.update(record)
    shown = []
    if isinstance(latest.get("loss"), float):
        shown.append(f"loss {latest['loss']:.3f}")
    if isinstance(latest.get("images_per_second"), (int, float)):
        shown.append(f"{latest['images_per_second']:,.0f} images/s")
    return "  ".join(shown)


@contextlib.contextmanager
def bar(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; what it yields takes (done, total)."""
    columns = [
        TextColumn(text),
        BarColumn(24),
        MofNCompleteColumn(),
        Times(),
    ]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def results_table(summary: Mapping[str, Any]) -> Table:
    """What the job found: teacher and students, or measured models, side by side; or labels."""
    if "rows" in summary:
        return _measured_table(summary["rows"])
    if "labels" in summary:
        return _labels_table(summary)
    if "detectors" in summary:
        return _detectors_table(summary)
    columns = ("stage", "model", "top-1", "top-5", "parameters", "images/s", "its rounds", "over teacher")
    table = _results("test split", *columns)
    for row in summary["stages"]:
        over = 100 * (row["top1"] - summary["stages"][0]["top1"])
        slowest, fastest = row.get("slowest_round"), row.get("fastest_round")
        table.add_row(
            row["stage"],
            safe(row["model"]),
            percent(row["top1"]),
            percent(row["top5"]),
            f"{row['parameters']:,}",
            f"{row['images_per_second']:,.0f}",
            f"{slowest:,.0f} to {fastest:,.0f}" if slowest and fastest else "",
            "" if row is summary["stages"][0] else f"[red]{over:+.2f}[/red]" if over < 0 else f"{over:+.2f}",
        )
    return table


def _measured_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _results(
        "measured", "model", "parameters", "inference images/s", "training images/s", "latency ms", "top-1"
    )
    for row in rows:
        measured = [row[key] for key in ("inference_images_per_second", "training_images_per_second", "latency_ms")]
        table.add_row(
            safe(row["name"]),
            f"{row['parameters']:,}",
            *("does not fit" if value is None else f"{value:,.1f}" for value in measured),
            "" if row["top1"] is None else f"{row['top1']:.1f} %",
        )
    return table


def _labels_table(summary: Mapping[str, Any]) -> Table:
    labels = summary["labels"]
    table = _results("labels", "model", "labelled images", "bad", "mean confidence", "shards", "audited top-1")
    table.add_row(
        safe(labels["model"]),
        f"{labels['images']:,}",
        f"{sum(labels['bad'].values()):,}",
        "" if labels["mean_confidence"] is None else f"{labels['mean_confidence']:.3f}",
        f"{labels['shards'] - len(labels['failed']):,}",
        "".join(percent(one["accuracy"]) for one in summary["audits"]),
    )
    return table


def _detectors_table(summary: Mapping[str, Any]) -> Table:
    columns = ("model", "body", "body parameters", "box AP", "AP50", "mask AP", "AP50")
    table = _results(f"{summary['source']} images", *columns)
    for row in summary["detectors"]:
        figures = (row[name] for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50"))
        shown = ("" if value is None else percent(value) for value in figures)
        table.add_row(safe(row["name"]), safe(row["model"]), f"{row['body_parameters']:,}", *shown)
    return table


def _results(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("stage", "model") else "right")
    return table
