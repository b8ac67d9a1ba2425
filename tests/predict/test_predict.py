"""Predictions: the labelling stage's own bits, from every way in, and mistakes in a sentence."""

from __future__ import annotations

import csv
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

import noisy_lambda
from pipeline import weights
from pipeline.data import parquet_files, shards
from pipeline.plan import best
from pipeline.plan.stage import Done
from tests import small, tiny
from tests.small import World, command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run, which no test changes."""
    made = small.make(tmp_path_factory.mktemp("predict"))
    assert made.run().status == 0
    return made


@pytest.fixture
def photos(world: World, tmp_path: Path) -> Path:
    """The images of a shard as files, in its order."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample, data in shards.stream(str(world.shards / "unlabelled-000.tar")):
        (folder / f"{sample.index:03d}.png").write_bytes(data)
    return folder


def labels(world: World, name: str) -> dict[str, list]:
    return parquet_files.read_table(str(world.folder("gen1-label") / name)).to_pydict()


def test_every_way_in_gives_the_bits_of_the_labelling_stage(world: World, photos: Path, tmp_path: Path) -> None:
    """At its batch; label files hold float16 probabilities and float32 confidences."""
    teacher, said = world.folder("gen0-teacher"), labels(world, "unlabelled-000.parquet")
    model = noisy_lambda.load(teacher, raw=True)
    files = sorted(photos.iterdir())
    by_path = model.predict(files)
    assert [one.label for one in by_path] == [model.classes[label] for label in said["label"]]
    assert [np.float32(one.confidence) for one in by_path] == [np.float32(found) for found in said["confidence"]]
    for one, classes, probs in zip(by_path, said["classes"], said["probs"], strict=True):
        assert one.probabilities[classes].astype(np.float16).tolist() == probs
        assert one.problem == "" and one.probabilities.sum() == pytest.approx(1, abs=1e-6)
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    for others in ([path.read_bytes() for path in files], [Image.open(path) for path in files], arrays):
        assert [one.probabilities.tolist() for one in model.predict(others)] == [
            one.probabilities.tolist() for one in by_path
        ]
    out = tmp_path / "found.parquet"
    ran = command("predict", teacher, world.shards / "unlabelled-000.tar", "--out", out, "--raw", "--top", 2)
    assert ran.status == 0, ran
    table = pandas.read_parquet(out)
    assert table["shard"].tolist() == ["unlabelled-000.tar"] * 4 and table["index"].tolist() == said["index"]
    assert table["key"].tolist() == said["key"]
    assert table["confidence"].tolist() == [np.float32(one.confidence) for one in by_path]
    assert "class_2" in table and "class_3" not in table


def test_probabilities_are_calibrated_by_what_the_run_found(world: World, photos: Path) -> None:
    teacher = world.folder("gen0-teacher")
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    rows = {row["stage"]: row["validation"] for row in json.loads(tested.read_text())["models"]}
    found = noisy_lambda.load(teacher).predict(photos.iterdir())
    raw = noisy_lambda.load(teacher, raw=True).predict(photos.iterdir())
    for one, other in zip(found, raw, strict=True):
        expected = other.probabilities.astype(np.float64) ** (1 / rows["gen0-teacher"]["temperature"])
        assert one.probabilities == pytest.approx(expected / expected.sum(), abs=1e-5)
    [audit] = world.output.glob("gen1-audit-*/audit.json")
    audited = json.loads(audit.read_text())
    assert audited["model"] == teacher.name and audited["temperature"] == rows["gen0-teacher"]["temperature"]
    # An export says it itself, wherever it lies.
    pytest.importorskip("onnxscript")
    assert command("export", teacher, "--out", photos.parent / "export").status == 0
    alone = noisy_lambda.load(photos.parent / "export").predict(photos.iterdir())
    assert [one.probabilities.tolist() for one in alone] == [one.probabilities.tolist() for one in found]


def test_what_evaluate_says_of_validation_images_is_what_its_files_say(world: World) -> None:
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    for row in json.loads(tested.read_text())["models"]:
        truth, said = [0, 1, 2], []
        labelled = tested.parent / "validation" / row["stage"] / "val-000.parquet"
        said += parquet_files.read_table(str(labelled))["label"].to_pylist()
        right = [true == label for true, label in zip(truth, said, strict=True)]
        found = row["validation"]
        assert (found["images"], found["accuracy"]) == (3, sum(right) / 3) and found["per_class"] == [1, 1, 1]
        wrong = [[true, label, 1] for true, label in zip(truth, said, strict=True) if true != label]
        assert sorted(found["confusion"]) == sorted(wrong)
        done = json.loads((world.folder(row["stage"]) / "done.json").read_text())
        assert found["accuracy"] == pytest.approx(done["info"]["validation"]["top1"])


