"""The test on corrupted images: its counts against a loop of a few lines, and what a job can say of it."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import graph, storage, weights
from pipeline.cluster.contract import Resources
from pipeline.config.load import load_job
from pipeline.corruption.corrupt import canvas, corrupt
from pipeline.data import images, label_files, shards
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.stages import robustness
from tests import small

TWO = "evaluate.robustness.corruptions=[snow, gaussian_noise]"


def found(world: small.World) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((world.folder("robustness") / "robustness.json").read_text())
    return result


def wrong_by_hand(world: small.World, stage: str, name: str | None, severity: int) -> float:
    """Percent of the test images that a model takes for another class."""
    model, card = weights.load_model(str(world.folder(stage)))
    wrong = 0
    samples = list(shards.stream(str(world.shards / "test-000.tar")))
    for truth, (_, data) in enumerate(samples):
        pixels = canvas(images.decode(data))
        if name:
            pixels = corrupt(pixels, name, severity, label_files.image_hash(data))
        array = torch.from_numpy(images.to_array(Image.fromarray(pixels), card.view()))
        with torch.inference_mode():
            wrong += int(model.eval()(images.normalise(array[None], card.view())).argmax() != truth)
    return 100 * wrong / len(samples)


def test_errors_are_those_of_a_plain_loop_and_nothing_else_is_done_again(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path)
    before = {path.parent.name for path in world.output.glob("*/done.json")}
    assert world.run(TWO, "evaluate.robustness.severities=[5, 1]").status == 0
    new = {
        path.parent.name.rpartition("-")[0]
        for path in world.output.glob("*/done.json")
        if path.parent.name not in before
    }
    assert new == {"robustness", "report"}
    said = found(world)
    assert (said["images"], said["severities"], said["reference"]) == (3, [1, 5], "teacher")
    assert [row["stage"] for row in said["models"]] == ["gen0-teacher", "gen1-student"]
    for row in said["models"]:
        assert list(row["errors"]) == ["gaussian_noise", "snow"]
        assert row["clean_error"] == pytest.approx(wrong_by_hand(world, row["stage"], None, 0))
        for name, errors in row["errors"].items():
            assert errors == pytest.approx([wrong_by_hand(world, row["stage"], name, severity) for severity in (1, 5)])
    assert said["models"][0]["mce"] in (None, pytest.approx(100))
    rows = list(csv.DictReader((world.folder("robustness") / "robustness.csv").open()))
    assert len(rows) == 2 * (1 + 2 * 2)
    [page] = [path for path in world.output.glob("report-*/index.html") if "Corruption error" in path.read_text()]
    assert (page.parent / "corruptions.png").exists() and (page.parent / "error_by_severity.png").exists()


def test_neither_batch_nor_shards_change_what_is_counted(worlds: small.Store, tmp_path: Path) -> None:
    from tests.data import tars

    said = []
    for name, files in (("one", [(0, 6)]), ("two", [(0, 2), (2, 6)])):
        world = small.make(tmp_path / name, generations=[])
        (world.shards / "test-000.tar").unlink()
        for number, (start, end) in enumerate(files):
            labels = [i % 3 for i in range(start, end)]
            tars.shard(world.shards / f"test-{number:03}.tar", end - start, labels=labels, start=200 + start)
        for batch in (1, 64):
            ran = world.run(TWO, f"evaluate.batch={batch}", "evaluate.robustness.images=4")
            assert ran.status == 0, ran.err
        said.append(found(world)["models"][0]["errors"])
        assert found(world)["images"] == 4
    assert said[0] == said[1]


class Workers:
    """A cluster whose every `map` has so many workers, each of which takes part."""

    def __init__(self, cluster: Any, workers: int, folder: Path) -> None:
        self.cluster, self.workers, self.folder = cluster, workers, folder

    def map(self, make_worker: Any, units: Any, *, resources: Resources, overlap: int = 1) -> Any:
        self.folder.mkdir()
        together = functools.partial(working_together, make_worker, self.folder, self.workers)
        resources = dataclasses.replace(resources, workers=self.workers)
        yield from self.cluster.map(together, units, resources=resources, overlap=overlap)
        assert len(list(self.folder.iterdir())) == self.workers


def working_together(make_worker: Any, folder: Path, workers: int) -> Any:
    """A worker that begins its first unit once all workers have one."""
    work, begun = make_worker(), folder / str(os.getpid())

    def run(unit: Any) -> Any:
        if not begun.exists():
            begun.touch()
            end = time.monotonic() + 120
            while len(list(folder.iterdir())) < workers:
                assert time.monotonic() < end
                time.sleep(0.01)
        return work(unit)

    return run


@pytest.mark.slow
def test_neither_workers_nor_batch_change_a_figure(
    tmp_path: Path, embedded_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three shards, with one worker and with three on Ray, with batches of 1, 2 and 64."""
    from tests.data import tars

    monkeypatch.setattr(robustness, "SMALL_BYTES", 0)
    world = small.make(tmp_path)
    for number in range(3):
        tars.shard(world.shards / f"test-{number:03}.tar", 4, labels=[0, 1, 2, number], start=200 + 10 * number)
    assert world.run().status == 0
    token, said = storage.write_token(str(world.output)), []
    for workers, batch in ((1, 64), (3, 64), (3, 1), (1, 2)):
        job = load_job(str(world.job), [f"output={world.output}", "evaluate.robustness.corruptions=all"])
        job.evaluate.batch = batch
        [stage] = [stage for stage in graph.stages_of(job) if stage.name == "robustness"]
        done = {look.stage.name: look.done for look in graph.look(job) if look.done}
        folder = str(tmp_path / f"{workers}-{batch}")
        context = Context(
            job, stage, graph.stages_of(job), folder, "", {name: done[name] for name in stage.needs},
            Corpora(job, done, write=False), Workers(embedded_ray, workers, tmp_path / f"pids-{workers}-{batch}"),
            pytest.fail, token,
        )  # fmt: skip
        robustness.run(context)
        said.append([(Path(folder) / name).read_bytes() for name in ("robustness.json", "robustness.csv")])
    assert said[1:] == said[:1] * 3
    assert json.loads(said[0][0])["images"] == 12


