"""The command beside a user's own folders `models` and `pipeline`: everything that it starts still finds ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.prepare.shard_writer import IN_PROCESS
from tests import small, tiny
from tests.cluster.head import ray_head
from tests.data import tars
from tests.small import World

HOSTILE = "raise RuntimeError(f'imported {__file__}')\n"
SCRIPT = """\
import sys
from noisy_lambda import main
if __name__ == "__main__":
    sys.exit(main())
"""  # what an installer writes into bin/noisy-lambda

ON_RAY = """\
import importlib.util, json, noisy_lambda
noisy_lambda.claim()
from pipeline.cluster.contract import Resources
from pipeline.cluster.on_ray import OnRay
def make_worker():
    import pipeline
    return lambda unit: [pipeline.__file__, importlib.util.find_spec("models").origin]
cluster = OnRay("embedded", cpus=1)
[outcome] = cluster.map(make_worker, [("a", 0)], resources=Resources())
cluster.close()
print(json.dumps(outcome.value))
"""


def call(folder: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with these words, in `folder`, by a user to whom noisy-lambda is installed."""
    env = {**os.environ, "PYTHONPATH": str(tiny.ROOT), **env}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "noisy-lambda"
    path.write_text(f"#!{sys.executable}\n{SCRIPT}")
    path.chmod(0o755)
    return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A job in a folder with a package `models` and a package `pipeline` that cannot be imported."""
    world = small.make(tmp_path)
    for name in ("models", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HOSTILE)
    return world


def spelled(form: list[str], script: Path) -> list[str]:
    return [str(script) if word == "SCRIPT" else word for word in form]


def succeeds(world: World, done: subprocess.CompletedProcess[str], stages: list[str] = small.STAGES) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.done() == stages


def test_a_job_without_ray(world: World, script: Path) -> None:
    settings = (world.job, f"output={world.output}", "generations=[]")
    succeeds(world, call(world.job.parent, script, "run", *settings), small.TEACHER_ONLY)
    status = call(world.job.parent, script, "status", *settings, PYTHONPATH=f".{os.pathsep}{tiny.ROOT}")
    assert status.returncode == 0, status.stderr


@pytest.mark.slow
def test_a_worker_of_ray_imports_ours(world: World) -> None:
    """Ray puts the working directory in front of all that its workers import from."""
    found = call(world.job.parent, "-c", ON_RAY)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [str(tiny.ROOT / name / "__init__.py") for name in ("pipeline", "models")]


@pytest.mark.slow
def test_a_job_on_ray(world: World, script: Path) -> None:
    settings = (world.job, f"output={world.output}", "cluster=embedded")
    succeeds(world, call(world.job.parent, script, "run", *settings))


@pytest.mark.slow
def test_rays_training_workers(world: World, script: Path) -> None:
    settings = (world.job, f"output={world.output}", "cluster=embedded", "generations=[]", "workers.train=2")
    succeeds(world, call(world.job.parent, script, "run", *settings), small.TEACHER_ONLY)


@pytest.mark.slow
def test_workers_of_a_running_cluster_that_get_the_code_sent(world: World, script: Path) -> None:
    with ray_head(world.job.parent) as head:
        settings = (world.job, f"output={world.output}", f"cluster={head.address}")
        succeeds(world, call(world.job.parent, script, "run", *settings, **{**head.env, "PYTHONPATH": str(tiny.ROOT)}))


@pytest.mark.slow
@pytest.mark.parametrize("form", [["--no-python", "SCRIPT"], ["SCRIPT"], ["-m", "noisy_lambda"]], ids=" ".join)
def test_processes_of_torchrun(world: World, script: Path, form: list[str]) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = ["run", world.job, f"output={world.output}", "generations=[]"]
    succeeds(world, call(world.job.parent, *launch, *spelled(form, script), *job), small.TEACHER_ONLY)


@pytest.mark.parametrize(
    "form", [["SCRIPT"], pytest.param(["-m", "noisy_lambda"], marks=pytest.mark.slow)], ids=" ".join
)
def test_processes_that_write_shards(world: World, script: Path, form: list[str]) -> None:
    """Also where the folder comes first on PYTHONPATH."""
    folder = world.job.parent
    (folder / "a.png").write_bytes(tars.picture(0))
    (folder / "images.csv").write_text("path,label\n" + "a.png,cat\n" * IN_PROCESS)  # with fewer there are no processes
    words = (
        "prepare",
        "table",
        "images.csv",
        "--processes",
        "2",
        "--shard-images",
        IN_PROCESS // 2,
        "--out",
        "shards2",
    )
    done = call(folder, *spelled(form, script), *words, PYTHONPATH=f".{os.pathsep}{tiny.ROOT}")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "shards2").glob("*.tar"))) == 2


# ---- python -m pipeline, and import noisy_lambda -----------------------------------------------------------


def test_python_m_pipeline_says_what_is_in_the_way(tmp_path: Path) -> None:
    sentence = (
        "error: {} would be imported in place of noisy-lambda's own package `models`; call `noisy-lambda` in place of "
        "`python -m pipeline`, or work in another folder\n"
    )
    (tmp_path / "models.py").write_text(HOSTILE)
    ran = call(tmp_path, "-m", "pipeline", "jobs")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", sentence.format(tmp_path / "models.py"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(HOSTILE)
    ran = call(tmp_path, "-m", "pipeline", "jobs")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", sentence.format(tmp_path / "models"))


def test_python_m_pipeline_starts_where_nothing_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()  # no package: ours is found behind it
    assert call(tmp_path, "-m", "pipeline", "--help").returncode == 0
    assert call(tiny.ROOT, "-m", "pipeline", "--help").returncode == 0


def test_import_noisy_lambda_beside_such_folders(world: World) -> None:
    code = "import noisy_lambda as n, json; print(json.dumps([len(n.list_models()), n.plan('small.yaml')[0]['stage']]))"
    found = call(world.job.parent, "-c", code)
    assert found.returncode == 0, found.stderr
    models, stage = json.loads(found.stdout)
    assert models > 10 and stage == "index"


def test_import_noisy_lambda_where_the_other_package_is_in_use(world: World) -> None:
    (world.job.parent / "models" / "__init__.py").write_text("")
    code = "import models, noisy_lambda\nnoisy_lambda.list_models()"
    failed = call(world.job.parent, "-c", code)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == (
        "ImportError: noisy_lambda has a package `models` of its own, and this process has imported another one, "
        f"{world.job.parent}/models; use noisy_lambda in a process that does not import that"
    )
