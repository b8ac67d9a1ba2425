"""Says how answers to the images of an entry of `evaluate.sets` are marked.

What class indexes in its shards mean (the classes.json beside them), which classes may be answered (`classes`), which
several are right for an image (`labels`), and which corruption and severity a shard is of (`reference`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.config.checks_evaluate import CORRUPTIONS
from pipeline.config.settings_evaluate import EvaluationSet
from pipeline.data.classes import CLASSES_NAME, plain, read_classes
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.data.shards import Shard
from pipeline.errors import DataError

OF_TIMM = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
"""What `classes` can name: the 200 classes of a published set, as timm lists them."""
REAL, REAL_LABELS, IMAGENET = "imagenet-real", "imagenet_real_labels.json", "imagenet_synsets.txt"
VALIDATION = "ILSVRC2012_val_{:08d}"
"""ImageNet's validation images, which lists of labels are in the order of; counted from 1."""
SEVERITIES = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class Marking:
    """`meaning`: what the class indexes in the shards are among the job's classes; `answers`: those of the classes that
    may be answered; `right`: by image the classes that are right. None: the same, all, the label alone. `parts`: of
    each shard (corruption, severity), where it has such."""

    meaning: tuple[int, ...] | None = None
    answers: tuple[int, ...] | None = None
    right: Mapping[str, tuple[int, ...]] | None = None
    parts: Mapping[str, tuple[str, str]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Empty where images are marked by their labels alone."""
        right = None
        if self.right is not None:
            right = hashlib.sha256(json.dumps(sorted(self.right.items())).encode()).hexdigest()
        found = {"meaning": self.meaning, "answers": self.answers, "right": right}
        return {name: value for name, value in found.items() if value is not None}


def read(
    source: str, entry: EvaluationSet, shards: Sequence[Shard], classes: Sequence[str], classes_path: str, root: str
) -> Marking:
    """What the entry `source` of a job with these `classes` says of its images. DataError."""
    return Marking(
        _meaning(source, shards, classes, classes_path),
        None if entry.classes is None else _answers(f"{source}.classes", entry.classes, classes, root),
        None if entry.labels is None else _right(f"{source}.labels", entry.labels, classes, root),
        None if entry.reference is None else _parts(source, entry.reference, shards),
    )


def _meaning(source: str, shards: Sequence[Shard], classes: Sequence[str], classes_path: str) -> tuple[int, ...] | None:
    """By the class list beside the shards. (One of folders "0", "1", "10" is sorted as text: the third is class 10.)"""
    home = classes_path.rpartition("/")[0]
    folders = sorted({shard.path.rpartition("/")[0] for shard in shards} - {home})
    folders = [folder for folder in folders if not folder.startswith(("http://", "https://"))]
    lists = {folder: storage.join(folder, CLASSES_NAME) for folder in folders}
    found = {folder: read_classes(path) for folder, path in lists.items() if storage.exists(path)}
    if not found:
        return None
    first = next(iter(found))
    for folder in folders:
        if found.get(folder) != found[first]:
            raise DataError(
                f"{source}: beside its shards {storage.redact(lists[first])} says what class indexes mean, and "
                f"{storage.redact(folder)} has {'another one' if folder in found else 'none'}; prepare all shards of "
                "the set with one class list"
            )
    names = found[first]
    return None if names == list(classes) else numbers_of(names, classes, f"{source}: {storage.redact(lists[first])}")


def numbers_of(entries: Sequence[object], classes: Sequence[str], where: str) -> tuple[int, ...]:
    """The job's class indexes of a list of class names, or of one of class indexes alone. DataError."""
    number = {plain(name): index for index, name in enumerate(classes)}
    texts = [plain(str(entry)) for entry in entries]
    unknown = [text for text in texts if text not in number]
    if unknown and len(unknown) == len(texts) and all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        found = [int(text) for text in texts]
        if max(found) >= len(classes):
            raise DataError(
                f"{where} names the class index {max(found)}, but the job has {len(classes)} classes (0 to "
                f"{len(classes) - 1}); correct it"
            )
    elif unknown:
        close = difflib.get_close_matches(unknown[0], number, 1, 0.6)
        hint = f"did you mean '{close[0]}'?" if close else "name classes as the job's class list does, or by index"
        if re.fullmatch(r"n\d{8}", unknown[0]):
            hint = "this set is for a job whose class list has ImageNet's classes by their WordNet ids"
        raise DataError(
            f"{where} names '{unknown[0][:40]}', which is none of the job's {len(classes)} classes ('{classes[0]}', "
            f"…); {hint}"
        )
    else:
        found = [number[text] for text in texts]
    if len(set(found)) < len(found):
        twice = next(text for text, index in zip(texts, found, strict=True) if found.count(index) > 1)
        raise DataError(f"{where} names the class '{twice[:40]}' twice; name each once")
    if not found:
        raise DataError(f"{where} names no class; give names or indexes of the job's classes")
    return tuple(found)


def _answers(where: str, said: str | list[Any], classes: Sequence[str], root: str) -> tuple[int, ...]:
    if isinstance(said, list):
        return numbers_of(said, classes, where)
    if said in OF_TIMM:
        return numbers_of(_of_timm(OF_TIMM[said]).split(), classes, f"{where}: {said}")
    if not said.endswith((".txt", ".json")):
        raise DataError(f"{where} is '{said}'; it takes {', '.join(OF_TIMM)}, a list, or a .txt or .json file of one")
    path = _path(said, root)
    shown = f"{where}: {storage.redact(path)}"
    if path.endswith(".json"):
        listed = _json(path, shown)
        if not isinstance(listed, list):
            raise DataError(f"{shown} is no JSON list; write class names or class indexes")
        return numbers_of(listed, classes, shown)
    return numbers_of([line for line in _read(path, shown).splitlines() if line.strip()], classes, shown)


def _right(where: str, said: str, classes: Sequence[str], root: str) -> dict[str, tuple[int, ...]]:
    if said == REAL:
        given, shown = json.loads(_of_timm(REAL_LABELS)), f"{where}: {REAL}"
    elif said.endswith(".json"):
        path = _path(said, root)
        shown = f"{where}: {storage.redact(path)}"
        given = _json(path, shown)
    else:
        raise DataError(f"{where} is '{said}'; it takes {REAL}, or a .json file of {{image: [classes]}}")
    if isinstance(given, list):  # as published: of ImageNet's validation images in order, by ImageNet's class index
        names: Sequence[str] = _of_timm(IMAGENET).split()
        images = {VALIDATION.format(number): some for number, some in enumerate(given, 1)}
    else:
        names, images = [], given
    if not isinstance(images, dict) or not all(isinstance(some, list) for some in images.values()):
        raise DataError(f'{shown} is not of the form {{"image": ["class", …]}}; write a list of classes for each image')
    said_of = sorted({value for some in images.values() for value in some}, key=str) if _plain(images) else []
    if not said_of:
        raise DataError(f"{shown} has no class for any image, or something that is neither a name nor an index")
    if names:
        meant = numbers_of(names, classes, shown)
        if not all(isinstance(value, int) and 0 <= value < len(meant) for value in said_of):
            raise DataError(f"{shown} has class indexes beyond ImageNet's {len(meant):,}; correct them")
        number: dict[Any, int] = dict(enumerate(meant))
    else:
        number = dict(zip(said_of, numbers_of(said_of, classes, shown), strict=True))
    found: dict[str, tuple[int, ...]] = {}
    for image, some in images.items():
        name = _image_name(image)
        if name in found:
            raise DataError(f"{shown} names two images '{name}'; file names must differ, for folders do not count")
        found[name] = tuple(sorted({number[value] for value in some}))
    return found


def _plain(images: Mapping[str, list[Any]]) -> bool:
    return all(type(value) in (str, int) for some in images.values() for value in some)


def of_image(key: str, right: Mapping[str, Sequence[int]]) -> str | None:
    """Under which name an image of a shard stands in `right`: its key's last part, or what `prepare` made that of."""
    name = _image_name(key)
    return next((one for one in (name, re.sub(r"^\d{8}_", "", name)) if one in right), None)


def _image_name(path: str) -> str:
    """A file's name without suffix, as `prepare` has it in keys."""
    name = PurePosixPath(path).name
    stem, dot, suffix = name.rpartition(".")
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem if dot and suffix.lower() in IMAGE_SUFFIXES else name)[:60]


