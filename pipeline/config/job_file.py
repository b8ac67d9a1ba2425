"""Reads job files as YAML: their bases, and three things that YAML 1.1 would let pass.

`base:` inside any mapping names files, beside the job or shipped ones of conf/, that are merged below it. A key that is
there twice is an error, and numbers are those of YAML 1.2: 1e-3 is one, and 1:3 is not 63. A number with a leading zero
is an error too: 010 would be 8, 10 or text, depending on who reads it.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import shipped
from pipeline.errors import ConfigError

LEADING_ZERO = "leading zero"
NUMBERS = {
    LEADING_ZERO: (r"[-+]?0[0-9_]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", "-+0"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


def read(path: Path) -> dict[str, Any]:
    """The file, or the shipped one of this name, with its bases merged below it. ConfigError: it, or one of them,
    cannot be read."""
    return _read(shipped.job_path(path), [])


def read_own(path: Path) -> dict[str, Any]:
    """What the file itself says, without its bases."""
    return _without_bases(parse(shipped.job_path(path).read_text(encoding="utf-8")) or {})


def _without_bases(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_bases(value) for key, value in tree.items() if key != "base"}
    return [_without_bases(entry) for entry in tree] if isinstance(tree, list) else tree


def parse(text: str) -> Any:
    """A YAML document. Raises yaml.YAMLError."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def words(error: Exception, lines: bool = True) -> str:
    """What is wrong with a YAML text, in a few words, and with the line where it shows."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or mark is None:
        return " ".join(str(error).split())
    found = problem.replace("but got '<stream end>'", "but the text ends").replace(
        "found '<stream end>'", "the text ends"
    )
    if "mapping values are not allowed" in found:
        found = "a second ': ' in a value; put the value in quotes, or begin a new line"
    if not lines:
        return found
    begun = getattr(error, "context_mark", None)
    inside = f" ({error.context} that begins in line {begun.line + 1})" if begun and begun.line != mark.line else ""  # type: ignore[attr-defined]
    return f"line {mark.line + 1}: {found}{inside}"


def dump(plain: Mapping[str, Any]) -> str:
    """The YAML of plain data; text that `parse` would take for a number is quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    _add_numbers(Dumper)
    return yaml.dump(dict(plain), Dumper=Dumper, sort_keys=False)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    other = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in other]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _add_numbers(Loader)

    def mapping(loader: Any, node: Any) -> Any:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return loader.construct_yaml_map(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor(_tag(LEADING_ZERO), _refuse_leading_zero)
    return Loader


def _refuse_leading_zero(_: Any, node: Any) -> None:
    import yaml

    sign = node.value[0] if node.value[0] in "-+" else ""
    rest = node.value[len(sign) :].lstrip("0_")
    meant = sign + (rest if rest[:1].isdigit() else f"0{rest}")
    found = f"{node.value} is a number with a leading zero (write {meant}, or '{node.value}' in quotes for text)"
    raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)


def _add_numbers(reader: Any) -> None:
    for name, (pattern, first) in NUMBERS.items():
        reader.add_implicit_resolver(_tag(name), re.compile(f"^(?:{pattern})$"), list(first))


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


def _read(path: Path, trail: list[Path]) -> dict[str, Any]:
    import yaml

    if path in trail:
        raise ConfigError(f"{path}: its `base` leads back to itself ({' -> '.join(map(str, [*trail, path]))})")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the job file {path}: {error.strerror}; name a file, or "
            "one of those that `noisy-lambda jobs` lists"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
    try:
        raw = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {words(error)}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a job file is a mapping of settings")
    return _with_bases(raw, path, [*trail, path])


def _with_bases(raw: dict[str, Any], path: Path, trail: list[Path]) -> dict[str, Any]:
    own = {key: _with_bases(v, path, trail) if isinstance(v, dict) else v for key, v in raw.items() if key != "base"}
    own = {
        key: [_with_bases(v, path, trail) if isinstance(v, dict) else v for v in value]
        if isinstance(value, list)
        else value
        for key, value in own.items()
    }
    merged: dict[str, Any] = {}
    bases = raw.get("base") or []
    for name in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _read(_find_base(str(name), path), trail))
    return merge(merged, own)


def _find_base(name: str, path: Path) -> Path:
    conf = shipped.folder(shipped.CONF)
    for folder in (path.parent, path.parent.parent / "conf", conf, shipped.folder(shipped.JOBS)):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted(p.relative_to(conf).as_posix() for p in conf.rglob("*.yaml"))
    close = difflib.get_close_matches(name, known, 3, 0.3)
    raise ConfigError(
        f"{path}: base '{name}' is neither beside the job nor shipped; did you mean {', '.join(close or known)}?"
    )
