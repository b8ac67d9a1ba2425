"""The cluster contract in this process: no Ray, one worker, and every traceback where it belongs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.contract import Outcome, Resources, Spec, Unit, Value
from pipeline.errors import UserError


@dataclass(frozen=True)
class Try:
    """One try of a unit: `value`, or `error`; a `final` error is not worth another try."""

    value: Any = None
    error: str | None = None
    final: bool = False


def attempt(function: Callable[[Any], Any], unit: Any) -> Try:
    """Call `function(unit)`; an exception becomes text, so that nothing but the value crosses processes."""
    try:
        return Try(value=function(unit))
    except UserError as error:
        return Try(error=str(error), final=True)
    except Exception as error:
        return Try(error=last_line(error))


def last_line(error: BaseException) -> str:
    """What a traceback ends with, such as 'ValueError: no image'."""
    return traceback.format_exception_only(error)[-1].strip()


def check_names(units: Sequence[tuple[str, Any]]) -> None:
    """Outcomes are told apart by name: two units of one name are a bug of the caller."""
    if len({name for name, _ in units}) != len(units):
        raise ValueError("two units have the same name")


class Inline:
    """Units one after the other, the training loop by a plain call."""

    def map(
        self,
        make_worker: Callable[[], Callable[[Unit], Value]],
        units: Sequence[tuple[str, Unit]],
        *,
        resources: Resources,
        attempts: int = 3,
    ) -> Iterator[Outcome[Value]]:
        check_names(units)
        if not units:
            return
        function = make_worker()
        for name, unit in units:
            result, tries = attempt(function, unit), 1
            while result.error is not None and not result.final and tries < attempts:
                result, tries = attempt(function, unit), tries + 1
            yield Outcome(name, result.value, result.error, tries)

    def fit(
        self, loop: Callable[[Spec], dict[str, Any]], spec: Spec, *, resources: Resources, folder: str
    ) -> dict[str, Any]:
        return loop(spec)

    def describe(self) -> str:
        return "inline"

    def close(self) -> None:
        pass
