"""A running cluster: joined through RAY_ADDRESS, and given jobs through `submit`. Starts a real head."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.submit import _inside, submit
from pipeline.errors import ClusterError, ConfigError
from tests.cluster.head import Head, ray_head
from tests.cluster.test_on_ray import run_python

TOLD = """\
import os, sys, time
print("arguments", sys.argv[1:], flush=True)
print("in", os.getcwd(), flush=True)
for name in ("MLFLOW_TRACKING_URI", "AWS_REGION", "AWS_ENDPOINT_URL", "CHOSEN", "NOISY_LAMBDA_SECRETS"):
    print(name, os.environ.get(name), flush=True)
if "do=fail" in sys.argv:
    sys.exit(2)
if "do=wait" in sys.argv:
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in the small: a module `noisy_lambda` that tells how it was called, and a job."""
    root = tmp_path_factory.mktemp("tree")
    (root / "noisy_lambda.py").write_text(TOLD)
    (root / "jobs").mkdir()
    (root / "jobs" / "a b.yaml").write_text("name: x\n")
    (root / "runs").mkdir()
    (root / "runs" / "big").write_text("not to be uploaded")
    return root


@pytest.fixture(scope="module")
def head(tree: Path) -> Iterator[Head]:
    with ray_head(tree) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in head.env.items():
            if name.startswith("RAY_"):
                patch.setenv(name, value)
        yield head


def test_no_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"^no Ray cluster takes jobs at http://127.0.0.1:1 "):
        submit("jobs/x.yaml", [], "http://127.0.0.1:1", None)


def test_a_shipped_job_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _inside("smoke", str(tmp_path)) == "smoke"
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "smoke.yaml").touch()
    with pytest.raises(ConfigError, match="is not inside the working directory"):
        _inside("jobs/smoke.yaml", str(tmp_path / "other"))


@pytest.mark.slow
def test_a_job_outside_the_working_directory_is_refused(head: Head, tree: Path) -> None:
    with pytest.raises(ConfigError, match="is not inside the working directory"):
        submit("/elsewhere/x.yaml", [], None, str(tree))


@pytest.mark.slow
def test_a_job_runs_where_the_head_was_started_with_its_arguments_intact(
    head: Head, tree: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_on = {"MLFLOW_TRACKING_URI": "http://tracking:5000", "AWS_REGION": "eu-1", "AWS_ENDPOINT_URL": "http://s3"}
    for name, value in {**handed_on, "CHOSEN": "x y", "AWS_SECRET_ACCESS_KEY": "hunter2"}.items():
        monkeypatch.setenv(name, value)
    secrets, arguments = "/etc/not-here.env", ["a.b=[1, 'x']", "c=$HOME"]
    assert submit("jobs/a b.yaml", arguments, None, None, env=["CHOSEN"], secrets=secrets) == 0
    out, err = capfd.readouterr()
    assert """arguments ['run', 'jobs/a b.yaml', "a.b=[1, 'x']", 'c=$HOME']""" in out
    assert f"in {tree.resolve()}\n" in out
    for name, value in {**handed_on, "CHOSEN": "x y", "NOISY_LAMBDA_SECRETS": secrets}.items():
        assert f"{name} {value}\n" in out
    assert "Ray keeps CHOSEN readable for all who use the cluster" in err
    from ray.job_submission import JobSubmissionClient

    assert "hunter2" not in repr(JobSubmissionClient(head.dashboard).list_jobs())


@pytest.mark.slow
def test_an_uploaded_job_runs_in_rays_cache_and_its_failure_shows(
    head: Head, tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(str(tree / "jobs" / "a b.yaml"), ["do=fail"], head.dashboard, str(tree)) == 1
    captured = capfd.readouterr()
    assert "arguments ['run', 'jobs/a b.yaml', 'do=fail']" in captured.out
    assert "working_dir_files" in captured.out
    assert "exit code 2" in captured.err and "INFO" not in captured.err


@pytest.mark.slow
def test_a_stopped_job_is_told_from_a_finished_one(head: Head, capfd: pytest.CaptureFixture[str]) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(head.dashboard)
    before = {job.submission_id for job in client.list_jobs()}

    def stop_when_it_runs() -> None:
        while True:
            for job in client.list_jobs():
                if job.submission_id not in before and job.status == JobStatus.RUNNING:
                    client.stop_job(job.submission_id)
                    return
            time.sleep(0.5)

    thread = threading.Thread(target=stop_when_it_runs)
    thread.start()
    assert submit("jobs/a b.yaml", ["do=wait"], None, None) == 3
    thread.join()


@pytest.mark.slow
def test_a_job_that_is_not_followed_goes_on(head: Head) -> None:
    assert submit("jobs/a b.yaml", [], None, None, follow=False) == 0


@pytest.mark.slow
def test_a_running_cluster_gets_our_code_and_says_when_it_has_no_room(head: Head, tmp_path: Path) -> None:
    """From another folder, so that nothing but what we send makes `pipeline` importable there."""
    result = run_python(
        f"""
        from pipeline.cluster.contract import Resources
        from pipeline.cluster.on_ray import OnRay
        from pipeline.errors import ClusterError

        def make():
            from pipeline.cluster import contract
            return lambda unit: ("py_modules" in contract.__file__, unit)

        cluster = OnRay("auto", patience=5)
        print(cluster.describe())
        for outcome in cluster.map(make, [("a", 1)], resources=Resources()):
            print(outcome.value)
        try:
            list(cluster.map(make, [("a", 1)], resources=Resources(cpus=64)))
        except ClusterError as error:
            print(str(error))
        try:
            cluster.fit(dict, {{}}, resources=Resources(workers=3), folder={str(tmp_path)!r})
        except ClusterError as error:
            print(str(error))
        cluster.close()
        """,
        cwd=tmp_path,
        **{name: value for name, value in head.env.items() if name.startswith("RAY_")},
        RAY_ADDRESS=head.address,
    )
    lines = result.stdout.splitlines()
    assert result.stderr == "" and result.returncode == 0
    assert lines[:2] == [f"Ray at {head.address}", "(True, 1)"]
    assert lines[2].startswith("no room in 5 s for a worker with 64 CPU and 0 GPU each: the cluster has 2 CPU")
    assert lines[3].startswith("no room in 5 s for 3 workers with 1 CPU")


@pytest.mark.slow
def test_a_head_without_the_package_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its `python` is one that has no packages at all."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    with ray_head(tmp_path, path=tmp_path / "bin") as bare, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        assert submit("smoke", [], bare.dashboard, None) == 1
    assert "the head's python has no noisy_lambda: activate the environment" in capfd.readouterr().err
