"""`python -m models`: a line a member, with the papers' figures in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models import list_models
from models.__main__ import HEADER, row


@pytest.mark.parametrize("name, cells", [
    ("lambda_resnet_101", ["192", "36.87", "11.29", "12.83"]),
    ("hybrid_resnet_50_cccc", ["224", "25.56", "8.18", "11.11"]),
    ("lambda_resnet_tiny", ["32"]),
])  # fmt: skip
def test_a_row(name, cells):
    line = row(name)
    assert line.split()[: 1 + len(cells)] == [name, *cells]
    assert len(line) == len(HEADER)


@pytest.mark.slow
def test_the_command_lists_every_member():
    done = subprocess.run([sys.executable, "-m", "models"], capture_output=True, text=True, check=True)
    header, *lines = done.stdout.splitlines()
    assert header == HEADER
    assert [line.split()[0] for line in lines] == list_models()
