"""Nothing that a run records holds a password."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pipeline import secrets_file, storage
from pipeline.cluster.submit import submit
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from tests import small
from tests.test_https import Ranges, serving


def test_no_url_in_job_yaml_keeps_its_password(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    secret = "http://me:hunter2@tracking.example/path?token=hunter2"
    assert world.run(f"tracking.uri={secret}").status == 0
    written = (world.output / "job.yaml").read_text()
    assert "hunter2" not in written
    assert load_job(str(world.output / "job.yaml")).tracking.uri == "http://tracking.example/path"
    assert not [p for p in world.output.rglob("*.json") if "hunter2" in p.read_text()]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("https://host/a.tar?signature=x", "https://host/a.tar"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
        ("/local/what?", "/local/what?"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert storage.redact(url) == shown


LETTERS = "abcXYZ0189"
# What may stand in a password that some client takes. Not `?`, which none takes there.
PASSWORD = LETTERS + "/@:+=&;,!$~*.-_%#()[]{}'|"


def word(rng: random.Random, letters: str = LETTERS, least: int = 3) -> str:
    return "".join(rng.choices(letters, k=rng.randint(least, 12)))


def secret_url(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """(a URL, its secrets, what of it must still be seen)."""
    scheme, host, path = rng.choice(["s3", "gs", "http", "https", "hdfs", "postgresql+psycopg"]), word(rng), word(rng)
    port, secrets, user, query = rng.choice(["", ":8080"]), [], "", ""
    if rng.random() < 0.8:
        password = f"S{word(rng, PASSWORD, 8)}T"
        user = rng.choice([f"{word(rng)}:{password}@", f":{password}@"])
        secrets.append(password)
    if not user or rng.random() < 0.3:
        secrets.append(f"S{word(rng, LETTERS + '/+=@,:;.', 8)}T")
        query = f"?{word(rng)}={secrets[-1]}&x=1"
    name = rng.choice(["", "/{000..100}.tar", "/a*.tar", "/a b"[:2] + "b"])
    return f"{scheme}://{user}{host}{port}/{path}{name}{query}", secrets, [f"{scheme}://{host}{port}/{path}{name}"]


def test_no_form_of_a_url_shows_its_secrets() -> None:
    rng = random.Random(11)
    forms = [
        lambda one, other: one,
        lambda one, other: f"simplecache::{one}",
        lambda one, other: f"tar://a.txt::filecache::{one}",
        lambda one, other: f"{one}::{other}",
        lambda one, other: "{" + f"{one},{other}" + "}",
        lambda one, other: f"cannot reach {one}: {other} says 403",
        lambda one, other: f"Max retries ('{one}', Caused by \"{other}\")",
        lambda one, other: f"tracking.uri={one}",
    ]
    for number in range(1000):
        (one, secrets, seen), (other, more, _) = secret_url(rng), secret_url(rng)
        form = forms[number % len(forms)]
        text, shown = form(one, other), storage.redact(form(one, other))
        for secret in [*secrets, *(more if other in text else [])]:
            assert secret not in shown and secret[:6] not in shown and secret[-6:] not in shown, (text, shown)
        assert all(part in shown for part in seen), (text, shown)
        assert storage.redact(shown) == shown


def test_what_holds_no_secret_stays_as_it_is() -> None:
    for text in (
        "s3://bucket/shard-?.tar", "s3://bucket/a#1/{000..100}.tar", "https://host/a@2x.png", "http://host:5000/a@b",
        "http://[::1]:80/a@b", "memory://x/y z", "sqlite:////a/b@c.db", "/local/what?a=b",
        "a mail to me@host: see docs",
        "file:///a/b@c", "simplecache::s3://bucket/x", "http://[::1",
    ):  # fmt: skip
        assert storage.redact(text) == text


@pytest.mark.parametrize("wrong", [False, True])
def test_nothing_of_a_run_on_a_web_server_holds_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    world = small.make(tmp_path)
    with serving(Ranges, world.shards) as proxy:
        url = proxy.url.replace("//", "//me:hunter2@")
        names = {"labelled": "labelled-000", "validation": "val-000", "test": "test-000"}
        names["unlabelled"] = "gone-000" if wrong else "unlabelled-{000..001}"
        monkeypatch.setenv("TOKEN", "hunter2")
        settings = [f"data.{source}={url}/{name}.tar?token=${{oc.env:TOKEN}}" for source, name in names.items()]
        settings += [f"data.classes={world.shards / 'classes.json'}", f"tracking.uri={tmp_path / 'ml'}"]
        ran = [small.command(command, world.job, f"output={world.output}", *settings) for command in ("run", "status")]
        planned = small.command("plan", world.job, f"output={world.output}", *settings)
    assert [one.status for one in ran] == [2 if wrong else 0, 0], ran
    said = [f"{one.out} {one.err}" for one in (*ran, planned)]
    assert not wrong or "gone-000.tar" in said[0]
    files = [path for folder in (world.output, tmp_path / "ml") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > (2 if wrong else 40)
    for text in [*said, *(path.read_bytes().decode(errors="replace") for path in files)]:
        assert "hunter2" not in text


def test_a_password_is_not_handed_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@tracking.example")
    with pytest.raises(ConfigError, match=r"^the URL in MLFLOW_TRACKING_URI=https://tracking\.example has a password"):
        submit("jobs/noisy_student.yaml", [], "http://127.0.0.1:1", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match=r"^the URL in data\.root=s3://bucket has a password"):
        submit("jobs/noisy_student.yaml", ["data.root=s3://key:hunter2@bucket"], "http://127.0.0.1:1", None)


def test_secrets_come_from_a_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secrets.env"
    path.write_text("# of the store\n\nAWS_SECRET_ACCESS_KEY=a=b # c\n  QUOTED='x y'  \nEMPTY=\n")
    assert secrets_file.read(str(path)) == {"AWS_SECRET_ACCESS_KEY": "a=b # c", "QUOTED": "x y", "EMPTY": ""}
    monkeypatch.setenv("QUOTED", "before")
    monkeypatch.setenv(secrets_file.VARIABLE, str(path))
    for name in ("AWS_SECRET_ACCESS_KEY", "EMPTY"):
        monkeypatch.setenv(name, "")  # put back in the end
    assert small.command("jobs").status == 0
    assert (os.environ["QUOTED"], os.environ["AWS_SECRET_ACCESS_KEY"]) == ("x y", "a=b # c")


@pytest.mark.parametrize("text", ["hunter2", "hunter2 = x", "=hunter2", "1A=hunter2", None])
def test_a_file_of_secrets_that_is_none_is_a_sentence_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "secrets.env"
    if text is not None:
        path.write_text(f"GOOD=1\n{text}\n")
    monkeypatch.setenv(secrets_file.VARIABLE, str(path))
    monkeypatch.delenv("GOOD", raising=False)
    ran = small.command("jobs")
    wrong = "cannot be read on" if text is None else f"line 2 of the file of secrets {path} is not NAME=value"
    assert ran.status == 2 and wrong in ran.err and "hunter2" not in ran.err
    assert "GOOD" not in os.environ


def test_what_is_asked_to_be_handed_on_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"^--env NOT_SET: this shell has no such variable"):
        submit("jobs/noisy_student.yaml", [], "http://127.0.0.1:1", None, env=["NOT_SET"])
    with pytest.raises(ConfigError, match=r"^--secrets here\.env is the file's path on the cluster's machines"):
        submit("jobs/noisy_student.yaml", [], "http://127.0.0.1:1", None, secrets="here.env")
