"""The registered model of a real run, as people use it: loaded by MLflow, by us, and served."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import noisy_lambda
from pipeline.plan import best
from tests import small, tiny
from tests.data import tars
from tests.small import World, command

LOAD = """
import json, sys
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
images = [open(path, "rb").read() for path in sys.argv[2:]]
print(json.dumps(model.predict(pandas.DataFrame({"image": images})).to_dict("records")))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = small.make(tmp_path_factory.mktemp("registered"))
    assert made.run("tracking.enabled=true").status == 0
    return made


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(tars.picture(number))
    paths[1].write_bytes(b"<html>")
    return paths


def environment(world: World) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{world.output}/mlflow.db", "PYTHONPATH": str(tiny.ROOT)}


def expected(world: World, photos: list[Path]) -> list[dict[str, Any]]:
    return [
        {"label": one.label, "confidence": one.confidence, "problem": one.problem}
        for one in noisy_lambda.load(world.output).predict(photos)
    ]


def test_the_champion_loads_in_mlflow_and_by_name(
    world: World, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = [sys.executable, "-c", LOAD, "models:/tiny@champion", *map(str, photos)]
    done = subprocess.run(called, cwd=tmp_path, env=environment(world), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for one, other in zip(found, expected(world, photos), strict=True):
        assert one["label"] == other["label"] and one["problem"] == other["problem"]
        assert one["confidence"] == other["confidence"] or other["problem"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{world.output}/mlflow.db")
    ran = command("predict", "models:/tiny@champion", photos[0])
    assert ran.status == 0 and ran.out == command("predict", world.output, photos[0]).out, ran
    out = tmp_path / "found.parquet"
    for _ in range(2):  # it knows its model
        assert command("predict", "models:/tiny@champion", photos[0].parent, "--out", out).status == 0
    missing = command("predict", "models:/tiny@nobody", photos[0])
    assert missing.status == 2 and missing.err.startswith("error: cannot fetch models:/tiny@nobody from sqlite:///")


def test_mlflow_has_what_evaluate_says_of_each_model(world: World) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{world.output}/mlflow.db")
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    for row in json.loads(tested.read_text())["models"]:
        folder = world.folder(row["stage"])
        run = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
        assert run.data.metrics["test_top1"] == row["top1"]
        assert run.data.metrics["inference_images_per_second"] == row["images_per_second"]
        done = json.loads((folder / "done.json").read_text())["info"]["validation"]
        assert run.data.metrics["best_validation_top1"] == done["top1"]
        [version] = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        card = Path(version.source.removeprefix("file://"), "data", "noisy_lambda", "model.yaml").read_text()
        assert f"temperature: {best.temperature_of(str(folder))}" in card


@pytest.mark.slow
def test_the_served_model_answers_on_loopback(world: World, photos: list[Path], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    called = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/tiny@champion",
        "--env-manager",
        "local",
    ]
    env = {**environment(world), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        [*called, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=1)
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.2)
        records = [{"image": base64.b64encode(path.read_bytes()).decode()} for path in photos]
        body = json.dumps({"dataframe_records": records}).encode()
        asked = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        answer = json.loads(urllib.request.urlopen(asked, timeout=60).read())["predictions"]
        for one, other in zip(answer, expected(world, photos), strict=True):
            assert (one["label"], one["problem"]) == (other["label"], other["problem"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
