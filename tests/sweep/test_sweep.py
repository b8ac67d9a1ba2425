"""`noisy-lambda sweep` on two dozen images: what it shares, ranks and leaves, what fails, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_job
from pipeline.sweep import ranking, record
from tests import small, tiny
from tests.data import tars
from tests.small import World
from tests.test_cli import files

SETTINGS = ["select.threshold=0.0,0.2", "seed=0,1"]


def stage_folders(output: Path, kind: str = "") -> list[str]:
    return sorted(path.parent.name for path in output.glob(f"{kind}*/done.json"))


def found(output: Path) -> dict[str, Any]:
    [path] = output.glob("sweep-*/sweep.json")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, small.Ran]:
    world = small.make(tmp_path_factory.mktemp("sweep"))
    ran = world.call("sweep", *SETTINGS)
    assert (ran.status, ran.err) == (0, ""), ran
    return world, ran


def test_what_is_equal_is_made_once_and_no_model_is_tested(swept: tuple[World, small.Ran]) -> None:
    world, ran = swept
    made = {kind: len(stage_folders(world.output, kind)) for kind in ("index", "gen0", "gen1-l", "gen1-sel", "gen1-st")}
    assert made == {"index": 1, "gen0": 2, "gen1-l": 2, "gen1-sel": 4, "gen1-st": 4}
    assert ran.out.count("▸") == len(stage_folders(world.output)) == 17  # and four audits
    assert "17 stages to run; 7 shared with an earlier combination, 0 done before" in ran.out
    assert not {path.name for path in world.output.iterdir()} & {"job.yaml", "progress.json"}
    assert "evaluate" not in ran.out


def test_the_ranking_is_that_of_the_students_validation(swept: tuple[World, small.Ran]) -> None:
    world, ran = swept
    told = found(world.output)
    for one in told["combinations"]:
        assert one["state"] == "done" and one["stage"].startswith("gen1-student") and one["stage"] in one["folders"]
        done = json.loads((world.output / one["stage"] / "done.json").read_text())
        assert one["top1"] == done["info"]["validation"]["top1"]
    for entry in told["ranking"]:
        top1 = [told["combinations"][number]["top1"] for number in entry["members"]]
        assert entry["top1"] == statistics.fmean(top1) and entry["error"] == statistics.stdev(top1) / 2**0.5
        assert {told["combinations"][n]["settings"]["seed"] for n in entry["members"]} == {"0", "1"}
    assert [entry["top1"] for entry in told["ranking"]] == sorted((e["top1"] for e in told["ranking"]), reverse=True)
    assert json.loads(ran.out.splitlines()[-1]) == {name: told[name] for name in told if name != "sha256"}
    page = next(world.output.glob("sweep-*/index.html")).read_text()
    assert "select.threshold" in page and "data:image/png" in page and told["ranking"][0]["settings"] != {}


def test_the_best_job_is_one_that_run_finds_trained(swept: tuple[World, small.Ran]) -> None:
    world, _ = swept
    told = found(world.output)
    best = told["combinations"][told["ranking"][0]["members"][0]]
    [path] = world.output.glob("sweep-*/best.yaml")
    said = [f"{key}={value}" for key, value in best["settings"].items()]
    assert load_job(str(path)) == load_job(str(world.job), [f"output={world.output}", *said])
    planned = small.command("plan", path).out
    assert [line.split()[0] for line in planned.splitlines() if "will run" in line] == ["evaluate", "report"]


def test_other_commands_know_of_it(swept: tuple[World, small.Ran]) -> None:
    world, _ = swept
    before = files(world.output)
    again = world.call("sweep", *SETTINGS)
    assert again.status == 0 and "all is done; nothing had to run" in again.out and "▸" not in again.out
    stages = {name: at for name, at in before.items() if not name.startswith((".", "sweep-"))}
    assert {name: at for name, at in files(world.output).items() if not name.startswith((".", "sweep-"))} == stages
    status = world.call("status").out
    assert "has not run" in status and re.search(r"sweep-\w{8}: 4 of 4 combinations are done; best select", status)
    told, [best] = found(world.output), world.output.glob("sweep-*/best.yaml")
    kept = small.command("clean", best).out
    assert "nothing to clean" in kept and "of sweeps are kept; --sweeps cleans them too" in kept
    listed = small.command("clean", best, "--sweeps").out
    mine = told["combinations"][told["ranking"][0]["members"][0]]["folders"]
    assert {line.split()[-1] for line in listed.splitlines()[:-1]} == set(stage_folders(world.output)) - set(mine)
    with pytest.raises(Exception, match=r"holds a sweep and no run yet: `noisy-lambda run .*best\.yaml`"):
        from pipeline.predict import choose

        choose.find(str(world.output), lambda text: None)


def test_a_combination_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    ran = world.call("sweep", "teacher.lr=1e30,0.01", "teacher.weight_decay=0.0,0.1")  # no loss is finite after a step
    assert ran.status == 2, ran
    told = found(world.output)
    assert ran.err == (
        "error: 2 of 4 combinations failed, teacher.lr=1e30 teacher.weight_decay=0.0 first; "
        f"{told['report']} says why, and the same command tries again what failed\n"
    )
    assert [one["state"] for one in told["combinations"]] == ["failed", "failed", "done", "done"]
    assert "became nan" in told["combinations"][0]["error"] and told["combinations"][0]["top1"] is None
    assert [entry["settings"]["teacher.lr"] for entry in told["ranking"]] == ["0.01", "0.01"]
    assert len(stage_folders(world.output, "gen0-teacher")) == 2


def test_a_shared_stage_that_fails_is_not_tried_for_each(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.make(world.shards / "unlabelled-000.tar", {f"{number}.jpg": b"<html>" for number in range(4)})
    ran = world.call("sweep", "select.threshold=0.0,0.1,0.2")
    assert ran.status == 2 and "3 of 3 combinations failed" in ran.err, ran
    assert ran.out.count("▸ gen1-label") == 1
    assert len({one["error"] for one in found(world.output)["combinations"]}) == 1
    assert not list(world.output.glob("sweep-*/best.yaml"))


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_finds_the_same(swept: tuple[World, small.Ran], tmp_path: Path) -> None:
    world = small.make(tmp_path)
    words = [sys.executable, "-m", "pipeline", "sweep", str(world.job), f"output={world.output}", *SETTINGS]
    trained: dict[str, int] = {}
    for wanted in ("gen0-teacher-*/metrics.jsonl", "gen1-select-*/done.json", "gen1-student-*/done.json"):
        process = subprocess.Popen(words, cwd=tiny.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(world.output.glob(wanted)):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for path in world.output.glob("*/done.json"):
            assert trained.setdefault(path.parent.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        begun = {path.parent.name for path in world.output.glob("gen*/metrics.jsonl")}
        assert begun <= record.folders(str(world.output))
        assert not begun & set(world.call("clean", "seed=9").out.split())
    ran = world.call("sweep", *SETTINGS)
    assert (ran.status, ran.err) == (0, "")
    assert all((world.output / name / "done.json").stat().st_mtime_ns == at for name, at in trained.items())
    mine, undisturbed = found(world.output), found(swept[0].output)
    for one, other in zip(mine["combinations"], undisturbed["combinations"], strict=True):
        names, others = (
            [name for name in its["folders"] if "index" not in name] for its in (one, other)
        )  # time stamps
        assert one["top1"] == other["top1"] and names == others and len(names) == 5
    assert [one["settings"] for one in mine["ranking"]] == [one["settings"] for one in undisturbed["ranking"]]


@pytest.mark.slow
def test_mlflow_has_one_run_for_all_and_each_stage_once(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    world = small.make(tmp_path, tracking={"enabled": True})
    ran = world.call("sweep", *SETTINGS)
    assert ran.status == 0, ran
    client = MlflowClient(f"sqlite:///{world.output}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len(children) == len(stage_folders(world.output))
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.info.run_name == "tiny · sweep" and parent.data.params["sweep.seed"] == "0, 1"
    assert parent.data.metrics["best_validation_top1"] == found(world.output)["ranking"][0]["top1"]
    assert "select.threshold" in parent.data.tags["mlflow.note.content"]


# ---- ranking ------------------------------------------------------------------------------------------------------


def combination(top1: float | None, **settings: str) -> dict[str, Any]:
    state = "failed" if top1 is None else "done"
    return {"settings": settings, "state": state, "top1": top1, "images": 400, "validation": "v"}


def test_a_seed_is_a_repetition_and_what_failed_in_part_comes_last() -> None:
    ranked = ranking.entries(
        [
            combination(0.95, lr="1", seed="0"),
            combination(None, lr="1", seed="1"),
            combination(0.70, lr="2", seed="0"),
            combination(0.74, lr="2", seed="1"),
            combination(0.80, lr="3", seed="0"),
            combination(0.80, lr="3", seed="1"),
            combination(None, lr="4", seed="0"),
        ]
    )
    assert [(entry.settings["lr"], list(entry.members), entry.failed) for entry in ranked] == [
        ("3", [4, 5], 0),
        ("2", [2, 3], 0),
        ("1", [0], 1),
    ]
    assert ranked[1].top1 == pytest.approx(0.72) and ranked[1].error == pytest.approx(0.02)
    assert ranked[2].error is None


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        ([0.90, 0.90], "Chance of 400 validation images may explain its lead over the other (95 %): seeds"),
        ([0.90, 0.87], "may explain its lead over the other"),
        ([0.90, 0.70], "Its lead is more than chance of 400 validation images explains (95 %)."),
        ([1.0, 0.999], "may explain its lead over the other"),
        ([0.90, 0.89, 0.5, 0.88], "may explain its lead over 2 of the 3 others"),
    ],
)
def test_what_chance_may_explain(top1: list[float], said: str) -> None:
    combinations = [combination(value, lr=str(number)) for number, value in enumerate(top1)]
    assert said in ranking.sentences(ranking.entries(combinations), combinations)[1]


def test_equal_seeds_prove_nothing() -> None:
    combinations = [combination(0.5, lr=lr, seed=seed) for lr in "12" for seed in "01"]
    assert "may explain its lead over the other (95 %): more seeds" in " ".join(
        ranking.sentences(ranking.entries(combinations), combinations)
    )
