"""Workers on machines of their own: names that mean nothing, folders that are not shared, packages that are missing.

Each machine is a set of namespaces (namespaces.py), which takes root; skipped where that is not allowed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.ops.namespaces import Network, impossible, wait_until
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


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Network]:
    """A head, which does no work, and two machines of one core; each test says what is wrong with the second, and
    switches it on."""
    with Network(tmp_path / "net", ["head", "a", "b"], RAY) as network:
        network["head"].start(
            "ray start --head --num-cpus 0 --object-store-memory 100000000 --dashboard-host 0.0.0.0 "
            "--disable-usage-stats",
            cwd=str(ROOT),
        )
        join(network, "a")
        yield network


def join(network: Network, name: str) -> None:
    """Switch a machine on, which joins the head as soon as that is there."""
    again = f"ray start --address {network['head'].address}:6379 --num-cpus 1 --object-store-memory 100000000"
    network[name].start(f"until {again} --disable-usage-stats; do sleep 2; done")


def submitted(network: Network, output: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """A job of one teacher on both machines."""
    head = network["head"]
    status = ("ray", "status", "--address", f"{head.address}:6379")
    wait_until(lambda: "/2.0 CPU" in head.call(*status).stdout, 300, "two machines")
    words = ["jobs/smoke.yaml", f"output={output}", "workers.train=2", "generations=[]", "tracking.enabled=false"]
    return head.call("ray", "job", "submit", "--working-dir", ".", "--", *words, *settings, cwd=ROOT, seconds=1200)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """What the job said; `ray job submit` shows its last lines once more."""
    found = {line for line in done.stdout.splitlines() if line.startswith("error: ")} or {done.stdout + done.stderr}
    [line] = found
    return line


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("wrong", ["output", "package", "cache"])
def test_a_machine_that_lacks_something_is_named_before_training(cluster: Network, tmp_path: Path, wrong: str) -> None:
    shared, cache, second = tmp_path / "shared", tmp_path / "cache", cluster["b"]
    shared.mkdir()
    cache.mkdir()
    timm = Path(importlib.util.find_spec("timm").submodule_search_locations[0])  # type: ignore[union-attr,index]
    [record] = timm.parent.glob("timm-*.dist-info")
    second.hidden = {"output": [shared], "package": [timm, record], "cache": [cache]}[wrong]
    second.read_only = [cache] if wrong == "cache" else []
    join(cluster, "b")
    said = refusal(submitted(cluster, shared / "run", *([f"data.cache={cache}/c"] if wrong == "cache" else [])))
    assert said.startswith(f"error: the machine b ({second.address}): "), said
    expected = {
        "output": f"a worker on b does not see the driver's files in {shared}/run",
        "package": "timm is missing there; install this project there too",
        "cache": f"data.cache: {cache}/c cannot hold copies of shards: Read-only file system",
    }
    assert expected[wrong] in said


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", [DEBIAN, NOTHING], ids=["127.0.1.1", "no name"])
def test_rays_workers_meet_whatever_their_machines_are_called(cluster: Network, tmp_path: Path, names: str) -> None:
    """One of the machines is called so; the other one's name is right."""
    cluster["b"].hosts = names.format(name="b")
    join(cluster, "b")
    done = submitted(cluster, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run").glob("gen0-teacher-*/done.json"))
