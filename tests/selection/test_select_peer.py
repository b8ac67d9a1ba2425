"""Selection equals DuckDB's window function, as benchmarks/select.py has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_selection_equals_duckdb_row_for_row(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="a peer of the bench extra")
    size = ["--rows", "40000", "--files", "6", "--classes", "9", "--fewer", "20000", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.select", *size, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differing_rows"] == 0 and found["selected_rows"] > 10_000
    assert found["ours"]["rows"] == 40000 and found["fewer"]["rows"] == 20000
