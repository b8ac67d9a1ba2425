"""What the screen says of time and numbers, and what `status` says of stages that have not begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.progress import Progress

from pipeline.progress import Times, clock
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
