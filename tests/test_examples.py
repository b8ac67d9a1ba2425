"""The worked examples of CONTRIBUTING.md, applied to a copy of the repository, where their own tests run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NEW = dict(re.findall(r"^`([\w./]+)`, new:\n\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
DIFFS = re.findall(r"^```diff\n--- ([\w./]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", "build", "dist", "*.xz")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "repository"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name, code in NEW.items():
        assert not (folder / name).exists(), name
        (folder / name).write_text(code)
    for name, lines in DIFFS:
        apply(folder / name, lines.splitlines())
    return folder


def apply(file: Path, lines: list[str]) -> None:
    """A diff without line numbers: what it keeps and removes must be in the file exactly once."""
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has {text.count(old)} places like\n{old}"
    file.write_text(text.replace(old, new))


def command(copy: Path, *words: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_examples_fit_the_code_and_are_written_as_it_is(copy: Path) -> None:
    assert len(NEW) == 4
    files = [*(name for name in NEW), *{name for name, _ in DIFFS}]
    command(copy, "ruff", "check", "--no-cache", *files)
    command(copy, "ruff", "format", "--no-cache", "--check", *files)


@pytest.mark.slow
def test_the_examples_pass_their_tests(copy: Path) -> None:
    tests = [name for name in NEW if name.startswith("tests/")]
    assert len(tests) == 2
    agree = ["tests/models/test_contraction.py::test_orders_agree_to_rounding_forward_and_backward"]
    listed = ["tests/models/test_choose_order.py"]
    command(copy, "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *tests, *agree, *listed)
