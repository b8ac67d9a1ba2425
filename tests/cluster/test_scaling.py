"""A cluster that grows while work waits or runs: what is asked of it, and whether what comes is used. Real heads."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.cluster.head import Head, ray_head
from tests.cluster.machines import machine
from tests.cluster.test_training import answer, driver, wait_long
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def head() -> Iterator[Head]:
    """A running cluster of one machine with one core."""
    with ray_head(ROOT, cpus=1) as found:
        yield found


def labelling(head: Head, folder: Path, most: int | None) -> Popen[str]:
    """`map` of 6 units that end when two machines work on them; prints on how many they ran, and all that was said."""
    code = """
        import sys
        from pipeline.cluster import actor_pool
        from pipeline.cluster.contract import Resources
        from pipeline.cluster.on_ray import OnRay
        from tests.cluster.units import make_meeting_worker

        address, folder, most = sys.argv[1:]
        actor_pool.GROWTH_SECONDS = 1.0
        units = [(str(n), folder) for n in range(6)]
        cluster = OnRay(address)
        found = list(cluster.map(make_meeting_worker, units, resources=Resources(most=int(most) or None)))
        cluster.close()
        print(len({outcome.value for outcome in found}), sorted(outcome.error or "" for outcome in found))
    """
    words = [head.address, str(folder), str(most or 0)]
    environment = {**head.env, "PYTHONPATH": str(ROOT)}
    return Popen([sys.executable, "-c", textwrap.dedent(code), *words], env=environment, stdout=PIPE, text=True)


def demand(head: Head) -> str:
    """What an autoscaler sees: what `ray status` says below Demands."""
    command = ["ray", "status", "--address", head.address]
    shown = subprocess.run(command, env=head.env, capture_output=True, text=True, check=False).stdout
    return shown.partition("Demands:")[2] or shown.partition("Pending Demands")[2]


@pytest.mark.parametrize("most", [None, 3])
def test_a_machine_that_is_added_while_it_labels_is_used(head: Head, tmp_path: Path, most: int | None) -> None:
    with labelling(head, tmp_path, most) as process:
        try:
            wait_long(lambda: len(list(tmp_path.iterdir())) == 1)
            if most:  # two of the three have no place
                wait_long(lambda: re.search(r"'CPU': 1.0.*: 2\+", demand(head)) is not None)
            with machine(head):
                out, _ = process.communicate(timeout=300)
                assert out.startswith("2 ['', "), out
        finally:
            process.kill()


def test_elastic_training_asks_for_all_its_places_while_it_waits(head: Head, tmp_path: Path) -> None:
    with driver(head, "until_second_time_alone", tmp_path, patience=60.0, workers=3, least=2) as process:
        wait_long(lambda: re.search(r"'CPU': 1.0.*: 2\+ pending placement groups", demand(head)) is not None)
        assert "no room in 60 s for 2 workers with 1 CPU and 0 GPU each" in answer(process)
