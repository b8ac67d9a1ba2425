"""The mirror in MLflow, with a real MLflow: its sqlite store, and its server that dies and comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.tracking import connection, mirror, registered, to_mlflow
from pipeline.tracking.contract import Dataset, StageRecord
from pipeline.tracking.journal import Journal
from pipeline.tracking.runs import batches, flatten, store_uri, within
from pipeline.tracking.to_mlflow import MlflowTracker
from tests.flaky_proxy import Fault, Proxy

for name, value in connection.ENVIRONMENT.items():  # for the test's own client too
    os.environ.setdefault(name, value)

import mlflow.store.tracking.sqlalchemy_store  # noqa: E402, F401 - not in two threads at the same time
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with one sqlite store for all tests here: creating its tables takes seconds."""
    return str(tmp_path_factory.mktemp("store"))


def connect(uri: str) -> Any:
    return MlflowClient(tracking_uri=uri)


def stage(output: str, name: str, **params: Any) -> StageRecord:
    return StageRecord(name, storage.join(output, name), params, {"workers": "2"})


def run_of(client: Any, folder: str) -> Any:
    run_id = storage.read_json(storage.join(folder, "mlflow.json"))["run_id"]
    if run_id is None:
        raise LookupError("no run yet")
    return client.get_run(run_id)


def steps(client: Any, run: Any, name: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, name)]


