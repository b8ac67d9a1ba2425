"""`test_views` in a whole small run: model.yaml says so, and who asks the model obeys it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from models.over_views import OverViews, network_of
from pipeline import weights
from pipeline.data import parquet_files
from tests import small

VIEWS = ["flip", "shift"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> small.World:
    made = small.make(tmp_path_factory.mktemp("views"), generations=[{"student": {}}])
    job = yaml.safe_load(made.job.read_text())
    job["teacher"]["test_views"] = VIEWS
    made.job.write_text(yaml.safe_dump(job))
    ran = made.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return made


@pytest.mark.slow
def test_the_card_says_so_and_labels_are_means(world: small.World) -> None:
    folder = world.folder("gen0-teacher")
    assert yaml.safe_load((folder / "model.yaml").read_text())["test_views"] == VIEWS
    assert "test_views" not in (world.folder("gen1-student") / "model.yaml").read_text()
    model, card = weights.load_model(str(folder))
    assert isinstance(model, OverViews) and model.count == 6 and card.test_views == VIEWS
    path = world.folder("gen1-label") / "unlabelled-000.parquet"
    assert parquet_files.read_metadata(str(path))["transform"]["test_views"] == VIEWS
    done = json.loads((folder / "done.json").read_text())["info"]
    assert done["view"]["test_views"] == VIEWS
    # Training's own validation, the audit and the evaluation ask the same question.
    audited = json.loads((world.folder("gen1-audit") / "audit.json").read_text())
    tested = json.loads((world.folder("evaluate") / "evaluate.json").read_text())["models"][0]
    assert done["validation"]["top1"] == pytest.approx(audited["accuracy"]) == tested["validation"]["accuracy"]
    assert done["validation"]["loss"] == pytest.approx(audited["nll"], rel=2e-3)


@pytest.mark.slow
def test_other_views_are_other_labels_of_the_same_weights(world: small.World) -> None:
    planned = world.call("plan", "teacher.test_views=[]").out
    assert next(line.split()[0] for line in planned.splitlines() if "will run" in line) == "gen0-teacher"


@pytest.mark.slow
def test_predict_and_exports_obey(world: small.World, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder, out = world.folder("gen0-teacher"), tmp_path / "out"
    assert small.command("export", folder, "--out", out).status == 0
    model, _ = weights.load_model(str(folder))
    again, card = weights.load_model(str(out))
    x = torch.randn(2, 3, card.size, card.size)
    assert card.test_views == VIEWS
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(again(x), expected)
        assert not torch.allclose(network_of(model)(x).softmax(1), expected.softmax(1), atol=1e-6)
    from pipeline.predict import onnx_network

    told, _ = onnx_network.load(str(out / "model.onnx"))
    torch.testing.assert_close(told(x), expected, atol=1e-4, rtol=1e-4)
    labels = pq.read_table(world.folder("gen1-audit") / "validation" / "val-000.parquet")
    assert np.isfinite(labels["confidence"].to_numpy()).all()
