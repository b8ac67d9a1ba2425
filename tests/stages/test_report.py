"""The report on made-up runs: real shards, label files, selections and journals; only the models are invented."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import tarfile
import uuid
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.cluster.inline import Inline
from pipeline.data import labels, selection, shards
from pipeline.plan import Done, Sources, stages_of
from pipeline.settings import Data, Generation, Job, Select, Teacher
from pipeline.stages import report, report_labels, report_plots, report_style
from pipeline.stages.context import Context, Result
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal

NAMES = ["zero", "one", "two"]


def random_images(count: int, seed: int = 0, side: int = 12) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [png_of(rng.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(count)]


def png_of(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def random_probs(count: int, classes: int, seed: int) -> np.ndarray:
    logits = 2.5 * np.random.default_rng(seed).standard_normal((count, classes))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def write_tar(path: Path, pictures: Sequence[bytes], key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(pictures):
            info = tarfile.TarInfo(f"{key}{number:05d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_labels(folder: str, shard: Any, probs: np.ndarray, bad: set[int]) -> None:
    samples = shards.scan(shard.path).samples
    good = np.array([n for n in range(len(samples)) if n not in bad], np.int64)
    columns = {
        "index": [sample.index for sample in samples],
        "key": [labels.printable_key(sample.key) for sample in samples],
        "offset": [sample.offset for sample in samples],
        "size": [sample.size for sample in samples],
        "status": ["truncated" if n in bad else "ok" for n in range(len(samples))],
        "image_hash": np.arange(len(samples), dtype=np.uint64),
    }
    table = labels.make_table(columns, good, labels.rows_from_probs(probs[good]))
    labels.write_labels(storage.join(folder, labels.file_name(shard.name)), table, {"shard": shard.name, "cut": None})


def write_journal(folder: str, generation: int, steps: int, top1: float) -> None:
    log = Journal(folder)
    log.log(0, steps, kind="start", epoch_is="one pass")
    for step in range(10, steps + 1, 10):
        loss = 0.3 + 2 * 0.995**step + 0.1 * generation
        log.log(step, steps, kind="train", loss=loss, lr=0.1, images_per_second=900.0, epoch=step / 10)
        if step % (steps // 10) == 0:
            log.log(step, steps, kind="validation", top1=top1 * (1 - 0.6 * 0.98**step), top5=0.99, loss=0.5)
    log.close()


def fake_run(
    root: Path,
    *,
    names: Sequence[str] = NAMES,
    pictures: Sequence[Sequence[bytes]] = (),
    probs: Sequence[Sequence[np.ndarray]] = (),
    top1: Sequence[float] = (0.8422, 0.8956, 0.9311),
    select: Select | None = None,
    bad: set[int] | None = None,
    failed: Sequence[int] = (),
    key: str = "",
    output: str = "",
) -> Context:
    """A run in which all but the report is done. `pictures`: of each unlabelled shard; `probs`: of each generation
    and shard; `bad`: rows of the first shard; `failed`: shards without labels."""
    select = select or Select(threshold=0.5, per_class=12)
    generations = [Generation(select=select) for _ in probs]
    job = Job(
        name="made-up <run>",
        output=output or str(root / "run"),
        data=Data(root=str(root / "data")),
        teacher=Teacher(model="lambda_tiny"),
        generations=generations,
    )
    storage.write_json(str(root / "data" / "classes.json"), list(names))
    for number, found in enumerate(pictures):
        write_tar(root / "data" / f"unlabelled-{number:03d}.tar", found, key)
    sources = Sources(job, str(root / "data"))
    done: dict[str, Done] = {}
    models = []
    for stage in stages_of(job)[:-1]:
        folder = str(root / "run" / f"{stage.name}-1a2b3c4d")
        storage.make_folder(folder)
        if stage.kind == "train":
            write_journal(folder, stage.generation, 200 + 200 * stage.generation, top1[stage.generation])
            speed = [9000.0, 5200.0, 4700.0][stage.generation]
            models.append(
                {
                    "stage": stage.name,
                    "dir": folder,
                    "model": "lambda_tiny",
                    "top1": top1[stage.generation],
                    "top5": 0.99,
                    "loss": 0.4,
                    "count": 450,
                    "bad": 0,
                    "parameters": 84_000 * (1 + stage.generation),
                    "size": 16,
                    "images_per_second": speed,
                    "batch": 256,
                    "device": "CPU, 2 threads",
                    "dtype": "float32",
                }
            )
        elif stage.kind == "label":
            for number, shard in enumerate(sources["unlabelled"].shards):
                if number in failed:
                    record = {"shard": shard.name, "error": "it is <damaged>", "attempts": 3}
                    storage.write_json(storage.join(folder, shard.name.removesuffix(".tar") + ".failed.json"), record)
                else:
                    write_labels(
                        folder,
                        shard,
                        probs[stage.generation - 1][number],
                        (bad or set()) if number == 0 else set(),
                    )
        elif stage.kind == "select":
            labelled = done[f"gen{stage.generation}-label"].folder
            paths = [storage.join(labelled, n) for n in storage.listdir(labelled) if n.endswith(".parquet")]
            settings = selection.Settings(len(names), threshold=select.threshold, per_class=select.per_class)
            summary = selection.select_all(paths, settings, lambda f, groups: [f(g) for g in groups], folder)
            storage.write_json(storage.join(folder, "summary.json"), summary)
        elif stage.kind == "evaluate":
            storage.write_json(storage.join(folder, "evaluate.json"), {"images": 450, "models": models})
        done[stage.name] = Done(stage.name, folder, "1a2b3c4d" * 8, "", {"seconds": 12.3, "line": ""})
    stage = stages_of(job)[-1]
    folder = storage.join(job.output, "report-5e6f7a8b")
    storage.make_folder(folder)
    needs = {name: done[name] for name in stage.needs}
    return Context(job, stage, folder, "5e6f7a8b" * 8, needs, sources, Inline(), pytest.fail, "")


def two_generations(root: Path, **more: Any) -> Context:
    pictures = [random_images(60, 1), random_images(45, 2)]
    probs = [
        [random_probs(len(p), len(more.get("names", NAMES)), 10 * g + n) for n, p in enumerate(pictures)]
        for g in (1, 2)
    ]
    return fake_run(root, **{"pictures": pictures, "probs": probs, **more})


class Parsed(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(context: Context) -> tuple[str, Parsed]:
    page = storage.read_bytes(storage.join(context.folder, "index.html")).decode()
    return page, Parsed(page)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Result]:
    """A report of two generations."""
    context = two_generations(tmp_path_factory.mktemp("finished"))
    return context, report.run(context)


def test_report_of_two_generations(finished: tuple[Context, Result]) -> None:
    context, result = finished
    expected = {"summary.json", "index.html", "speed_accuracy.csv", "speed_accuracy.png"}
    expected |= {"accuracy_by_generation.png", "learning_curves.png"}
    expected |= {f"gen{g}-{name}.png" for g in (1, 2) for name in ("confidence", "classes", "contact")}
    assert set(result.artifacts) == expected
    assert set(storage.walk(context.folder)) == expected | {"metrics.jsonl"}
    for name in expected:
        if name.endswith(".png"):
            Image.open(Path(context.folder, name)).verify()

    summary = storage.read_json(storage.join(context.folder, "summary.json"))
    assert list(summary) == ["job", "stages", "gain_points", "report"]
    assert [stage["stage"] for stage in summary["stages"]] == ["gen0-teacher", "gen1-student", "gen2-student"]
    assert list(summary["stages"][0]) == list(report.STAGE_KEYS)
    assert summary["gain_points"] == pytest.approx(8.89)
    assert summary["report"] == storage.join(context.folder, "index.html")
    with Path(context.folder, "speed_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [0.8422, 0.8956, 0.9311]

    records = journal.read(context.folder)[0]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["total"] == 5


def test_page_is_self_contained(finished: tuple[Context, Result]) -> None:
    context, _ = finished
    page, parsed = page_of(context)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert len(parsed.addresses) == parsed.tags.count("img") == 9
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "+8.9" in parsed.text and "84.2 %" in parsed.text and "93.1 %" in parsed.text
    assert f"gen2-select-{'1a2b3c4d'}" in parsed.text


def test_same_run_gives_same_bytes(finished: tuple[Context, Result], tmp_path: Path) -> None:
    context, result = finished
    again = dataclasses.replace(context, folder=str(tmp_path / storage.name(context.folder)))
    report.run(again)
    for name in set(result.artifacts) - {"summary.json"}:  # it holds the folder
        assert Path(again.folder, name).read_bytes() == Path(context.folder, name).read_bytes(), name


def test_text_from_data_is_made_harmless(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$\\frac$ & \x1b[31m", "a\u202eb\u2028\ud800 \u5b57"]
    context = two_generations(tmp_path, names=names, bad={0, 5}, key='"><img src=x onerror=y>')
    report.run(context)
    page, parsed = page_of(context)
    assert "<script" not in page and "onerror=y>" not in page
    assert parsed.tags.count("img") == 9
    assert '"><img src=x onerror=y>00005' in parsed.text  # shown as it is, as text
    assert not {c for c in page if c in "\x1b\u202e\u2028"}
    assert "made-up <run>" in parsed.text


def test_without_generations(tmp_path: Path) -> None:
    context = fake_run(tmp_path)
    result = report.run(context)
    summary = storage.read_json(storage.join(context.folder, "summary.json"))
    assert summary["gain_points"] == 0.0 and len(summary["stages"]) == 1
    assert not [name for name in result.artifacts if name.startswith("gen")]
    assert "84.2 %" in page_of(context)[1].text


def test_adopted_teacher_has_no_curve(tmp_path: Path) -> None:
    context = fake_run(tmp_path)
    storage.remove(storage.join(context.needs["gen0-teacher"].folder, "metrics.jsonl"))
    assert "learning_curves.png" not in report.run(context).artifacts


def test_bad_samples_and_failed_shards_are_named(tmp_path: Path) -> None:
    context = two_generations(tmp_path, bad={3, 7}, failed=[1])
    report.run(context)
    text = page_of(context)[1].text
    assert "2 truncated" in text and "00003" in text and "00007" in text
    assert "unlabelled-001.tar" in text and "it is <damaged>" in text and "1 bad shard, 2 bad samples" in text


def test_report_in_an_object_store(tmp_path: Path) -> None:
    output = f"memory://report-{uuid.uuid4().hex}"
    context = two_generations(tmp_path, output=output)
    try:
        result = report.run(context)
        names = set(storage.walk(context.folder))
        assert set(result.artifacts) <= names
        assert "gen2-student" in page_of(context)[1].text
    finally:
        storage.remove(output)


def test_contact_sheet_shows_the_extremes(tmp_path: Path) -> None:
    """Against sorting all kept rows; confidences repeat, so that ties matter; no image stands on both sides."""
    pictures = [random_images(80, 1), random_images(80, 2), random_images(9, 3)]
    probs = [[np.round(random_probs(len(p), 3, n), 1) for n, p in enumerate(pictures)]]
    context = fake_run(
        tmp_path, pictures=pictures, probs=probs, select=Select(threshold=0.5, per_class=30), top1=(0.8, 0.9)
    )
    label, select = (context.needs[f"gen1-{kind}"].folder for kind in ("label", "select"))
    corpus = context.sources["unlabelled"].shards
    kept = storage.read_json(storage.join(select, "summary.json"))["kept_per_class"]
    found = report_labels.scan(label, select, corpus, report_labels.shown_classes(kept), lambda number: None)
    rows = report_labels.contact_rows(found, label, corpus, NAMES, kept)

    everything: list[tuple[float, int, int, int]] = []
    for number, shard in enumerate(corpus):
        table = labels.read_labels(storage.join(label, labels.file_name(shard.name))).to_pydict()
        chosen = labels.read_labels(storage.join(select, labels.file_name(shard.name)))["index"].to_pylist()
        everything += [(-table["confidence"][i], number, i, table["label"][i]) for i in chosen]
    for number, row in enumerate(rows):
        ranked = sorted(entry for entry in everything if entry[3] == number)
        assert len(ranked) == kept[number]
        for side, expected in ((row.most, ranked[:6]), (row.least, ranked[::-1][:6])):
            assert [sure for _, sure in side] == [-entry[0] for entry in expected]
            for (image, _), (_, shard_number, i, _) in zip(side, expected, strict=True):
                original = Image.open(io.BytesIO(pictures[shard_number][i]))
                assert np.array_equal(np.asarray(image), np.asarray(original))


@pytest.mark.parametrize(("kept", "sides"), [(1, (1, 0)), (2, (1, 1)), (5, (3, 2)), (40, (6, 6))])
def test_few_kept_images_stand_once(tmp_path: Path, kept: int, sides: tuple[int, int]) -> None:
    pictures = [random_images(kept, 1)]
    probs = [[np.tile(np.array([0.9, 0.05, 0.05], np.float32), (kept, 1))]]
    context = fake_run(tmp_path, pictures=pictures, probs=probs, select=Select(threshold=0.5))
    label, select = (context.needs[f"gen1-{kind}"].folder for kind in ("label", "select"))
    corpus = context.sources["unlabelled"].shards
    found = report_labels.scan(label, select, corpus, [0], lambda number: None)
    [row] = report_labels.contact_rows(found, label, corpus, NAMES, [kept, 0, 0])
    assert (len(row.most), len(row.least)) == sides
    shown = [image.tobytes() for image, _ in [*row.most, *row.least]]
    assert len(set(shown)) == len(shown)


def test_nothing_kept(tmp_path: Path) -> None:
    context = two_generations(tmp_path, select=Select(threshold=1.0, per_class=5))
    result = report.run(context)
    assert "gen1-confidence.png" in result.artifacts and "gen1-contact.png" not in result.artifacts


def test_a_thousand_classes(tmp_path: Path) -> None:
    names = [f"class number {n}" for n in range(1000)]
    pictures = [random_images(200)]
    probs = [[random_probs(200, 1000, 0) ** 2]]
    probs[0][0] /= probs[0][0].sum(axis=1, keepdims=True)
    context = fake_run(
        tmp_path, names=names, pictures=pictures, probs=probs, select=Select(threshold=0.01, per_class=3)
    )
    result = report.run(context)
    assert "gen1-classes.png" in result.artifacts
    assert Image.open(Path(context.folder, "gen1-classes.png")).size == (1040, 700)
    assert Image.open(Path(context.folder, "gen1-contact.png")).height < 12 * 90 * 2 + 100
    assert Path(context.folder, "index.html").stat().st_size < 3_000_000
    kept = json.loads(Path(context.needs["gen1-select"].folder, "summary.json").read_text())["kept_per_class"]
    shown = report_labels.shown_classes(kept)
    assert len(shown) == 12 and all(kept[number] for number in shown)


def test_spread_keeps_distance_and_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.random(6).tolist()
        found = report_style.spread(wanted, 0.1)
        assert np.all(np.diff(np.sort(found)) >= 0.1 - 1e-9)
        assert np.array_equal(np.argsort(wanted), np.argsort(found))
    assert report_style.spread([0.0, 1.0], 0.1) == [0.0, 1.0]
    assert report_style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


def test_text_fit_to_be_shown() -> None:
    assert report_style.clean("a\x00b\x1b[0m\u200b\u202e\ud800\n") == "ab[0m"
    assert report_style.clean("x" * 50, 10) == "x" * 9 + "…"
    assert [report_style.short(n) for n in (512, 84_000, 1_234_567, 2.5e9)] == ["512", "84 k", "1.23 M", "2.5 G"]


def test_models_that_are_equal_can_be_drawn() -> None:
    model = report_plots.Model("gen0-teacher", "d", "m", 1.0, 1.0, 10, 0.5, 16, 8, "CPU", "float32")
    twin = report_plots.Model("gen1-student", "d", "m", 1.0, 1.0, 10, 0.5, 16, 8, "CPU", "float32")
    for draw in (report_plots.speed_accuracy, lambda models: report_plots.accuracy_by_generation(models, 450)):
        assert Image.open(io.BytesIO(draw([model, twin]))).size == (1040, 700)
