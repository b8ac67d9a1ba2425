"""Finds fonts in which plots can write class names of any script; a name that none can is shown by its number.

The page itself leaves this to the browser. matplotlib has a font of its own, with Latin, Greek, Cyrillic, Arabic and
Hebrew; the others are those that are installed. Scripts whose letters join or change places are shaped by matplotlib
since 3.11: before, names in them are numbers too, for their letters would be drawn one by one and the wrong way round.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence

from matplotlib import font_manager, ft2font

from pipeline.printable import counted
from pipeline.report.style import clean

OWN = "DejaVu Sans"
BOXES = "Last Resort"  # a font that has a box for every character
SHAPED = hasattr(ft2font, "__libraqm_version__")
ACCENTS = range(0x300, 0x370)  # marks that need no shaping


def families(names: Iterable[str]) -> list[str]:
    """The fonts in which to write some names, for matplotlib, which takes each character from the first that has it."""
    return _families(_characters(names))


def in_plots(names: Sequence[str]) -> tuple[list[str], str]:
    """The names as plots can show them, and a sentence where some of them are shown otherwise, else ""."""
    # A character that one name alone has may still be in a font that the others do not ask for: all are looked up once.
    known = _known(tuple(families(names)))
    good = [(SHAPED or not needs_shaping(name)) and _characters([name]) <= known for name in names]
    shown = [name if yes else f"class {number}" for number, (name, yes) in enumerate(zip(names, good, strict=True))]
    bad = [number for number, yes in enumerate(good) if not yes]
    if not bad:
        return shown, ""
    mend = "install one that does, such as Noto Sans" if SHAPED else "install one that does, and matplotlib 3.11"
    which = f"class {bad[0]}: {clean(names[bad[0]], 40)}"
    return shown, (
        f"No installed font can write {counted(len(bad), 'class name')} in the plots, which show "
        f"{'its' if len(bad) == 1 else 'their'} number instead ({which}); {mend}, delete the folder of report, and run "
        "again."
    )


def needs_shaping(text: str) -> bool:
    """Whether letters of it join, change places or run from right to left."""
    return any(
        unicodedata.bidirectional(c) in ("R", "AL")
        or unicodedata.category(c) == "Mc"
        or (unicodedata.category(c) == "Mn" and ord(c) not in ACCENTS)
        for c in text
    )


def _characters(names: Iterable[str]) -> frozenset[int]:
    return frozenset(ord(c) for name in names for c in clean(name) if not c.isspace())


@functools.cache
def _families(wanted: frozenset[int]) -> list[str]:
    """The own font, then as few others as have what it lacks."""
    missing = wanted - _has(font_manager.findfont(OWN))
    found = [OWN]
    paths: dict[str, str] = {}
    for entry in font_manager.fontManager.ttflist if missing else ():
        if not entry.name.startswith(BOXES):
            paths.setdefault(entry.name, str(entry.fname))
    having = {name: covered for name, path in sorted(paths.items()) if (covered := _has(path) & missing)}
    while missing and having:
        best = max(having, key=lambda name: len(having[name] & missing))
        if not having[best] & missing:
            break
        found.append(best)
        missing = missing - having[best]
    return found


@functools.cache
def _known(chosen: tuple[str, ...]) -> frozenset[int]:
    return frozenset().union(*(_has(font_manager.findfont(name)) for name in chosen))


@functools.cache
def _has(path: str) -> frozenset[int]:
    """The characters of a font; none of one that cannot be read."""
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
