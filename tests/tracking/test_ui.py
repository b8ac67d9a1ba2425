"""The command that opens MLflow on a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import socket
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.tracking import ui
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.to_mlflow import MlflowTracker


def test_the_command_names_the_store_by_absolute_path_and_stays_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(ui.command("runs/the demo"))
    assert words[:2] == ["mlflow", "ui"]
    assert words[words.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/runs/the demo/mlflow.db"
    assert words[words.index("--host") + 1] == "127.0.0.1"


def test_a_job_that_has_not_run_has_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(OutputError, match=r"there is no .*/run/mlflow\.db: this job has not run yet"):
        ui.ui(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            OutputError, match=rf"port {port} of 127\.0\.0\.1 cannot be had .*; name another with --port"
        ):
            ui.ui(str(tmp_path), port=port)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_it_prints_one_address_and_ends_quietly_with_all_that_it_started(tmp_path: Path, end: str) -> None:
    run = StageRecord("teacher", str(tmp_path / "teacher"), {}, {})
    tracker = MlflowTracker(str(tmp_path), warn=pytest.fail)
    tracker.start_job("digits", str(tmp_path), {}, {})
    tracker.start_stage(run)
    tracker.end_stage(run, "finished", {"test_top1": 0.5}, ())
    tracker.end_job("finished", {}, ())
    tracker.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import sys; from pipeline.tracking import ui; sys.exit(ui.ui({str(tmp_path)!r}, port={port}))"
    terminal, inner = pty.openpty()
    opened = subprocess.Popen(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inner)
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(terminal, 1000)
    [address] = re.findall(rf"http://127\.0\.0\.1:{port}/#/experiments/\d+/runs\S*", said.decode())
    assert urllib.request.urlopen(address.partition("#")[0]).status == 200
    if end == "Ctrl-C":
        os.write(terminal, b"\x03")
    else:
        opened.terminate()
    assert opened.wait(30) == 0
    rest = b""
    with contextlib.suppress(OSError):  # which is how the end of a terminal reads
        while found := os.read(terminal, 1000):
            rest += found
    os.close(terminal)
    assert rest.strip() in (b"", b"^C") and said.count(b"\n") == 1
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address.partition("#")[0])


def test_a_server_is_opened_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert ui.command("s3://bucket/run") == "http://127.0.0.1:5000"
    assert ui.ui("s3://bucket/run") == 0
    assert capsys.readouterr().out == "http://127.0.0.1:5000\n"
