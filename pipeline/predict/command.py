"""The command `predict`: what images show, on the screen or in a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.predict import choose, inputs, table
from pipeline.predict.predictor import Predictor
from pipeline.printable import shown


def predict(
    models: Sequence[str], input: str, out: str | None, *, top: int, raw: bool, column: str, batch: int, device: str
) -> int:
    """Predict the images of `input` into `out`, or onto the screen; the exit status."""
    if top < 1:
        raise ConfigError(f"--top is {top}; it takes at least one class")
    if out and storage.is_url(out):
        raise ConfigError(f"--out {storage.redact(out)} is a URL; name a local file")
    if out:
        table.check_name(out)
    damages: list[str] = []
    wanted = inputs.find(input, column, damages)
    predictor = choose.predictor(models, _say, raw=raw, device=device, batch=batch)
    if out is None:
        _on_screen(predictor, wanted, top)
        return _end(damages)
    began = time.monotonic()
    with _counting() as progress:
        found = table.write(predictor, wanted, out, top, progress)
    bad = {problem: count for problem, count in sorted(found.items()) if problem}
    line = f"{found.total():,} images in {time.monotonic() - began:.1f} s"
    line += "".join(f", {count:,} {problem.replace('_', ' ')}" for problem, count in bad.items())
    print(f"{line}, written to {shown(out)}")
    if found and not found[""]:
        raise DataError(f"none of the {found.total():,} images could be read; {shown(out)} says why of each")
    return _end(damages)


def _end(damages: list[str]) -> int:
    if damages:
        more = f" ({len(damages)} such shards)" if len(damages) > 1 else ""
        raise DataError(f"{damages[0]}{more}")
    return 0


def _say(text: str) -> None:
    print(f"model: {shown(text)}", file=sys.stderr)


def _on_screen(predictor: Predictor, wanted: Iterator[inputs.Wanted], top: int) -> None:
    bad = number = 0
    for one, prediction in table.answered(predictor, wanted):
        number += 1
        name = shown(" ".join(str(value) for value in one.where.values()))
        if prediction.problem:
            print(f"{name}  ✗ {shown(prediction.problem)}")
            bad += 1
            continue
        order = (-prediction.probabilities).argsort(kind="stable")[:top]
        classes = [f"{predictor.classes[index]} {100 * prediction.probabilities[index]:.1f} %" for index in order]
        print(f"{name}  {shown(', '.join(classes))}")
    if bad == number:
        raise DataError(f"none of the {number:,} images could be read")


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """A counter of images on a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("predicting"), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda count: progress.update(task, advance=count)
