"""One run at a time on a local output folder. Object stores: test_s3.py."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.storage.lock import LOCK_NAME, lock

HOLDER = """
import os, signal, sys
from pipeline.storage.lock import lock
with lock(sys.argv[1]):
    if os.fork() == 0:
        print("forked", flush=True)
        sys.stdin.read()  # lives until the test lets it go
        os._exit(0)
    signal.pause()
"""


def test_a_killed_run_is_not_held_on_by_a_process_forked_from_it(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, output], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "forked\n"
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        with lock(output):
            pass  # while the child waits for our pipe to be closed


def test_who_deletes_the_lock_file_lets_one_run_go_on(tmp_path: Path) -> None:
    with lock(str(tmp_path)) as first:
        first.check()
        (tmp_path / LOCK_NAME).unlink()
        first.check()  # it makes it again
        with pytest.raises(OutputError, match="is in use by process"), lock(str(tmp_path)):
            pass
        (tmp_path / LOCK_NAME).unlink()
        with lock(str(tmp_path)) as second:
            second.check()
            with pytest.raises(OutputError, match="was taken by another run while this one stood still"):
                first.check()
