"""Takes secrets from a file on this machine into this process's environment, so that no cluster has to record them.

The variable NOISY_LAMBDA_SECRETS names the file; all that is handed on and recorded is this path. Its lines are
NAME=value; empty ones and those that begin with # do not count.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import ConfigError

VARIABLE = "NOISY_LAMBDA_SECRETS"


def load() -> None:
    """Into the environment, over what stands there. ConfigError: there is no such file, or a line says nothing."""
    if path := os.environ.get(VARIABLE):
        os.environ.update(read(path))


def read(path: str) -> dict[str, str]:
    """The variables by name. What is wrong with a line is told without the line."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(
            f"the file of secrets {path} cannot be read on {os.uname().nodename} ({reason}); every machine of the "
            "cluster needs one there, with lines NAME=value"
        ) from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)=(.*?)\s*", line)
        if not match:
            raise ConfigError(f"line {number} of the file of secrets {path} is not NAME=value")
        quoted = re.fullmatch(r"(['\"])(.*)\1", match[2])
        found[match[1]] = quoted[2] if quoted else match[2]
    return found
