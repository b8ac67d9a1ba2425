"""What a tracker is told of stages and results, where some of it is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.load import load_job
from pipeline.plan import tracked
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, Stage
from tests import small


def test_a_stage_is_called_by_the_model_that_it_left(tmp_path: Path) -> None:
    job = load_job(str(small.make(tmp_path).job), [])
    stage = Stage("gen0-teacher", "adopt", ("index",), model=True)
    assert tracked.title(job, stage, None) == f"gen0-teacher · {job.teacher.model}"
    adopted = Done("gen0-teacher", "", "", "", {"model": "timm/vit_tiny_patch16_224"})
    assert tracked.title(job, stage, adopted) == "gen0-teacher · timm/vit_tiny_patch16_224"
    assert tracked.title(job, Stage("gen1-label", "label", ()), None) == "gen1-label"


def test_what_was_not_measured_is_left_out() -> None:
    row: dict[str, Any] = {"stage": "gen0-teacher", "model": "tiny", "top1": 0.5, "top5": 0.75, "ece": 0.125}
    row |= {"parameters": 1234567, "images_per_second": 1234.5}
    known = {"test_top1": 0.5, "test_top5": 0.75, "test_ece": 0.125, "parameters": 1234567.0}
    assert tracked._figures(row) == known | {"inference_images_per_second": 1234.5}
    assert tracked._figures(row | {"flops": None, "latency_ms": 2.5})["latency_ms"] == 2.5
    line = tracked._table([row | {"flops": 2_500_000, "validation": {"accuracy": 0.5}}], "").splitlines()[-1]
    assert line == "| gen0-teacher · tiny | 50.00 % |  | 50.00 % | 1,234,567 | 2.5 M | 1,234 |  |"


def test_settings_are_params_and_hashes_are_tags(tmp_path: Path) -> None:
    job, sha256 = load_job(str(small.make(tmp_path).job), []), "0123456789abcdef" * 4
    identity = {
        "settings": {"lr": 0.1, "affine": {"shear": 8.0}},
        "seed": 0,
        "evaluate_every": "5st",
        "labelled": sha256,
        "models": [{"weights": sha256, "view": {"size": 8}}],
        "classes": ["a"] * 64,
    }
    stage = Stage("gen0-teacher", "train", ("index",), model=True)
    record = tracked.stage_record(job, stage, "folder", identity, {}, Corpora(job, {}))
    assert record.params == {"lr": 0.1, "affine.shear": 8.0, "seed": 0, "evaluate_every": "5st"}
    ours = {name: value for name, value in record.tags.items() if "workers" not in name and "source" not in name}
    hashes = {"noisy_lambda.labelled": sha256[:16], "noisy_lambda.models.0.weights": sha256[:16]}
    assert ours == {"noisy_lambda.job": job.name, "noisy_lambda.stage": "gen0-teacher"} | hashes
    assert record.datasets == []  # none was looked up
