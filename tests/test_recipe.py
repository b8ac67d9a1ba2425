"""conf/recipe against the paper's numbers, as a job gets them.

Run: pytest tests/test_recipe.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from models.family import TRAINED_AT
from pipeline.augment.noise import augment_of
from pipeline.config.load import load_job
from pipeline.config.settings_train import Affine, Train
from pipeline.train.spec import architecture_overrides
from pipeline.weights import build_model

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted((CONF / "recipe").glob("lambda_resnet_*.yaml"))
# LambdaNetworks, tables 19 and 20 (PAPER.md 2.11): (depth, size) -> top-1 supervised and with pseudo-labels,
# RandAugment's magnitude, dropout, stochastic depth.
TABLE = {
    (50, 128): (77.4, 82.1, 10, 0.2, 0.0),
    (50, 160): (79.2, 83.4, 10, 0.2, 0.0),
    (101, 160): (80.8, 84.7, 10, 0.3, 0.0),
    (101, 192): (81.9, 85.4, 15, 0.2, 0.0),
    (152, 192): (82.5, 86.1, 15, 0.3, 0.0),
    (152, 224): (83.2, 86.5, 15, 0.3, 0.1),
    (152, 256): (83.8, None, 15, 0.3, 0.1),
    (152, 288): (None, 86.7, 15, 0.3, 0.1),
    (270, 256): (84.2, None, 15, 0.3, 0.1),
    (350, 256): (84.4, None, 15, 0.3, 0.2),
    (350, 288): (84.5, None, 15, 0.3, 0.2),
    (350, 320): (84.7, None, 15, 0.3, 0.2),
    (420, 320): (84.9, None, 15, 0.3, 0.2),
}


def row_of(path: Path) -> tuple[int, int]:
    depth, size = re.fullmatch(r"lambda_resnet_(\d+)-(\d+)", path.stem).groups()
    return int(depth), int(size)


def settings_of(path: Path, folder: Path) -> Train:
    """What a job whose teacher builds on this recipe alone trains with."""
    job = folder / "job.yaml"
    job.write_text(f"name: x\ndata: {{root: /data}}\nteacher: {{base: recipe/{path.name}}}\n")
    return load_job(str(job)).teacher


def test_the_files_are_the_thirteen_rows_of_the_table() -> None:
    assert sorted(map(row_of, FILES)) == sorted(TABLE)
    assert sorted((depth, size) for depth, sizes in TRAINED_AT.items() for size in sizes) == sorted(TABLE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_its_row_of_the_table_on_the_papers_set_up(path: Path, tmp_path: Path) -> None:
    depth, size = row_of(path)
    supervised, pseudo, magnitude, dropout, stochastic_depth = TABLE[depth, size]
    train = settings_of(path, tmp_path)
    assert (train.model, train.resolution) == (f"lambda_resnet_{depth}", size)
    assert train.augment == f"rand-m{magnitude}-mmax{magnitude}-n2-p1"
    assert (train.dropout, train.stochastic_depth) == (dropout, stochastic_depth)
    # Appendix E.2 (PAPER.md 4.1, 4.2), the same for all.
    assert (train.duration, train.warmup, train.batch) == ("350ep", "5ep", 4096)
    assert (train.optimizer, train.momentum, train.lr, train.lr_images) == ("sgd", 0.9, 0.1, 256)
    assert (train.weight_decay, train.label_smoothing, train.ema) == (4e-5, 0.1, 0.9999)
    assert (train.crop, train.interpolation, train.flip) == (0.875, "bicubic", 0.5)
    assert (train.crop_scale, train.crop_ratio) == ([0.08, 1.0], [3 / 4, 4 / 3])
    # What the paper does not have stays off; what it leaves open is as in Noisy Student (PAPER.md 4.3).
    assert (train.mixup, train.cutmix, train.augment_ops, train.affine) == (0.0, 0.0, [], Affine())
    assert (train.labels, train.temperature, train.pseudo_weight, train.init) == ("soft", 1.0, 1.0, "scratch")
    view = augment_of(train)
    assert (view.size, view.policy, view.on_device) == (size, train.augment, False)
    said = path.read_text().splitlines()[0]
    assert (f"supervised {supervised} %" in said) == (supervised is not None)
    assert (f"with pseudo-labels {pseudo} %" in said) == (pseudo is not None)


def test_dropout_and_stochastic_depth_reach_the_network(tmp_path: Path) -> None:
    train = settings_of(CONF / "recipe" / "lambda_resnet_152-224.yaml", tmp_path)
    model = build_model("lambda_resnet_tiny", 10, architecture_overrides(train))
    assert (model.architecture.dropout, model.architecture.stochastic_depth) == (0.3, 0.1)


def test_published_accuracies_are_those_of_the_table() -> None:
    published = yaml.safe_load((CONF / "measure" / "published_accuracy.yaml").read_text())
    for table, column in (("table 19", 0), ("table 19, pseudo-labels", 1)):
        (block,) = (b for b in published if b["source"].endswith(f"(arXiv 2102.08602), {table}"))
        expected = {f"lambda_resnet_{d}@{s}": row[column] for (d, s), row in TABLE.items() if row[column] is not None}
        assert {entry[0]: entry[1] for entry in block["top1"]} == expected


def test_the_docs_show_the_table() -> None:
    text = (CONF.parent / "docs" / "training.md").read_text()
    for (depth, size), (supervised, pseudo, magnitude, dropout, stochastic_depth) in TABLE.items():
        cells = [f"{depth} @ {size}", magnitude, dropout, f"{stochastic_depth:g}", supervised or "", pseudo or ""]
        assert "| " + " | ".join(map(str, cells)).replace("|  |", "| |").rstrip() + " |" in text, (depth, size)
