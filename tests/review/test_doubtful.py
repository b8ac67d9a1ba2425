"""Doubtful labels: what is found and in which order, against cleanlab and against the definition taken literally."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipeline.data import label_files, parquet_files
from pipeline.review import doubtful
from tests.review import written


def drawn(seed: int, images: int, classes: int, wrong: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Labels, a share of them `wrong`, and what a fair model says of the images."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, images)
    logits = rng.normal(0, 1.2, (images, classes))
    logits[np.arange(images), truth] += 2.5
    given = np.where(rng.random(images) < wrong, rng.integers(0, classes, images), truth)
    probs = np.exp(logits)
    return given, (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def as_read(probs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The probabilities as label files hold them."""
    rows = label_files.rows_from_probs(probs)
    return label_files.spread_targets(rows.classes, rows.probs, probs.shape[1]).astype(np.float64)


def by_definition(given: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> list[int]:
    """Doubtful images, the least probable label first."""
    classes = range(probs.shape[1])
    least = [probs[given == c, c].mean() if (given == c).any() else 2.0 for c in classes]
    found = []
    for image, row in enumerate(probs):
        sure = [c for c in classes if row[c] >= least[c] - 1e-6]
        guess = sure[0] if len(sure) == 1 else int(row.argmax())
        if sure and guess != given[image] and row.max() > row[given[image]] + 1e-6:
            found.append((row[given[image]] - np.delete(row, given[image]).max(), image))
    return [image for _, image in sorted(found)]


SETS = [(0, 600, 4, 0.1), (1, 900, 10, 0.3), (2, 300, 2, 0.2), (3, 5000, 7, 0.05), (4, 2500, 150, 0.15)]


@pytest.mark.parametrize("drawing", SETS)
@pytest.mark.parametrize("files", [1, 3])
def test_it_finds_what_the_definition_says_in_that_order(
    drawing: tuple[int, int, int, float], files: int, tmp_path: Path
) -> None:
    given, probs = drawn(*drawing)
    found = doubtful.find(written(tmp_path, given, probs, files), probs.shape[1])
    parts = np.array_split(np.arange(len(given)), files)
    assert [int(parts[f][r]) for f, r in zip(found.file, found.row, strict=True)] == by_definition(
        given, as_read(probs)
    )
    assert len(found.row) > 5 and found.images == len(given)


@pytest.mark.parametrize("drawing", SETS)
def test_it_agrees_with_cleanlab(drawing: tuple[int, int, int, float], tmp_path: Path) -> None:
    filter_ = pytest.importorskip("cleanlab.filter")
    rank = pytest.importorskip("cleanlab.rank")
    count = pytest.importorskip("cleanlab.count")
    given, probs = drawn(*drawing)
    found = doubtful.find(written(tmp_path, given, probs), probs.shape[1])
    theirs = as_read(probs)
    for score in ("normalized_margin", "self_confidence"):
        issues = filter_.find_label_issues(
            given, theirs, filter_by="confident_learning", return_indices_ranked_by=score, n_jobs=1
        )
        assert set(found.row) == set(issues)
        quality = rank.get_label_quality_scores(given, theirs, method=score)
        ours = found.margin if score == "normalized_margin" else np.sort(found.own)
        np.testing.assert_allclose(ours, quality[issues], rtol=0, atol=1e-12)
        if score == "normalized_margin":
            assert found.row.tolist() == sorted(issues, key=lambda image: (quality[image], image))
    joint = count.compute_confident_joint(given, theirs, calibrate=False)
    np.testing.assert_array_equal(joint, np.where(np.eye(len(joint), dtype=bool), found.joint.clip(1), found.joint))


def test_a_class_without_labels_and_an_image_without_an_answer(tmp_path: Path) -> None:
    given = np.array([0, 0, 0, 1, 1, 1])
    probs = np.array([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.05, 0, 0.95], [0.1, 0.9, 0], [0.2, 0.8, 0], [0.99, 0.01, 0]])
    files = written(tmp_path, given, probs.astype(np.float32))
    table = parquet_files.read_table(files[0][1])
    silent = [None if row == 5 else value for row, value in enumerate(table["confidence"].to_pylist())]
    at = table.column_names.index("confidence")
    changed = table.set_column(at, "confidence", pa.array(silent, pa.float32()))
    parquet_files.write_table(files[0][1], changed, parquet_files.read_metadata(files[0][1]))
    found = doubtful.find(files, 3)
    assert found.row.tolist() == [1] and found.images == 5  # no label says 2, so nobody can confidently be one
    assert found.confused(3) == [(0, 1, 1)]


def test_nothing_is_doubtful_where_all_agree(tmp_path: Path) -> None:
    probs = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    found = doubtful.find(written(tmp_path, np.array([0, 1, 2, 0]), probs), 3)
    assert len(found.row) == 0 and found.confused(3) == [] and found.joint.tolist() == np.diag([2, 1, 1]).tolist()
