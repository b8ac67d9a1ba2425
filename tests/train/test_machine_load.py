"""How much of the machine others take: the work of another process counts, our own does not."""

from __future__ import annotations

import subprocess
import sys
import time

from pipeline.train import machine_load

BURN = "import time\nwhile time.process_time() < 0.6: pass"


def test_what_another_process_works_is_seen() -> None:
    before = machine_load.now()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    after = machine_load.now()
    assert after.worked - before.worked > 0.5
    assert after.own - before.own < 0.3  # waiting for it is no work
    found = machine_load.since(before)
    assert found["others"] * found["seconds"] > 0.3 and found["others"] <= found["cores"]


def test_our_own_work_is_ours() -> None:
    before = machine_load.now()
    while time.process_time() and machine_load.now().own - before.own < 0.3:
        pass
    after = machine_load.now()
    assert after.own - before.own >= 0.3 and after.clock - before.clock >= 0.25
