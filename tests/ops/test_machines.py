"""Workers on machines of their own: names that mean nothing, folders that are not shared, packages that are missing.

Each machine is a set of namespaces (namespaces.py), which takes root; skipped where that is not allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.ops.namespaces import Network, impossible
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(impossible()), reason=impossible())]

RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
DEBIAN, NOTHING = "127.0.0.1 localhost\n127.0.1.1 {name}\n", "127.0.0.1 localhost\n"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("names", [DEBIAN, NOTHING], ids=["127.0.1.1", "no name"])
def test_torchruns_processes_meet_whatever_their_machines_are_called(tmp_path: Path, names: str) -> None:
    code = """
        import torch
        from pipeline.cluster.world import join
        with join() as world:
            print("sum", world.sum(torch.ones(1)).item())
    """
    script = tmp_path / "meet.py"
    script.write_text("\n".join(line[8:] for line in code.splitlines()))
    with Network(tmp_path, ["a", "b"], {"PYTHONPATH": str(ROOT)}) as network:
        started = []
        for rank, one in enumerate((network["a"], network["b"])):
            one.hosts = names.format(name=one.name)
            one.start()
            there = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            there |= {"MASTER_ADDR": network["a"].address, "MASTER_PORT": "29500", "CUDA_VISIBLE_DEVICES": ""}
            command = one.enter(sys.executable, str(script), **there)
            started.append(Popen(command, stdout=PIPE, stderr=PIPE, text=True))
        try:
            for process in started:
                out, err = process.communicate(timeout=600)
                assert "sum 2.0" in out, err
        finally:
            for process in started:
                process.kill()
