"""Lists of values on the command line: how they are split, what they make, and what is a mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import job_file
from pipeline.config.load import load_job
from pipeline.sweep import ahead, grid
from tests import small
from tests.small import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small.make(tmp_path_factory.mktemp("grid"))


def drawn(rng: np.random.Generator, depth: int = 0) -> Any:
    """A value that a setting might take."""
    kind = rng.integers(0, 7 if depth < 2 else 5)
    if kind == 5:
        return [drawn(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    if kind == 6:
        return {f"k{number}": drawn(rng, depth + 1) for number in range(rng.integers(0, 3))}
    letters = list("ab,'\"[]{}: #é-")
    return [
        None,
        True,
        int(rng.integers(-9, 99)),
        float(rng.random()),
        "".join(rng.choice(letters, rng.integers(1, 9))),
    ][kind]


@pytest.mark.parametrize("seed", range(100))
def test_whatever_yaml_writes_in_one_line_is_one_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [drawn(rng) for _ in range(rng.integers(1, 5))]
    texts = [
        yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True)[1:-2] for value in values
    ]
    found = grid.split(",".join(texts))
    assert found is not None and [job_file.parse(text) for text in found] == values
    assert ",".join(found) == ",".join(texts)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.3,0.5", ["0.3", "0.5"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("[1,2]", ["[1,2]"]),
        ("unlabelled-{000..003}.tar", ["unlabelled-{000..003}.tar"]),
        ("a-{0,1}.tar,b-[01].tar", ["a-{0,1}.tar", "b-[01].tar"]),
        ("it's,that's", ["it's", "that's"]),
        ("", [""]),
        ("a],b", ["a]", "b"]),
        ("[1,2", None),
        ("'a,b", None),
    ],
)
def test_where_values_end(text: str, values: list[str] | None) -> None:
    assert grid.split(text) == values


def test_every_combination_is_the_job_that_run_would_read(world: World) -> None:
    output = f"output={world.output}"
    swept = {"student.crop_scale": ["[0.5,1.0]", "[0.8,1.0]"], "seed": ["0", "3"], "student.duration": ["1st", "2st"]}
    sweep = grid.read(str(world.job), [output, *(f"{key}={', '.join(values)}" for key, values in swept.items())])
    wanted = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    assert [dict(one.settings) for one in sweep.combinations] == wanted
    for one in sweep.combinations:
        said = [f"{key}={value}" for key, value in one.settings.items()]
        assert one.job == load_job(str(world.job), [output, *said])
        assert str(one) == " ".join(said)
    again = grid.read(str(world.job), [*(f"{key}={','.join(values)}" for key, values in swept.items()), output])
    assert again.folder == sweep.folder
    other = grid.read(str(world.job), [output, "teacher.lr=0.5", "seed=0,3"])
    assert other.folder != grid.read(str(world.job), [output, "seed=0,3"]).folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["seed=1"], "nothing is swept: give at least one setting several values"),
        ([], "nothing is swept"),
        (["student.lr"], "'student.lr' is not of the form key=value or key=value,value"),
        (["select.threshold=0.1,0.10"], "select.threshold=0.1 and select.threshold=0.10 train the same models"),
        (["workers.train=1,2"], "train the same models; sweep over settings that change them"),
        (["name=a,b"], "train the same models"),
        (["evaluate.batch=8,16"], "train the same models"),
        (["select.threshold=0.1,"], "'0.1,': one of them is empty; write null for no value"),
        (["student.crop_scale=[0.5,1.0"], "a bracket or a quote is not closed"),
        (["student.lr=0.1,x"], "student.lr is 'x'; it takes a number"),
        (["student.lr=0.1,0.2", "student.lr=0.3"], "student.lr is given twice"),
        (["student.lrr=0.1,0.2"], "student.lrr'; did you mean 'lr'?"),
        (["select.threshold=0.5,1.5"], "it must be between"),
        (
            ["student.model=lambda_resnet_tiny,foo"],
            "the sweep would fail with student.model=foo: gen1-student: there is",
        ),
        (["data.labelled=labelled-*.tar,no-*.tar"], "the sweep would fail with data.labelled=no-*.tar"),
        (["output=here,there"], "a sweep has one output"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(world: World, settings: list[str], said: str) -> None:
    given = settings if settings and settings[0].startswith("output") else [f"output={world.output}", *settings]
    ran = small.command("sweep", world.job, *given)
    assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran
    assert not world.output.exists()


def test_a_job_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    job = tmp_path / "measure.yaml"
    job.write_text("name: m\nmeasure: {models: [lambda_resnet_tiny@8]}\n")
    ran = small.command("sweep", job, "measure.batch=1,2")
    assert ran.status == 2 and "trains no model" in ran.err


def test_a_warning_is_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    base = world.job.parent / "base.yaml"
    base.write_text("student: {optimizer: sgd, momentum: 0.8}\n")
    job = world.job.parent / "warned.yaml"
    text = yaml.safe_load(world.job.read_text())
    job.write_text(yaml.safe_dump({"base": "base.yaml", **text}))
    grid.read(str(job), [f"output={world.output}", "seed=0,1,2"])
    assert [record.getMessage().count("student.momentum") for record in caplog.records] == [1]


def test_the_plan_shares_what_the_settings_share(world: World) -> None:
    settings = ["student.lr=0.01,0.02", "select.threshold=0.0,0.2", "label.batch=64,128", "teacher.lr=0.01,0.02"]
    found = ahead.plan(grid.read(str(world.job), [f"output={world.output}", *settings]))
    new = [name for one in found for name in one.new]
    assert {name: new.count(name) for name in small.STAGES[:-2]} == {
        "index": 1,
        "gen0-teacher": 2,
        "gen1-audit": 8,  # it counts what the threshold lets through
        "gen1-label": 4,
        "gen1-select": 8,
        "gen1-student": 16,
    }
    assert not any(one.done for one in found) and not world.output.exists()
