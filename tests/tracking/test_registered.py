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
from pipeline.plan import best, tracked
from tests import small, tiny
from tests.data import tars
from tests.small import World, command

FIGURES = ("latency_ms", "parameters", "flops")
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
        assert {name: run.data.metrics[name] for name in FIGURES} == {name: row[name] for name in FIGURES}
        assert run.info.run_name == f"{row['stage']} · {row['model']}"
        done = json.loads((folder / "done.json").read_text())["info"]["validation"]
        assert run.data.metrics["best_validation_top1"] == done["top1"]
        [version] = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        card = Path(version.source.removeprefix("file://"), "data", "noisy_lambda", "model.yaml").read_text()
        assert f"temperature: {best.temperature_of(str(folder))}" in card


def test_mlflow_shows_what_came_out_of_a_job_and_what_went_in(world: World) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{world.output}/mlflow.db")
    parent, student = (
        client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
        for folder in (world.output, world.folder("gen1-student"))
    )
    rows = json.loads((world.folder("evaluate") / "evaluate.json").read_text())["models"]
    summary = json.loads((world.folder("report") / "summary.json").read_text())
    [chosen] = [row for row in rows if row["stage"] == summary["best"]]
    shown = parent.data.metrics
    assert {name: shown[name] for name in FIGURES} == {name: chosen[name] for name in FIGURES}
    assert shown["test_top1"] == chosen["top1"] and shown["gain_points"] == summary["gain_points"]
    assert shown["best_validation_top1"] == chosen["validation"]["accuracy"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"index.html", "speed_accuracy.png"}

    note = parent.data.tags["mlflow.note.content"]
    assert all(sentence in note.split("\n\n") for sentence in summary["verdict"])
    table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in note.split("\n\n")[0].splitlines()]
    assert table[0] == ["model", *tracked.COLUMNS] and len(table) == 2 + len(rows)
    for cells, row in zip(table[2:], rows, strict=True):
        validation = row["validation"]
        gain = validation.get("gain")
        assert cells[:4] == [
            f"{row['stage']} · {row['model']}",
            f"{100 * validation['accuracy']:.2f} %",
            f"{gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})" if gain else "",
            f"{100 * row['top1']:.2f} %",
        ]

    # The student's data, by the digits that their folders and records have.
    used = {one.dataset.name: one.dataset for one in student.inputs.dataset_inputs}
    assert set(used) == {"labelled", "unlabelled", "gen1-label", "gen1-select"}
    content = json.loads((world.folder("index") / "done.json").read_text())["info"]["content"]
    assert used["labelled"].digest == content["labelled"][:16] == student.data.tags["noisy_lambda.labelled"]
    assert json.loads(used["unlabelled"].source) == {"uri": f"{world.shards}/unlabelled-*.tar"}
    assert json.loads(used["unlabelled"].profile)["shards"] == 2
    assert json.loads(used["gen1-label"].source) == {"uri": str(world.folder("gen1-label"))}
    assert student.data.params["batch"] == "4" and student.data.params["generation"] == "1"
    assert student.data.tags["noisy_lambda.steps_per_epoch"]
    assert not any(len(value) == 64 for value in {**student.data.params, **student.data.tags}.values())
    assert (
        student.data.tags["mlflow.source.git.commit"]
        == json.loads((world.folder("gen1-student") / "done.json").read_text())["info"]["commit"]
    )


def test_the_commit_is_that_of_the_working_folder(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        called = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    code = "from pipeline.plan import tracked; print(tracked.commit())"
    found = []
    env = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for command_ in ([], ["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        if command_:
            git(*command_)
        called = [sys.executable, "-c", code]
        ran = subprocess.run(called, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert ran.stderr == ""
        found.append(ran.stdout.strip())
    assert found == ["", "", git("rev-parse", "HEAD")]


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
