"""Nothing that a run records holds a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config.load import load_job
from tests import small


def test_no_url_in_job_yaml_keeps_its_password(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    secret = "http://me:hunter2@tracking.example/path?token=hunter2"
    assert world.run(f"tracking.uri={secret}").status == 0
    written = (world.output / "job.yaml").read_text()
    assert "hunter2" not in written
    assert load_job(str(world.output / "job.yaml")).tracking.uri == "http://tracking.example/path"
    assert not [p for p in world.output.rglob("*.json") if "hunter2" in p.read_text()]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("https://host/a.tar?signature=x", "https://host/a.tar"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
        ("/local/what?", "/local/what?"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert storage.redact(url) == shown
