"""Jobs that measure: the files they leave, where accuracies come from, and what they say of a wrong list."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from models import create_model, list_models
from pipeline import weights
from pipeline.config.settings import Measured
from pipeline.report import costs_on_paper, known_accuracy, measured_plot
from pipeline.report.known_accuracy import PUBLISHED, accuracy_of, published
from tests.small import Ran, command

COLUMNS = [
    "name",
    "model",
    "size",
    "overrides",
    "family",
    "parameters",
    "flops",
    "top1",
    "accuracy_source",
    "inference_batch",
    "inference_images_per_second",
    "inference_peak_bytes",
    "training_batch",
    "training_images_per_second",
    "training_peak_bytes",
    "latency_ms",
    "problem",
    "device",
    "dtype",
    "compile",
    "versions",
]
MODELS = ["lambda_resnet_tiny@16", {"model": "timm/test_resnet", "size": 32, "label": "timm's $mallest | one"}]


def write_job(folder: Path, **measure: Any) -> Path:
    measure = {"models": MODELS, "rounds": 1, "seconds": 0.0, "max_batch": 2, **measure}
    job = {"name": "measured", "cluster": "inline", "tracking": {"enabled": False}, "measure": measure}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `evaluate` leaves of a teacher and a student that differ in their overrides only."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = []
    for stage, overrides, top1 in (("gen0-teacher", {}, 0.875), ("gen1-student", {"k": 8}, 0.9375)):
        card = weights.Card("lambda_resnet_tiny", ["cat", "dog"], 16, 1.0, "bicubic", [0.5] * 3, [0.5] * 3, overrides)
        (folder / stage).mkdir()
        weights.write_card(str(folder / stage), card)
        rows.append({"stage": stage, "dir": str(folder / stage), "top1": top1})
    (folder / "evaluate.json").write_text(json.dumps({"images": 1600, "models": rows}))
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, evaluation: Path) -> tuple[Path, Path, Ran]:
    """A job, its output, and its run."""
    folder = tmp_path_factory.mktemp("measured")
    job = write_job(folder, accuracy_from=str(evaluation))
    ran = command("run", job, f"output={folder / 'out'}")
    assert ran.status == 0, ran.err
    return job, folder / "out", ran


def test_a_job_leaves_a_table_a_plot_and_a_line_of_json(measured: tuple[Path, Path, Ran]) -> None:
    _, output, ran = measured
    [folder] = output.glob("measure-*")
    done = json.loads((folder / "done.json").read_text())
    assert sorted(done["artifacts"]) == [
        "speed_accuracy.csv",
        "speed_accuracy.md",
        "speed_accuracy.png",
        "summary.json",
    ]
    assert (folder / "speed_accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((folder / "speed_accuracy.csv").read_text())))
    assert list(rows[0]) == COLUMNS
    for row, classes in zip(rows, (create_model("lambda_resnet_tiny"), timm.create_model("test_resnet")), strict=True):
        assert int(row["parameters"]) == sum(p.numel() for p in classes.parameters())
        assert all(float(row[key]) > 0 for key in COLUMNS if key.endswith(("second", "bytes", "ms", "flops")))
        assert (row["dtype"], row["compile"], row["problem"]) == ("float32", "eager", "")
        assert row["device"].startswith("CPU") and f"torch {torch.__version__}" in row["versions"]
    assert f"timm {timm.__version__}" in rows[1]["versions"]
    summary = json.loads(ran.out.splitlines()[-1])
    assert summary == json.loads((folder / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["lambda_resnet_tiny@16", "timm's $mallest | one"]
    assert summary["report"] == str(folder / "speed_accuracy.md")
    table = [line for line in (folder / "speed_accuracy.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert done["metrics"]["lambda_resnet_tiny@16/inference_images_per_second"] > 0


def test_measured_accuracy_is_labelled_so_and_needs_the_same_overrides(
    measured: tuple[Path, Path, Ran], evaluation: Path
) -> None:
    rows = json.loads(measured[2].out.splitlines()[-1])["rows"]
    assert (rows[0]["top1"], rows[0]["accuracy_source"]) == (87.5, "measured: gen0-teacher on 1,600 test images")
    assert (rows[1]["top1"], rows[1]["accuracy_source"]) == (None, None)
    known = known_accuracy.evaluated(str(evaluation))
    found = accuracy_of(Measured("lambda_resnet_tiny", 16, {"k": 8}), known)
    assert found and found.top1 == 93.75
    assert accuracy_of(Measured("lambda_resnet_tiny", 20), known) is None


def test_a_rerun_measures_nothing_and_says_the_same(measured: tuple[Path, Path, Ran]) -> None:
    job, output, ran = measured
    again = command("run", job, f"output={output}")
    assert again.out.splitlines()[-1] == ran.out.splitlines()[-1]
    assert "nothing had to run" in again.out
    assert "measure  done" in command("plan", job, f"output={output}").out
    assert "done" in command("status", job, f"output={output}").out
    assert "nothing to clean" in command("clean", job, f"output={output}").out
    assert "measure-" in command("clean", job, f"output={output}", "measure.rounds=2").out


def test_another_evaluation_is_another_table(
    measured: tuple[Path, Path, Ran], evaluation: Path, tmp_path: Path
) -> None:
    job, output, _ = measured
    (tmp_path / "evaluate.json").write_text((evaluation / "evaluate.json").read_text())
    moved = command("plan", job, f"output={output}", f"measure.accuracy_from={tmp_path}").out
    assert "measure  done" in moved  # the same figures elsewhere
    (tmp_path / "evaluate.json").write_text((evaluation / "evaluate.json").read_text().replace("0.875", "0.5"))
    assert "will run" in command("plan", job, f"output={output}", f"measure.accuracy_from={tmp_path}").out


def test_what_does_not_fit_in_memory_is_a_row(tmp_path: Path) -> None:
    job = write_job(tmp_path, models=["lambda_resnet_tiny@16"], batch=1 << 40)
    ran = command("run", job, f"output={tmp_path / 'out'}")
    assert ran.status == 0, ran.err
    [row] = json.loads(ran.out.splitlines()[-1])["rows"]
    wanted = f"inference: out of memory at batch {1 << 40}; training: out of memory at batch {1 << 40}"
    assert (row["problem"], row["inference_images_per_second"], row["training_peak_bytes"]) == (wanted, None, None)
    [markdown] = tmp_path.glob("out/measure-*/speed_accuracy.md")
    assert f"| out of memory ({1 << 40}) |" in markdown.read_text()
    assert "no plot" in ran.out


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        (
            ["lambda_resnet_tiny@16", "lambda_resnet_51@16"],
            ["measure.models[1]", "lambda_resnet_51", "lambda_resnet_50"],
        ),
        (["timm/test_resnett@32"], ["measure.models[0]", "timm has no model", "test_resnet"]),
        (["lambda_resnet_tiny"], ["measure.models[0] is 'lambda_resnet_tiny'", "model@size"]),
        ([{"model": "lambda_resnet_tiny"}], ["measure.models[0].size is not set"]),
        ([{"modle": "lambda_resnet_tiny", "size": 16}], ["measure.models[0].modle", "'model'"]),
        (["lambda_resnet_tiny@2"], ["measure.models[0].size is 2", "between 4 and 4096"]),
        (
            [{"model": "lambda_resnet_tiny", "size": 16, "overrides": {"q": 1}}],
            ["measure.models[0]", "no model setting 'q'"],
        ),
        (["timm/test_vit@100"], ["measure.models[0]", "does not take images of 100 × 100 pixels", "another size"]),
        (["lambda_resnet_tiny@16"] * 2, ["measure.models[0] and [1]", "lambda_resnet_tiny@16", "label"]),
    ],
)
def test_a_wrong_list_is_one_clear_sentence(tmp_path: Path, models: list[Any], wanted: list[str]) -> None:
    ran = command("run", write_job(tmp_path, models=models), f"output={tmp_path / 'out'}")
    assert ran.status == 2
    assert ran.err.count("\n") == 1 and all(text in ran.err for text in wanted), ran.err


def test_a_job_measures_or_trains(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    for setting, named in (("teacher.model=lambda_resnet_tiny", "teacher.model"), ("generations=[{}]", "generations")):
        ran = command("run", job, f"output={tmp_path / 'out'}", setting)
        assert ran.status == 2 and f"measure.models and {named} are both set" in ran.err
    ran = command("run", job, f"output={tmp_path / 'out'}", f"measure.accuracy_from={tmp_path}")
    assert ran.status == 2 and "measure.accuracy_from: there is no evaluate.json" in ran.err


def test_the_job_that_a_run_writes_down_runs(measured: tuple[Path, Path, Ran]) -> None:
    _, output, ran = measured
    again = command("run", output / "job.yaml")
    assert again.out.splitlines()[-1] == ran.out.splitlines()[-1]


def test_published_accuracies_are_kept_apart_by_training_data() -> None:
    """LambdaNetworks, tables 5, 14 and 19; EfficientNet's README."""

    def top1(data: str, model: str, size: int, **overrides: Any) -> float | None:
        found = accuracy_of(Measured(model, size, overrides), published(data))
        return found.top1 if found else None

    assert (top1("imagenet", "lambda_resnet_50", 160), top1("extra", "lambda_resnet_50", 160)) == (79.2, 83.4)
    assert (top1("imagenet", "lambda_resnet_152", 288), top1("extra", "lambda_resnet_152", 288)) == (None, 86.7)
    assert top1("imagenet", "lambda_resnet_152", 256) == 83.8  # table 14 says 83.4
    assert (top1("imagenet", "timm/tf_efficientnet_b7", 600), top1("extra", "timm/tf_efficientnet_b7", 600)) == (
        84.7,
        86.9,
    )
    assert top1("imagenet", "timm/tf_efficientnet_b7.aa_in1k", 600) == 84.7
    assert top1("extra", "timm/vit_large_patch16_384", 384) == 87.1
    assert top1("imagenet", "hybrid_resnet_50_llll", 224) == 78.4
    assert top1("imagenet", "hybrid_resnet_50_llll", 224, k=8) == 77.9
    assert top1("imagenet", "hybrid_resnet_50_llll", 224, k=8, u=4) is None


