"""The job files handed to a real cluster, word for word as the README says: `ray job submit jobs/X.yaml` on a head that
was started in a copy of the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.head import Head, ray_head

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["noisy_lambda.py", "pipeline", "models", "jobs", "conf", "pyproject.toml"]


@dataclass(frozen=True)
class Place:
    """A copy of the repository and the head that was started in it."""

    tree: Path
    head: Head

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command in the copy, by someone who knows where the cluster is and nothing else."""
        return subprocess.run(
            words, cwd=self.tree, env=self.head.env, capture_output=True, text=True, check=False, timeout=1200
        )

    def status(self, submitted: subprocess.CompletedProcess[str]) -> str:
        """The job's status as `ray job status` has it; its own command ends with 0 for a stopped job too."""
        found = re.search(r"raysubmit_\w+", submitted.stdout)
        assert found, submitted.stdout + submitted.stderr
        shown = self.call("ray", "job", "status", found[0])
        match = re.search(r"\b(SUCCEEDED|FAILED|STOPPED|RUNNING|PENDING)\b", (shown.stdout + shown.stderr).upper())
        assert match, shown.stdout + shown.stderr
        return match[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    tree = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split("\0")  # fmt: skip
    # Without git (an unpacked archive) everything that lies there.
    names = [name for name in listed if name] or [
        path.relative_to(ROOT).as_posix() for top in COPIED for path in [ROOT / top, *(ROOT / top).rglob("*")]
    ]
    for name in names:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    with ray_head(tree) as head:
        yield Place(tree, head)


def summary(output: Path) -> dict[str, Any]:
    [path] = output.glob("report-*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("folder", "settings", "models"),
    [
        pytest.param(
            "smoke", [], ["gen0-teacher", "gen1-student", "gen2-student"], id="literally", marks=pytest.mark.slow
        ),
        pytest.param(
            "teacher",
            ["generations=[]", "output=runs/teacher", "cluster=inline"],
            ["gen0-teacher"],
            id="teacher only",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ray_job_submit_smoke(place: Place, folder: str, settings: list[str], models: list[str]) -> None:
    submitted = place.call("ray", "job", "submit", "jobs/smoke.yaml", *settings)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert place.status(submitted) == "SUCCEEDED"
    output = place.tree / "runs" / folder
    found = summary(output)
    assert found["job"] == "smoke"
    assert [stage["stage"] for stage in found["stages"]] == models
    assert json.dumps(found) in submitted.stdout  # what `run` printed came through
    assert (output / "mlflow.db").is_file()
    assert [path.name for path in output.glob("report-*/index.html")] == ["index.html"]


@pytest.mark.slow
def test_an_uploaded_job_needs_an_absolute_output(place: Place) -> None:
    submitted = place.call("ray", "job", "submit", "--working-dir", ".", "--", "jobs/smoke.yaml")
    assert submitted.returncode != 0
    assert place.status(submitted) == "FAILED"
    assert (
        "error: output 'runs/smoke' is relative, and this job runs in the directory that Ray unpacked"
        in submitted.stdout
    )
    assert "Traceback (most recent call last)" not in submitted.stdout


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["generations=[]", "cluster=inline"], id="teacher only", marks=pytest.mark.slow),
        pytest.param([], id="literally", marks=pytest.mark.slow),
    ],
)
def test_an_uploaded_job_with_an_absolute_output(place: Place, tmp_path: Path, settings: list[str]) -> None:
    output = tmp_path / "out"
    uploaded = ("ray", "job", "submit", "--working-dir", ".", "--", "jobs/smoke.yaml", f"output={output}")
    submitted = place.call(*uploaded, *settings)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert place.status(submitted) == "SUCCEEDED"
    assert summary(output)["job"] == "smoke"


@pytest.mark.slow
def test_our_submit_tells_success_failure_and_a_mistake_apart(place: Place, tmp_path: Path) -> None:
    ours = (sys.executable, "-m", "pipeline", "submit", "jobs/smoke.yaml", "generations=[]")
    output = tmp_path / "out"
    mistaken = place.call(*ours, f"output={output}", "teacher.lr=-1")
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("error: jobs/smoke.yaml") and "teacher.lr is -1" in mistaken.stderr
    assert mistaken.stderr.count("\n") == 1
    failed = place.call(*ours, f"output={output}", "teacher.model=lambda_resnet_tin", "cluster=inline")
    assert failed.returncode == 1
    assert "nearest are lambda_resnet_tiny" in failed.stdout
    assert "failed:" in failed.stderr and "exit code 2" in failed.stderr
    good = place.call(*ours, f"output={output}", "cluster=inline", "tracking.enabled=false")
    assert good.returncode == 0, good.stdout + good.stderr
    assert json.loads(good.stdout.splitlines()[-1]) == summary(output)


@pytest.mark.slow
def test_ray_job_submit_the_demo(place: Place) -> None:
    submitted = place.call("ray", "job", "submit", "jobs/noisy_student.yaml")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert place.status(submitted) == "SUCCEEDED"
    assert summary(place.tree / "runs" / "noisy_student")["gain_points"] > 0
