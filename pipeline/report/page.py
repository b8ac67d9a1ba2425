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

from pipeline.printable import counted
from pipeline.report.noise_levels import Grid
from pipeline.report.plots import Model
from pipeline.report.style import HALF, clean, colour, short

TEMPLATE = "page.html.j2"
LONGEST = 600  # characters of a text; names are shortened where they are put in


@dataclass(frozen=True)
class Picture:
    """A PNG for the page. `alt` and `caption` are plain text; a `photo` keeps its colours where the page is dark."""

    name: str
    png: bytes
    alt: str
    caption: str
    photo: bool = False

    @property
    def width(self) -> int:
        """Pixels of the page, of which the picture has two each; from the PNG's header."""
        return int.from_bytes(self.png[16:20], "big") // 2


@dataclass(frozen=True)
class Tile:
    """A small image (PNG or JPEG) with words below it; of a mistake also the `true` class and the one that was `said`,
    apart because a name may run from right to left."""

    image: bytes
    text: str
    true: str = ""
    said: str = ""


@dataclass(frozen=True)
class SheetRow:
    """One class of a contact sheet, images on the left and on the right."""

    name: str
    left: Sequence[Tile]
    right: Sequence[Tile]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet; `titles` of its two sides."""

    titles: tuple[str, str]
    rows: Sequence[SheetRow]
    caption: str


@dataclass(frozen=True)
class Bad:
    """A bad shard or sample: how its bytes begin, and the image (PNG or JPEG) that can still be seen, b"" for none."""

    shard: str
    key: str
    why: str
    start: str = ""
    image: bytes = b""


@dataclass(frozen=True)
class Section:
    """One generation: what its labelling and selection did, in facts and pictures."""

    generation: int
    teacher: str
    student: str
    lead: str  # a sentence or two
    facts: Mapping[str, str]
    pictures: Sequence[Picture]  # those of half the page's width stand in pairs
    advice: Sequence[str] = ()  # sentences
    sheets: Sequence[Sheet] = ()
    bad: Sequence[Bad] = ()
    bad_title: str = ""
    grids: Sequence[Grid] = ()


@dataclass(frozen=True)
class Cell:
    """Of a confusion matrix: images of one class with one answer, their share of the class, whether it is right."""

    images: int
    share: float
    right: bool


@dataclass(frozen=True)
class Pair:
    """A true class and another one that was answered: how many of its images, and their share of the class."""

    true: str
    said: str
    images: int
    share: float


@dataclass(frozen=True)
class Mistakes:
    """What one model gets wrong on the validation images: a `matrix` (a row a true class, a column an answer) or, of
    many classes, the most frequent `pairs`; and wrong answers, the most confident first."""

    lead: str
    names: Sequence[str]
    matrix: Sequence[Sequence[Cell]]
    pairs: Sequence[Pair]
    gallery: Sequence[Tile]


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
    note: str
    """What else is known of it, by the entry of the set."""


@dataclass(frozen=True)
class Detected:
    """What a detector reached, by names of pipeline.detection.figures; a row of its own table."""

    name: str
    model: str
    body_parameters: int | None
    box: Mapping[str, float | None]
    mask: Mapping[str, float | None]


@dataclass(frozen=True)
class State:
    """How a stage of an unfinished run stands."""

    stage: str
    state: str
    what: str


@dataclass(frozen=True)
class Page:
    """`models` is empty while they are not tested."""

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
    warnings: Sequence[str] = ()
    mistakes: Mistakes | None = None
    detectors: Sequence[Detected] = ()
    annotations: Sequence[str] = ()  # sentences: what of them is not used, and why
    unfinished: Sequence[State] = ()  # of a run that goes on: how its stages stand


def render(page: Page) -> bytes:
    """The page as UTF-8."""
    return environment().get_template(TEMPLATE).render(page=page).encode()


def shown(value: object) -> object:
    """What stands for a value in the page; not yet escaped."""
    return value if isinstance(value, Markup) else clean(str(value), LONGEST)


def address(image: bytes) -> Markup:
    """A PNG or JPEG itself, in the page; longer than `clean` would let through."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup("data:image/{};base64,").format(kind) + base64.b64encode(image).decode()


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def signed(points: float) -> str:
    """With a real minus, and no sign where it rounds to nothing."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def whole(number: float) -> str:
    return f"{number:,.0f}"


def in_pairs(pictures: Sequence[Picture]) -> Iterator[tuple[bool, Iterator[Picture]]]:
    """Neighbours that are equally wide, narrow ones (of half the page's width) or not."""
    return itertools.groupby(pictures, key=lambda picture: picture.width <= 100 * HALF)


@cache
def environment() -> Environment:
    """For the templates of this folder."""
    made = Environment(
        loader=PackageLoader("pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,  # so that nothing can be shown unclean
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (percent, whole, short, colour, in_pairs, address, signed)
    made.filters |= {function.__name__: function for function in functions}
    made.globals["counted"] = counted
    return made
