"""Shared by all tests: one embedded Ray for the session, the test data, and the number of skipped tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def embedded_ray() -> Iterator[Any]:
    """An OnRay on an embedded Ray that all tests share (it takes seconds to start); started by its first use."""
    from pipeline.cluster.on_ray import OnRay

    cluster = OnRay("embedded", cpus=4)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real test data (NOISY_LAMBDA_TEST_DATA, default ../shared/data); skips where there is none."""
    path = Path(os.environ.get("NOISY_LAMBDA_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test data at {path} (NOISY_LAMBDA_TEST_DATA)")
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"skipped tests: {skipped}")
