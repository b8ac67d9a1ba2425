"""The import contracts of pyproject.toml hold, and each of them notices what it is there for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())"
BROKEN = [
    ("pipeline/labelling/teacher.py", "from pipeline.augment import view", "the teacher is never noised"),
    ("pipeline/data/shards.py", "from pipeline.plan import stage", "imports run one way, from room to room"),
    ("pipeline/room_without_a_place.py", "", "imports run one way, from room to room"),
    ("pipeline/selection/sort_keys.py", "from pipeline.selection import select", "rooms have no circles inside"),
    ("pipeline/selection/select.py", "import ray", "only pipeline.cluster imports ray"),
    ("pipeline/tracking/runs.py", "import mlflow", "only three modules of pipeline.tracking import mlflow"),
    ("pipeline/runner.py", "from pipeline.cluster.on_ray import OnRay", "back ends are handed in from above"),
    ("models/fold.py", "import numpy", "models/ is torch only"),
]


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [BROKEN[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in BROKEN[1:])],
    ids=lambda value: value if value.endswith(".py") else "",
)
def test_a_contract_that_is_broken_is_named(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for name in ("models", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / file
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    ran = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout
    verdicts = [text for text in ran.stdout.splitlines() if text.endswith((" KEPT", " BROKEN"))]
    assert len(verdicts) == 7
    assert next(text for text in verdicts if text.endswith(" BROKEN")).startswith(contract)
