"""What the tests of training share: tiny shards, and a loader that each test leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.train import classification
from tests.train.pair import Pair
from tests.train.tiny import make_spec


@pytest.fixture(scope="session")
def gloo_pair() -> Iterator[Pair]:
    """The two workers of all tests that need two."""
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `make_spec`."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_spec(folder, "unused")
    return folder


@pytest.fixture(autouse=True)
def loader_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """`die_at` and its like replace it."""
    monkeypatch.setattr(classification, "batches", classification.batches)
