"""Fulfils the cluster contract in this process: no Ray, one worker, and every traceback where it belongs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
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


def innermost(error: BaseException) -> str:
    """As `last_line`, of what lies at the bottom of it: Ray and torch wrap errors in errors, whose own text says
    little."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        failures = list(getattr(error, "worker_failures", None) or {})
        inside = [error.worker_failures[failures[0]]] if failures else []  # type: ignore[attr-defined]
        inside += [getattr(error, name, None) for name in ("controller_failure", "cause", "__cause__")]
        error = next((one for one in inside if isinstance(one, BaseException)), error)
    return last_line(error)


def check_names(units: Sequence[tuple[str, Any]]) -> None:
    """Outcomes are told apart by name: two units of one name are a bug of the caller."""
    if len({name for name, _ in units}) != len(units):
        raise ValueError("two units have the same name")


class Inline:
    """Units one after the other, or `overlap` at once on threads; the training loop by a plain call."""

    def map(
        self,
        make_worker: Callable[[], Callable[[Unit], Value]],
        units: Sequence[tuple[str, Unit]],
        *,
        resources: Resources,
        attempts: int = 3,
        overlap: int = 1,
        check: Callable[[], None] | None = None,
    ) -> Iterator[Outcome[Value]]:
        check_names(units)
        if not units:
            return
        function = make_worker()
        if overlap == 1:
            for entry in units:
                yield _handle(function, entry, attempts)
        else:
            yield from _overlapping(function, units, attempts, overlap)

    def fit(
        self,
        loop: Callable[..., dict[str, Any]],
        spec: Spec,
        *,
        resources: Resources,
        folder: str,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        return loop(spec)

    def describe(self) -> str:
        return "inline"

    def close(self) -> None:
        pass


def _handle(function: Callable[[Unit], Value], entry: tuple[str, Unit], attempts: int) -> Outcome[Value]:
    name, unit = entry
    result, tries = attempt(function, unit), 1
    while result.error is not None and not result.final and tries < attempts:
        result, tries = attempt(function, unit), tries + 1
    return Outcome(name, result.value, result.error, tries)


def _overlapping(
    function: Callable[[Unit], Value], units: Sequence[tuple[str, Unit]], attempts: int, overlap: int
) -> Iterator[Outcome[Value]]:
    """As soon as one unit has ended the next one begins."""
    waiting = iter(units)
    with ThreadPoolExecutor(overlap, "unit") as threads:
        running = {threads.submit(_handle, function, entry, attempts) for entry in islice(waiting, overlap)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for entry in islice(waiting, len(done)):
                    running.add(threads.submit(_handle, function, entry, attempts))
                for future in done:
                    yield future.result()
        finally:
            if running and (close := getattr(function, "close", None)):
                close()
