"""The command that opens MLflow on a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.tracking import ui


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


def test_a_server_is_opened_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert ui.command("s3://bucket/run") == "http://127.0.0.1:5000"
    assert ui.ui("s3://bucket/run") == 0
    assert capsys.readouterr().out == "http://127.0.0.1:5000\n"