def test_a_run_means_its_best_model_also_without_its_shards(world: World, photos: Path, tmp_path: Path) -> None:
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    rows = json.loads(tested.read_text())["models"]
    top = max(row["validation"]["accuracy"] for row in rows)
    expected = [row["stage"] for row in rows if row["validation"]["accuracy"] == top][-1]
    ran = command("predict", world.output, photos / "000.png")
    assert ran.status == 0 and f"model: {expected} (" in ran.err, ran
    assert ran.out.startswith(f"{photos}/000.png  ") and ran.out.count("%") == 3
    moved = tmp_path / "moved"
    shutil.copytree(world.output, moved)
    job = (moved / "job.yaml").read_text()
    assert str(world.shards) in job
    (moved / "job.yaml").write_text(job.replace(str(world.shards), str(tmp_path / "gone")))
    again = command("predict", moved, photos / "000.png")
    assert (again.status, again.out) == (0, ran.out) and f"model: {expected} (" in again.err, again


def test_of_equal_models_the_later_one_is_the_best() -> None:
    def model(name: str, top1: float | None, is_model: bool = True) -> Done:
        info = {} if top1 is None else {"validation": {"top1": top1}}
        return Done(name, f"/{name}", "", "", info, model=is_model)

    done = {one.name: one for one in (model("a", 0.5), model("b", 0.7), model("c", 0.7), model("d", 0.6))}
    found = best.find(done)
    assert found and (found.model.name, found.top1) == ("c", 0.7)
    found = best.find({"x": model("x", None, False), "y": model("y", None)})
    assert found and (found.model.name, found.top1) == ("y", None)
    assert best.find({"x": model("x", None, False)}) is None


def test_several_models_answer_by_the_mean(world: World, photos: Path) -> None:
    folders = [world.folder("gen0-teacher"), world.folder("gen1-student")]
    both = noisy_lambda.load(*folders).predict(photos.iterdir())
    each = [noisy_lambda.load(folder).predict(photos.iterdir()) for folder in folders]
    for one, first, second in zip(both, *each, strict=True):
        assert one.probabilities == pytest.approx((first.probabilities + second.probabilities) / 2, abs=1e-6)