def test_a_run_without_students_says_how_often_its_teacher_errs(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, generations=[])
    ran = world.run(TWO)
    assert ran.status == 0, ran.err
    row = found(world)["models"][0]
    assert f"mean error on 3 corrupted images: gen0-teacher {row['mean_error']:.1f} %" in ran.out
    assert "mCE" not in ran.out
    [page] = [text for path in world.output.glob("report-*/index.html") if "spoilt" in (text := path.read_text())]
    assert f"{row['mean_error']:.1f} on average, against {row['clean_error']:.1f} as they are" in page
    summary = json.loads(ran.out.splitlines()[-1])
    assert summary["robustness"] == str(world.folder("robustness") / "robustness.json")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluate.robustness.corruptions=[snwo]", "names 'snwo', which is no corruption; did you mean 'snow'?"),
        ("evaluate.robustness.corruptions=rain", "evaluate.robustness.corruptions is 'rain'; it takes all, or a list"),
        ("evaluate.robustness.severities=[1]", "which has no effect: evaluate.robustness.corruptions names none"),
        ("evaluate.robustness={corruptions: all, severities: [6]}", "severities is [6]; it must be between 1 and 5"),
        ("evaluate.robustness={corruptions: all, severities: []}", "severities is empty; it takes numbers from 1 to 5"),
        (
            "evaluate.robustness={corruptions: all, severities: [1, 2], reference: alexnet}",
            "reference is alexnet, whose errors are known as means over the severities 1 to 5",
        ),
        (
            "evaluate.robustness={corruptions: all, reference: resnet}",
            "reference is 'resnet' (did you mean 'alexnet'?); allowed are teacher, alexnet",
        ),
    ],
)
def test_mistakes(tmp_path: Path, setting: str, words: str) -> None:
    ran = small.make(tmp_path, generations=[]).run(setting)
    assert (ran.status, ran.err.count("\n")) == (2, 1) and words in ran.err, ran.err


def test_all_is_the_list_of_all(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, generations=[])
    ran = world.run("evaluate.robustness.corruptions=all", "evaluate.robustness.severities=[3]")
    assert ran.status == 0, ran.err
    assert len(found(world)["models"][0]["errors"]) == 15
    assert np.mean([errors[0] for errors in found(world)["models"][0]["errors"].values()]) == pytest.approx(
        found(world)["models"][0]["mean_error"]
    )
