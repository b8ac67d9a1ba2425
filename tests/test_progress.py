"""What the screen says of time and numbers, and what `status` says of stages that have not begun."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from pipeline import progress as progress_module
from pipeline.progress import Screen, Times, clock, standing
from pipeline.tracking.journal import Journal
from tests import small


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (37.4, "0:37"), (130, "2:10"), (3700, "1:01:40")])
def test_seconds_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_bar_says_what_has_passed_and_what_is_left() -> None:
    now = 0.0
    progress = Progress(get_time=lambda: now)
    number = progress.add_task("", total=100)
    task = progress.tasks[0]
    assert Times().render(task).plain == "0:00 elapsed"
    for second in range(1, 38):
        now = float(second)
        progress.update(number, completed=second)
    assert Times().render(task).plain == "0:37 elapsed, 1:03 left"


def test_status_shows_no_rates_of_what_has_not_begun(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, until="gen1-audit")
    path = world.output / "progress.json"
    record = json.loads(path.read_text())
    record["stages"] = {name: facts for name, facts in record["stages"].items() if name in world.done()}
    path.write_text(json.dumps(record))
    [line] = [line for line in world.call("status").out.splitlines() if line.startswith("gen1-label")]
    assert line.split() == ["gen1-label", "missing"]


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "nothing done yet"),
        ({"step": 1200, "total": 10000, "eta": None, "latest": {}}, "1,200/10,000"),
        (
            {"step": 3, "total": 10, "eta": 3725.0, "latest": {"images_per_second": 1234.5, "bad": 1002}},
            "3/10  1,234 images/s  ETA 1:02:05  1,002 bad",
        ),
        ({"step": 3, "total": 10, "eta": 5.0, "latest": {"loss": 2.5}}, "3/10  loss 2.500  ETA 0:05"),
    ],
)
def test_how_far_a_stage_is_in_one_line(facts: dict[str, object], text: str) -> None:
    assert standing(facts) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_lines_with_the_time_while_a_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """And what is waited for, at once. On a terminal the bar shows all that."""
    monkeypatch.setattr(progress_module, "LOG_SECONDS", 0.1)
    monkeypatch.setattr(progress_module, "FOLLOW_SECONDS", 0.02)
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200, force_terminal=terminal), str(tmp_path), "job", ["gen1-label"])
    with screen.following("gen1-label", str(tmp_path)), Journal(str(tmp_path)) as journal:
        screen.say("waiting for room")
        screen.say("")
        journal.log(2, 8, images_per_second=40.0, bad=1)
        journal.flush()
        end = time.monotonic() + 30
        while "2/8" not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    lines = [line for line in out.getvalue().splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line)]
    if terminal:
        assert not lines
    else:
        assert lines[0].endswith("  waiting for room")
        assert re.search(r"  gen1-label  2/8  40 images/s  (ETA [\d:]+  )?1 bad$", lines[-1])
