"""What `export` writes: the same answers from torch, onnxruntime and timm, and a card that says what the run knows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import noisy_lambda
from pipeline import weights
from pipeline.data import shards
from pipeline.data.images import View
from pipeline.errors import WeightsError
from pipeline.export.command import export
from pipeline.plan import best
from pipeline.plan.stage import CARD, WEIGHTS
from pipeline.storage.files import UMASK
from tests import small
from tests.small import World, command

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def world(worlds: small.Store) -> World:
    return worlds.original(generations=[{"student": {}}])


@pytest.fixture(scope="module")
def best_of(world: World) -> Path:
    """The folder of the run's best model, by evaluate.json."""
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    rows = json.loads(tested.read_text())["models"]
    top = max(row["validation"]["accuracy"] for row in rows)
    return world.folder([row["stage"] for row in rows if row["validation"]["accuracy"] == top][-1])


@pytest.fixture(scope="module")
def exported(world: World, best_of: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export writes of a run."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    ran = command("export", world.output, "--out", folder)
    assert ran.status == 0, ran
    names = ["model.safetensors", "model.yaml", "model.onnx", "README.md"]
    assert ran.out.startswith(f"wrote {', '.join(names)} in {folder}; checked: onnxruntime's logits of random images")
    assert ran.out.count("\n") == 1
    assert ran.err.startswith(f"model: {best_of.name.rpartition('-')[0]} ({best_of.name}") and ran.err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~UMASK}
    return folder


@pytest.fixture
def photo(world: World, tmp_path: Path) -> Path:
    _, data = next(iter(shards.stream(str(world.shards / "unlabelled-000.tar"))))
    (tmp_path / "photo.png").write_bytes(data)
    return tmp_path / "photo.png"


def test_onnx_answers_like_torch_at_any_batch_and_says_how_to_feed_it(best_of: Path, exported: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    [given], [made] = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:]) == ("images", [3, 8, 8]) and isinstance(given.shape[0], str)
    assert (made.name, made.shape[1:]) == ("logits", [3])
    model, card = weights.load_model(str(best_of))
    for batch in (1, 3, 17):
        images = torch.randn(batch, 3, 8, 8)
        with torch.inference_mode():
            expected = model(images).numpy()
        [found] = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == small.CLASSES and said["interpolation"] == "bicubic"
    numbers = {name: json.loads(said[name]) for name in ("mean", "std", "size", "crop", "temperature")}
    temperature = best.temperature_of(str(best_of))
    assert numbers == {"mean": card.mean, "std": card.std, "size": 8, "crop": 1.0, "temperature": temperature}


def test_no_path_of_this_machine_is_in_the_file(exported: Path) -> None:
    data = (exported / "model.onnx").read_bytes()
    assert str(Path(weights.__file__).parents[1]).encode() not in data and b"site-packages" not in data


def test_what_is_exported_loads_again(best_of: Path, exported: Path) -> None:
    before, card = weights.load_model(str(best_of))
    after, written = weights.load_model(str(exported))
    assert written == dataclasses.replace(card, temperature=best.temperature_of(str(best_of)))
    assert written.temperature
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(before(images), after(images))


