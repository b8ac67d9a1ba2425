"""Writes and reads JSON objects that say whether they are whole: each has the sha256 of all else in it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.errors import OutputError
from pipeline.storage.files import read_bytes, redact, write_json


def write_record(path: str, value: dict[str, Any]) -> None:
    """Write a JSON object with the sha256 of all else in it."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read: keys are text
    write_json(path, {**plain, "sha256": _digest(plain)})


def read_record(path: str, mend: str = "delete it and run again") -> dict[str, Any]:
    """What `write_record` wrote. OutputError: it is damaged; `mend` says what to do then. FileNotFoundError."""
    try:
        record = json.loads(read_bytes(path))
        reason = None if isinstance(record, dict) else "it holds no JSON object"
    except (ValueError, RecursionError) as error:
        reason = f"it is no JSON, {str(error)[:100]}"
    if reason is None and "sha256" in record and record.pop("sha256") != _digest(record):  # 0.1.0 wrote none
        reason = "its content is not what its sha256 is of"
    if reason is not None:
        raise OutputError(f"{redact(path)} is damaged ({reason}); {mend}")
    return dict(record)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