def test_what_cannot_be_read_is_a_row_with_its_reason(world: World, photos: Path, tmp_path: Path) -> None:
    (photos / "002.png").write_bytes((photos / "002.png").read_bytes()[:-30])
    (photos / "notes.jpg").write_text("<html>")
    (photos / "readme.txt").write_text("no image by its name")
    table = tmp_path / "list.csv"
    table.write_text("file\n" + "\n".join(["photos/001.png", "photos/002.png", "photos/gone.png", "photos/notes.jpg"]))
    for source, options, names in (
        (photos, (), ["000.png", "001.png", "002.png", "003.png", "notes.jpg"]),
        (table, ("--column", "file"), ["001.png", "002.png", "gone.png", "notes.jpg"]),
    ):
        out = tmp_path / f"{source.name}.out.csv"
        ran = command("predict", world.output, source, "--out", out, *options, "--batch", 2)
        assert ran.status == 0 and f"{len(names)} images in " in ran.out and "1 truncated" in ran.out, ran
        rows = list(csv.DictReader(out.open()))
        assert [Path(row["path"]).name for row in rows] == names
        for row in rows:
            name = Path(row["path"]).name
            reasons = {"002.png": "truncated", "gone.png": "unreadable: no such file", "notes.jpg": "not_an_image"}
            assert row["problem"].startswith(reasons.get(name, "")) and bool(row["class"]) == (name not in reasons)
    model = noisy_lambda.load(world.output)
    [lost] = model.predict(tmp_path / "nowhere.png")
    assert lost.problem.startswith("unreadable: no such file") and np.isnan(lost.confidence)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{shards}", "{photos}"], "there is no trained model at"),
        (["{run}", "{photos}/000.png", "--out", "a.txt"], "neither .csv nor .parquet"),
        (["{run}", "{photos}", "--contact-sheet", "a.gif"], "neither .png nor .jpg"),
        (["{run}", "{photos}", "--contact-sheet", "{tmp}/there.png"], "there.png is there already"),
        (["{run}", "{photos}", "--out", "{tmp}/there.csv"], "is there already, a .csv does not say of which model"),
        (["{run}", "{photos}/000.png", "{photos}/001.png"], "the last one alone is the input"),
        (["{run}", "{photos}", "--device", "cuda"], "the device is 'cuda'; allowed are auto and cpu"),
        (["{run}", "{photos}", "--device", "tpu"], "the device is 'tpu'; allowed are"),
        (["{run}", "{shards}/cut.tar"], "cut.tar is damaged"),
        (["{run}", "{tmp}/none*.png"], "holds no image file"),
        (["{run}", "{tmp}/empty"], "holds no image file; known suffixes are"),
        (["{run}", "{tmp}/list.csv"], "has no column 'path'; its columns are file"),
        (["{run}", "{tmp}/nothing.png"], "the image cannot be read"),
        (["{run}", "gone-*.tar"], "no shard matches gone-*.tar"),
        (["{run}", "{photos}", "--top", "0"], "it takes at least one class"),
        (["{run}", "{photos}", "--batch", "0"], "it takes at least one image"),
        (["models:/x@champion", "{photos}"], "set MLFLOW_TRACKING_URI to the store that has it"),
    ],
)
def test_mistakes(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("file\na.png\n")
    (tmp_path / "there.csv").write_text("somebody's")
    (tmp_path / "there.png").write_text("somebody's")
    whole = (world.shards / "unlabelled-001.tar").read_bytes()
    (world.shards / "cut.tar").write_bytes(whole[: len(whole) // 2])
    before = sorted(tmp_path.rglob("*"))
    places = {"shards": world.shards, "photos": photos, "run": world.output, "tmp": tmp_path}
    ran = command("predict", *(argument.format(**places) for argument in arguments))
    errors = [line for line in ran.err.splitlines() if not line.startswith("model: ")]
    assert ran.status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], ran
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.csv").read_text() == "somebody's"


def test_a_table_of_another_model_stays_and_one_of_the_same_is_written_anew(
    world: World, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.parquet"
    for expected, name in ((0, "gen0-teacher"), (0, "gen0-teacher"), (2, "gen1-student")):
        assert command("predict", world.folder(name), photos, "--out", out).status == expected
    assert len(pandas.read_parquet(out)) == 4


def test_models_of_other_classes_do_not_answer_together(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.folder("gen0-teacher"), other)
    (other / "done.json").unlink()
    card = weights.read_card(str(other))
    weights.write_card(str(other), weights.Card(**{**vars(card), "classes": ["cat", "dog", "eagle"]}))
    with pytest.raises(noisy_lambda.UserError, match="knows other classes than"):
        noisy_lambda.load(world.folder("gen0-teacher"), other)


def test_one_photo_needs_neither_ray_nor_mlflow(world: World, photos: Path) -> None:
    code = (
        "import sys; from pipeline import cli; status = cli.main(sys.argv[1:]); "
        "print(status, [name for name in ('ray', 'mlflow', 'timm', 'sklearn') if name in sys.modules])"
    )
    called = [sys.executable, "-c", code, "predict", str(world.output), str(photos / "000.png")]
    done = subprocess.run(called, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done


def test_the_transform_is_what_the_module_takes(world: World, photos: Path) -> None:
    model = noisy_lambda.load(world.folder("gen0-teacher"), raw=True)
    image = model.transform(photos / "000.png")
    assert image.shape == (3, 8, 8)
    [said] = model.predict(photos / "000.png")
    assert model.module(image[None]).softmax(1)[0].tolist() == pytest.approx(said.probabilities.tolist(), abs=1e-6)
    for nothing, words in ((photos / "gone.png", "this is no image"), (None, "a NoneType is no image")):
        with pytest.raises(noisy_lambda.UserError, match=words):
            model.transform(nothing)  # type: ignore[arg-type]
    with pytest.raises(noisy_lambda.UserError, match=r"an array of shape \[8, 8\] and type float64 is no image"):
        model.predict(np.zeros((8, 8)))


def test_a_folder_of_shards_a_list_of_them_and_a_glob_of_photos(world: World, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        shutil.copy(world.shards / f"unlabelled-00{number}.tar", folder)
    (tmp_path / "list.txt").write_text("tars/unlabelled-000.tar\ntars/unlabelled-001.tar\n")
    for number, (source, images) in enumerate(((folder, 8), (tmp_path / "list.txt", 8), (photos / "00[01]*.png", 2))):
        ran = command("predict", world.output, source, "--out", tmp_path / f"{number}.csv")
        assert f"{images} images in " in ran.out, ran
    ran = command("predict", world.output, photos / "*.png", "--out", tmp_path / "glob.csv")
    assert ran.status == 0 and "4 images in " in ran.out
    (folder / "a.png").write_bytes((photos / "000.png").read_bytes())
    both = command("predict", world.output, folder)
    assert both.status == 2 and "holds images and shards" in both.err


def test_what_comes_before_the_damage_of_a_shard_is_kept(world: World, tmp_path: Path) -> None:
    whole = (world.shards / "unlabelled-001.tar").read_bytes()
    shutil.copy(world.shards / "unlabelled-000.tar", tmp_path / "b.tar")
    (tmp_path / "a.tar").write_bytes(whole[: 1024 + 100])  # the first image, and not the next header
    ran = command("predict", world.output, tmp_path, "--out", tmp_path / "found.csv")
    assert ran.status == 2 and "a.tar is damaged" in ran.err.splitlines()[-1], ran
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [row["shard"] for row in rows] == ["a.tar", *["b.tar"] * 4] and all(row["class"] for row in rows[1:])


def test_accuracy_is_said_where_the_input_knows_all_classes(world: World, photos: Path, tmp_path: Path) -> None:
    [tested] = world.output.glob("evaluate-*/evaluate.json")
    [row] = [row for row in json.loads(tested.read_text())["models"] if row["stage"] == "gen0-teacher"]
    expected = (
        f"top-1 {100 * row['validation']['accuracy']:.2f} % of 3 images, by the classes that the input gives them"
    )
    teacher = world.folder("gen0-teacher")
    ran = command("predict", teacher, world.shards / "val-000.tar")
    assert ran.out.splitlines()[-1] == expected, ran
    for sample, data in shards.stream(str(world.shards / "val-000.tar")):
        folder = tmp_path / "classes" / small.CLASSES[sample.index]
        folder.mkdir(parents=True)
        (folder / f"{sample.index}.png").write_bytes(data)
    ran = command("predict", teacher, tmp_path / "classes", "--out", tmp_path / "found.csv")
    assert ran.out.splitlines()[-1] == expected, ran
    (tmp_path / "classes" / "cat").rename(tmp_path / "classes" / "lion")
    for source in (photos, world.shards / "unlabelled-000.tar", tmp_path / "classes"):
        assert "top-1" not in command("predict", teacher, source).out


def test_a_table_may_hold_the_images_themselves(world: World, photos: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in sorted(photos.iterdir())]
    plain = {"image": [*data[:3], None]}
    hub = {"image": [{"bytes": data[0], "path": "a.png"}, {"bytes": data[1], "path": None}]}
    hub["image"].append({"bytes": None, "path": str(photos / "002.png")})
    model = noisy_lambda.load(world.folder("gen0-teacher"))
    expected = [one.label for one in model.predict(data[:3])]
    for name, columns, paths in (
        ("plain", plain, ["row 0", "row 1", "row 2", ""]),
        ("hub", hub, ["a.png", "row 1", str(photos / "002.png")]),
    ):
        pandas.DataFrame(columns).to_parquet(tmp_path / f"{name}.parquet")
        out = tmp_path / f"{name}.csv"
        ran = command(
            "predict", model.models[0].folder, tmp_path / f"{name}.parquet", "--column", "image", "--out", out
        )
        assert ran.status == 0, ran
        rows = list(csv.DictReader(out.open()))
        assert [row["path"] for row in rows] == paths and [row["class"] for row in rows[:3]] == expected
    assert rows[-1]["problem"] == ""


def test_a_photo_that_a_server_refuses_is_asked_for_once_and_is_a_row(
    world: World, photos: Path, tmp_path: Path
) -> None:
    asked: Counter[str] = Counter()

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            status = int(self.path[1:4])
            data = (photos / "000.png").read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = tmp_path / "list.csv"
        statuses = (200, 404, 403, 410)
        urls = [f"http://127.0.0.1:{server.server_port}/{status}.png" for status in statuses]
        table.write_text("\n".join(["path", *urls]))
        ran = command("predict", world.folder("gen0-teacher"), table, "--out", tmp_path / "found.csv")
        server.shutdown()
    assert ran.status == 0, ran
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [bool(row["class"]) for row in rows] == [True, False, False, False]
    assert "there is no such file" in rows[1]["problem"] and "Forbidden" in rows[2]["problem"]
    assert asked == {f"/{status}.png": 1 for status in statuses}


@pytest.mark.parametrize(("name", "kind"), [("sheet.png", "PNG"), ("sheet.jpg", "JPEG")])
def test_a_contact_sheet_shows_the_images(world: World, photos: Path, tmp_path: Path, name: str, kind: str) -> None:
    Image.new("RGB", (40, 40), (250, 0, 250)).save(photos / "magenta.png")
    (photos / "broken.png").write_bytes(b"no image")
    ran = command("predict", world.folder("gen0-teacher"), photos, "--contact-sheet", tmp_path / name)
    assert ran.status == 0 and ran.out.splitlines()[-1] == f"contact sheet in {tmp_path / name}", ran
    sheet = Image.open(tmp_path / name)
    assert sheet.format == kind
    pixels = np.asarray(sheet.convert("RGB")).astype(int)
    magenta = (abs(pixels - [250, 0, 250]) < 30).all(axis=2)
    assert magenta.sum() == pytest.approx((2 * 64) ** 2, rel=0.1)  # one picture, two pixels for each of the page's


def test_files_are_for_everybody_whom_the_umask_lets(world: World) -> None:
    for path in (world.folder("gen0-teacher") / "model.safetensors", world.folder("gen0-teacher") / "model.yaml"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~storage_umask()


def storage_umask() -> int:
    from pipeline.storage import files

    return files.UMASK
