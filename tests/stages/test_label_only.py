"""Jobs that only label: given weights, unlabelled shards, and the label stage's own files, whoever asks for them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import storage
from pipeline.cluster.inline import Inline
from pipeline.config.load import load_job
from pipeline.config.settings import to_plain
from pipeline.data import parquet_files
from pipeline.progress import Screen, console
from pipeline.runner import run
from pipeline.tracking.contract import NullTracker, StageRecord
from tests import small, tiny
from tests.data import tars
from tests.small import World, command

PASSING = ("seconds", "skipped", "host", "versions")  # of a label file's metadata: how it went


@pytest.fixture(scope="module")
def world(worlds: small.Store) -> World:
    """A finished run, which no test changes."""
    return worlds.original()


@pytest.fixture
def corpus(world: World, tmp_path: Path) -> Path:
    """Its unlabelled shards, and nothing beside them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in world.shards.glob("unlabelled-*.tar"):
        shutil.copy2(path, folder)
    return folder


def write_job(folder: Path, corpus: Path, checkpoint: Any, **changes: Any) -> Path:
    job = {
        "name": "labels",
        "output": str(folder / "out"),
        "cluster": "inline",
        "data": {"root": str(corpus), **changes.pop("data", {})},
        "teacher": {"checkpoint": str(checkpoint)},
        "generations": [{"label": {"batch": 8, **changes.pop("label", {})}}],
        "tracking": {"enabled": False},
        **changes,
    }
    path = folder / "labels.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def files(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """{label file: (its table, its metadata but for how long it took)}."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        metadata = parquet_files.read_metadata(str(path))
        found[path.name] = pq.read_table(path), {k: v for k, v in metadata.items() if k not in PASSING}
    return found


def stages(output: Path) -> list[str]:
    return sorted(path.parent.name.rpartition("-")[0] for path in output.glob("*/done.json"))


def only(output: Path, stage: str) -> Path:
    [found] = output.glob(f"{stage}-*")
    return found