def wait_for(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline, reason = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (MlflowException, OSError, LookupError) as error:
            reason = str(error)
        time.sleep(0.05)
    raise AssertionError(f"it did not happen in time: {reason}")


def start(output: str, store: str | None, warnings: list[str] | None = None) -> MlflowTracker:
    tracker = MlflowTracker(output, uri=store, warn=print if warnings is None else warnings.append)
    tracker.start_job("digits", output, {"seed": 0}, {"cluster": "inline"})
    return tracker


def test_a_job_as_mlflow_sees_it(tmp_path: Path, store: str) -> None:
    output = str(tmp_path)
    teacher = stage(output, "gen0-teacher", model={"name": "tiny", "width": 8}, sizes=[1, 2])
    data = Dataset("labelled", "5395034016f1d760", "s3://key:secret@bucket/labelled-*.tar", "training", {"shards": 3})
    teacher = dataclasses.replace(teacher, title="gen0-teacher · ?", datasets=[data])
    tracker = start(output, store)
    tracker.start_stage(teacher)
    with Journal(teacher.folder) as journal:
        journal.log(0, 3, kind="start", labelled_per_step=50)
        for step in range(1, 4):
            journal.log(step, 3, loss=1.0 / step, phase="train", broken=float("nan"))
        journal.log(3, 3, top1=0.5)
    (tmp_path / "gen0-teacher" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "gen0-teacher" / "model.yaml").write_text("architecture: tiny\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    (tmp_path / "summary.json").write_text("{}")
    teacher = dataclasses.replace(teacher, title="gen0-teacher · tiny")
    tracker.end_stage(teacher, "finished", {"best_validation_top1": 0.5}, [str(tmp_path / "plots")], teacher.folder)
    student = stage(output, "gen1-student")
    tracker.start_stage(student)
    Path(student.folder).mkdir()
    for name in registered.FILES:
        shutil.copy(Path(teacher.folder, name), Path(student.folder, name))
    tracker.end_stage(student, "finished", {}, (), student.folder)
    tracker.add_figures(teacher.folder, {"test_top1": 0.75}, 1.5)
    told = ({"gain_points": 4.5}, [str(tmp_path / "summary.json")], teacher.folder, "| model | test top-1 |")
    tracker.end_job("finished", *told)
    tracker.close()

    client = connect(store_uri(output, store))
    parent, child = run_of(client, output), run_of(client, teacher.folder)
    assert (parent.info.run_name, child.info.run_name) == ("digits", "gen0-teacher · tiny")
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"model.name": "tiny", "model.width": "8", "sizes": "['1', '2']"}
    assert child.data.tags["workers"] == "2" and parent.data.tags["cluster"] == "inline"
    assert parent.data.params == {"seed": "0"} and parent.data.metrics == {"gain_points": 4.5}
    assert parent.data.tags["mlflow.note.content"] == "| model | test top-1 |"
    assert child.data.tags["noisy_lambda.labelled_per_step"] == "50"
    assert "labelled_per_step" not in child.data.metrics
    [used] = child.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source_type) == ("labelled", data.digest, "s3")
    assert json.loads(used.dataset.source) == {"uri": "s3://bucket/labelled-*.tar"}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    losses = client.get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    first = (tmp_path / "gen0-teacher" / "metrics.jsonl").read_text().splitlines()[1]
    assert json.loads(first)["time"] == losses[0].timestamp / 1000
    assert child.data.metrics["top1"] == 0.5 and child.data.metrics["test_top1"] == 0.75
    assert "broken" not in child.data.metrics and "phase" not in child.data.metrics
    assert [file.path for file in client.list_artifacts(child.info.run_id, "plots")] == ["plots/loss.png"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["summary.json"]
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.run_id == child.info.run_id
    assert client.get_model_version_by_alias("digits", "gen0-teacher").version == version.version
    assert client.get_model_version_by_alias("digits", "last").run_id == run_of(client, student.folder).info.run_id
    assert version.description == "test_top1 0.75"
    files = Path(version.source.removeprefix("file://")) / "data" / "noisy_lambda"
    assert sorted(file.name for file in files.iterdir()) == ["model.safetensors", "model.yaml"]
    assert (files / "model.yaml").read_text() == "architecture: tiny\ntemperature: 1.5\n"
    # The rerun of a done job has nothing to send, and another best model takes the alias.
    for champion, expected in ((teacher, teacher), (student, student), (student, student)):
        tracker = start(output, store)
        for record, figures in ((teacher, {"test_top1": 0.75}), (student, {"test_top1": 0.5})):
            tracker.end_stage(record, "finished", {}, (), record.folder)
            tracker.add_figures(record.folder, figures, None)
        gain = 4.5 if champion is teacher else -1.0
        tracker.end_job("finished", {"gain_points": gain}, (), champion.folder, f"take {champion.name}")
        tracker.close()
        parent = run_of(client, output)
        assert parent.data.metrics["gain_points"] == gain and parent.info.status == "FINISHED"
        assert parent.data.tags["mlflow.note.content"] == f"take {champion.name}"
        assert [point.value for point in client.get_metric_history(parent.info.run_id, "gain_points")][1:] == (
            [] if champion is teacher else [-1.0]
        )
        found = client.get_model_version_by_alias("digits", "champion").run_id
        assert found == run_of(client, expected.folder).info.run_id
        assert len(steps(client, run_of(client, teacher.folder), "test_top1")) == 1


def test_metrics_arrive_while_the_stage_runs_and_system_metrics_too(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_mlflow, "SYSTEM_SECONDS", 1.0)
    tracker, student = start(str(tmp_path), store), stage(str(tmp_path), "gen1-student")
    tracker.start_stage(student)
    client = connect(store_uri(str(tmp_path), store))
    with Journal(student.folder) as journal:
        for step in range(3):
            journal.log(step, loss=1.0)
            wait_for(lambda: step in steps(client, run_of(client, student.folder), "loss"))  # noqa: B023
        wait_for(lambda: run_of(client, student.folder).data.metrics["system/system_memory_usage_percentage"] > 0)
    tracker.end_stage(student, "failed", {}, [])
    tracker.end_job("failed", {}, [])
    tracker.close()
    assert run_of(client, student.folder).info.status == "FAILED"
    assert run_of(client, str(tmp_path)).info.status == "FAILED"


KILLED = """
import os, signal, sys, time
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.journal import Journal
from pipeline.tracking.to_mlflow import MlflowTracker
output, store, seen = sys.argv[1:]
tracker = MlflowTracker(output, uri=store, warn=print)
tracker.start_job("digits", output, {}, {})
old = StageRecord("old", output + "/old", {}, {})
tracker.start_stage(old)
stage = StageRecord("teacher", output + "/teacher", {"width": 8}, {"workers": "2"})
tracker.start_stage(stage)
journal = Journal(stage.folder)
for step in range(10):
    journal.log(step, loss=1.0)
while not os.path.exists(seen):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_same_runs_go_on_and_no_step_is_there_twice(tmp_path: Path, store: str) -> None:
    output, seen = str(tmp_path / "out"), tmp_path / "seen"
    killed = subprocess.Popen([sys.executable, "-c", KILLED, output, store, str(seen)])
    client = connect(store_uri(output, store))
    teacher = StageRecord("teacher", f"{output}/teacher", {"width": 99, "depth": 3}, {"workers": "4"})
    wait_for(lambda: len(steps(client, run_of(client, teacher.folder), "loss")) == 10)
    seen.touch()
    assert killed.wait() == -signal.SIGKILL
    before = run_of(client, teacher.folder)
    assert before.info.status == run_of(client, f"{output}/old").info.status == "RUNNING"
    client.log_metric(before.info.run_id, "loss", 1.0, step=10)  # as if killed before the answer to its last request

    tracker = start(output, store)
    tracker.start_stage(teacher)
    with Journal(teacher.folder) as journal:
        journal.truncate(6)
        for step in range(7, 15):
            journal.log(step, loss=2.0)
    tracker.end_stage(teacher, "finished", {}, [])
    tracker.end_job("finished", {}, [])
    tracker.close()
    after = run_of(client, teacher.folder)
    assert after.info.run_id == before.info.run_id
    assert steps(client, after, "loss") == list(range(15))
    assert after.data.params == {"width": "8", "depth": "3"}  # params cannot change, new ones are welcome
    assert after.data.tags["workers"] == "4"
    assert after.info.status == "FINISHED"
    assert run_of(client, f"{output}/old").info.status == "KILLED"


def test_closing_in_the_middle_leaves_killed_runs_that_the_next_run_continues(tmp_path: Path, store: str) -> None:
    output, data = str(tmp_path), Dataset("labelled", "5395034016f1d760", "/data/labelled-*.tar", "training")
    teacher = dataclasses.replace(stage(output, "teacher"), datasets=[data])
    client = connect(store_uri(output, store))
    for first, status in ((0, "KILLED"), (5, "FINISHED")):
        tracker = start(output, store)
        tracker.start_stage(teacher)
        with Journal(teacher.folder) as journal:
            for step in range(first, first + 5):
                journal.log(step, loss=1.0)
        if first:
            tracker.end_stage(teacher, "finished", {}, [])
            tracker.end_job("finished", {}, [])
        tracker.close()
        assert run_of(client, teacher.folder).info.status == run_of(client, output).info.status == status
    run = run_of(client, teacher.folder)
    assert steps(client, run, "loss") == list(range(10)) and len(run.inputs.dataset_inputs) == 1


def test_a_job_that_is_done_fills_another_store_as_it_was(tmp_path: Path, store: str) -> None:
    teacher = dataclasses.replace(stage(str(tmp_path), "teacher"), title="teacher · tiny")
    with Journal(teacher.folder) as journal:
        for step in range(3):
            journal.log(step, loss=1.0)
    book = Path(teacher.folder, "metrics.jsonl")
    records = [json.loads(line) for line in book.read_text().splitlines()]
    for record, at in zip(records, (1.7e9, 1.7e9 + 5, 1.7e9 + 60), strict=True):
        record["time"] = at
    book.write_text("".join(json.dumps(record) + "\n" for record in records))
    tracker = start(str(tmp_path), store)
    tracker.end_stage(teacher, "finished", {}, [])
    tracker.add_figures(teacher.folder, {"test_top1": 0.75}, None)
    tracker.end_job("finished", {"test_top1": 0.75}, [], note="good")
    tracker.close()
    client = connect(store_uri(str(tmp_path), store))
    run, parent = run_of(client, teacher.folder), run_of(client, str(tmp_path))
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    assert steps(client, run, "loss") == [0, 1, 2] and run.info.run_name == "teacher · tiny"
    assert run.data.metrics["test_top1"] == parent.data.metrics["test_top1"] == 0.75
    assert parent.data.tags["mlflow.note.content"] == "good"


def test_a_description_loses_its_last_lines_where_it_is_too_long() -> None:
    text = "| a |\n| b |\nnotes"
    assert within(text, len(text)) == text
    assert within(text, len(text) - 1) == "| a |\n| b |"
    assert within("abc", 2) == "ab"


DEMO = """
import os, sys
from pipeline.tracking.contract import StageRecord
from pipeline.tracking.journal import Journal
from pipeline.tracking.to_mlflow import MlflowTracker
output = sys.argv[1]
tracker = MlflowTracker(output, warn=print)
tracker.start_job("digits", output, {}, {})
stage = StageRecord("teacher", output + "/teacher", {}, {})
done = os.path.exists(stage.folder)
if not done:
    tracker.start_stage(stage)
    with Journal(stage.folder) as journal:
        journal.log(0, loss=1.0)
tracker.end_stage(stage, "finished", {"top1": 0.5}, [])
tracker.end_job("finished", {"gain": 1.0}, [])
tracker.close()
assert done or "mlflow" in sys.modules
assert not (done and "mlflow" in sys.modules), "a job that is done needs no mlflow"
"""


def test_it_is_silent_stays_in_the_output_and_a_done_job_does_not_import_mlflow(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out put", tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "HOME": str(elsewhere)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", DEMO, str(output)], cwd=elsewhere, env=environment, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(elsewhere.iterdir()) == []
    client = connect(f"sqlite:///{output}/mlflow.db")
    run = run_of(client, str(output / "teacher"))
    assert steps(client, run, "loss") == steps(client, run, "top1") == [0]
    assert run.info.artifact_uri.startswith((output / "mlartifacts").as_uri())


def test_stages_in_an_object_store(tmp_path: Path, store: str) -> None:
    output = f"memory://tracked-{uuid.uuid4().hex}"
    teacher = stage(output, "teacher")
    tracker = start(output, store)
    tracker.start_stage(teacher)
    with Journal(teacher.folder) as journal:
        journal.log(1, loss=1.0)
    storage.write_bytes(f"{output}/plots/a.html", b"a")
    for name in registered.FILES:
        storage.write_bytes(f"{teacher.folder}/{name}", b"b")
    tracker.end_stage(teacher, "finished", {}, [f"{output}/plots", f"{output}/plots/a.html"], teacher.folder)
    tracker.close()
    client = connect(store_uri(output, store))
    run = run_of(client, teacher.folder)
    assert steps(client, run, "loss") == [1]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["a.html", "model", "plots"]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/a.html"]
    storage.remove(output)


def test_an_artifact_that_cannot_be_sent_warns_and_does_not_hold_up_the_others(tmp_path: Path, store: str) -> None:
    warnings: list[str] = []
    tracker = start(str(tmp_path), store, warnings)
    bad, good = stage(str(tmp_path), "bad"), stage(str(tmp_path), "good")
    for record in (bad, good):
        tracker.start_stage(record)
        tracker.end_stage(record, "finished", {}, [str(tmp_path / "missing.png")] if record is bad else [])
    client = connect(store_uri(str(tmp_path), store))
    wait_for(lambda: run_of(client, good.folder).info.status == "FINISHED")
    tracker.close()
    assert len(warnings) == 1 and "missing.png" in warnings[0]


def test_a_rerun_says_how_many_records_were_left_and_sends_them_all(tmp_path: Path, store: str) -> None:
    left, new = stage(str(tmp_path), "left"), stage(str(tmp_path), "new")
    with Journal(left.folder) as journal:
        for step in range(1200):
            journal.log(step, loss=1.0)
    with Journal(new.folder) as journal:
        journal.log(0, loss=1.0)
    written = time.time()
    wait_for(lambda: time.time() > written + 0.002)  # a record knows its time to the millisecond
    for said in (["lacked 1,201 records of earlier runs; it has them all now"], []):
        warnings: list[str] = []
        tracker = start(str(tmp_path), store, warnings)
        tracker.end_stage(left, "finished", {}, [])
        tracker.start_stage(new)  # which was killed after its first record
        with Journal(new.folder) as journal:
            journal.log(1, loss=1.0)
        tracker.end_stage(new, "finished", {}, [])
        tracker.end_job("finished", {}, [])
        tracker.close()
        assert [warning.partition("/mlflow.db ")[2] for warning in warnings] == said
    client = connect(store_uri(str(tmp_path), store))
    assert steps(client, run_of(client, left.folder), "loss") == list(range(1200))


def test_what_fails_once_while_the_job_ends_is_sent_all_the_same(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, finish = ["lost"], mirror.Mirror.finish

    def finish_second_time(self: mirror.Mirror, *arguments: Any) -> None:
        if failures:
            wait_for(lambda: tracker.closing)
            raise MlflowException(failures.pop())
        finish(self, *arguments)

    tracker = start(str(tmp_path), store, [])
    teacher = stage(str(tmp_path), "teacher")
    tracker.start_stage(teacher)
    wait_for(lambda: storage.read_json(storage.join(teacher.folder, "mlflow.json"))["run_id"])
    client = connect(store_uri(str(tmp_path), store))  # not before: it would make the store's tables too
    monkeypatch.setattr(mirror.Mirror, "finish", finish_second_time)
    tracker.end_stage(teacher, "finished", {}, [])
    tracker.close()
    assert not failures and run_of(client, teacher.folder).info.status == "FINISHED"


def test_patience_does_not_wear_out_while_we_import(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(connection.time, "monotonic", lambda: now)
    asked = connection.Connection("http://nobody", print)
    now = 5.0
    assert asked.silent_for() == 5.0
    with asked.own_work():
        now = 500.0
        assert asked.silent_for() == 0.0
    now = 503.0
    assert asked.silent_for() == 3.0


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri("runs/a") == f"sqlite:///{tmp_path}/runs/a/mlflow.db"
    assert store_uri("s3://bucket/a", "tracking") == f"sqlite:///{tmp_path}/tracking/mlflow.db"
    assert store_uri("a", "sqlite:///here.db") == f"sqlite:///{tmp_path}/here.db"
    with pytest.raises(OutputError, match="MLFLOW_TRACKING_URI") as error:
        MlflowTracker("s3://key:secret@bucket/a", warn=pytest.fail)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert store_uri("s3://bucket/a") == "http://server:5000"


def test_settings_are_flat_and_hold_no_secrets() -> None:
    settings = {"data": {"root": "s3://key:secret@bucket/x?token=secret", "parts": ["http://u:secret@h/y"]}}
    flat = dict(flatten({**settings, "long": "x" * 9000, "odd name=": 1}))
    assert flat["data.root"] == "s3://bucket/x" and flat["data.parts"] == "['http://h/y']"
    assert len(flat["long"]) <= 6000 and flat["odd name_"] == "1"


def test_batches_hold_each_new_step_of_each_metric_once() -> None:
    records = [{"step": step, "total": 9, "time": 1.5, "a": step, "b@5": 0.5} for step in range(2000)]
    sent = {"a": 1499}
    points = [point for batch in batches([*records, *records], sent) for point in batch]
    assert max(len(batch) for batch in batches(records, sent)) <= 999
    assert [step for name, _, _, step in points if name == "a"] == list(range(1500, 2000))
    assert [step for name, _, _, step in points if name == "b_5"] == list(range(2000))
    assert points[0][2] == 1500


class Server:
    """A real MLflow server on loopback, with a fixed port and store, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200)

    def kill(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
def test_a_server_that_dies_costs_one_warning_and_gets_all_of_it_when_it_is_back(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(to_mlflow, "RETRY_SECONDS", 1.0)
    output, warnings = str(tmp_path / "out"), []
    teacher, student = stage(output, "teacher", width=8), stage(output, "student")
    client = connect(server.uri)
    slowest = 0.0

    def timed(call: Callable[..., None], *arguments: Any) -> None:
        nonlocal slowest
        began = time.monotonic()
        call(*arguments)
        slowest = max(slowest, time.monotonic() - began)

    # It dies in the middle of a stage and is back before the job ends: in this run.
    tracker = start(output, None, warnings)
    timed(tracker.start_stage, teacher)
    journal = Journal(teacher.folder)
    for step in range(50):
        journal.log(step, loss=1.0)
    wait_for(lambda: len(steps(client, run_of(client, teacher.folder), "loss")) == 50)
    server.kill()
    for step in range(50, 100):
        journal.log(step, loss=1.0)
    wait_for(lambda: warnings)
    journal.close()
    for name in registered.FILES:
        storage.write_bytes(storage.join(teacher.folder, name), b"model")
    timed(tracker.end_stage, teacher, "finished", {"top1": 0.5}, [], teacher.folder)
    timed(tracker.start_stage, student)
    server.start()
    wait_for(lambda: run_of(client, teacher.folder).info.status == "FINISHED")
    assert steps(client, run_of(client, teacher.folder), "loss") == list(range(100))
    assert client.get_model_version_by_alias("digits", "last").version == "1"

    # It dies again and stays dead until after the job: the next run of the job sends the rest.
    with Journal(student.folder) as journal:
        for step in range(1500):
            journal.log(step, loss=1.0, rate=0.1)
    wait_for(lambda: len(client.get_metric_history(run_of(client, student.folder).info.run_id, "loss")) == 1500)
    server.kill()
    with Journal(student.folder) as journal:
        for step in range(1500, 2000):
            journal.log(step, loss=1.0, rate=0.1)
    timed(tracker.end_stage, student, "finished", {}, [])
    timed(tracker.end_job, "finished", {}, [])
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 15 and slowest < 1
    assert len(warnings) == 1 and server.uri in warnings[0]
    assert tracker.unsent()[0] == "student"  # and the job, whose run it is in

    server.start()
    tracker = start(output, None)
    tracker.end_stage(teacher, "finished", {"top1": 0.5}, [], teacher.folder)
    tracker.end_stage(student, "finished", {}, [])
    tracker.end_job("finished", {}, [])
    tracker.close()
    assert tracker.unsent() == []
    for record, count in ((teacher, 100), (student, 2000)):
        run = run_of(client, record.folder)
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in history) == list(range(count))
        assert run.info.status == "FINISHED"
    assert run_of(client, output).info.status == "FINISHED"
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_a_server_that_never_answers_neither_blocks_nor_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as deaf:  # takes connections and never says a word
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        warnings: list[str] = []
        tracker = start(str(tmp_path), f"http://user:secret@127.0.0.1:{deaf.getsockname()[1]}", warnings)
        teacher = stage(str(tmp_path), "teacher")
        began = time.monotonic()
        tracker.start_stage(teacher)
        tracker.end_stage(teacher, "finished", {}, [])
        tracker.end_job("finished", {}, [])
        assert time.monotonic() - began < 1
        wait_for(lambda: warnings)
        tracker.close()
    assert len(warnings) == 1 and "secret" not in warnings[0]
    assert tracker.unsent()[0] == "teacher" and len(tracker.unsent()) == 2  # and its job


@pytest.mark.slow
def test_refused_requests_and_lost_answers_leave_no_step_out_and_none_twice(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_mlflow, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(to_mlflow, "POLL_SECONDS", 0.1)
    proxy, rng = Proxy("127.0.0.1", server.port), random.Random(3)
    faults = [*(Fault(status=status) for status in (401, 403, 429, 500)), Fault(lost=True), Fault(cut=1)]
    output, warnings = str(tmp_path / "out"), []
    data = Dataset("labelled", "5395034016f1d760", "/data/labelled-*.tar", "training")
    records = [dataclasses.replace(stage(output, name), datasets=[data]) for name in ("teacher", "student")]

    def end(tracker: MlflowTracker) -> None:
        for record in records:
            tracker.add_figures(record.folder, {"latency_ms": 2.5}, None)
        tracker.end_job("finished", {"gain_points": 4.5}, [], records[0].folder, "good")
        tracker.close()

    with proxy.faults(*(rng.choice([*faults, None, None]) for _ in range(1000))) as seen:
        tracker = start(output, proxy.url, warnings)
        for record in records:
            tracker.start_stage(record)
            with Journal(record.folder) as journal:
                for step in range(300):
                    journal.log(step, loss=1.0)
                    time.sleep(0.03)
            for name in registered.FILES:
                storage.write_bytes(storage.join(record.folder, name), b"model")
            tracker.end_stage(record, "finished", {"test_top1": 0.5}, [], record.folder)
        end(tracker)
    assert len(warnings) == 1 and len(seen) > 50
    tracker = start(output, proxy.url)
    for record in records:
        tracker.end_stage(record, "finished", {"test_top1": 0.5}, [], record.folder)
    end(tracker)
    proxy.close()
    client = connect(server.uri)
    for record in records:
        run = run_of(client, record.folder)
        assert steps(client, run, "loss") == list(range(300)) and run.info.status == "FINISHED"
        assert len(steps(client, run, "test_top1")) == len(steps(client, run, "latency_ms")) == 1
        assert len(run.inputs.dataset_inputs) == 1
    parent = run_of(client, output)
    assert len(steps(client, parent, "gain_points")) == 1 and parent.data.tags["mlflow.note.content"] == "good"
    assert (
        client.get_model_version_by_alias("digits", "champion").run_id == run_of(client, records[0].folder).info.run_id
    )
    experiment = client.get_experiment_by_name("noisy-lambda")
    assert len(client.search_runs([experiment.experiment_id])) == 3
    assert len(client.search_model_versions("name = 'digits'")) == 2
    assert run_of(client, output).info.status == "FINISHED"
