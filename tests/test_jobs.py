"""The job files that we ship: executable, loadable, and safe to hand to `ray job submit`."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from pipeline.config.load import load_job
from pipeline.graph import stages_of
from tests.small import command

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
    assert all(word in comment for word in ("noisy-lambda", "Hardware", "Time", "Expect")), comment


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_loads(path: Path) -> None:
    given = ["teacher.checkpoint=/weights", "teacher.model=lambda_resnet_50"] if path.stem == "label_corpus" else []
    job = load_job(str(path), ["data.root=/data", *given])
    if job.labels_only:
        assert [stage.name for stage in stages_of(job)] == ["gen0-teacher", "gen1-label", "report"]
        return
    if job.measure.models:
        assert [stage.name for stage in stages_of(job)] == ["measure"]
        return
    if job.detects_only:
        assert [stage.name for stage in stages_of(job)][-2:] == ["detect-evaluate", "report"]
        return
    assert job.generations or path.stem.endswith("_control")
    last = [stage.name for stage in stages_of(job)][-3:]
    assert (
        last == ["evaluate", "robustness", "report"]
        if path.stem.startswith("robustness")
        else last[1:] == ["evaluate", "report"]
    )


def test_git_keeps_the_execute_bit() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "jobs"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("not a git checkout")
    assert all(line.startswith("100755") for line in listed.splitlines() if line.endswith(".yaml")), listed


def test_no_folder_is_needed_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` answers for the paper-scale job without its data."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    data = (f"data.root={tmp_path}", f"data.unlabelled={tmp_path}/**/*.tar")
    planned = command("plan", ROOT / "jobs" / "imagenet.yaml", *data, f"output={tmp_path}/out")
    assert (planned.status, planned.err) == (0, "")
    assert "gen2-student" in planned.out
    assert "no shard matches" in " ".join(planned.out.split())
    assert not (tmp_path / "out").exists()
