"""Label files: schema, probabilities, soft targets, metadata, refusals."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def small_table() -> pa.Table:
    """Five samples, of which 1 and 3 are bad."""
    columns = {
        "index": range(5),
        "key": ["a", "b", label_files.printable_key(b"c\xff".decode("utf-8", "surrogateescape")), "a", "d/é"],
        "offset": [512, 2048, 4096, 1 << 40, 8192],
        "size": [10, 0, 30, 40, 50],
        "status": ["ok", "not_an_image", "ok", "truncated", "ok"],
        "image_hash": [label_files.image_hash(bytes([i])) for i in range(5)],
    }
    probs = softmax(np.random.default_rng(0).normal(size=(3, 4)))
    return label_files.make_table(columns, np.array([0, 2, 4]), label_files.rows_from_probs(probs))


@pytest.mark.parametrize("classes", [2, 10, 128, 129, 1000])
def test_rows_hold_the_most_probable_classes_first_and_ties_go_to_the_lower_class(classes: int) -> None:
    rng = np.random.default_rng(classes)
    probs = softmax(rng.integers(-3, 3, (20, classes)).astype(np.float32))  # many ties
    found = label_files.rows_from_probs(probs)
    keep = classes if classes <= 128 else 32
    expected = np.argsort(-probs, axis=1, kind="stable")[:, :keep]
    assert np.array_equal(found.classes, expected)
    assert np.array_equal(found.label, probs.argmax(1)) and found.label.dtype == np.int32
    assert np.array_equal(found.confidence, probs.max(1)) and found.confidence.dtype == np.float32
    assert np.array_equal(found.probs, np.take_along_axis(probs, expected, 1).astype(np.float16))


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 0.01, 100.0])
def test_soft_targets_are_the_teachers_distribution_with_the_rest_spread_evenly(
    classes: int, temperature: float
) -> None:
    probs = softmax(np.random.default_rng(1).normal(size=(30, classes)) * 4)
    found = label_files.rows_from_probs(probs)
    targets = label_files.spread_targets(found.classes, found.probs, classes, temperature=temperature)
    named, expected = np.zeros_like(probs, bool), np.zeros(probs.shape)
    for i, (row, stored) in enumerate(zip(found.classes, found.probs, strict=True)):
        named[i, row], expected[i, row] = True, stored
    if classes > 128:
        expected += ~named * (1 - expected.sum(1, keepdims=True)) / (classes - 32)
    expected /= expected.max(1, keepdims=True)
    expected **= 1 / temperature
    expected /= expected.sum(1, keepdims=True)
    assert targets.dtype == np.float32 and targets.shape == (30, classes)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets, expected, rtol=1e-3, atol=1e-7)


def test_temperature_by_hand() -> None:
    """p^(1/T), after the mass that is not named has been spread, then renormalised."""
    dense = label_files.spread_targets(
        np.array([[2, 0, 1]], np.int32), np.array([[0.64, 0.32, 0.04]], np.float16), 3, temperature=2.0
    )
    assert dense[0] == pytest.approx(np.array([0.5657, 0.2, 0.8]) / 1.5657, rel=1e-3)
    # Two of four classes named: the missing 0.1 is 0.05 for each of the others, and that is what the power is taken of.
    top = label_files.spread_targets(
        np.array([[3, 1]], np.int32), np.array([[0.7, 0.2]], np.float16), 4, temperature=0.5
    )
    assert top[0] == pytest.approx(np.array([0.0025, 0.04, 0.0025, 0.49]) / 0.535, rel=5e-3)


def test_a_file_has_the_published_schema_and_nulls_where_the_status_is_not_ok(tmp_path: Path) -> None:
    path = str(tmp_path / "sub" / "000.parquet")
    label_files.write_labels(path, small_table(), {"shard": "sub/000.tar"})
    assert pq.read_schema(path).remove_metadata() == label_files.SCHEMA
    table = parquet_files.read_table(path)
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["status"].to_pylist() == ["ok", "not_an_image", "ok", "truncated", "ok"]
    assert table["key"].to_pylist() == ["a", "b", "c\\xff", "a", "d/é"]
    for name in ("label", "confidence", "classes", "probs"):
        assert [value is None for value in table[name].to_pylist()] == [False, True, False, True, False]
    for row in table.to_pylist():
        if row["status"] == "ok":
            assert row["classes"][0] == row["label"] and sorted(row["classes"]) == [0, 1, 2, 3]
            assert abs(row["probs"][0] - row["confidence"]) < 1e-3
    assert parquet_files.read_table(path, ["label"]).column_names == ["label"]


def test_a_shard_without_any_good_image_and_an_empty_one_have_files_too(tmp_path: Path) -> None:
    nothing = label_files.rows_from_probs(np.zeros((0, 4), np.float32))
    bad = {
        "index": [0],
        "key": ["a"],
        "offset": [512],
        "size": [3],
        "status": ["truncated"],
        "image_hash": [7],
    }
    for columns in (bad, {name: [] for name in bad}):
        path = str(tmp_path / f"a{len(columns['index'])}.parquet")
        label_files.write_labels(
            path,
            label_files.make_table(columns, np.zeros(0, np.int64), nothing),
            {"shard": f"a{len(columns['index'])}.tar"},
        )
        assert parquet_files.read_table(path)["label"].to_pylist() == [None] * len(columns["index"])


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    metadata = {"shard": "a.tar", "counts": {"ok": 3}}
    for name in ("a.parquet", "b.parquet"):
        label_files.write_labels(str(tmp_path / name), small_table(), metadata)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert parquet_files.read_metadata(str(tmp_path / "a.parquet")) == {"format": label_files.FORMAT, **metadata}


def test_a_reader_is_refused_with_what_differs() -> None:
    metadata = {
        "shard": "a.tar",
        "shard_size": 10,
        "teacher": "11",
        "class_list": label_files.class_list_hash(["x"]),
    }
    label_files.check_labels(metadata, metadata, "f")
    with pytest.raises(DataError, match=r"f does not fit.*teacher \(sha256 of its weights\) is '11' instead of '22'"):
        label_files.check_labels(metadata, {**metadata, "teacher": "22"}, "f")
    with pytest.raises(DataError, match=r"shard's size is 10 instead of 11.*class list"):
        label_files.check_labels(metadata, {"shard_size": 11, "class_list": label_files.class_list_hash(["y"])}, "f")
    assert label_files.class_list_hash(["a", "b"]) != label_files.class_list_hash(["b", "a"])


def test_files_on_a_url() -> None:
    label_files.write_labels("memory://labels/x/000.parquet", small_table(), {"shard": "x/000.tar"})
    assert parquet_files.read_metadata("memory://labels/x/000.parquet")["shard"] == "x/000.tar"
    assert parquet_files.read_table("memory://labels/x/000.parquet", ["index"])["index"].to_pylist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_image_hash_is_pinned() -> None:
    assert label_files.image_hash(b"noisy lambda") == 0xCC991F92BECB0731
