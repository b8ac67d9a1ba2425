"""Lists the images that predictions are wanted of: a file, a folder, a table with a path column, or shards."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.data import shards
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.errors import DataError
from pipeline.predict.predictor import Picture

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Wanted:
    """An image: `where` says which (the columns of the output that name it), `picture` is it."""

    where: dict[str, str | int]
    picture: Picture


def find(name: str, column: str, damages: list[str]) -> Iterator[Wanted]:
    """The images that a name means, in a fixed order; `damages` gets a sentence for each shard that ends too soon.
    DataError: there are none."""
    if _globs_files(name):
        return _of_files(sorted(glob.glob(name, recursive=True)), name)  # noqa: PTH207 - it may be absolute
    if Path(name).is_dir():
        return _of_folder(name, damages)
    if are_shards(name):
        return _of_shards(name, damages)
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


def _of_folder(name: str, damages: list[str]) -> Iterator[Wanted]:
    found = sorted(
        str(path) for path in Path(name).rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    )
    tars = next(Path(name).rglob("*.tar"), None)
    if found and tars:
        raise DataError(f"{name} holds images and shards, such as {tars}; name the one kind or the other")
    return _of_shards(name, damages) if tars else _of_files(found, name)


def _of_files(found: list[str], name: str) -> Iterator[Wanted]:
    if not found:
        raise DataError(f"{name} holds no image file; known suffixes are {', '.join(IMAGE_SUFFIXES)}")
    return (Wanted({"path": path}, path) for path in found)


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
    texts = ["" if pandas.isna(text) else str(text) for text in table[column]]
    # An empty cell is an empty image, which is a row that says so.
    files = [text if storage.is_url(text) else str(base / text) if text else b"" for text in texts]
    return (Wanted({"path": text}, file) for text, file in zip(texts, files, strict=True))


def _of_shards(pattern: str, damages: list[str]) -> Iterator[Wanted]:
    for shard in shards.find_shards(pattern, "input", str(Path.cwd())):
        reader = shards.stream(shard.path)
        for sample, data in reader:
            where: dict[str, str | int] = {"shard": shard.name, "index": sample.index, "key": sample.key}
            yield Wanted(where, data)
        if reader.damage:
            damages.append(
                f"shard {storage.redact(shard.path)} is damaged ({reader.damage}): nothing is said of its images after "
                "that; copy it again, or leave it out"
            )
