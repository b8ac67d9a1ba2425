"""`classes.json`: the class names in index order, beside the labelled shards."""

from __future__ import annotations

from collections import Counter

from pipeline import storage
from pipeline.errors import DataError

CLASSES_NAME = "classes.json"


def read_classes(path: str) -> list[str]:
    """The names in a classes.json, or in the one inside a folder. Raises DataError."""
    if not path.endswith(".json"):
        path = storage.join(path, CLASSES_NAME)
    shown = storage.redact(path)
    try:
        names = storage.read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"there is no {shown}: a JSON list of class names in index order belongs beside the labelled "
            "shards; `prepare` writes it"
        ) from None
    except ValueError as error:
        raise DataError(f"{shown} is not JSON ({error}); it holds class names in index order") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f'{shown} is not a list of class names in index order, such as ["cat", "dog"]')
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{shown} names a class twice: {', '.join(twice[:3])}; give each a name of its own")
    return names


def write_classes(folder: str, names: list[str]) -> None:
    storage.write_json(storage.join(folder, CLASSES_NAME), names)
