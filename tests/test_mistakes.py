"""Generated mistakes and damage: every command ends in exit status 0, or in 2 with one line, never in a traceback."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import small
from tests.conftest import ROOT
from tests.small import World, command

DEEP = b"[" * 100_000
NONSENSE = {"nothing": b"", "half": b"{", "no text": b"\xff\x00\x00", "null": b"null", "list": b"[1]", "deep": DEEP}
FILES = [
    "gen1-label-*/done.json", "index-*/done.json", "progress.json", "corpus-*.json", "index-*/shards.json",
    "**/mlflow.json", "**/metrics.jsonl", "gen0-teacher-*/model.yaml", "evaluate-*/evaluate.json",
    "gen1-select-*/summary.json", "gen1-student-*/result.json",
]  # fmt: skip
SLOW = ("nothing", "no text", "null", "deep", "list")
COMMANDS = ("run", "plan", "clean", "status")


def mostly(*names: str) -> list[Any]:
    """The commands, of which only some run in `make test`."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


def ends_well(world: World, name: str, *settings: str) -> str:
    """What was said on standard error."""
    ran = command(name, world.job, f"output={world.output}", *settings)
    assert ran.status in (0, 2), (name, ran)
    assert "Traceback" not in ran.out + ran.err
    assert ran.status == 0 or (ran.err.startswith("error: ") and ran.err.count("\n") == 1), (name, ran.err)
    return ran.err


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in NONSENSE])
@pytest.mark.parametrize("file", [*FILES[:4], *(pytest.param(file, marks=pytest.mark.slow) for file in FILES[4:])])
def test_nonsense_in_a_file_of_the_run_folder(worlds: small.Store, tmp_path: Path, file: str, kind: str) -> None:
    world = worlds.finished(tmp_path, until="evaluate")
    for path in world.output.glob(file):
        path.write_bytes(NONSENSE[kind])
    for name in ("plan", "status", "clean", "run"):
        ends_well(world, name)


def gone(pattern: str) -> Callable[[World], None]:
    def remove(world: World) -> None:
        for path in [*world.output.glob(pattern), *world.shards.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(pattern: str, content: bytes) -> Callable[[World], None]:
    def write(world: World) -> None:
        for path in [*world.shards.glob(pattern), *([world.job] if world.job.match(pattern) else [])]:
            path.write_bytes(content)

    return write


@pytest.mark.parametrize("name", mostly("run"))
@pytest.mark.parametrize(
    "change",
    [
        gone("gen1-label-*"), gone("gen1-label-*/*.parquet"), gone("index-*/shards.json"), gone("unlabelled-000.tar"),
        gone("gen0-teacher-*/model.safetensors"), gone("classes.json"), written("classes.json", DEEP),
        written("classes.json", b"{}"), written("unlabelled-000.tar", gzip.compress(bytes(9999))),
        written("unlabelled-000.tar", b""), written("small.yaml", b"a: " + DEEP), written("small.yaml", b"\xff"),
    ],
)  # fmt: skip
def test_what_is_gone_or_is_something_else(
    worlds: small.Store, tmp_path: Path, name: str, change: Callable[[World], None]
) -> None:
    world = worlds.finished(tmp_path, until="gen1-select")
    change(world)
    ends_well(world, name)


@pytest.mark.parametrize("name", mostly("plan"))
@pytest.mark.parametrize(
    "setting",
    [
        "data.unlabelled=http://[::1/x.tar", "data.classes=classes.txt", "teacher.checkpoint=/nowhere/x.pth.tar",
        "teacher.checkpoint=''", "student.model=resnot", "output=.", "output=' '", "tracking.uri=localhost:5000",
        "data.test=[a", "generations=3", "teacher=null", "seed=9" + "9" * 5000,
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(worlds: small.Store, tmp_path: Path, name: str, setting: str) -> None:
    ends_well(worlds.finished(tmp_path, until="gen1-label"), name, setting)


def test_a_server_without_a_scheme_is_refused_with_the_hint(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, until="gen1-student")
    tracked = ("tracking.enabled=true", "tracking.uri=localhost:5000")
    assert "write http://localhost:5000" in ends_well(world, "run", *tracked)
    assert not list(tmp_path.rglob("localhost*"))


def test_one_image_a_step_is_too_few_for_batch_norm(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    assert "batch norm cannot learn from one image of one position" in ends_well(world, "run", "teacher.batch=1")


@pytest.mark.parametrize("file, content", [
    ("optimizer.pt", pickle.dumps({"a": 1})), ("manifest.json", b"{}"), ("manifest.json", DEEP), ("state.json", b"0"),
])  # fmt: skip
def test_a_checkpoint_that_is_something_else_is_not_used(
    worlds: small.Store, tmp_path: Path, file: str, content: bytes
) -> None:
    world = worlds.finished(tmp_path, until="gen1-student")
    folder = world.folder("gen1-student")
    weights = (folder / "model.safetensors").read_bytes()
    for name in ("done.json", "result.json", "model.safetensors"):
        (folder / name).unlink()
    for path in folder.glob(f"checkpoints/*/{file}"):
        path.write_bytes(content)
    assert ends_well(world, "run") == ""
    assert (folder / "model.safetensors").read_bytes() == weights


def test_an_output_in_or_around_another_runs_is_refused(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path)
    foreign = world.output / ".tmp-mine"
    foreign.write_text("not ours")
    assert "all is done" in world.run().out and foreign.exists()
    for place, word in ((world.output / "deeper" / "run", "lies inside"), (tmp_path, "holds")):
        ran = command("run", world.job, f"output={place}")
        assert ran.status == 2 and word in ran.err and "the output of another run" in ran.err
    assert not (world.output / "deeper").exists()


def test_output_that_cannot_show_every_character(worlds: small.Store) -> None:
    world = worlds.original()
    words = [sys.executable, "-m", "pipeline", "status", str(world.job), f"output={world.output}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.isascii() and "gen1-student" in ran.stdout


@pytest.mark.parametrize("settings, words", [
    (["student.pretrained=true"], "gen1-student: model 'lambda_resnet_tiny' has no published weights"),
    (["student.init=teacher", 'student.overrides={"depths":[1,1,2],"widths":[8,8,16]}'],
     "gen1-student: init is 'teacher', but the teacher's weights: the weights do not fit"),
])  # fmt: skip
def test_what_a_student_starts_from_is_looked_at_before_the_teacher_is_trained(
    tmp_path: Path, settings: list[str], words: str
) -> None:
    world = small.make(tmp_path)
    assert words in ends_well(world, "run", *settings)
    assert world.done() == ["index"]
    planned = command("plan", world.job, f"output={world.output}", *settings)
    assert words.partition(":")[0] in planned.out and words.partition(": ")[2][:30] in " ".join(planned.out.split())
