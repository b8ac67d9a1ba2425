"""Selection equals sorting everything, whatever the files, their grouping and their order."""

import dataclasses
import functools
import hashlib
import math
import pickle
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError
from pipeline.selection import candidates, radix, select, sort_keys
from pipeline.selection.select import Settings, select_all


def inline(function: Callable[[Any], Any], units: Sequence[Any]) -> Iterable[Any]:
    """As a cluster does it: the function is pickled, results come in any order."""
    function = pickle.loads(pickle.dumps(function))  # noqa: S301
    results = [function(unit) for unit in units]
    random.Random(len(units)).shuffle(results)
    return results


def write_shard(folder: Path, name: str, label: np.ndarray, confidence: np.ndarray, **more: Any) -> str:
    """A label file of samples whose label is >= 0; the others are bad."""
    n, good = len(label), np.flatnonzero(label >= 0)
    columns = {
        "index": range(n),
        "key": [f"{i:06d}" for i in range(n)],
        "offset": [512 + 1024 * i for i in range(n)],
        "size": [100] * n,
        "status": ["ok" if value >= 0 else "truncated" for value in label],
        "image_hash": more.pop("hashes", np.arange(n, dtype=np.uint64)),
    }
    found = label_files.Predictions(
        label[good].astype(np.int32),
        confidence[good].astype(np.float32),
        label[good, None].astype(np.int32),
        confidence[good, None].astype(np.float16),
    )
    path = str(folder / label_files.file_name(name))
    label_files.write_labels(path, label_files.make_table(columns, good, found), {"shard": name, **more})
    return path


