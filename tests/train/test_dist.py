"""Joining the processes that torchrun starts."""

from __future__ import annotations

import pytest
import torch

from pipeline.cluster.world import join
from pipeline.errors import ConfigError


def test_more_processes_than_gpus_is_one_sentence(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(
            ConfigError, match=r"torchrun started 2 processes on a machine with 1 GPU\(s\); start one for each"
        ),
        join(),
    ):
        pass
