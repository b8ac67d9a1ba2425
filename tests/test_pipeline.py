"""The main job end to end, in small and inline: what it leaves, what a rerun does, what a kill loses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.small import Ran, command

STAGES = ["prepare", "index", "gen0-teacher", "gen1-audit", "gen1-label", "gen1-select", "gen1-student", "gen2-audit",
          "gen2-label", "gen2-select", "gen2-student", "evaluate", "report"]  # fmt: skip


Finished = tuple[Path, Path, Ran]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """(job file, output, what it printed) of one undisturbed run; tests must not change the output."""
    folder = tmp_path_factory.mktemp("finished")
    job = tiny.write_job(folder)
    done = command("run", job, f"output={folder / 'out'}")
    assert done.status == 0, done
    return job, folder / "out", done


def folder_of(output: Path, stage: str) -> Path:
    [found] = [path for path in output.iterdir() if re.fullmatch(rf"{stage}-[0-9a-f]{{8}}", path.name)]
    return found


def content(output: Path) -> dict[str, bytes]:
    """The files that must be equal, bit for bit, whatever happened on the way: weights, and rows of Parquet files."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.name == "model.safetensors" and "checkpoints" not in name:
            found[name] = path.read_bytes()
        elif path.suffix == ".parquet":
            table = pq.read_table(path).replace_schema_metadata(None)
            found[name] = repr(table.to_pydict()).encode()
    return found


def test_every_stage_leaves_its_folder_and_done_last(
    finished: Finished,
) -> None:
    _, output, done = finished
    for stage in STAGES:
        folder = folder_of(output, stage)
        record = json.loads((folder / "done.json").read_text())
        assert folder.name == f"{stage}-{record['fingerprint'][:8]}"
        newest = max(path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file())
        assert (folder / "done.json").stat().st_mtime_ns == newest
    assert not [path for path in output.rglob("*") if path.name.startswith(".tmp-")]
    assert done.err == ""


def test_labels_reconcile_with_the_shards(finished: Finished) -> None:
    _, output, _ = finished
    for generation in ("gen1", "gen2"):
        tables = [pq.read_table(path) for path in sorted(folder_of(output, f"{generation}-label").glob("*.parquet"))]
        assert sum(table.num_rows for table in tables) == 1107
        assert all(table["index"].to_pylist() == list(range(table.num_rows)) for table in tables)
        copies = [
            pq.read_table(path)["copies"].to_pylist()
            for path in folder_of(output, f"{generation}-select").glob("*.parquet")
        ]
        summary = json.loads((folder_of(output, f"{generation}-select") / "summary.json").read_text())
        assert sum(map(sum, copies)) == summary["copies"]
        assert all(n == 40 for n, empty in zip(summary["copies_per_class"], summary["available"], strict=True) if empty)


def test_the_last_line_is_the_summary(finished: Finished) -> None:
    _, output, done = finished
    summary = json.loads(done.out.splitlines()[-1])
    assert summary == json.loads((folder_of(output, "report") / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == ["gen0-teacher", "gen1-student", "gen2-student"]
    for stage in summary["stages"]:
        assert 0 <= stage["top1"] <= stage["top5"] <= 1
        assert stage["images_per_second"] > 0
    gain = 100 * (summary["stages"][-1]["top1"] - summary["stages"][0]["top1"])
    assert summary["gain_points"] == pytest.approx(gain, abs=1e-4)
    assert summary["stages"][2]["parameters"] > summary["stages"][1]["parameters"]
    test = pq.read_table(folder_of(output, "index") / "test" / "test-000.parquet")
    assert test.num_rows == 450


def test_a_rerun_does_nothing_and_imports_nothing_heavy(
    finished: Finished,
) -> None:
    job, output, _ = finished
    before = {
        path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name in ("done.json", "model.safetensors")
    }
    code = (
        "import sys; from pipeline.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'ray', 'mlflow', 'timm'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    words = [sys.executable, "-c", code, "run", str(job), f"output={output}"]
    done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all is done" in done.stdout
    assert done.stdout.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_changed_student_redoes_itself_and_what_follows(finished: Finished, tmp_path: Path) -> None:
    job, output, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    words = (job, f"output={copy}", "generations[1].student.duration=6st")
    done = command("run", *words)
    assert done.status == 0, done
    states = {line.split()[1]: line for line in done.out.splitlines() if line.startswith(("·", "✓"))}
    assert [name for name in STAGES if "finished" in states[name]] == ["gen2-student", "evaluate", "report"]
    listed = command("clean", *words)
    assert sorted(re.findall(r"(gen2-student|evaluate|report)-", listed.out)) == ["evaluate", "gen2-student", "report"]
    assert len(list(copy.glob("gen2-student-*"))) == 2
    assert command("clean", *words, "--yes").status == 0
    assert len(list(copy.glob("gen2-student-*"))) == 1
    assert "all is done" in command("run", *words).out


def test_kill_9_in_every_stage_changes_nothing(finished: Finished, tmp_path: Path) -> None:
    """One run, killed in the teacher, in labelling, in selection and in the student, ends bitwise like the undisturbed
    one."""
    job, undisturbed, _ = finished
    output = tmp_path / "out"
    marks = ["gen0-teacher-*/checkpoints/step-*/manifest.json", "gen1-label-*/*.parquet", "gen1-select-*/*.parquet",
             "gen1-student-*/checkpoints/step-*/manifest.json", "gen2-label-*/*.parquet"]  # fmt: skip
    killed = []
    for mark in marks:
        process = tiny.start(job, f"output={output}")
        while process.is_alive() and not any(output.glob(mark)):
            time.sleep(0.002)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            stage = mark.split("-*")[0]
            killed += [stage] if not any(output.glob(f"{stage}-*/done.json")) else []
        process.join()
    # A stage may be over between its first file and the signal; most are caught inside.
    assert len(killed) >= 3, killed
    done = command("run", job, f"output={output}")
    assert done.status == 0, done
    assert content(output) == content(undisturbed)
    assert not [path for path in output.rglob("*") if path.name.startswith(".tmp-")]


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    from pipeline.storage.lock import lock

    job = tiny.write_job(tmp_path)
    with lock(str(tmp_path / "out")):
        process = tiny.start(job, f"output={tmp_path / 'out'}", err=tmp_path / "err")
        process.join()
    assert process.exitcode == 2
    said = (tmp_path / "err").read_text()
    assert f"in use by process {os.getpid()}" in said
    assert len(said.splitlines()) == 1


def test_status_and_plan_of_a_finished_run(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    job, output, _ = finished
    status = command("status", job, f"output={output}")
    assert "tiny: finished" in status.out
    assert status.out.count(" done ") >= len(STAGES)
    plan = command("plan", job, f"output={output}")
    assert plan.out.count(" done ") == len(STAGES)
    changed = command("plan", job, f"output={output}", "teacher.lr=0.02")
    assert changed.out.count("will run") == len(STAGES) - 2  # the data stays


def test_moved_output_is_still_done(finished: Finished, tmp_path: Path) -> None:
    job, output, _ = finished
    shutil.copytree(output, tmp_path / "elsewhere")
    assert "all is done" in command("run", job, f"output={tmp_path / 'elsewhere'}").out