def test_labels_are_those_of_a_whole_job(world: World, corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, without labelled, validation and test shards and without classes.json."""
    settings = yaml.safe_load(world.job.read_text()).get("label", {})
    job = write_job(tmp_path, corpus, world.folder("gen0-teacher"), label=settings)
    ran = command("run", job)
    assert (ran.status, ran.err) == (0, ""), ran
    out = tmp_path / "out"
    assert stages(out) == ["gen0-teacher", "gen1-label", "report"]
    assert only(out, "gen1-label").name == world.folder("gen1-label").name  # so a whole job finds it done
    found, expected = files(only(out, "gen1-label")), files(world.folder("gen1-label"))
    assert list(found) == list(expected) == ["unlabelled-000.parquet", "unlabelled-001.parquet"]
    for name, (table, metadata) in expected.items():
        assert found[name][0].schema.equals(table.schema, check_metadata=False)
        assert found[name][0].equals(table) and found[name][1] == metadata
    summary = json.loads(ran.out.splitlines()[-1])
    assert (summary["labels"]["images"], summary["labels"]["shards"], summary["audits"]) == (8, 2, [])
    assert summary["labels"]["dir"] == str(only(out, "gen1-label"))
    table = pandas.read_csv(only(out, "report") / "labels_by_class.csv")
    assert table["class"].tolist() == small.CLASSES and table["images"].sum() == 8
    page = (only(out, "report") / "index.html").read_text()
    assert "8 images of 2 shards labelled" in page and str(world.folder("gen0-teacher")) in page
    again = command("run", job)
    assert "all is done; nothing had to run" in again.out
    assert f"labels   {only(out, 'gen1-label')}" in again.out and "labelled images" in again.out
    # The run says itself what it is: status, plan and clean by its own job.yaml.
    assert "student" not in (out / "job.yaml").read_text()
    for verb, words in (("status", "8 images of 2 shards labelled"), ("plan", "done"), ("clean", "nothing to clean")):
        said = command(verb, out / "job.yaml")
        assert said.status == 0 and words in said.out, said


def test_labels_are_audited_where_there_are_validation_shards(world: World, tmp_path: Path) -> None:
    tars.shard(tmp_path / "audit" / "a.tar", 5, labels=[0, 1, 2, 0, 1], start=700)
    patterns = {"validation": "val-*.tar", "audit_only": str(tmp_path / "audit" / "*.tar")}
    job = write_job(tmp_path, world.shards, world.folder("gen0-teacher"), data=patterns, label={"calibrate": True})
    ran = command("run", job)
    assert (ran.status, ran.err) == (0, ""), ran
    out = tmp_path / "out"
    assert stages(out) == ["gen0-teacher", "gen1-audit", "gen1-label", "index", "report"]
    audit = json.loads((only(out, "gen1-audit") / "audit.json").read_text())
    expected = json.loads((world.folder("gen1-audit") / "audit.json").read_text())
    assert audit["sources"]["validation"] == expected["sources"]["validation"]
    assert audit["sources"]["audit_only"]["images"] == 5 and audit["images"] == 8
    metadata = [metadata for _, metadata in files(only(out, "gen1-label")).values()]
    assert [one["temperature"] for one in metadata] == [audit["temperature"]] * 2
    [audited] = json.loads(ran.out.splitlines()[-1])["audits"]
    assert audited["accuracy"] == audit["accuracy"]
    page = (only(out, "report") / "index.html").read_text()
    assert "On 8 images whose class is known" in page and "Reliability diagram" in page
    # Without them the temperature is that which the weights' own run found.
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    rows = {row["stage"]: row["validation"] for row in json.loads(tested.read_text())["models"]}
    alone = write_job(tmp_path, world.shards, world.folder("gen0-teacher"), label={"calibrate": True})
    assert command("run", alone, f"output={tmp_path}/alone").status == 0
    for _, found in files(only(tmp_path / "alone", "gen1-label")).values():
        assert found["temperature"] == rows["gen0-teacher"]["temperature"]
    loose = tmp_path / "loose"
    shutil.copytree(world.folder("gen0-teacher"), loose)
    unknown = command("run", alone, f"output={tmp_path}/unknown", f"teacher.checkpoint={loose}")
    assert unknown.status == 2 and "no run has measured how sure" in unknown.err


KILLED = """
import os, signal, sys, threading
from pipeline import cli
from pipeline.data import label_files
write, written, one_by_one = label_files.write_labels, [], threading.Lock()
def write_one(path, *rest):
    with one_by_one:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *rest)
        written.append(path)
