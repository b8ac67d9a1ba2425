"""`select.max_noise` in whole small runs: what is kept, what is redone, and generations that are not run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import graph, storage
from pipeline.config.load import load_job
from pipeline.plan import early_stop
from pipeline.plan.stage import Done
from tests import small
from tests.data import tars
from tests.small import World


def finished(world: World) -> set[str]:
    return {path.parent.name.rpartition("-")[0] for path in world.output.glob("*/done.json")}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three validation images, of which nothing can be promised."""
    generations = [{"student": {}}, {"student": {}}]
    world = small.make(tmp_path_factory.mktemp("stopped"), generations=generations, select={"max_noise": 0.05})
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def test_where_no_threshold_will_do_the_run_ends_in_order(stopped: World) -> None:
    assert finished(stopped) == {"index", "gen0-teacher", "gen1-audit", "evaluate", "report"}
    why = "in no class does a threshold keep the share of wrong labels by the teacher below max_noise 0.05; raise it"
    again = stopped.run()
    assert again.status == 0 and "all is done; nothing had to run" in again.out
    assert f"generations 1 to 2 not run {why}" in " ".join(again.out.split())
    assert json.loads(again.out.splitlines()[-1])["stop"] == {"after_generation": 0, "max_noise": 0.05}
    assert f"Generations 1 to 2 not run: {why}" in (stopped.folder("report") / "index.html").read_text()
    for verb in ("plan", "status"):
        assert "generations 1 to 2 not run" in " ".join(stopped.call(verb).out.split())


def test_plan_shows_what_other_rules_would_keep_before_a_student_is_trained(stopped: World) -> None:
    shown = " ".join(stopped.call("plan").out.split())
    assert "What would be kept, judged on 3 images whose class is known" in shown
    assert "confidence ≥ 0 100.0 %" in shown and "noise ≤ 5 % 0.0 %" in shown


def test_the_rule(stopped: World) -> None:
    """An audit that found nothing ends the line; the generations before it stay."""
    job = load_job(str(stopped.job), ["min_gain=-100"])

    def done(**info: float) -> dict[str, Done]:
        top1 = {"validation": {"top1": 0.5}}
        found = {name: Done(name, "", "", "", top1) for name in ("gen0-teacher", "gen1-student")}
        return found | {"gen2-audit": Done("gen2-audit", "", "", "", info)}

    assert early_stop.find(job, done()) is None
    stop = early_stop.find(job, done(too_noisy=0.02))
    assert stop and stop.plain() == {"after_generation": 1, "max_noise": 0.02} and "by student 1" in str(stop)
    names = [stage.name for stage in graph.stages_of(job, done(too_noisy=0.02))]
    assert names[-4:] == ["gen1-student", "gen2-audit", "evaluate", "report"]


@pytest.mark.slow
def test_what_is_kept_is_at_or_above_the_thresholds_of_the_audit(tmp_path: Path) -> None:
    world = small.make(tmp_path, select={"max_noise": 0.8})
    tars.shard(world.shards / "val-000.tar", 60, labels=[0, 1, 2] * 20, start=100)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    audited = storage.read_json(str(world.folder("gen1-audit") / "audit.json"))
    least = [2.0 if one is None else one for one in audited["level"]["thresholds"]]
    assert audited["threshold"] is None and audited["max_noise"] == 0.8 and min(least) < 2
    for shard in ("unlabelled-000.parquet", "unlabelled-001.parquet"):
        rows = pq.read_table(world.folder("gen1-label") / shard, columns=["label", "confidence"]).to_pydict()
        sure = np.array(rows["confidence"], np.float32) >= np.array(least, np.float32)[rows["label"]]
        assert pq.read_table(world.folder("gen1-select") / shard)["index"].to_pylist() == np.flatnonzero(sure).tolist()
    page = (world.folder("report") / "index.html").read_text()
    assert "What would be kept, judged on 60 images whose class is known" in page
    assert "sure enough for max_noise" in page
    summary = json.loads((world.folder("report") / "summary.json").read_text())
    [figures] = summary["audits"]
    assert figures["expected_low"] < figures["expected_noise"] < figures["expected_high"]
    assert "What would be kept" not in world.call("plan").out  # the student is trained
    job = load_job(str(world.job), [f"output={world.output}", "select.max_noise=0.79"])
    states = {look.stage.name: look.done is not None for look in graph.look(job)}
    assert not states["gen1-audit"] and not states["gen1-select"] and states["gen1-label"]
