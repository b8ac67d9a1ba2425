"""Folders that version 0.1.0 finished stay finished: the fingerprints that it gave, and a run folder that it left.

`evaluate` alone has other ones since it tests models on the validation images too, and `report` follows it.

`pinned/` holds jobs as they were then (the shipped ones may change), the fingerprints of all their stages from made-up
inputs, and a run: shards, job and output of `tests/small.py` with two generations, a fine-tune and further image sizes.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph
from pipeline.config.load import load_job
from pipeline.data import corrections
from pipeline.data.corpus import Corpus
from pipeline.data.shards import Shard
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, Stage, fingerprint, folder_of
from tests import small

PINNED = Path(__file__).parent / "pinned"
FINGERPRINTS: dict[str, dict[str, str]] = json.loads((PINNED / "fingerprints.json").read_text())


class MadeUp:
    """Corpora without shards."""

    classes = ("cat", "dog", "owl")
    corrections = corrections.NONE

    def __getitem__(self, name: str) -> Corpus:
        return Corpus(f"corpus of {name}", [Shard("", "", 0, f"{name} {number}", name) for number in range(2)], [])


def made_up(stage: Stage) -> Done:
    """What a stage might have left."""
    info: dict[str, Any] = {"seconds": 1.0}
    if stage.kind == "index":
        info["content"] = {name: f"content of {name}" for name in ("labelled", "validation", "test", "audit_only")}
    if stage.kind == "audit":
        info["temperature"] = 1.25
    if stage.kind in ("train", "finetune"):
        info |= {"view": {"size": 16, "crop": 0.875}, "validation": {"top1": 0.5}}
    name = stage.name
    return Done(name, f"/made/up/{name}", f"fingerprint of {name}", f"output of {name}", info)


def fingerprints(job: Any) -> dict[str, str]:
    done: dict[str, Done] = {}
    found = {}
    for stage in graph.in_order(job, done):
        found[stage.name] = fingerprint(stage.kind, graph.inputs_of(job, stage, done, MadeUp()))  # type: ignore[arg-type]
        done[stage.name] = made_up(stage)
    return found


def pinned_job(name: str) -> Any:
    """One of the pinned jobs; the files that they name are made in the working directory."""
    weights, stage = Path("weights.safetensors"), Path("stage")
    stage.mkdir()
    weights.write_bytes(b"weights")
    (stage / "model.safetensors").write_bytes(b"other weights")
    (stage / "model.yaml").write_bytes(b"a card")
    (stage / "evaluate.json").write_bytes(b"{}")
    settings = {
        "adopt": [f"teacher.checkpoint={weights}"],
        "adopt several": [f"teacher.checkpoint=[{weights}, {stage}]"],
        "measure": [f"measure.accuracy_from={stage}"],
    }
    return load_job(str(PINNED / f"{name.split()[0]}.yaml"), settings.get(name, []))


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_stage_has_the_fingerprint_that_0_1_0_gave(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fingerprints(pinned_job(name)) == FINGERPRINTS[name]


def test_the_demos_first_folders_have_their_old_names(tmp_path: Path) -> None:
    """Of real shards; the teacher's is another with each version of Pillow's encoder."""
    from pipeline.prepare.digits import digits

    job = load_job(str(PINNED / "demo.yaml"), [f"output={tmp_path}"])
    first, second = graph.stages_of(job)[:2]
    prepared = fingerprint(first.kind, graph.inputs_of(job, first, {}, MadeUp()))  # type: ignore[arg-type]
    folder = folder_of(job, first, prepared)
    digits(folder, seed=0, labels_per_class=5)
    done = {"prepare": Done("prepare", folder, prepared, prepared)}
    indexed = fingerprint(second.kind, graph.inputs_of(job, second, done, Corpora(job, done)))
    assert [prepared[:8], indexed[:8]] == ["ca59c8ed", "069a1a4c"]


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """shards/, small.yaml and out/ as 0.1.0 left them; time stamps count, and the archive has them."""
    with tarfile.open(PINNED / "run_0_1_0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run(folder: Path) -> small.Ran:
    return small.command("run", folder / "small.yaml", f"data.root={folder / 'shards'}", f"output={folder / 'out'}")


def test_a_run_folder_of_0_1_0_is_done(old_run: Path) -> None:
    ran = run(old_run)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("done before") == 11
    assert [line.split()[1] for line in ran.out.splitlines() if " finished " in line] == ["evaluate", "report"]
    assert "all is done; nothing had to run" in run(old_run).out


def test_the_job_yaml_of_0_1_0_can_be_run(old_run: Path) -> None:
    """It spells out what its bases set, settings without effect included."""
    job = old_run / "out" / "job.yaml"
    idle = job.read_text().replace("  momentum: 0.9\n", "  momentum: 0.8\n")
    assert "optimizer: adamw" in idle and idle != job.read_text()
    job.write_text(idle)
    planned = small.command("plan", job, f"data.root={old_run / 'shards'}", f"output={old_run / 'out'}")
    assert planned.status == 0, planned.err


def test_a_run_folder_of_0_1_0_is_continued(old_run: Path) -> None:
    """What is left is done from what is there, under the names that 0.1.0 would have given."""
    out = old_run / "out"
    lost = [path for stage in ("gen2-select", "gen2-student", "gen2-finetune") for path in out.glob(f"{stage}-*")]
    for path in lost:
        shutil.rmtree(path)
    ran = run(old_run)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("done before") >= 8
    # Weights are the same only where arithmetic rounds alike, so of these the first alone is certain to have its name.
    assert (out / lost[0].name / "done.json").exists()
    assert (out / lost[1].name / "done.json").exists()