def random_shards(folder: Path, seed: int, classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Skewed classes, many confidences of exactly 1, some bad samples, names in sub-folders."""
    rng = np.random.default_rng(seed)
    shards = {}
    for number in range(int(rng.integers(1, 9))):
        n = int(rng.integers(0, 200))
        label = np.minimum(rng.geometric(0.3, n) - 1, classes - 1)
        label[rng.random(n) < 0.1] = -1
        confidence = rng.random(n, np.float32)
        confidence = np.where(rng.random(n) < 0.4, np.float32(1), confidence)
        confidence = np.where(rng.random(n) < 0.2, np.round(confidence, 1), confidence).astype(np.float32)
        name = f"{'ab'[number % 2]}/{number:03d}.tar"
        shards[name] = (label, confidence)
        write_shard(folder, name, label, confidence)
    return shards


def paths_of(folder: Path, shards: Iterable[str]) -> list[str]:
    return [str(folder / label_files.file_name(name)) for name in shards]


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


@dataclasses.dataclass
class Case:
    """Settings and shards drawn from a seed: classes of very different sizes, many ties, any number of files."""

    shards: dict[str, tuple[np.ndarray, np.ndarray]]
    settings: Settings
    groups: int

    @classmethod
    def draw(cls, folder: Path, seed: int) -> "Case":
        rng = np.random.default_rng(1000 + seed)
        classes = int(rng.integers(1, 8))
        choice = seed % 3  # balanced, the best share of each, everything
        own = {k: float(rng.choice([0.0, 0.2, 0.95, 1.0])) for k in range(classes) if rng.random() < 0.3}
        settings = Settings(
            classes,
            threshold=float(rng.choice([0.0, 0.3, 0.5, 1.0])),
            per_class=int(rng.choice([1, 3, 20, 64, 300])) if choice == 0 else None,
            top_fraction=float(rng.choice([0.01, 0.07, 0.3, 0.5, 1.0])) if choice == 1 else None,
            max_copies=int(rng.integers(1, 6)) if seed % 4 == 1 else None,
            thresholds=own if seed % 2 else {},
            by_confidence=seed % 5 == 2,
            left_out=(0,) if seed % 7 == 3 else (),
        )
        return cls(random_shards(folder, seed, classes), settings, int(rng.integers(1, 12)))


def by_sorting(case: Case) -> dict[str, dict[int, int]]:
    """The contract, naively: {shard: {index: copies}}."""
    settings = case.settings
    ranked: list[list[tuple[float, int, str, int]]] = [[] for _ in range(settings.num_classes)]
    for name, (label, confidence) in case.shards.items():
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for index, (c, p) in enumerate(zip(label, confidence, strict=True)):
            least = np.float32(settings.thresholds.get(int(c), settings.threshold))
            if c >= 0 and c not in settings.left_out and p >= least:
                ranked[c].append((-float(p), splitmix64(start ^ index), name, index))
    copies: dict[str, dict[int, int]] = {name: {} for name in case.shards}
    for rows in ranked:
        rows.sort()
        for rank, (_, _, name, index) in enumerate(rows):
            number = 1
            if settings.per_class is not None:
                number = settings.per_class // len(rows) + (rank < settings.per_class % len(rows))
            if settings.top_fraction is not None:
                number = int(rank < math.ceil(Decimal(str(settings.top_fraction)) * len(rows)))
            if settings.max_copies is not None:
                number = min(number, settings.max_copies)
            if settings.by_confidence:
                number = min(number, 1)
            if number:
                copies[name][index] = number
    return {name: dict(sorted(rows.items())) for name, rows in copies.items()}


def written(case: Case, expected: dict[str, dict[int, int]], folder: Path) -> dict[str, bytes]:
    """The selection files that must come of it, byte by byte."""
    files = {}
    for name, rows in expected.items():
        columns = [pa.array(rows.keys(), pa.int32()), pa.array(rows.values(), pa.int32())]
        schema = select.SCHEMA
        if case.settings.by_confidence:
            columns.append(pa.array(case.shards[name][1][list(rows)].astype(np.float32)))
            schema = schema.append(select.WEIGHT)
        metadata = {"stage": "out", "shard": name, "samples": len(rows), "copies": sum(rows.values())}
        path = folder / label_files.file_name(name)
        encoding = {"index": "DELTA_BINARY_PACKED", "copies": "DELTA_BINARY_PACKED"}
        table = pa.table(columns, schema=schema)
        parquet_files.write_table(str(path), table, metadata, use_dictionary=False, column_encoding=encoding)
        files[name] = path.read_bytes()
    return files


def read_back(folder: Path, names: Iterable[str]) -> dict[str, dict[int, int]]:
    found = {}
    for name in names:
        table = parquet_files.read_table(str(folder / label_files.file_name(name)))
        found[name] = dict(zip(table["index"].to_pylist(), table["copies"].to_pylist(), strict=True))
    return found


@pytest.fixture(params=[(1 << 20, 1 << 21), (1 << 20, 0), (64, 0), (64, 40)])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, where all rows are gathered at once; never gathered; with few counters, and none or some gathered
    late."""
    monkeypatch.setattr(radix, "BINS", request.param[0])
    monkeypatch.setattr(radix, "GATHERED", request.param[1])
    monkeypatch.setattr(candidates, "BUFFERED", 300)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("seed", range(30))
def test_selection_equals_sorting_everything(tmp_path: Path, seed: int) -> None:
    case = Case.draw(tmp_path / "labels", seed)
    settings, shards = case.settings, case.shards
    paths = paths_of(tmp_path / "labels", shards)
    random.Random(seed).shuffle(paths)
    expected = by_sorting(case)
    run = functools.partial(select_all, paths, settings, inline, str(tmp_path / "out"), groups=case.groups)
    if not any(expected.values()):
        with pytest.raises(DataError, match="the selection keeps no image"):
            run()
        assert not (tmp_path / "out").exists()
        return
    summary = run()
    found = {name: (tmp_path / "out" / label_files.file_name(name)).read_bytes() for name in shards}
    assert found == written(case, expected, tmp_path / "expected")
    assert read_back(tmp_path / "out", shards) == expected
    assert summary["shards"] == {name: sum(rows.values()) for name, rows in sorted(expected.items())}
    every = [(c, p) for label, confidence in shards.values() for c, p in zip(label, confidence, strict=True)]
    good = [(c, p) for c, p in every if c >= 0]
    assert summary["samples"] == len(every) and summary["labelled"] == len(good) == sum(summary["histogram"])
    lowest = [np.float32(settings.thresholds.get(k, settings.threshold)) for k in range(settings.num_classes)]
    available = [
        0 if k in settings.left_out else sum(c == k and p >= lowest[k] for c, p in good)
        for k in range(settings.num_classes)
    ]
    assert summary["available"] == available and summary["confident"] == sum(available)
    assert summary["kept"] == sum(len(rows) for rows in expected.values()) == sum(summary["kept_per_class"])
    assert summary["copies"] == sum(summary["copies_per_class"]) == sum(summary["shards"].values())
    assert sum(summary["kept_histogram"]) == summary["kept"]
    if settings.per_class is not None and settings.max_copies is None and not settings.by_confidence:
        assert summary["copies_per_class"] == [settings.per_class if n else 0 for n in available]
    assert summary["empty"] == [k for k, n in enumerate(available) if n == 0]
    assert summary["short"] == [k for k, n in enumerate(available) if 0 < n < (settings.per_class or 0)]


def test_files_do_not_depend_on_order_or_grouping(tmp_path: Path) -> None:
    shards = random_shards(tmp_path / "labels", seed=4, classes=5)
    paths = paths_of(tmp_path / "labels", shards)
    contents = []
    for number, (order, groups) in enumerate([(paths, 1), (paths[::-1], 2), (sorted(paths), 100)]):
        out = tmp_path / str(number) / "out"
        summary = select_all(order, Settings(5, 0.3, 40), inline, str(out), groups=groups)
        contents.append(([(out / label_files.file_name(name)).read_bytes() for name in shards], summary))
    assert len(shards) > 3 and contents[0] == contents[1] == contents[2]


def test_a_short_class_gets_copies_the_most_confident_one_more_and_many_are_reported(tmp_path: Path) -> None:
    label, confidence = np.array([0, 0, 0, 1, 0]), np.array([0.5, 0.9, 0.7, 0.4, 0.1])
    path = write_shard(tmp_path, "a.tar", label, confidence)
    summary = select_all([path], Settings(3, 0.3, 20), inline, str(tmp_path / "out"))
    assert read_back(tmp_path / "out", ["a.tar"])["a.tar"] == {0: 6, 1: 7, 2: 7, 3: 20}
    assert summary["much_copied"] == [1] and summary["short"] == [0, 1] and summary["empty"] == [2]
    summary = select_all([path], Settings(3, 0.3, 20, max_copies=6), inline, str(tmp_path / "capped"))
    assert read_back(tmp_path / "capped", ["a.tar"])["a.tar"] == {0: 6, 1: 6, 2: 6, 3: 6}
    assert summary["much_copied"] == [] and summary["copies"] == 24


def test_copies_of_held_out_images_are_dropped_before_the_cut(tmp_path: Path) -> None:
    hashes = [5, 2**64 - 1, 7, None]
    path = write_shard(tmp_path, "a.tar", np.array([0, 0, 0, -1]), np.array([0.9, 0.8, 0.7, 0]), hashes=hashes)
    exclude = np.array([2, 5, 6], np.uint64)
    summary = select_all([path], Settings(1, 0.3, 1, exclude=exclude), inline, str(tmp_path / "out"))
    assert read_back(tmp_path / "out", ["a.tar"])["a.tar"] == {1: 1}
    assert (summary["confident"], summary["excluded"], summary["available"]) == (3, 1, [2])


def test_the_tie_hash_is_pinned() -> None:
    assert sort_keys.mix(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0
    assert [hex(value) for value in sort_keys.tie_hash("train/000.tar", np.arange(3))] == [
        "0x7269f57e520cba8d",
        "0xa77eb09961d6fa05",
        "0xd3dc8584bc15a27c",
    ]


def test_labels_of_another_teacher_or_class_are_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "a.tar", np.array([0, 4]), np.array([0.9, 0.8]), teacher="11", class_list="ab")
    run = functools.partial(select_all, [path], map_fn=inline, out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a\.parquet does not fit.*'11' instead of '22'"):
        run(settings=Settings(5, expected={"teacher": "22"}))
    with pytest.raises(DataError, match=r"a\.parquet does not fit.*the class list \(hash\) is 'ab' instead of 'cd'"):
        run(settings=Settings(5, expected={"class_list": "cd"}))
    with pytest.raises(DataError, match=r"a\.parquet holds classes 0 to 4.*allowed are classes 0 to 2"):
        run(settings=Settings(3, expected={"teacher": "11"}))
    with pytest.raises(DataError, match="no label file to select from"):
        select_all([], Settings(3), inline, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1.5, -0.5, float("nan"), float("inf")])
def test_confidences_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    path = write_shard(tmp_path, "a.tar", np.array([0, -1, 1]), np.array([0.9, 0, value]))
    with pytest.raises(DataError, match=r"a\.parquet holds .* confidences from .* allowed are .* from 0 to 1"):
        select_all([path], Settings(2), inline, str(tmp_path / "out"))


def test_a_label_file_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    good = write_shard(tmp_path, "a.tar", np.array([0]), np.array([0.9]))
    bad = tmp_path / "b.parquet"
    with pytest.raises(DataError, match=r"there is no file .*b\.parquet"):
        select_all([good, str(bad)], Settings(1), inline, str(tmp_path / "out"))
    bad.write_bytes(Path(good).read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b\.parquet is not a readable Parquet file"):
        select_all([good, str(bad)], Settings(1), inline, str(tmp_path / "out"))


def test_a_selection_that_keeps_nothing_says_why(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    low = write_shard(tmp_path, "a.tar", np.array([0, 1, -1]), np.array([0.2, 0.125, 0]))
    with pytest.raises(
        DataError, match=r"of 2 labelled ones the most confident has about 0\.20, but .* is 0\.3; lower it"
    ):
        select_all([low], Settings(2, 0.3), inline, out)
    with pytest.raises(DataError, match=r"is 0\.25; lower it"):
        select_all([low], Settings(2, 0.3, thresholds={1: 0.25}), inline, out)
    with pytest.raises(DataError, match=r"all 2 confident ones are copies of validation or test images"):
        select_all([low], Settings(2, 0.1, exclude=np.arange(9, dtype=np.uint64)), inline, out)
    bad = write_shard(tmp_path, "b.tar", np.array([-1, -1]), np.array([0, 0]))
    with pytest.raises(DataError, match=r"of 2 unlabelled samples none has a label"):
        select_all([bad], Settings(2), inline, out)
    assert not Path(out).exists()


def test_a_shard_of_which_nothing_is_kept_has_an_empty_file(tmp_path: Path) -> None:
    names = {"a.tar": 0.9, "b.tar": 0.1, "c.tar": 0.8}
    paths = [write_shard(tmp_path, name, np.array([0, -1]), np.array([p, 0])) for name, p in names.items()]
    paths.append(write_shard(tmp_path, "d.tar", np.zeros(0, np.int32), np.zeros(0)))
    summary = select_all(paths, Settings(1, 0.3, 1), inline, str(tmp_path / "out"))
    assert read_back(tmp_path / "out", [*names, "d.tar"]) == {"a.tar": {0: 1}, "b.tar": {}, "c.tar": {}, "d.tar": {}}
    assert summary["shards"] == {"a.tar": 1, "b.tar": 0, "c.tar": 0, "d.tar": 0}


def test_words_never_contradict_ranks() -> None:
    rng = np.random.default_rng(0)
    near = np.concatenate([np.arange(5), rng.integers(0, 0x3F800001, 300), [0x3F800000, 2**29, 2**29 - 1, 2**29 + 1]])
    distance = np.repeat(near, 3).astype(np.uint32)
    hashes = rng.integers(0, 2**64, len(distance), np.uint64)
    order = np.lexsort((hashes, distance))
    word = sort_keys.words(distance, hashes)[order]
    assert (word[1:] >= word[:-1]).all()
    last_distance, last_hash = sort_keys.last_ranks(word)
    assert (last_distance == distance[order]).all()
    assert (last_hash >= hashes[order]).all() and (last_hash - hashes[order] < 2**35).all()
    # Of a prefix: nothing that has it lies beyond, and whatever lies beyond has a greater one.
    for left in (30, 50, 62):
        bound = word >> np.uint64(left) << np.uint64(left) | np.uint64((1 << left) - 1)
        d, h = sort_keys.last_ranks(bound)
        inside = (distance[order][None] < d[:, None]) | (
            (distance[order][None] == d[:, None]) & (hashes[order][None] <= h[:, None])
        )
        assert (inside == (word[None] <= bound[:, None])).all()


def test_finding_held_out_images() -> None:
    rng = np.random.default_rng(0)
    known = np.unique(rng.integers(0, 2**64, 5000, np.uint64))
    others = known ^ np.uint64(1 << 40)  # the same place in the table
    asked = np.concatenate([known[::2], others, rng.integers(0, 2**64, 5000, np.uint64)])
    assert (candidates.HeldOut(known).find(asked) == np.isin(asked, known)).all()


def test_results_of_groups_do_not_pile_up(tmp_path: Path) -> None:
    """At most the sum, the result that is being added and the next one are alive."""
    shards = random_shards(tmp_path / "labels", seed=4, classes=5)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def watched(function: Callable[[Any], Any], units: Sequence[Any]) -> Iterator[Any]:
        nonlocal most
        for unit in units:
            result = function(unit)
            alive.append(weakref.ref(result))
            most = max(most, sum(ref() is not None for ref in alive))
            yield result
            del result

    select_all(paths_of(tmp_path / "labels", shards), Settings(5, 0.3, 40), watched, str(tmp_path / "out"), groups=100)
    assert len(alive) >= 12 and most <= 4  # the first pass's sum is kept, for the summary