def test_the_model_card_is_one_to_the_hub_and_says_what_the_run_knows(
    world: World, best_of: Path, exported: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((exported / "README.md").read_text())
    assert (card.data.library_name, card.data.pipeline_tag) == ("noisy-lambda", "image-classification")
    assert card.data.license == "unknown" and card.data.metrics == ["accuracy"]
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    [row] = [row for row in json.loads(tested.read_text())["models"] if Path(row["dir"]).name == best_of.name]
    figures = {result.dataset_split: result.metric_value for result in card.data.eval_results}
    expected = {"validation": row["validation"]["accuracy"], "test": row["top1"]}
    assert figures == {name: round(value, 4) for name, value in expected.items()}
    assert f"| test | 3 | {100 * row['top1']:.2f} % |" in card.text and "- labelled: 6 images" in card.text
    assert "duration: 2st" in card.text and str(world.output) not in card.text
    assert f"divided by {row['validation']['temperature']:g}, the temperature" in card.text


def test_a_model_of_which_nothing_is_known_says_so(
    best_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (WEIGHTS, CARD):
        shutil.copy(best_of / name, alone / name)
    assert export(str(alone)) == 0
    text = (alone / "export" / "README.md").read_text()
    for words in (
        "The images that it was trained on are not known here",
        "The settings of its training are not known here",
        "Its accuracy is not known here",
        "Not calibrated",
    ):
        assert words in text
    assert "model-index" not in text and "figures hold" not in text
    # A card that somebody has finished stays; one of another model is not written over.
    (alone / "export" / "README.md").write_text(text.replace("license: unknown", "license: mit"))
    assert export(str(alone)) == 0
    assert "license: mit" in (alone / "export" / "README.md").read_text()
    assert "README.md is there already and stays as it is" in capsys.readouterr().err
    (alone / "export" / "README.md").write_text("somebody's")
    ran = command("export", alone)
    assert ran.status == 2 and "not the card of this model" in ran.err


def test_predict_takes_the_onnx_file_and_a_folder_that_has_nothing_else(
    exported: Path, photo: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "onnx"
    alone.mkdir()
    shutil.copy(exported / "model.onnx", alone)
    [expected] = noisy_lambda.load(exported).predict(photo)
    for name in (alone, alone / "model.onnx"):
        model = noisy_lambda.load(name)
        assert model.classes == small.CLASSES
        [found] = model.predict(photo)
        assert found.label == expected.label
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    ran = command("predict", alone, photo)
    assert ran.status == 0 and ran.out.startswith(f"{photo}  {expected.label} "), ran
    cut = (alone / "model.onnx").read_bytes()
    (alone / "model.onnx").write_bytes(cut[: len(cut) // 2])
    broken = command("predict", alone, photo)
    assert broken.status == 2 and "is no ONNX model that onnxruntime runs" in broken.err and broken.err.count("\n") == 1


def test_an_onnx_file_of_others_is_refused(photo: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "g", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / "other.onnx")
    ran = command("predict", tmp_path / "other.onnx", photo)
    assert ran.status == 2 and "does not say in its metadata what it is (architecture, " in ran.err, ran


def test_timm_loads_the_export_of_a_timm_model(photo: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    overrides = {"drop_rate": 0.1, "drop_path_rate": 0.05}
    module = weights.build_model("timm/test_resnet", 3, overrides)
    view = View(32, 0.9, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    stage = tmp_path / "stage"
    weights.save_state(str(stage / WEIGHTS), module.state_dict())
    weights.write_card(str(stage), weights.card_of("timm/test_resnet", overrides, small.CLASSES, view))
    ran = command("export", stage, "--out", tmp_path / "out")
    assert ran.status == 0 and "config.json in " in ran.out, ran
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    ours = noisy_lambda.load(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(again(images), module.eval()(images))
    looks = timm.data.resolve_model_data_config(again)
    assert (looks["input_size"], looks["crop_pct"], looks["interpolation"]) == ((3, 32, 32), 0.9, "bilinear")
    assert list(looks["mean"]) == list(view.mean) and list(looks["std"]) == list(view.std)
    assert again.pretrained_cfg["label_names"] == small.CLASSES == ours.classes
    assert ours.predict(photo)[0].label in small.CLASSES


def test_export_that_differs_writes_nothing(best_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export.onnx_file.TOLERANCE", 0.0)
    with pytest.raises(WeightsError, match=r"differs from torch by \S+ on random input .*; nothing was written"):
        export(str(best_of), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("{tmp}/notes.txt", (), "notes.txt is a file and no model that is known here; name a stage's folder"),
        ("{stage}/model.safetensors", (), "is a part of a model; name the folder, which holds"),
        ("{stage}/model.yaml", (), "is a part of a model; name the folder, which holds"),
        ("{tmp}/nothing", (), "there is no trained model at"),
        ("{stage}", ("--out", "{stage}"), "is the folder of a stage; name another one"),
        ("{exported}/model.onnx", (), "is an export already"),
    ],
)
def test_mistakes(
    best_of: Path, exported: Path, tmp_path: Path, name: str, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    places = {"tmp": tmp_path, "stage": best_of, "exported": exported}
    ran = command("export", name.format(**places), *(word.format(**places) for word in options))
    assert ran.status == 2 and ran.err.count("\n") == 1 and ran.err.startswith("error: ") and words in ran.err, ran
