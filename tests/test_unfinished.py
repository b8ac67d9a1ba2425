"""The report of a run that is not finished: pages of what there is, what is missing, and nothing of a stage touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline import graph
from pipeline.plan.context import Context
from pipeline.plan.stage import Result
from tests import small
from tests.test_cli import files


def page_of(world: small.World) -> str:
    return (world.output / "unfinished-report" / "index.html").read_text()


@pytest.mark.parametrize("until", ["index", "gen1-audit", "gen1-select", "evaluate"])
def test_there_is_a_report_after_a_stage(worlds: small.Store, tmp_path: Path, until: str) -> None:
    world = worlds.finished(tmp_path, until)
    before = files(world.output)
    ran = world.call("report")
    assert (ran.status, ran.err) == (0, ""), ran
    path, missing = ran.out.splitlines()
    assert path == str(world.output / "unfinished-report" / "index.html")
    after = small.STAGES[small.STAGES.index(until) + 1 :]
    assert missing == f"not finished: {', '.join(after)}"
    page = page_of(world)
    assert page.count("<td>not begun</td>") == len(after) and page.count("<td>done</td>") == 8 - len(after)
    assert ("So far gen" in page) == (until not in ("index", "evaluate"))
    assert ("<p>Take gen" in page) == (until == "evaluate")
    assert ("<h2><i" in page) == (until in ("gen1-select", "evaluate"))  # the generation's section
    assert {name: data for name, data in files(world.output).items() if "unfinished-report" not in name} == before
    again = world.call("report")
    assert again.out == ran.out and page_of(world) == page
    assert world.call("clean").out == "nothing to clean\n"


def test_of_a_finished_run_it_names_its_own(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, "gen1-select")
    world.call("report")
    world.run()
    ran = world.call("report")
    assert (ran.status, ran.out) == (0, f"{world.folder('report') / 'index.html'}\n"), ran
    assert not (world.output / "unfinished-report").exists()


def test_of_a_run_that_has_not_begun_there_is_none(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    ran = world.call("report")
    assert ran.status == 2 and f"no stage of tiny is finished in {world.output}, so there is nothing" in ran.err
    assert not world.output.exists()


def test_a_run_that_stops_says_how_to_see_what_there_is(
    worlds: small.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds.finished(tmp_path, "gen1-select")

    def stop(context: Context) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setitem(graph.KINDS, "train", dataclasses.replace(graph.KINDS["train"], run=stop))
    ran = world.run()
    assert ran.status == 130
    [line] = [line for line in ran.out.splitlines() if line.startswith("a report of what is finished: ")]
    words = line.removeprefix("a report of what is finished: noisy-lambda ").split()
    assert words == ["report", str(world.job), f"output={world.output}"]
    ran = small.command(*words)
    assert ran.status == 0 and "not finished: gen1-student (stopped), evaluate, report" in ran.out


def test_a_run_that_stops_before_anything_is_done_says_nothing_of_it(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    ran = world.run("data.labelled=nothing-*.tar")
    assert ran.status == 2 and "a report" not in ran.out
