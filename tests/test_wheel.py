"""The wheel: what it holds, and that what it installs works in another folder, without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import shipped
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from tests import small, tiny

ROOT = tiny.ROOT
BUILT = ["pyproject.toml", "README.md", "LICENSE", "noisy_lambda.py", "models", "pipeline", "conf", "jobs"]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml"))


@dataclass(frozen=True)
class Installed:
    """An installation of the wheel, and a folder in which nothing else lies."""

    wheel: Path
    site: Path
    elsewhere: Path

    def noisy_lambda(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.site / "bin" / "noisy-lambda"), *map(str, words)]
        env = {**os.environ, "PYTHONPATH": str(self.site)}
        return subprocess.run(command, cwd=self.elsewhere, env=env, capture_output=True, text=True, check=False)


def copy_of_the_repository(folder: Path) -> None:
    """To build from: a build leaves folders behind."""
    folder.mkdir()
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("wheel")
    source, built, site, elsewhere = (place / name for name in ("source", "built", "site", "elsewhere"))
    copy_of_the_repository(source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(built), str(source)],
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), "--find-links", str(built), "noisy-lambda"],
    ):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    elsewhere.mkdir()
    [wheel] = built.glob("*.whl")
    return Installed(wheel, site, elsewhere)


def test_every_folder_is_a_package_of_the_wheel() -> None:
    """If this fails, a folder was added or renamed: list it in pyproject.toml."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    code = [path.parent for top in ("models", "pipeline") for path in (ROOT / top).rglob("__init__.py")]
    data = [
        Path("pipeline", path.parent.relative_to(ROOT))
        for top in ("conf", "jobs")
        for path in (ROOT / top).rglob("*.yaml")
    ]
    folders = [*(path.relative_to(ROOT) for path in code), *data]
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders})


def test_the_wheel_holds_all_code_and_yaml_and_nothing_else(installed: Installed) -> None:
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    code = [path.relative_to(ROOT) for top in ("models", "pipeline") for path in (ROOT / top).rglob("*.py")]
    data = [
        Path("pipeline", path.relative_to(ROOT)) for top in ("conf", "jobs") for path in (ROOT / top).rglob("*.yaml")
    ]
    assert held == {path.as_posix() for path in [*code, *data]} | {
        "noisy_lambda.py",
        "models/py.typed",
        "pipeline/py.typed",
        "pipeline/report/page.html.j2",
        "pipeline/report/style.css.j2",
        "pipeline/report/sweep.html.j2",
        "pipeline/review/page.html.j2",
    }


def test_an_installation_lists_and_plans_its_jobs_in_any_folder(installed: Installed) -> None:
    listed = installed.noisy_lambda("jobs")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:] if line[0] != " "] == JOBS
    planned = installed.noisy_lambda("plan", "smoke")  # its base lies beside it, and that one's in conf/
    assert planned.returncode == 0, planned.stderr
    assert "gen2-student" in planned.stdout and "lambda_resnet_medium" in planned.stdout
    assert list(installed.elsewhere.iterdir()) == []


def test_an_installation_runs_a_job_in_any_folder(installed: Installed) -> None:
    """`base` names what only the wheel has there, and the output lies below the folder."""
    world = small.make(installed.elsewhere, generations=[])
    text = world.job.read_text().replace("name: tiny", "name: mine\nbase: cluster/laptop.yaml")
    world.job.write_text(text)
    done = installed.noisy_lambda("run", world.job.name, "cluster=inline")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert [stage["stage"] for stage in summary["stages"]] == ["gen0-teacher"]
    assert (installed.elsewhere / "runs" / "mine" / "job.yaml").is_file()


def test_an_editable_installation_finds_the_folders_of_its_checkout(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    copy_of_the_repository(checkout)
    site.mkdir()
    build = f"from setuptools.build_meta import build_editable; build_editable({str(site)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Package would be ignored" not in done.stderr
    [wheel] = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import json, site, sys; [site.addsitedir(path) for path in sys.argv[1:]]; import noisy_lambda, "
        "pipeline.config.shipped as s;"
        "print(json.dumps([str(s.folder('conf')), str(s.folder('jobs')), noisy_lambda.plan('smoke')[0]['stage']]))"
    )
    command = [sys.executable, "-S", "-c", code, str(site), sysconfig.get_path("purelib")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [str(checkout / "conf"), str(checkout / "jobs"), "prepare"]


# ---- which file a name means -------------------------------------------------------------------------------


def test_a_job_is_the_path_as_written_or_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()  # a folder is no job
    for name in ("smoke", "smoke.yaml", "jobs/smoke.yaml"):
        assert load_job(name).name == "smoke"
    assert load_job("smoke").output == str(tmp_path / "runs" / "smoke")
    (tmp_path / "smoke.yaml").write_text("name: mine\nbase: smoke\n")  # not itself: a base has to be a file
    assert load_job("smoke").name == "smoke"
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_job("smoke.yaml")
    (tmp_path / "smoke.yaml").write_text("name: mine\nbase: [noisy_student, cluster/gpu-1]\n")
    mine = load_job("smoke.yaml")
    assert (mine.name, mine.teacher.model, mine.workers.gpus) == ("mine", "lambda_resnet_tiny", 1)


def test_an_unknown_job_is_one_sentence_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = small.command("plan", "noisy_studnet")
    assert (ran.status, ran.err) == (
        2,
        "error: there is no job file noisy_studnet; did you mean noisy_student? name a file, or one of the shipped "
        "jobs that "
        "`noisy-lambda jobs` lists\n",
    )
    assert (
        "there is no job file other/smoke.yaml; did you mean smoke? " in small.command("plan", "other/smoke.yaml").err
    )
    ran = small.command("plan", tmp_path)
    assert ran.err.startswith(f"error: cannot read the job file {tmp_path}: Is a directory; name a file, or ")


def test_every_shipped_job_says_what_it_is_and_how_long_it_takes() -> None:
    found = shipped.jobs()
    assert [job.name for job in found] == JOBS
    for job in found:
        assert job.what.endswith(".") and len(job.what) < 200, job
        assert 3 < len(job.time) < 60, job
    [demo] = [job for job in found if job.name == "noisy_student"]
    assert demo.time == "about 2 minutes"
    assert demo.what.startswith("The whole pipeline on real handwritten digits") and demo.what.endswith(
        "unlabelled ones."
    )
