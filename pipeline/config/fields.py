"""Declares settings: the default, the rules, and whether a stage's folder is named after the value."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any

REQUIRED = "???"  # OmegaConf's mark of a value that must be given


def _setting(kind: str, default: Any, text: str, rules: dict[str, Any]) -> Any:
    metadata = {"kind": kind, "help": text, **rules}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(default: Any, text: str, **rules: Any) -> Any:
    """A field that changes what is computed. Rules: `choices`, `low`, `high`, and `neutral`: the value with
    which a field added later reproduces the old behaviour, left out of the fingerprint."""
    return _setting("identity", default, text, rules)


def execution(default: Any, text: str, **rules: Any) -> Any:
    """A field that changes only where, how fast or how often something is done."""
    return _setting("execution", default, text, rules)


def identity_of(config: Any) -> dict[str, Any]:
    """The identity fields of a settings object as plain data, without fields at their `neutral` value."""
    found: dict[str, Any] = {}
    for item in fields(config):
        if item.metadata["kind"] != "identity":
            continue
        value = getattr(config, item.name)
        if "neutral" in item.metadata and value == item.metadata["neutral"]:
            continue
        found[item.name] = _plain_identity(value)
    return found


def _plain_identity(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_identity(entry) for entry in value]
    return identity_of(value) if is_dataclass(value) else value


def execution_of(config: Any) -> dict[str, Any]:
    """The execution fields of a settings object as plain data."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["kind"] == "execution"}
