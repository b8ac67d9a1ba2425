"""The compose file: what it promises, read; and run in namespaces with the demo submitted literally."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ops.compose import Stack, example, load
from tests.ops.namespaces import impossible
from tests.tiny import ROOT

COMPOSE = ROOT / "deploy" / "compose"
VARIABLES = example(COMPOSE / ".env.example")


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(ROOT / "docker-compose.yml", VARIABLES)["services"]
    return found


def test_passwords_are_asked_for() -> None:
    for name in ("S3_USER", "S3_PASSWORD", "DB_PASSWORD"):
        with pytest.raises(ValueError, match=rf"{name} is missing: copy deploy/compose/.env.example"):
            load(ROOT / "docker-compose.yml", {**VARIABLES, name: ""})


def test_what_is_waited_for_can_be_waited_for(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other], (name, other)
            ends = services[other].get("restart") in ("on-failure", "no")
            assert (how["condition"] == "service_completed_successfully") is ends, (name, other)
        assert service["restart"] in ("unless-stopped", "on-failure"), name


def test_only_loopback_is_published(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_rays_object_store_fits_its_shared_memory(services: dict[str, dict[str, Any]]) -> None:
    """On 64 GiB and more Ray refuses to start otherwise."""
    for name in ("head", "worker"):
        found = re.search(r"--object-store-memory (\d+)", services[name]["command"])
        assert found and services[name]["shm_size"] == "2gb" and int(found[1]) <= 1e9
    assert "--num-cpus 0" in services["head"]["command"]


def test_the_image_has_what_the_services_call_and_is_not_roots() -> None:
    image, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    assert image.rindex("USER app") > image.rindex("RUN pip install")
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", image, re.MULTILINE)]
    for path in {path for paths in copied for path in paths}:
        assert (ROOT / path).exists() and f"!{path}" in ignored, path


def replacements() -> dict[str, str]:
    """Commands of this machine's for the services whose images are others'."""
    postgres = Path(shutil.which("postgres") or "/nowhere").resolve().parent
    be = "setpriv --reuid postgres --regid postgres --clear-groups"
    data = "/var/lib/postgresql/data"
    admin = f"{postgres}/psql -h localhost -U mlflow -d postgres -c"
    database = [
        f"mkdir -p {data}; chown postgres {data}; chmod 700 {data}",
        f"[ -f {data}/PG_VERSION ] || {be} {postgres}/initdb -D {data} -U mlflow -A trust",
        f"grep -q 10.78 {data}/pg_hba.conf || echo 'host all all 10.78.0.0/24 trust' >> {data}/pg_hba.conf",
        f"(until {admin} 'select 1'; do sleep 1; done; {admin} 'create database mlflow') &",
        f"exec {be} {postgres}/postgres -D {data} -c listen_addresses='*' -c unix_socket_directories=/tmp",
    ]
    return {
        "db": f"bash -c {shlex.quote(chr(10).join(database))}",
        "s3": f"{sys.executable} -m moto.server -H 0.0.0.0 -p 9000",
    }


def missing() -> str:
    if reason := impossible():
        return reason
    if not shutil.which("postgres"):
        return "PostgreSQL is missing (apt install postgresql)"
    try:
        import boto3  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"{error.name} is missing (pip install 'noisy-lambda[server]')"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.timeout(3600)
def test_the_demo_runs_on_it_and_survives_a_lost_worker(services: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with Stack({"services": services}, tmp_path, replacements(), {"worker": 2}) as stack:
        job = ("ray", "job", "submit", "--no-wait", "--submission-id", "demo", "jobs/noisy_student.yaml")
        assert (sent := stack.execute("head", *job)).returncode == 0, sent.stdout + sent.stderr
        end = time.monotonic() + 3000
        lost = False
        while time.monotonic() < end:
            status = stack.execute("head", "ray", "job", "status", "demo").stdout.lower()
            if not lost and list((tmp_path / "volumes" / "runs").glob("*/gen0-teacher-*/done.json")):
                stack["worker2"].lose()
                lost = True
            if "succeeded" in status or "failed" in status:
                break
            time.sleep(5)
        log = stack.execute("head", "ray", "job", "logs", "demo").stdout
        assert lost and "succeeded" in status, log
        code = (
            "import mlflow; c = mlflow.MlflowClient(); "
            "runs = c.search_runs([e.experiment_id for e in c.search_experiments()]); "
            "print(len(runs), {r.info.status for r in runs}, {r.info.artifact_uri.split('/')[0] for r in runs})"
        )
        told = stack.execute("head", sys.executable, "-c", code, seconds=300).stdout
        assert "{'FINISHED'}" in told, told
        store = "import boto3; print(boto3.client('s3').list_objects_v2(Bucket='mlflow')['KeyCount'])"
        assert int(stack.execute("head", sys.executable, "-c", store).stdout) > 0