def test_every_published_figure_has_a_model_and_a_source() -> None:
    for block in yaml.safe_load(PUBLISHED.read_text()):
        assert block["data"] in ("imagenet", "extra") and block["source"]
        for name, top1, *overrides in block["top1"]:
            model, _, size = name.rpartition("@")
            assert model in list_models() or timm.is_model(model.removeprefix("timm/")), name
            assert 32 <= int(size) <= 600 and 76 <= top1 <= 89 and len(overrides) <= 1, name


def test_flops_count_the_products_of_attention_and_agree_with_the_papers_convention() -> None:
    width, tokens, blocks = 192, 24 * 24 + 1, 12
    block = 12 * width**2 * tokens + 2 * width * tokens**2  # projections and MLP; q·k and attention·v
    around = 16 * 16 * 3 * width * (tokens - 1) + width * 1000  # patches, classifier
    with torch.device("meta"):
        members = [{"architecture": name, "overrides": {}} for name in ("lambda_resnet_tiny", "lambda_resnet_small")]
        several = weights.build_model(weights.ENSEMBLE, 10, {"members": members})
        assert costs_on_paper.flops(several, 16) == sum(costs_on_paper.flops(one, 16) for one in several.members)
        assert costs_on_paper.flops(timm.create_model("vit_tiny_patch16_384"), 384) == 2 * (blocks * block + around)
        ours, theirs = create_model("resnet_50_se"), timm.create_model("resnetrs50")
        assert costs_on_paper.flops(theirs, 160) == costs_on_paper.flops(ours, 160)
        assert (
            abs(costs_on_paper.flops(create_model("hybrid_resnet_50_clll"), 224) - 10.0e9) < 5e7
        )  # table 11, scope 23


