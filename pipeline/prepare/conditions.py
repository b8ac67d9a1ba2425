"""Understands conditions on the rows of a table, such as `width>=64`: those of `prepare table --where`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, DataError

WRITTEN = re.compile(r"\s*(?P<column>.*?[^\s!<>=])\s*(?P<sign>==|!=|<=|>=|=|<|>)\s*(?P<value>.*?)\s*")
SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """A row has it where its `column` compares so with `value`; a row without a value there does not."""

    column: str
    sign: str
    value: str

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.value}"


def conditions_in(texts: Sequence[str]) -> tuple[Condition, ...]:
    """ConfigError: one is no condition."""
    found = []
    for text in texts:
        match = WRITTEN.fullmatch(text)
        if match is None:
            raise ConfigError(f"--where is '{text}'; write a column, one of = != < <= > >= and a value: 'width>=64'")
        found.append(Condition(match["column"], match["sign"], match["value"].strip("'\"")))
    return tuple(found)


def expression(conditions: Sequence[Condition], schema: pa.Schema, path: str) -> pc.Expression | None:
    """What Parquet's reader understands: all of them, on columns of this schema. DataError: a value is of no such
    type."""
    every = None
    for one in conditions:
        kind = schema.field(one.column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        try:
            value = pa.scalar(one.value).cast(kind)
        except (pa.ArrowException, NotImplementedError):
            raise DataError(
                f"--where '{one}': column '{one.column}' of {path} is of type {kind}, and '{one.value}' is none; "
                "compare it with a value of that type"
            ) from None
        this = SIGNS[one.sign](pc.field(one.column), value)
        every = this if every is None else every & this
    return every


def holds(condition: Condition, text: str | None) -> bool:
    """Whether a value that is known as text has it: as numbers where both are some, else as text."""
    if text is None:
        return False
    compare = SIGNS[condition.sign]
    try:
        return bool(compare(float(text), float(condition.value)))
    except ValueError:
        return bool(compare(text, condition.value))
