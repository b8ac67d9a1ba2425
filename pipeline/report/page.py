"""Renders index.html: the report on one self-contained page, pictures inside, no scripts, nothing fetched.

The page is page.html.j2. Whatever it shows is cleaned (`shown`) and then escaped, save `Markup`, which only we make.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.plots import Model
from pipeline.report.style import HALF, clean, colour, short

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Picture:
    """A PNG for the page. `alt` and `caption` are plain text."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def width(self) -> int:
        """Pixels of the page, of which the picture has two each; from the PNG's header."""
        return int.from_bytes(self.png[16:20], "big") // 2

    @property
    def address(self) -> Markup:
        """The picture itself, in the page; longer than `clean` would let through."""
        return Markup("data:image/png;base64,") + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """One generation: what its labelling and selection did, in facts and pictures."""

    generation: int
    teacher: str
    student: str
    lead: str  # a sentence or two
    facts: Mapping[str, str]
    pictures: Sequence[Picture]  # those of half the page's width stand in pairs
    bad: Sequence[tuple[str, str, str, str]] = ()  # (shard, key, what is wrong, how it begins)
    bad_title: str = ""


@dataclass(frozen=True)
class Further:
    """What a model reached at one image size with its averaged or its raw weights; a row of its own table."""

    label: str
    generation: int
    weights: str
    size: int
    top1: float
    top5: float
    ece: float


@dataclass(frozen=True)
class OnSet:
    """What a model reached on a further evaluation set; a row of its own table."""

    label: str
    generation: int
    name: str
    top1: float
    top5: float
    ece: float


@dataclass(frozen=True)
class Page:
    job: str
    images: int  # of the test split
    models: Sequence[Model]
    overview: Sequence[Picture]
    sections: Sequence[Section]
    stages: Sequence[tuple[str, str, str, str]]  # (stage, folder name, fingerprint, seconds)
    stop: str = ""  # why generations were left out
    notes: Sequence[str] = field(default_factory=tuple)
    command: str = ""
    further: Sequence[Further] = ()
    sets: Sequence[OnSet] = ()
    verdict: Sequence[str] = ()


def render(page: Page) -> bytes:
    """The page as UTF-8."""
    return _environment().get_template(TEMPLATE).render(page=page).encode()


def shown(value: object) -> object:
    """What stands for a value in the page; not yet escaped."""
    return value if isinstance(value, Markup) else clean(str(value))


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def whole(number: float) -> str:
    return f"{number:,.0f}"


def in_pairs(pictures: Sequence[Picture]) -> Iterator[tuple[bool, Iterator[Picture]]]:
    """Neighbours that are equally wide, narrow ones (of half the page's width) or not."""
    return itertools.groupby(pictures, key=lambda picture: picture.width <= 100 * HALF)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,  # so that nothing can be shown unclean
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "whole": whole, "short": short, "colour": colour, "in_pairs": in_pairs}
    return environment