label_files.write_labels = write_one
cli.main(sys.argv[1:])
"""


def test_predict_into_a_folder_goes_on_where_it_was_killed(world: World, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    words = ["predict", str(world.folder("gen0-teacher")), f"{corpus}/*.tar", "--out", str(out), "--raw"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words], cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed
    [first] = out.glob("gen1-label-*/*.parquet")
    before = first.stat().st_mtime_ns, first.stat().st_ino
    ran = command(*words)
    assert (ran.status, ran.err) == (0, ""), ran
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before and f"labels   {first.parent}\n" in ran.out
    expected = files(world.folder("gen1-label"))
    found = files(first.parent)
    assert list(found) == list(expected)
    assert all(found[name][0].equals(table) for name, (table, _) in expected.items())
    assert "all is done; nothing had to run" in command(*words).out
    for changed in (
        ["predict", world.folder("gen1-student"), *words[2:]],  # another model
        words[:-1],  # another temperature
        [*words, "--batch", "2"],
        ["predict", words[1], f"{corpus}/unlabelled-000.tar", *words[3:]],
    ):
        other = command(*changed)
        assert other.status == 2 and "holds the results of another model, temperature, batch" in other.err, other
    # Shards that come later are taken in where that is asked for.
    tars.shard(corpus / "unlabelled-002.tar", 2, start=500)
    assert "(unlabelled-002.tar); --refreeze" in " ".join(command(*words).out.split())
    assert command("run", out / "job.yaml", "--refreeze").status == 0
    grown = command(*words)
    assert "all is done; nothing had to run" in grown.out and f"labels   {first.parent}\n" not in grown.out
    assert len(list(out.glob("gen1-label-*/unlabelled-000.parquet"))) == 2


def test_predict_says_the_same_in_a_folder_as_in_a_table(world: World, corpus: Path, tmp_path: Path) -> None:
    """With the model's temperature; a picture that cannot be read is a row in both."""
    tars.make(corpus / "broken.tar", {"a.png": tars.picture(1), "b.jpg": b"<html>"})
    common = ("predict", world.folder("gen0-teacher"), corpus, "--out")
    assert command(*common, tmp_path / "found.parquet").status == 0
    ran = command(*common, tmp_path / "found")
    assert ran.status == 0, ran
    label = only(tmp_path / "found", "gen1-label")
    names = ("broken.parquet", "unlabelled-000.parquet", "unlabelled-001.parquet")
    rows = [row for name in names for row in pq.read_table(label / name).to_pylist()]
    table = pandas.read_parquet(tmp_path / "found.parquet")
    assert [row["key"] for row in rows] == table["key"].tolist()
    for row, one in zip(rows, table.to_dict("records"), strict=True):
        if row["status"] == "ok":
            assert small.CLASSES[row["label"]] == one["class"] and row["confidence"] == one["confidence"]
        else:
            assert one["problem"].startswith(row["status"]) and pandas.isna(one["class"])


