"""The command `predict`: what images show, on the screen or in a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline import storage
from pipeline.detection.card import is_detector
from pipeline.errors import ConfigError, DataError
from pipeline.predict import choose, inputs, table
from pipeline.predict.inputs import Wanted
from pipeline.predict.predictor import Prediction, Predictor
from pipeline.printable import counted, shown

Seen = Callable[[Wanted, Prediction], None]


def predict(
    models: Sequence[str], input: str, out: str | None, *, top: int, raw: bool, column: str, batch: int, device: str,
    contact_sheet: str | None = None,
) -> int:  # fmt: skip
    """Predict the images of `input` into `out`, or onto the screen, and draw them on a contact sheet; the exit
    status."""
    if top < 1:
        raise ConfigError(f"--top is {top}; it takes at least one class")
    for option, path in (("--out", out), ("--contact-sheet", contact_sheet)):
        if path and storage.is_url(path):
            raise ConfigError(f"{option} {storage.redact(path)} is a URL; name a local file")
    if any(map(is_detector, models)):
        if len(models) > 1 or contact_sheet:
            raise ConfigError("a detector answers alone and draws into --out FOLDER; drop the other models and options")
        from pipeline.predict.detect import detect  # matplotlib takes a second

        return detect(models[0], input, out, column=column, device=device)
    if out:
        table.check_name(out)
    damages: list[str] = []
    predictor = choose.predictor(models, _say, raw=raw, device=device, batch=batch)
    wanted = inputs.find(input, column, damages, predictor.classes)
    with _sheet(contact_sheet, predictor) as take:
        right = _Right(predictor.classes)
        if out is None:
            _on_screen(predictor, wanted, top, _all(right.see, take))
        else:
            _into_table(predictor, wanted, out, top, _all(right.see, take))
    if str(right):
        print(right)
    return _end(damages)


@dataclass
class _Right:
    """Counts those predictions that are right, if the classes of all images are known."""

    classes: Sequence[str]
    known: int = 0
    right: int = 0
    all_known: bool = True

    def see(self, one: Wanted, prediction: Prediction) -> None:
        self.all_known &= one.truth is not None
        if one.truth is not None and not prediction.problem:
            self.known += 1
            self.right += self.classes[one.truth] == prediction.label

    def __str__(self) -> str:
        if not self.known or not self.all_known:
            return ""
        top1 = f"top-1 {100 * self.right / self.known:.2f} % of {counted(self.known, 'image')}"
        return f"{top1}, by the classes that the input gives them"


@contextmanager
def _sheet(path: str | None, predictor: Predictor) -> Iterator[Seen]:
    """What takes images for the contact sheet, which is written at the end."""
    if path is None:
        yield lambda one, prediction: None
        return
    from pipeline.predict.sheet import Sheet

    sheet = Sheet(path, predictor.classes)
    yield sheet.take
    sheet.write()
    print(f"contact sheet in {shown(path)}")


def _all(*several: Seen) -> Seen:
    def seen(one: Wanted, prediction: Prediction) -> None:
        for each in several:
            each(one, prediction)

    return seen


def _into_table(predictor: Predictor, wanted: Iterator[Wanted], out: str, top: int, seen: Seen) -> None:
    began = time.monotonic()
    with _counting() as progress:
        found = table.write(predictor, wanted, out, top, _all(seen, lambda one, prediction: progress(1)))
    bad = {problem: count for problem, count in sorted(found.items()) if problem}
    line = f"{counted(found.total(), 'image')} in {time.monotonic() - began:.1f} s"
    line += "".join(f", {count:,} {problem.replace('_', ' ')}" for problem, count in bad.items())
    print(f"{line}, written to {shown(out)}")
    if found and not found[""]:
        raise DataError(f"none of the {found.total():,} images could be read; {shown(out)} says why of each")


def _end(damages: list[str]) -> int:
    if damages:
        more = f" ({len(damages)} such shards)" if len(damages) > 1 else ""
        raise DataError(f"{damages[0]}{more}")
    return 0


def _say(text: str) -> None:
    print(f"model: {shown(text)}", file=sys.stderr)


def _on_screen(predictor: Predictor, wanted: Iterator[Wanted], top: int, seen: Seen) -> None:
    bad = number = 0
    for one, prediction in table.answered(predictor, wanted):
        number += 1
        seen(one, prediction)
        name = shown(" ".join(str(value) for value in one.where.values()))
        if prediction.problem:
            print(f"{name}  ✗ {shown(prediction.problem)}")
            bad += 1
            continue
        order = (-prediction.probabilities).argsort(kind="stable")[:top]
        classes = [f"{predictor.classes[index]} {100 * prediction.probabilities[index]:.1f} %" for index in order]
        print(f"{name}  {shown(', '.join(classes))}")
    if bad == number:
        raise DataError(f"none of the {number:,} images could be read" if number > 1 else "the image cannot be read")


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """A counter of images on a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    from pipeline.progress import Times

    columns = [TextColumn("predicting"), MofNCompleteColumn(), Times()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda count: progress.update(task, advance=count)
