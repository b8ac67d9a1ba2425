"""A whole job under torchrun: the first process runs it, all train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.train import checkpoint
from tests import small, tiny


def torchrun(world: small.World, *settings: str, workers: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    job = ["-m", "pipeline", "run", str(world.job), f"output={world.output}", *settings]
    return subprocess.run(
        [*launch, *job], cwd=tiny.ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_a_job_on_ray_is_not_started_by_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ran = small.make(tmp_path).run("cluster=embedded")
    assert ran.status == 2
    assert "torchrun started this job, whose `cluster` is 'embedded'" in ran.err


@pytest.mark.slow
def test_a_job_trains_on_all_processes_and_one_runs_the_rest(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    done = torchrun(world)
    assert done.returncode == 0, done.stderr
    assert world.done() == world.stages
    [summary] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [stage["stage"] for stage in summary["stages"]] == ["gen0-teacher", "gen1-student"]
    for stage in ("gen0-teacher", "gen1-student"):
        found = checkpoint.latest(str(world.folder(stage)))
        assert found is not None and found.state["world_size"] == 2
    again = torchrun(world)
    assert again.returncode == 0, again.stderr
    assert "all is done" in again.stdout


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_its_sentence(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    failed = torchrun(world, "teacher.batch=1")
    assert failed.returncode != 0
    assert "error: 2 training workers share 1 images a step" in failed.stderr
    assert not list(world.output.glob("gen0-teacher-*/done.json"))
    assert torchrun(world).returncode == 0  # nothing holds the output