def test_what_cannot_go_into_a_folder(
    world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(tars.picture(1))
    tars.make(tmp_path / "bad.tar", {"b.jpg": b"<html>"})
    run_, teacher, student = world.output, world.folder("gen0-teacher"), world.folder("gen1-student")
    for words, said in (
        ([run_, corpus, "--out", "full"], "is a folder with other things in it"),
        ([run_, corpus, "--out", run_], "holds the results of another model"),
        ([run_, "full", "--out", "new"], "is neither .csv nor .parquet"),
        ([run_, corpus, "--out", "new.csv", "--cluster", "embedded"], "--cluster is for shards that go into a folder"),
        ([run_, corpus, "--out", "new", "--batch", 0], "it takes at least one image"),
        ([run_, corpus, "--out", "new", "--device", "cuda"], "there is no GPU here"),
        ([run_, "gone-*.tar", "--out", "new"], "no shard matches gone-*.tar"),
        ([teacher, student, corpus, "--out", "new"], "without temperatures; add --raw"),
        (["models:/x@champion", corpus, "--out", "new"], "lies in MLflow"),
        ([tmp_path / "nowhere", corpus, "--out", "new"], "there is no trained model at"),
        ([run_, "bad.tar", "--out", "new"], "none of the images could be read; "),
    ):
        ran = command("predict", *words)
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert ran.status == 2 and len(errors) == 1 and said in errors[0], ran
        assert (tmp_path / "new").exists() == (said.startswith("none of"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"model": "lambda_resnet_tiny"}}, "for a job that only labels, the weights that do it"),
        ({"generations": [{}, {}]}, "none of the 2 generations has a student"),
        ({"select": {"threshold": 0.5}}, "has no student, but select.threshold is set, which is for students"),
        ({"min_gain": 0.5}, "has no student, but min_gain is set"),
        ({"finetune": {"resolution": 16}}, "has no student, but finetune.resolution is set"),
        (
            {"student": {"lr": 0.1}, "teacher": {"checkpoint": "x", "model": "y"}},
            "generations[0].student.model is not set",
        ),
        ({"evaluate": {"sizes": [16]}}, "evaluate.sizes is [16], which has no effect: a job that only labels"),
        ({"data": {"labelled": "a-*.tar"}}, "data.labelled is 'a-*.tar', which has no effect: a job that only labels"),
        ({"label": {"corpus": "selected"}}, "before the first generation nothing was selected"),
        ({"data": {"validation": "val-*.tar"}}, "no shard matches"),
        ({"teacher": {"checkpoint": "/nowhere"}}, "/nowhere"),
    ],
)
def test_a_forgotten_student_and_other_mistakes(
    world: World, corpus: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    job = write_job(tmp_path, corpus, world.folder("gen0-teacher"), **changes)
    ran = command("plan", job)
    assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran


def test_null_is_nothing_and_a_whole_job_needs_its_shards(world: World, corpus: Path, tmp_path: Path) -> None:
    nothing = {"labelled": None, "validation": None, "test": None}
    job = write_job(tmp_path, corpus, world.folder("gen0-teacher"), data=nothing)
    planned = command("plan", job)
    assert planned.status == 0 and [line.split()[0] for line in planned.out.splitlines() if "will run" in line] == [
        "gen0-teacher", "gen1-label", "report",
    ], planned  # fmt: skip
    for pattern, said in (("null", "data.unlabelled is not set"), ("gone-*.tar", "no shard matches")):
        ran = command("run", job, f"data.unlabelled={pattern}")
        assert ran.status == 2 and said in ran.err, ran
    for name in nothing:
        ran = world.call("plan", f"data.{name}=null")
        assert ran.status == 2 and f"data.{name} is null; it takes a value" in ran.err, ran


def test_weights_without_a_card_take_the_job_s_word(world: World, corpus: Path, tmp_path: Path) -> None:
    shutil.copy(world.folder("gen0-teacher") / "model.safetensors", tmp_path / "weights.safetensors")
    job = write_job(tmp_path, corpus, tmp_path / "weights.safetensors")
    teacher = yaml.safe_load(world.job.read_text())["teacher"]
    said = json.dumps({**teacher, "checkpoint": str(tmp_path / "weights.safetensors")})
    ran = command("run", job, f"teacher={said}")
    assert ran.status == 2 and "classes.json" in ran.err, ran
    shutil.copy(world.shards / "classes.json", corpus)
    ran = command("run", job)
    assert ran.status == 2 and "no model.yaml beside" in ran.err, ran
    ran = command("run", job, f"teacher={said}")
    assert ran.status == 0, ran
    expected = files(world.folder("gen1-label"))
    found = files(only(tmp_path / "out", "gen1-label"))
    assert all(found[name][0].equals(table) for name, (table, _) in expected.items())


def test_labels_by_number_mean_the_list_beside_them(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(world.shards, folder)
    (folder / "classes.json").write_text(json.dumps(["owl", "dog", "cat"]))
    job = write_job(tmp_path, folder, world.folder("gen0-teacher"), data={"validation": "val-*.tar"})
    ran = command("plan", job)
    assert ran.status == 2 and "lists other classes than the model.yaml of teacher.checkpoint" in ran.err, ran
    assert command("plan", job, "data.validation=null").status == 0  # then nobody reads it


class Recorder(NullTracker):
    """What the runner tells of models."""

    def __init__(self) -> None:
        self.models: list[Any] = []

    def end_stage(self, stage: StageRecord, *rest: Any) -> None:
        self.models.append(rest[-1])

    def end_job(self, *rest: Any, champion: str | None = None, **more: Any) -> None:
        self.models.append(champion)


def test_given_weights_are_no_new_version_of_a_registered_model(world: World, corpus: Path, tmp_path: Path) -> None:
    job = load_job(str(write_job(tmp_path, corpus, world.folder("gen0-teacher"))))
    tracker = Recorder()
    run(job, Inline(), tracker, Screen(console(), job.output, job.name, ["report"]))
    assert tracker.models == [None] * 4
    assert load_job(storage.join(job.output, "job.yaml")) == job and "student" not in to_plain(job)["generations"][0]
