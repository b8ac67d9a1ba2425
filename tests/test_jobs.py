"""The job files that we ship: executable, loadable, and safe to hand to `ray job submit`."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from pipeline import config
from pipeline.plan import stages_of

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
SHEBANG = b"#!/usr/bin/env -S python -m pipeline run\n"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_is_executable_and_starts_with_the_shebang(path: Path) -> None:
    """Without the shebang an executable YAML is run as a shell script; with a BOM too."""
    assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0o111
    content = path.read_bytes()
    assert content.startswith(SHEBANG)
    assert b"\r" not in content
    lines = content.decode().splitlines()[1:]
    comment = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert all(word in comment for word in ("python -m pipeline", "Hardware", "Time", "Expect")), comment


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_loads(path: Path) -> None:
    job = config.load(str(path), ["data.root=/data"])
    if job.measure.models:
        assert [stage.name for stage in stages_of(job)] == ["measure"]
        return
    assert job.generations or path.stem.endswith("_control")
    assert [stage.name for stage in stages_of(job)][-2:] == ["evaluate", "report"]


def test_git_keeps_the_execute_bit() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "jobs"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("not a git checkout")
    assert all(line.startswith("100755") for line in listed.splitlines() if line.endswith(".yaml")), listed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf" / "recipe").glob("lambda_resnet_*.yaml")), ids=lambda path: path.stem
)
def test_recipes_name_their_model_and_resolution(path: Path) -> None:
    import yaml

    model, _, size = path.stem.rpartition("-")
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["model"], recipe["resolution"]) == (model, int(size))


def test_all_thirteen_rows_of_the_papers_table_are_there() -> None:
    """LambdaNetworks, table 20: (depth, size) -> RandAugment magnitude, dropout, stochastic depth."""
    import yaml

    table = {(50, 128): (10, 0.2, 0), (50, 160): (10, 0.2, 0), (101, 160): (10, 0.3, 0), (101, 192): (15, 0.2, 0),
             (152, 192): (15, 0.3, 0), (152, 224): (15, 0.3, 0.1), (152, 256): (15, 0.3, 0.1), (152, 288): (15, 0.3, 0.1),
             (270, 256): (15, 0.3, 0.1), (350, 256): (15, 0.3, 0.2), (350, 288): (15, 0.3, 0.2), (350, 320): (15, 0.3, 0.2),
             (420, 320): (15, 0.3, 0.2)}  # fmt: skip
    for (depth, size), (magnitude, dropout, stochastic_depth) in table.items():
        recipe = yaml.safe_load((ROOT / "conf" / "recipe" / f"lambda_resnet_{depth}-{size}.yaml").read_text())
        assert recipe["augment"] == f"rand-m{magnitude}-mmax{magnitude}-n2-p1"
        assert (recipe["dropout"], recipe["stochastic_depth"]) == (dropout, stochastic_depth)


def test_no_folder_is_needed_on_the_path(tmp_path: Path) -> None:
    """`plan` answers for the paper-scale job without its data."""
    env = {**os.environ, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "pipeline", "plan", "jobs/imagenet.yaml", f"data.root={tmp_path}",
               f"data.unlabelled={tmp_path}/**/*.tar", f"output={tmp_path}/out"]  # fmt: skip
    import sys

    command[0] = sys.executable
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gen2-student" in done.stdout
    assert "no shard matches" in " ".join(done.stdout.split())
    assert not (tmp_path / "out").exists()
