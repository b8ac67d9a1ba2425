"""Job files as YAML: their bases, and two things that YAML 1.1 would let pass.

`base:` inside any mapping names files, beside the job or shipped ones of conf/, that are merged below it. A key that is there
twice is an error, and numbers are those of YAML 1.2: 1e-3 is one, and 1:3 is not 63.
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

WRITTEN = "# Every setting of a run, those of its bases included; written by noisy-lambda.\n"  # how job.yaml begins
NUMBERS = {
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


def read(path: Path) -> dict[str, Any]:
    """The file, or the shipped one of this name, with its bases merged below it. ConfigError: it, or one of them, cannot be
    read."""
    return _read(shipped.job_path(path), [])


def parse(text: str) -> Any:
    """A YAML document. Raises yaml.YAMLError."""
    import yaml

    return yaml.load(text, _loader())


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
    for name, (pattern, first) in NUMBERS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list(first))

    def mapping(loader: Any, node: Any) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is there twice", node.start_mark)
        return loader.construct_yaml_map(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def _read(path: Path, trail: list[Path]) -> dict[str, Any]:
    import yaml

    if path in trail:
        raise ConfigError(f"{path}: its `base` leads back to itself ({' -> '.join(map(str, [*trail, path]))})")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the job file {path}: {error.strerror}; name a file, or one of those that `noisy-lambda jobs` lists"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
    try:
        raw = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
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
