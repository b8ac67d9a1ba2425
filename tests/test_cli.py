"""The command line: its whole surface against a list, what it imports, and what it answers."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.data import shards
from tests import small, tiny
from tests.data import tars
from tests.small import World, command

JOB = ["JOB", "key=value"]
FILES = ["--out", "--split", "--unlabelled", "--seed", "--max-bad", "--shard-images", "--shard-bytes", "--processes"]
SURFACE = {
    "jobs": [],
    "init": ["FOLDER", "--out"],
    "run": [*JOB, "--refreeze", "--json"],
    "plan": [*JOB, "--measure"],
    "status": JOB,
    "report": JOB,
    "review": [*JOB, "--folds", "--images"],
    "sweep": [*JOB, "--plan"],
    "submit": [*JOB, "--address", "--working-dir", "--env", "--secrets", "--no-wait"],
    "clean": [*JOB, "--sweeps", "--yes"],
    "ui": [*JOB, "--port"],
    "export": ["MODEL", "--out", "--int8", "--max-drop"],
    "predict": [
        *["MODEL", "INPUT", "--out", "--contact-sheet", "--top", "--raw", "--column", "--batch", "--device"],
        "--cluster",
    ],
    "prepare digits": ["--seed", "--labels-per-class", "--out"],
    "prepare folder": ["DIR", "--split-off", *FILES],
    "prepare scenes": ["--seed", "--out"],
    "prepare coco": ["ANNOTATIONS", "--images", *(name for name in FILES if name != "--unlabelled")],
    "prepare table": ["PATTERN", "--image", "--label", "--label-is", "--where", "--cluster", *FILES],
    "reshard": ["SOURCE", "--out", "--shards", "--seed", "--split", "--labels", "--cluster"],
}


def surface(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """(command, its arguments) of every command that does something."""
    arguments = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from surface(sub, f"{prefix} {name}".strip())
            return
        if not isinstance(action, argparse._HelpAction):
            arguments += action.option_strings or [str(action.metavar)]
    yield prefix, arguments


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run", "a.yaml", "--seed", "1"],
            "unrecognized arguments: --seed 1; a setting is written seed=1, without dashes",
        ),
        (["plan", "a.yaml", "--teacher.lr=0.2"], "a setting is written teacher.lr=0.2, without dashes"),
        (["jobs", "--seed=1"], "unrecognized arguments: --seed=1"),
    ],
)
def test_settings_that_are_given_as_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert capsys.readouterr().err.rstrip().endswith(said)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("teacher.learning_rate=0.1", "it is called 'lr' here"),
        ("teacher.epochs=3", "it is called 'duration' here"),
        ("student.batch_size=3", "it is called 'batch' here"),
        ("teacher.name=x", "it is called 'model' here"),
        ("learning_rate=3", "unknown key 'learning_rate'"),
    ],
)
def test_settings_by_the_names_of_other_tools(worlds: small.Store, setting: str, said: str) -> None:
    ran = worlds.original().call("plan", setting)
    assert ran.status == 2 and said in ran.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(r"noisy-lambda \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_reader_that_has_read_enough_is_no_error(worlds: small.Store) -> None:
    world = worlds.original()
    called = [sys.executable, "-m", "pipeline", "plan", str(world.job), f"output={world.output}"]
    planned = subprocess.Popen(called, cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert planned.stdout and planned.stderr
    planned.stdout.close()
    assert planned.wait(60) == 141 and planned.stderr.read() == b""


def test_commands_and_options() -> None:
    assert dict(surface(cli.parser())) == SURFACE


def test_every_argument_has_a_help_text() -> None:
    def texts(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str | None]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    yield from texts(sub)
            else:
                yield f"{parser.prog} {action.metavar or action.dest}", action.help

    assert not [name for name, text in texts(cli.parser()) if not text]


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys; from pipeline.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = 'torch ray mlflow timm pandas pyarrow omegaconf numpy rich yaml fsspec'.split()\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    for words in (["--help"], ["run", "--help"], ["prepare", "folder", "--help"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tiny.ROOT, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr == "[]\n"
        assert done.stdout.startswith("usage: noisy-lambda")
        assert (after.ru_utime + after.ru_stime) - (
            before.ru_utime + before.ru_stime
        ) < 0.5  # CPU time: others may be busy


def test_the_docs_show_every_command() -> None:
    text = "".join((tiny.ROOT / name).read_text() for name in ("README.md", "docs/your_data.md"))
    missing = [name for name in SURFACE if not re.search(rf"(pipeline|noisy-lambda) {name}\b", text)]
    assert not missing


# ---- exit status -------------------------------------------------------------------------------------------


def test_a_mistake_on_the_command_line_is_status_2(tmp_path: Path) -> None:
    for words in ([], ["nonsense"], ["run"], ["prepare"], ["plan", "x.yaml", "--nonsense"]):
        ran = command(*words)
        assert ran.status == 2 and ran.err.startswith("usage: ")
    for verb in ("run", "plan", "status", "submit", "clean", "ui"):
        ran = command(verb, tmp_path / "none.yaml")
        assert ran.status == 2
        assert (
            ran.err
            == f"error: there is no job file {tmp_path}/none.yaml; name a file, or one of the shipped jobs that "
            "`noisy-lambda jobs` lists\n"
        )
    assert command("export", tmp_path).status == 2


def test_a_bug_keeps_its_traceback_and_is_status_1(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline import cli, graph\n"
        "def broken(*_): raise ZeroDivisionError('a bug')\n"
        "graph.stages_of = broken\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    world = small.make(tmp_path)
    words = ["plan", str(world.job), f"output={world.output}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: a bug" in done.stderr


@pytest.mark.parametrize(
    "number, word", [pytest.param(signal.SIGINT, "interrupted", marks=pytest.mark.slow), (signal.SIGTERM, "stopped")]
)
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, number: signal.Signals, word: str) -> None:
    world = small.make(tmp_path)
    long = [f"output={world.output}", "teacher.duration=100000st", "teacher.checkpoint_every=5st"]
    process = tiny.start(world.job, *long, err=tmp_path / "err")
    try:
        while process.is_alive() and not list(world.output.glob("gen0-teacher-*/checkpoints/*/manifest.json")):
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.join(60)
        err = (tmp_path / "err").read_text()
    finally:
        process.kill()
    assert (process.exitcode, err.splitlines()[-1]) == (128 + number, f"{word}; run the same command to continue")
    assert "Traceback" not in err
    assert world.done() == ["index"]
    assert json.loads((world.output / "progress.json").read_text())["state"] == "stopped"
    assert world.run("generations=[]").status == 0


# ---- commands that only look -------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, int]:
    """{path: modification time} of all that lies in a folder."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(worlds: small.Store, tmp_path: Path) -> World:
    return worlds.finished(tmp_path / "finished")


