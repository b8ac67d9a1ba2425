"""Expands braces in patterns as Bash and WebDataset do it, after counting what they stand for."""

from __future__ import annotations

import re

from braceexpand import braceexpand

from pipeline import storage
from pipeline.errors import DataError

# A range of numbers, one of letters, or a mark between names; as in the library, '$' would let a line's end pass.
TOKENS = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\n?\}|\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\n?\}|[{},]")
MAX_EXPANSION = 1_000_000


def expand(pattern: str) -> list[str]:
    """`x-{08..10}-{a,b}` -> x-08-a, x-08-b, x-09-a, … Ranges keep leading zeros; braces may be nested."""
    # Counted first, because the library builds whole ranges before it gives the first name.
    names = count(pattern)
    if names is None:
        raise DataError(
            f"pattern {storage.redact(pattern)} has a brace without its partner; "
            "add the missing one, or write ? for a brace that is part of a name"
        )
    if names > MAX_EXPANSION:
        raise DataError(
            f"pattern {storage.redact(pattern)} stands for more than {MAX_EXPANSION} names; "
            "write a wildcard instead of so wide a range"
        )
    return list(dict.fromkeys(braceexpand(pattern, escape=False)))


def count(pattern: str) -> int | None:
    """How many names a pattern stands for, repeated ones too; None where a brace has no partner."""
    levels = [(0, 1)]  # of each open brace: the names of its finished alternatives, and of the one being read
    for token in TOKENS.finditer(pattern):
        finished, current = levels.pop()
        if token[0] == "{":
            levels += [(finished, current), (0, 1)]
        elif token[0] == ",":
            levels.append((finished + current, 1) if levels else (finished, current))
        elif token[0] == "}":
            if not levels:
                return None
            before, outside = levels.pop()
            levels.append((before, outside * (finished + current)))
        else:
            levels.append((finished, current * _length(token)))
    return levels[0][1] if len(levels) == 1 else None


def _length(token: re.Match[str]) -> int:
    if token[1] is None:
        return sum(1 for _ in braceexpand(token[0]))  # of letters: at most 52
    return abs(int(token[1]) - int(token[2])) // (int(token[3] or 1) or 1) + 1
