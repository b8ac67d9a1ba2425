"""Lists the images that predictions are wanted of: a file, a folder, a table with a path column, or shards."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.data import index_files, shards
from pipeline.data.classes import plain
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.errors import DataError
from pipeline.predict.predictor import Picture

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Wanted:
    """An image: `where` says which (the columns of the output that name it), `picture` is it, `truth` the class that
    its folder or its shard gives it, where that is known."""

    where: dict[str, str | int]
    picture: Picture
    truth: int | None = None


def find(name: str, column: str, damages: list[str], classes: Sequence[str]) -> Iterator[Wanted]:
    """The images that a name means, in a fixed order; `damages` gets a sentence for each shard that ends too soon.
    DataError: there are none."""
    if _globs_files(name):
        return _of_files(sorted(glob.glob(name, recursive=True)), name)  # noqa: PTH207 - it may be absolute
    if Path(name).is_dir():
        return _of_folder(name, damages, classes)
    if are_shards(name):
        return _of_shards(name, damages, classes)
    if name.lower().endswith(TABLES):
        return _of_table(name, column)
    return iter([Wanted({"path": name}, name)])


def are_shards(name: str) -> bool:
    """Whether a name means shards."""
    if Path(name).is_dir():
        return next(Path(name).rglob("*.tar"), None) is not None
    return not _globs_files(name) and (name.endswith((".tar", ".txt")) or "*" in name or "{" in name)


def _globs_files(name: str) -> bool:
    return "*" in name and Path(name).suffix[1:].lower() in IMAGE_SUFFIXES


def _of_folder(name: str, damages: list[str], classes: Sequence[str]) -> Iterator[Wanted]:
    found = sorted(
        str(path) for path in Path(name).rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    )
    tars = next(Path(name).rglob("*.tar"), None)
    if found and tars:
        raise DataError(f"{name} holds images and shards, such as {tars}; name the one kind or the other")
    return _of_shards(name, damages, classes) if tars else _of_files(found, name, classes)


def _of_files(found: list[str], name: str, classes: Sequence[str] = ()) -> Iterator[Wanted]:
    """Sub-folders that are called like `classes` are the truth."""
    if not found:
        raise DataError(f"{name} holds no image file; known suffixes are {', '.join(IMAGE_SUFFIXES)}")
    number = {plain(one): index for index, one in enumerate(classes)}
    return (Wanted({"path": path}, path, number.get(plain(Path(path).parent.name))) for path in found)


def _of_table(name: str, column: str) -> Iterator[Wanted]:
    import pandas

    if not Path(name).is_file():
        raise DataError(f"there is no file {name}; give an image, a folder, a table or shards")
    try:
        table = pandas.read_parquet(name) if name.lower().endswith(".parquet") else pandas.read_csv(name, dtype=str)
    except Exception as error:  # pandas raises a different type for each way of being broken
        raise DataError(f"cannot read the table {name} ({type(error).__name__}: {error})") from error
    if column not in table:
        shown = ", ".join(map(str, table.columns))
        raise DataError(f"{name} has no column '{column}'; its columns are {shown}: name one by --column")
    base = Path(name).absolute().parent
    return (_of_cell(value, number, base) for number, value in enumerate(table[column]))


def _of_cell(value: Any, number: int, base: Path) -> Wanted:
    """A path, the bytes of an image file, or Hugging Face's {bytes, path}; `row 7` is the path of what has none. An
    empty cell is an empty image, whose row says so."""
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return Wanted({"path": path or f"row {number}"}, bytes(data))
    text = path if isinstance(value, dict) else value
    text = "" if text is None or text != text else str(text)
    return Wanted({"path": text}, text if storage.is_url(text) else str(base / text) if text else b"")


def _of_shards(pattern: str, damages: list[str], classes: Sequence[str]) -> Iterator[Wanted]:
    # A generator: what is wrong with the pattern is said when the first image is asked for.
    yield from of_shards(shards.find_shards(pattern, "input", str(Path.cwd())), damages, classes)


def of_shards(
    found: Sequence[shards.Shard], damages: list[str], classes: Sequence[str], *, remote: bool = False
) -> Iterator[Wanted]:
    """The images of some shards; `remote`: the labels in remote ones too, which are read twice for them."""
    for shard in found:
        truth = _labels_of(shard, classes) if remote or not storage.is_url(shard.path) else []
        reader = shards.stream(shard.path)
        for sample, data in reader:
            where: dict[str, str | int] = {"shard": shard.name, "index": sample.index, "key": sample.key}
            yield Wanted(where, data, truth[sample.index] if truth else None)
        if reader.damage:
            damages.append(
                f"shard {storage.redact(shard.path)} is damaged ({reader.damage}): nothing is said of its images after "
                "that; copy it again, or leave it out"
            )


def _labels_of(shard: shards.Shard, classes: Sequence[str]) -> list[int]:
    """The labels in a shard, if all of its images have one."""
    try:
        samples = shards.scan(shard.path).samples
        return index_files.read_labels(shard, samples, index_files.Classes(classes))
    except DataError:  # unlabelled, or of other classes
        return []