def test_looking_at_a_job_that_never_ran_leaves_nothing(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    settings = (world.job, f"output={world.output}")
    assert command("plan", *settings).out.count("will run") == len(small.STAGES)
    assert "has not run in" in command("status", *settings).out
    assert command("clean", *settings).out == "nothing to clean\n"
    assert not world.output.exists()


def test_clean_deletes_only_with_yes(finished: World) -> None:
    changed = (finished.job, f"output={finished.output}", "generations[0].student.lr=0.02")
    unused = [finished.folder(stage).name for stage in ("gen1-student", "evaluate", "report")]
    assert finished.run("generations[0].student.lr=0.02").status == 0
    before = files(finished.output)
    listed = command("clean", *changed)
    assert listed.status == 0
    assert sorted(line.split()[-1] for line in listed.out.splitlines()[:-1]) == sorted(unused)
    assert "add --yes to delete them" in listed.out
    assert {name: at for name, at in files(finished.output).items() if name != ".lock"} == {
        name: at for name, at in before.items() if name != ".lock"
    }
    assert "deleted" in command("clean", *changed, "--yes").out
    assert set(before) - set(files(finished.output)) == {name for name in before if name.split("/")[0] in unused}
    assert command("clean", *changed).out == "nothing to clean\n"
    assert "all is done" in finished.run("generations[0].student.lr=0.02").out


def test_clean_keeps_what_the_last_run_made_with_settings_that_are_forgotten_now(finished: World) -> None:
    assert finished.run("generations[0].student.lr=0.02").status == 0
    before = files(finished.output)
    first = (finished.job, f"output={finished.output}")  # all is done for these too, before the second run
    forgotten = command("clean", *first, "--yes")
    assert forgotten.status == 0
    kept, *_, last = forgotten.out.splitlines()
    assert kept.startswith("kept, for the last run here") and kept.count("gen1-student-") == 1
    assert last == "nothing to clean"
    assert files(finished.output).keys() == before.keys()
    by_folder = command("clean", str(finished.output), "--yes")  # the folder remembers the last run's settings
    assert by_folder.out.count("gen1-student-") == 1 and "deleted" in by_folder.out
    assert "all is done" in finished.run("generations[0].student.lr=0.02").out


def test_a_runs_folder_stands_for_its_settings_where_it_lies_now(finished: World, tmp_path: Path) -> None:
    assert finished.run("generations[0].student.lr=0.02").status == 0
    moved = tmp_path / "moved: here, [1]"
    finished.output.rename(moved)
    assert command("plan", str(moved)).out.count("done") >= len(small.STAGES)
    assert "all is done" in command("run", str(moved)).out
    assert not finished.output.exists()
    assert command("plan", str(moved), "seed=3").out.count("will run") > 3
    assert command("plan", str(tmp_path)).status == 2  # a folder that is no run's


# ---- prepare -----------------------------------------------------------------------------------------------


def keys(folder: Path, pattern: str) -> list[str]:
    return [
        sample.key
        for shard in shards.find_shards(pattern, "s", str(folder))
        for sample in shards.scan(shard.path).samples
    ]


def test_prepare_digits(tmp_path: Path) -> None:
    ran = command("prepare", "digits", "--out", tmp_path / "a", "--seed", "1", "--labels-per-class", "2")
    assert ran.status == 0, ran
    assert ran.out == f"20 labelled, 1,137 unlabelled, 190 val, 450 test in {tmp_path}/a\n"
    assert len(keys(tmp_path / "a", "labelled-*.tar")) == 20
    assert len(json.loads((tmp_path / "a" / "classes.json").read_text())) == 10


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of three images each, one of them bad."""
    folder = tmp_path / "pictures"
    for number in range(6):
        path = folder / ("cat" if number < 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tars.picture(number) if number != 4 else b"no image")
    return folder


def test_prepare_folder(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    words = ("prepare", "folder", pictures, "--out", out, "--processes", "1", "--shard-images", "2")
    refused = command(*words)
    assert refused.status == 2 and "1 of 6 pictures are bad or not decoded here" in refused.err
    words += ("--max-bad", "0.2")
    ran = command(*words)
    assert ran.status == 0, ran
    assert ran.out == (
        f"3 shards, 5 images, 1 bad, 2 classes in {out}\nwhat is bad or skipped is listed in {out}/bad_files.txt\n"
    )
    assert len(keys(out, "labelled-*.tar")) == 5
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    assert f"{pictures}/dog/4.png" in (out / "bad_files.txt").read_text()
    assert command(*words, "--split", "corpus", "--unlabelled").status == 0
    assert all(not sample.texts for sample in shards.scan(str(out / "corpus-000.tar")).samples)


def test_prepare_table(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("file,kind\n" + "".join(f"pictures/cat/{n}.png,a\n" for n in range(3)) + "pictures/dog/5.png,b\n")
    words = ("prepare", "table", table, "--out", tmp_path / "out", "--processes", "1", "--image", "file")
    wrong = command(*words)
    assert wrong.status == 2
    assert wrong.err == f"error: {table} has no column 'label'; its columns are file, kind\n"
    assert command(*words, "--label", "kind").status == 0
    assert len(keys(tmp_path / "out", "labelled-*.tar")) == 4
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a", "b"]


def test_prepare_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    ran = command("prepare", "folder", tmp_path / "none", "--out", tmp_path / "out")
    assert (ran.status, ran.err) == (
        2,
        f"error: there is no folder {tmp_path}/none to prepare; give the folder that holds the images\n",
    )
    assert not (tmp_path / "out").exists()
