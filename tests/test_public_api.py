"""`import noisy_lambda`: what it has, that importing it costs nothing, and what its functions give back."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import noisy_lambda
from tests import small, tiny
from tests.small import World
from tests.test_cli import files

SURFACE = {
    "LambdaLayer": None,
    "UserError": None,
    "create_model": None,
    "labels": "(run: 'str | Path', generation: 'int | None' = None) -> 'Labels'",
    "list_models": None,
    "load": "(model: 'str | Path', *more: 'str | Path', raw: 'bool' = False, device: 'str' = 'auto') -> 'Predictor'",
    "plan": "(job: 'str | Path', *overrides: 'str') -> 'list[dict[str, str]]'",
    "run": "(job: 'str | Path', *overrides: 'str') -> 'dict[str, Any]'",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small.make(tmp_path_factory.mktemp("api"), generations=[])


@pytest.fixture(scope="module")
def summary(world: World) -> dict[str, Any]:
    return noisy_lambda.run(world.job, f"output={world.output}")


def test_what_it_has() -> None:
    assert sorted(SURFACE) == noisy_lambda.__all__ == dir(noisy_lambda)
    for name, signature in SURFACE.items():
        found = getattr(noisy_lambda, name)
        assert inspect.getdoc(found), name
        assert signature is None or str(inspect.signature(found)) == signature
    with pytest.raises(AttributeError, match="module 'noisy_lambda' has no attribute 'lode'"):
        _ = noisy_lambda.lode  # type: ignore[attr-defined]


def test_models_are_those_of_the_package() -> None:
    import models
    from pipeline.errors import UserError

    assert noisy_lambda.LambdaLayer is models.LambdaLayer
    assert noisy_lambda.create_model is models.create_model
    assert noisy_lambda.list_models is models.list_models
    assert noisy_lambda.UserError is UserError


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "torch ray mlflow models pipeline yaml"
    code = f"import sys, noisy_lambda; print([n for n in '{heavy}'.split() if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_run_gives_the_summary_and_load_the_model(world: World, summary: dict[str, Any]) -> None:
    [written] = world.output.glob("report-*/summary.json")
    assert summary == json.loads(written.read_text())
    model = noisy_lambda.load(world.folder("gen0-teacher"))
    assert not model.module.training
    assert (model.card.classes, model.card.size) == (small.CLASSES, 8)
    with torch.no_grad():
        assert model.module(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_run_again_has_nothing_to_do_also_off_the_main_thread(
    world: World, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook's cell may run on any thread; only a command may take SIGTERM."""
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(noisy_lambda.run(str(world.job), f"output={world.output}")))
    thread.start()
    thread.join()
    assert found == [summary]
    assert "all is done; nothing had to run" in capsys.readouterr().out


def test_plan_says_what_the_table_says_and_writes_nothing(world: World, summary: dict[str, Any]) -> None:
    before = files(world.output.parent)
    done = noisy_lambda.plan(world.job, f"output={world.output}")
    assert [row["stage"] for row in done] == small.TEACHER_ONLY
    assert {row["state"] for row in done} == {"done"}
    assert done[1]["folder"] == str(world.folder("gen0-teacher"))
    changed = noisy_lambda.plan(world.job, f"output={world.output}", "teacher.lr=0.02")
    assert [row["state"] for row in changed] == ["done", *["will run"] * 3]
    assert changed[1]["folder"] not in ("", done[1]["folder"]) and not Path(changed[1]["folder"]).exists()
    assert "learning rate" in changed[1]["what"] and changed[2]["folder"] == ""
    assert files(world.output.parent) == before


def test_mistakes_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(noisy_lambda.UserError, match="there is no job file smok; did you mean smoke"):
        noisy_lambda.run("smok")
    with pytest.raises(noisy_lambda.UserError, match=r"teacher\.lr is -1"):
        noisy_lambda.plan("smoke", "teacher.lr=-1")
    with pytest.raises(noisy_lambda.UserError, match=r"there is no trained model at"):
        noisy_lambda.load(tmp_path)
    assert [row["stage"] for row in noisy_lambda.plan("smoke")][:2] == ["prepare", "index"]
    assert list(tmp_path.iterdir()) == []
