"""The real training loop on Ray's workers: what is killed goes on from its checkpoint; machines come, go and are taken
away with notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from pipeline import weights
from pipeline.cluster.contract import Resources
from pipeline.tracking import journal
from pipeline.train.loop import run
from tests.cluster.head import Head, ray_head
from tests.cluster.machines import machine
from tests.cluster.units import train_and_die
from tests.train.tiny import difference, make_spec, without_noise

ROOT = Path(__file__).resolve().parents[2]
TWELVE = without_noise(steps=12, checkpoint_every=3)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_spec(folder, "unused")
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(make_spec(data, folder, **TWELVE))
    return folder


def assert_same(folder: Path, undisturbed: Path) -> None:
    """As one worker's run that nobody disturbed, each step on record once."""
    ours, theirs = (weights.read_state(f"{where}/model.safetensors") for where in (folder, undisturbed))
    assert difference(ours, theirs) < 1e-5
    steps = [[r["step"] for r in journal.read(str(where))[0]] for where in (folder, undisturbed)]
    assert steps[0] == steps[1]


def test_a_killed_worker_goes_on_from_its_checkpoint(
    embedded_ray: Any, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    spec = make_spec(data, tmp_path, keep=4, **TWELVE)
    result = embedded_ray.fit(train_and_die, spec, resources=Resources(workers=2), folder=str(tmp_path))
    assert result["step"] == 12
    starts = sorted(float(path.name.rpartition("-")[2]) for path in tmp_path.glob("start-1-*"))
    assert len(starts) == 2
    killed = (tmp_path / "checkpoints" / "step-000006" / "manifest.json").stat().st_mtime
    assert starts[1] - killed < 60  # seen: under 10; a worker that only a timeout gives up would take minutes
    assert_same(tmp_path, undisturbed)


def test_a_killed_driver_goes_on_from_its_checkpoint(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from pipeline.cluster.contract import Resources
        from pipeline.cluster.on_ray import OnRay
        from tests.cluster.units import train_and_kill_driver
        from tests.train.tiny import make_spec, without_noise

        cluster, folder = OnRay("embedded", cpus=2), sys.argv[2]
        spec = make_spec(Path(sys.argv[1]), folder, **without_noise(steps=12, checkpoint_every=3))
        if sys.argv[3] == "dies":
            Path(folder, "driver").write_text(str(os.getpid()))
        cluster.fit(train_and_kill_driver, spec, resources=Resources(workers=2), folder=folder)
        cluster.close()
    """
    status = {}
    for way in ("dies", "lives"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(data), str(tmp_path), way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        status[way] = subprocess.run(command, env=environment, timeout=200, check=False).returncode
        (tmp_path / "driver").unlink(missing_ok=True)
    assert status == {"dies": -signal.SIGKILL, "lives": 0}
    assert_same(tmp_path, undisturbed)


@pytest.fixture
def head() -> Iterator[Head]:
    """A running cluster of one machine with one core."""
    with ray_head(ROOT, cpus=1) as found:
        yield found


@contextlib.contextmanager
def driver(head: Head, loop: str, folder: Path, patience: float = 180.0, **resources: Any) -> Iterator[Popen[str]]:
    """`fit` in a process of its own, for a process that was in one Ray cannot be in another: they differ in their
    settings.

    It prints the result, or the sentence of an error.
    """
    code = """
        import json, sys
        from pipeline.cluster import ray_train
        from pipeline.cluster.contract import Resources
        from pipeline.cluster.on_ray import OnRay
        from pipeline.errors import ClusterError
        from tests.cluster import units

        address, loop, folder, patience, resources = sys.argv[1:]
        ray_train.RESIZE_SECONDS = 5.0
        cluster = OnRay(address, patience=float(patience))
        try:
            found = cluster.fit(getattr(units, loop), folder, resources=Resources(**json.loads(resources)),
            folder=folder)
        except ClusterError as error:
            found = str(error)
        finally:
            cluster.close()
        print(json.dumps(found))
    """
    words = [head.address, loop, str(folder), str(patience), json.dumps(resources)]
    environment = {**head.env, "PYTHONPATH": str(ROOT)}
    with Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], env=environment, stdout=PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: Popen[str]) -> Any:
    printed, _ = process.communicate(timeout=200)
    return json.loads(printed)


@pytest.mark.timeout(600)
def test_workers_follow_the_machines(head: Head, tmp_path: Path) -> None:
    """One machine, then two, then one again."""
    with driver(head, "until_second_time_alone", tmp_path, workers=2, least=1) as process:
        wait_long(lambda: len(list(tmp_path.glob("world-1-*"))) == 1)
        with machine(head) as second:
            wait_long(lambda: len(list(tmp_path.glob("world-2-*"))) == 1)
            second.lose()
            assert answer(process) == {"world": 1}


@pytest.mark.timeout(600)
def test_workers_are_told_that_a_machine_will_be_taken_away(head: Head, tmp_path: Path) -> None:
    with machine(head), driver(head, "until_noticed", tmp_path, workers=2, notice=True) as process:
        wait_long(lambda: len(list(tmp_path.glob("start-*"))) == 2)
        drain(other_node(head), head)
        assert answer(process)["world"] == 2


def test_elastic_training_without_room_for_its_least_is_one_sentence(head: Head, tmp_path: Path) -> None:
    with driver(head, "until_noticed", tmp_path, patience=1.0, workers=4, least=2) as process:
        assert "no room in 1 s for 2 workers with 1 CPU" in answer(process)


def wait_long(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def other_node(head: Head) -> str:
    """The id of the machine that is not the head's."""
    command = ["ray", "list", "nodes", "--address", head.dashboard, "--format", "json"]
    listed = json.loads(subprocess.run(command, env=head.env, check=True, capture_output=True).stdout)
    [found] = [node["node_id"] for node in listed if node["state"] == "ALIVE" and not node["is_head_node"]]
    return found


def drain(node: str, head: Head) -> None:
    words = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = ["ray", "drain-node", "--address", head.address, *words, "--deadline-remaining-seconds", "120"]
    subprocess.run(command, env=head.env, check=True, capture_output=True)
