"""Reads and writes `classes.json`: the class names in index order, beside the labelled shards."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.errors import ConfigError, DataError

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


def plain(name: str) -> str:
    """A class name as labels are compared: without surrounding white space, in Unicode's composed form."""
    return unicodedata.normalize("NFC", name.strip())


def alike(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case or Unicode form alone."""
    seen: dict[str, str] = {}
    found = []
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold().strip()
        if key in seen:
            found.append((seen[key], name))
        seen.setdefault(key, name)
    return found


def by_number(values: Mapping[str, float], names: Sequence[str], setting: str) -> dict[int, float]:
    """A setting's values by class name as values by class index; ConfigError for a name that there is not."""
    numbers = {name: number for number, name in enumerate(names)}
    for name in values:
        if name not in numbers:
            close = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"the {len(names)} names there begin with '{names[0]}'"
            raise ConfigError(f"{setting} names the class '{name}', which {CLASSES_NAME} does not have; {hint}")
    return {numbers[name]: value for name, value in values.items()}


def write_classes(folder: str, names: list[str]) -> None:
    storage.write_json(storage.join(folder, CLASSES_NAME), names)
