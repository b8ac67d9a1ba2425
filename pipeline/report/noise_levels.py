"""Tabulates what confidence thresholds and noise levels would keep, and how many of such labels to expect wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.printable import counted

SHOWN = 20  # classes, those with most noise
IN_CLASSES = {"threshold": (0.5, 0.9), "max_noise": (0.02, 0.05, 0.1)}  # the levels that classes are shown at


@dataclass(frozen=True)
class Grid:
    """A table: a title, the names of its columns, and rows of as many texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(audited: Mapping[str, Any], names: Sequence[str]) -> list[Grid]:
    """Over all classes, and class by class; none of an audit by an earlier version. `audited`: audit.json."""
    if "levels" not in audited:
        return []
    return [_over_all(audited, names), _by_class(audited, names)]


def _over_all(audited: Mapping[str, Any], names: Sequence[str]) -> Grid:
    rows = []
    for level in audited["levels"]:
        known = {number: noise for number, noise in enumerate(level["noise"]) if level["kept"][number]}
        worst = max(known, key=lambda number: known[number]) if known else None
        rows.append(
            (
                _rule(level),
                _percent(sum(level["kept"]) / audited["images"]),
                _between(level["in_all"]),
                f"{len(names) - len(known):,}",
                "" if worst is None else f"{names[worst]} {_percent(known[worst])}",
            )
        )
    title = f"What would be kept, judged on {counted(audited['images'], 'image')} whose class is known"
    columns = ("rule", "kept", "wrong labels expected", "classes without", "most noise")
    return Grid(title, columns, rows)


def _by_class(audited: Mapping[str, Any], names: Sequence[str]) -> Grid:
    shown = [one for one in audited["levels"] if any(one.get(rule) in some for rule, some in IN_CLASSES.items())]
    said = audited["levels"][0]["kept"]
    noise = [-1.0 if one is None else one for one in audited["levels"][0]["noise"]]
    order = sorted(range(len(names)), key=lambda number: (-noise[number], number))[:SHOWN]
    rows = [
        (
            names[number],
            *_in_force(audited["level"], number, said[number]),
            *(_cell(level, number, said[number]) for level in shown),
        )
        for number in order
    ]
    some = f", the {len(rows)} of {len(names):,} with most noise" if len(rows) < len(names) else ""
    columns = ("class", "threshold", "kept", "wrong labels expected", *(_rule(level) for level in shown))
    title = f"Of each class{some}: what the job keeps, then the share kept / wrong labels expected by other rules"
    return Grid(title, columns, rows)


def _in_force(level: Mapping[str, Any], number: int, said: int) -> tuple[str, str, str]:
    least = level["thresholds"][number]
    if least is None:
        return "none", "nothing", ""
    bounds = {name: level[name][number] for name in ("noise", "low", "high")}
    return f"{least:.3g}", _share(level["kept"][number], said), _between(bounds)


def _cell(level: Mapping[str, Any], number: int, said: int) -> str:
    if not level["kept"][number]:
        return "nothing"
    return f"{_share(level['kept'][number], said)} / {_percent(level['noise'][number])}"


def _share(kept: int, said: int) -> str:
    return f"{100 * kept / said:.0f} %" if kept else "nothing"


def _rule(level: Mapping[str, Any]) -> str:
    if "threshold" in level:
        return f"confidence ≥ {level['threshold']:g}"
    return f"noise ≤ {100 * level['max_noise']:g} %"


def _between(found: Mapping[str, Any]) -> str:
    if found["noise"] is None:
        return ""
    return f"{_percent(found['noise'])} ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
