"""The report on made-up runs: real shards, label files, selections and journals; only the models are invented."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config.settings import Select
from pipeline.data import label_files, parquet_files
from pipeline.plan.context import Context
from pipeline.plan.stage import Result
from pipeline.report import assemble, audit, plots, samples, style
from pipeline.stages import report
from pipeline.tracking import journal
from tests.report.made_up import NAMES, audit_of, fake_run, page_of, random_images, random_probs, two_generations

PICTURES = ("confidence", "classes", "reliability", "threshold")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Result]:
    """A report of two generations."""
    context = two_generations(tmp_path_factory.mktemp("finished"))
    return context, report.run(context)


def tiles(context: Context) -> int:
    """Small images on the contact sheets of two generations: of each class up to twelve, kept and dropped ones."""
    found = 0
    for number in (1, 2):
        label, select = (context.needs[f"gen{number}-{kind}"].folder for kind in ("label", "select"))
        sheets = samples.scan(label, select, context.corpora["unlabelled"].shards, [0, 1, 2], (), lambda number: None)
        found += sum(min(12, count) for side in (sheets.kept, sheets.dropped) for count in side.count.values())
    return found


def test_report_of_two_generations(finished: tuple[Context, Result]) -> None:
    context, result = finished
    expected = {"summary.json", "index.html", "speed_accuracy.csv", "speed_accuracy.png"}
    expected |= {"accuracy_by_generation.png", "learning_curves.png", "accuracy_by_class.png", "accuracy_by_class.csv"}
    expected |= {f"gen{g}-{name}.png" for g in (1, 2) for name in PICTURES}
    assert set(result.artifacts) == expected
    assert set(storage.walk(context.folder)) == expected | {"metrics.jsonl"}
    for name in expected:
        if name.endswith(".png"):
            Image.open(Path(context.folder, name)).verify()

    summary = storage.read_json(storage.join(context.folder, "summary.json"))
    assert list(summary) == [
        "job",
        "stages",
        "audits",
        "gain_points",
        "seconds",
        "report",
        "best",
        "verdict",
        "warnings",
    ]
    assert summary["best"] == "gen2-student" and summary["verdict"][-1].startswith("Take gen2-student: ")
    assert all(sentence in Path(context.folder, "index.html").read_text() for sentence in summary["verdict"])
    assert [stage["stage"] for stage in summary["stages"]] == ["gen0-teacher", "gen1-student", "gen2-student"]
    assert list(summary["stages"][0]) == list(assemble.STAGE_KEYS)
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
    assert len(parsed.addresses) == parsed.tags.count("img") == 4 + 2 * len(PICTURES) + tiles(context)
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
    assert parsed.tags.count("img") == 4 + 2 * len(PICTURES) + tiles(context) + 4  # each generation's bad samples
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


def test_accuracy_by_class_as_a_table(finished: tuple[Context, Result]) -> None:
    with Path(finished[0].folder, "accuracy_by_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == NAMES and [row["images"] for row in rows] == ["150", "150", "0"]
    assert [float(row["gen1-student"]) for row in rows[:2]] == pytest.approx([120 / 150, 134 / 150], abs=1e-6)
    assert rows[2]["gen0-teacher"] == ""  # no image, no accuracy


def test_other_sizes_and_raw_weights_stand_in_a_table(tmp_path: Path) -> None:
    context = fake_run(tmp_path)
    path = storage.join(context.needs["evaluate"].folder, "evaluate.json")
    evaluation = storage.read_json(path)
    evaluation["models"][0] |= {
        "sizes": [{"size": 24, "top1": 0.8512, "top5": 0.9812, "ece": 0.0712}],
        "raw": {"top1": 0.8312, "top5": 0.9712, "ece": 0.0912},
    }
    storage.write_json(path, evaluation)
    report.run(context)
    cells = [text.strip() for text in page_of(context)[1].text if text.strip()]
    start = cells.index("Other image sizes and weights")
    assert cells[start + 7 : start + 25] == [
        "teacher", "averaged", "16 px", "84.2 %", "99.0 %", "0.040",
        "teacher", "raw", "16 px", "83.1 %", "97.1 %", "0.091",
        "teacher", "averaged", "24 px", "85.1 %", "98.1 %", "0.071",
    ]  # fmt: skip


def test_an_evaluation_from_before_these_figures(tmp_path: Path) -> None:
    context = fake_run(tmp_path)
    path = storage.join(context.needs["evaluate"].folder, "evaluate.json")
    evaluation = storage.read_json(path)
    for name in ("ece", "per_class"):
        del evaluation["models"][0][name]
    storage.write_json(path, evaluation)
    assert not [name for name in report.run(context).artifacts if name.startswith("accuracy_by_class")]


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


def test_contact_sheets_show_the_extremes(tmp_path: Path) -> None:
    """Against sorting all kept and all other rows; confidences repeat, so that ties matter; no image stands on both
    sides."""
    pictures = [random_images(80, 1), random_images(80, 2), random_images(9, 3)]
    probs = [[np.round(random_probs(len(p), 3, n), 1) for n, p in enumerate(pictures)]]
    context = fake_run(
        tmp_path, pictures=pictures, probs=probs, select=Select(threshold=0.5, per_class=30), top1=(0.8, 0.9)
    )
    label, select = (context.needs[f"gen1-{kind}"].folder for kind in ("label", "select"))
    corpus = context.corpora["unlabelled"].shards
    kept = storage.read_json(storage.join(select, "summary.json"))["kept_per_class"]
    found = samples.scan(label, select, corpus, samples.shown_classes(kept), (), lambda number: None)

    sides: dict[bool, list[tuple[float, int, int, int]]] = {True: [], False: []}
    for number, shard in enumerate(corpus):
        table = parquet_files.read_table(storage.join(label, label_files.file_name(shard.name))).to_pydict()
        chosen = parquet_files.read_table(storage.join(select, label_files.file_name(shard.name)))["index"].to_pylist()
        for i, (sure, said) in enumerate(zip(table["confidence"], table["label"], strict=True)):
            sides[i in chosen].append((-sure, number, i, said))
    for extremes, everything in ((found.kept, sides[True]), (found.dropped, sides[False])):
        rows = samples.contact_rows(extremes, label, corpus, NAMES, [0, 1, 2])
        assert len(rows) == 3
        for number, row in enumerate(rows):
            ranked = sorted(entry for entry in everything if entry[3] == number)
            half = len(ranked) // 2
            for side, expected in ((row.most, ranked[: len(ranked) - half][:6]), (row.least, ranked[::-1][:half][:6])):
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
    corpus = context.corpora["unlabelled"].shards
    found = samples.scan(label, select, corpus, [0], (), lambda number: None)
    [row] = samples.contact_rows(found.kept, label, corpus, NAMES, [0])
    assert not found.dropped.most
    assert (len(row.most), len(row.least)) == sides
    shown = [image.tobytes() for image, _ in [*row.most, *row.least]]
    assert len(set(shown)) == len(shown)


def test_an_audit_without_a_confident_image(tmp_path: Path) -> None:
    context = two_generations(tmp_path)
    path = storage.join(context.needs["gen1-audit"].folder, "audit.json")
    storage.write_json(path, audit_of(3, 1, threshold=1.5))
    result = report.run(context)
    assert "gen1_expected_noise" not in result.metrics and "gen2_expected_noise" in result.metrics
    assert "nothing is known of the kept labels" in page_of(context)[0]


def test_a_class_without_a_kept_image_keeps_its_row(tmp_path: Path) -> None:
    pictures = [random_images(40, 1)]
    probs = [[np.tile(np.array([0.55, 0.4, 0.05], np.float32), (40, 1))]]
    probs[0][0][:9] = 0.4, 0.45, 0.15  # of "one" nothing is confident
    context = fake_run(tmp_path, pictures=pictures, probs=probs, select=Select(threshold=0.5), top1=(0.8, 0.9))
    report.run(context)
    page = page_of(context)[0]
    rows = [row.split("</b>")[0] for row in page.split('<div class="row"><b>')[1:]]
    assert rows == [*NAMES, *NAMES]  # of what was kept, and of what was dropped
    assert page.count("no image</span>") == 2 + 2
    assert "Of 2 of 3 classes no image is kept (one, two), so the student learns them from labelled images" in page


def test_a_student_that_is_worse_looks_worse(tmp_path: Path) -> None:
    context = two_generations(tmp_path, top1=(0.9, 0.85, 0.88))
    report.run(context)
    page, parsed = page_of(context)
    assert '<b class="loss">−2.0</b><span>points below the teacher</span>' in page
    assert page.count('<td class="number loss">') == 2 and "−5.0" in parsed.text


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
    assert page_of(context)[0].count('<div class="row"><b>') <= 2 * 12
    assert Path(context.folder, "index.html").stat().st_size < 3_000_000
    kept = json.loads(Path(context.needs["gen1-select"].folder, "summary.json").read_text())["kept_per_class"]
    shown = samples.shown_classes(kept)
    assert len(shown) == 12 and all(kept[number] for number in shown)


def test_spread_keeps_distance_and_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.random(6).tolist()
        found = style.spread(wanted, 0.1)
        assert np.all(np.diff(np.sort(found)) >= 0.1 - 1e-9)
        assert np.array_equal(np.argsort(wanted), np.argsort(found))
    assert style.spread([0.0, 1.0], 0.1) == [0.0, 1.0]
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


def test_text_fit_to_be_shown() -> None:
    assert style.clean("a\x00b\x1b[0m\u200b\u202e\ud800\n") == "ab[0m"
    assert style.clean("x" * 50, 10) == "x" * 9 + "…"
    assert [style.short(n) for n in (512, 84_000, 1_234_567, 2.5e9)] == ["512", "84 k", "1.23 M", "2.5 G"]


def test_models_that_are_equal_can_be_drawn() -> None:
    model = plots.Model("gen0-teacher", "d", "m", 1.0, 1.0, 10, 0.5, 16, 8, "CPU", "float32")
    twin = plots.Model("gen1-student", "d", "m", 1.0, 1.0, 10, 0.5, 16, 8, "CPU", "float32")
    for draw in (plots.speed_accuracy, lambda models: plots.accuracy_by_generation(models, 450)):
        assert Image.open(io.BytesIO(draw([model, twin]))).size == (1040, 700)


# ---- the audit ---------------------------------------------------------------------------------------------


def test_the_audit_is_told_in_a_sentence_and_in_numbers(finished: tuple[Context, Result]) -> None:
    context, result = finished
    summary = storage.read_json(storage.join(context.folder, "summary.json"))
    page = page_of(context)[0]
    for number, found in enumerate(summary["audits"], 1):
        recorded = storage.read_json(storage.join(context.needs[f"gen{number}-audit"].folder, "audit.json"))
        chosen = storage.read_json(storage.join(context.needs[f"gen{number}-select"].folder, "summary.json"))
        copies = np.array(chosen["copies_per_class"])
        noise = np.array(recorded["level"]["noise"])
        assert found["generation"] == number and found["accuracy"] == recorded["accuracy"] and found["images"] == 200
        assert found["expected_noise"] == pytest.approx((copies * noise).sum() / copies.sum(), abs=1e-5)
        assert found["expected_low"] < found["expected_noise"] < found["expected_high"]
        assert result.metrics[f"gen{number}_expected_noise"] == found["expected_noise"]
        assert f"ECE {recorded['ece']:.3f}, and temperature {recorded['temperature']:.2f} would calibrate it" in page
        between = f"({100 * found['expected_low']:.1f} to {100 * found['expected_high']:.1f} %)"
        assert f"{100 * found['expected_noise']:.1f} % {between} of the kept labels are expected to be wrong" in page


@pytest.mark.parametrize(("images", "faded"), [(9, True), (10, False)])
def test_bins_of_few_images_are_faded(images: int, faded: bool) -> None:
    empty = {"count": [0], "confidence": [0.0], "accuracy": [0.0]}
    bins = {"count": [images, images], "confidence": [0.5, 0.8], "accuracy": [0.6, 0.7]}
    found = {"reliability": bins, "calibrated_reliability": empty, "ece": 0.1, "calibrated_ece": 0.1}
    drawn = np.asarray(Image.open(io.BytesIO(audit.reliability({**found, "temperature": 1.0}, 1))).convert("RGB"))
    shade = np.array([int(style.colour(1)[i : i + 2], 16) for i in (1, 3, 5)])
    below_the_key = (drawn == shade).all(axis=2)[150:]
    assert (below_the_key.sum() < 10) == faded
    steps = {"count": [0] * 50 + [images] + [0] * 49, "right": [0] * 50 + [images] + [0] * 49}
    drawn = np.asarray(Image.open(io.BytesIO(audit.threshold([1] * 100, steps, 0.3, 1))).convert("RGB"))
    assert ((drawn == shade).all(axis=2)[150:].sum() < 10) == faded