def _parts(source: str, reference: str, shards: Iterable[Shard]) -> dict[str, tuple[str, str]]:
    """By shard, from the two folders that it lies in."""
    found = {}
    for shard in shards:
        folders = shard.path.partition("?")[0].split("/")[-3:-1]
        if len(folders) < 2 or folders[1] not in SEVERITIES:
            raise DataError(
                f"{source}: with a reference its shards lie in folders corruption/severity, such as snow/3, but "
                f"{shard.name} lies in {'/'.join(folders)}; rename the folders, or drop {source}.reference"
            )
        if reference == "alexnet" and folders[0] not in CORRUPTIONS:
            raise DataError(
                f"{source}.reference is alexnet, whose errors are known for {len(CORRUPTIONS)} corruptions, and "
                f"'{folders[0]}' is none of them; take the folder out of the pattern, or set the reference teacher"
            )
        found[shard.name] = (folders[0], folders[1])
    return found


def missing(parts: Iterable[tuple[str, str]]) -> list[str]:
    """What an mCE takes and is not there: corruptions, or severities of one."""
    there = set(parts)
    found = []
    for name in CORRUPTIONS:
        lacking = [severity for severity in SEVERITIES if (name, severity) not in there]
        found += [name] if len(lacking) == len(SEVERITIES) else [f"{name}/{severity}" for severity in lacking]
    return found


@cache
def _of_timm(name: str) -> str:
    """A list that timm ships, without importing it."""
    spec = importlib.util.find_spec("timm")
    assert spec and spec.origin
    return (Path(spec.origin).parent / "data" / "_info" / name).read_text()


def _path(said: str, root: str) -> str:
    return said if storage.is_url(said) or said.startswith("/") else storage.join(root, said)


def _read(path: str, shown: str) -> str:
    try:
        return storage.read_bytes(path).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it cannot be read as text"
        raise DataError(f"{shown}: {reason}; correct the path") from error


def _json(path: str, shown: str) -> Any:
    try:
        return json.loads(_read(path, shown))
    except ValueError as error:
        raise DataError(f"{shown} is not JSON ({error})") from error