@pytest.mark.parametrize(
    ("overrides", "gibibytes"),
    [
        ({"layer": "global_attention"}, 122.8),
        ({"layer": "axial_attention"}, 4.82),
        ({}, 1.92),
        ({"k": 8}, 0.96),
        ({"share_embeddings": True}, 0.625),
        ({"position": False}, None),
    ],
)
def test_memory_of_maps_is_the_papers(overrides: dict[str, Any], gibibytes: float | None) -> None:
    """LambdaNetworks, table 4, as its notes compute it: ResNet-50 at 224, batch 128."""
    columns = costs_on_paper.on_paper("", Measured("hybrid_resnet_50_llll", 224, overrides), 128)
    found = columns["map_bytes"]
    assert found is None if gibibytes is None else found / 2**30 == pytest.approx(gibibytes, rel=3e-3)


def test_only_what_has_maps_has_their_memory() -> None:
    for model in ("hybrid_resnet_50_cccc", "timm/test_resnet"):
        assert costs_on_paper.on_paper("", Measured(model, 32), 128)["map_bytes"] is None
    scoped = [costs_on_paper.on_paper("", Measured("lambda_resnet_tiny", 16, {"r": r}), 1)["map_bytes"] for r in (3, 5)]
    assert scoped[1] * 9 == scoped[0] * 25  # a scope that is set: its embeddings per position


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("lambda_resnet_152", "LambdaResNet"),
        ("lambda_resnet_152_c4", "LambdaResNet-C4"),
        ("resnet_50", "ResNet-D"),
        ("resnet_50_se", "ResNet-D + SE"),
        ("timm/resnetrs50", "ResNet-RS"),
        ("timm/tf_efficientnet_b7.ns_jft_in1k", "EfficientNet"),
        ("timm/vit_large_patch16_384", "ViT"),
        ("timm/regnety_032", "regnety"),
    ],
)
def test_families(model: str, family: str) -> None:
    assert costs_on_paper.family(model) == family


def test_the_plot_takes_what_is_known() -> None:
    row = {
        "name": "a",
        "model": "m",
        "size": 8,
        "family": "f",
        "top1": 80.0,
        "inference_images_per_second": 5.0,
        "training_images_per_second": 1.0,
        "device": "CPU",
        "dtype": "float32",
        "compile": "eager",
    }
    assert measured_plot.pareto([row | {"top1": None}, row | {"inference_images_per_second": None}]) is None
    one = measured_plot.pareto([row, row | {"top1": None}])
    two = measured_plot.pareto([row, row | {"name": "b", "top1": 81.0, "training_images_per_second": None}])
    assert one and two and one != two and one == measured_plot.pareto([row])
