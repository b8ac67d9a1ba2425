"""Sets what `key=value` on the command line says in the tree of a job file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from pipeline.config import job_file
from pipeline.errors import ConfigError
from pipeline.printable import counted


def override(tree: Any, item: str, path: str, shared: Collection[str]) -> None:
    """Set what `item` says; settings of the `shared` ones in every generation too, whatever it says itself.
    ConfigError."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"'{item}' is not of the form key=value, such as seed=1 or teacher.lr=0.2")
    if key.rpartition(".")[2] == "base":
        raise ConfigError(f"cannot set '{key}': a `base` is named in the job file, {path}")
    why = _wrong_place(tree, key)  # first, for OmegaConf takes [-3] of two for the last
    try:
        value = job_file.parse(text)
        for place in () if why else _places(tree, key, shared):
            OmegaConf.update(tree, place, value, merge=False, force_add=True)
    except yaml.YAMLError as error:
        why = job_file.words(error, lines=False)
    except (OmegaConfBaseException, IndexError, AttributeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split()).partition(" full_key:")[0] or type(error).__name__
    if why:
        raise ConfigError(f"cannot set '{key}' to '{text}': {why}; docs/configuration.md lists the settings")


def _places(tree: Any, key: str, shared: Collection[str]) -> Iterator[str]:
    yield key
    if re.split(r"[.\[]", key)[0] in shared:
        for number in range(len(tree.get("generations") or [])):
            yield f"generations[{number}].{key}"


def _wrong_place(tree: Any, key: str) -> str:
    """Why a list of the job has no such place; "" where that is not what is wrong."""
    from omegaconf import DictConfig, ListConfig

    place, where = tree, ""
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(place, ListConfig):
            held = f"{where} has {counted(len(place), 'entry', 'entries')}"
            if not re.fullmatch(r"-?\d+", part) or not -len(place) <= int(part) < len(place):
                numbers = f", numbered from 0 to {len(place) - 1}" if len(place) else ""
                return f"{held}{numbers}, and none is '{part}'"
            place, where = place[int(part)], f"{where}[{part}]"
        elif isinstance(place, DictConfig):
            place, where = place.get(part), f"{where}.{part}".lstrip(".")
        else:
            return ""
    return ""
