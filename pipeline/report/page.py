"""index.html: the report on one self-contained page: pictures inside, no scripts, nothing fetched.

Whatever comes from data or settings goes through `text`: control characters stripped, HTML escaped.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.report.plots import Model
from pipeline.report.style import HALF, clean, colour, short

STYLE = """
:root { color-scheme: light; --ink: #1c2733; --muted: #66727f; --line: #e3e8ed; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 44px 24px 64px; }
header p { margin: 0; color: var(--muted); }
h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { margin: 52px 0 4px; font-size: 22px; letter-spacing: -.01em; }
h2 small { font-size: 15px; font-weight: 400; color: var(--muted); letter-spacing: 0; margin-left: 8px; }
h2 i { display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 9px; }
p.lead { margin: 0 0 16px; color: var(--muted); max-width: 80ch; }
.card, figure { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
.headline { display: flex; flex-wrap: wrap; gap: 16px; margin: 24px 0 16px; }
.headline div { flex: 1 1 190px; padding: 18px 22px 14px; }
.headline .wide { flex-grow: 2; }
.headline b { display: block; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; white-space: nowrap; }
.headline span { color: var(--muted); font-size: 14px; }
.headline .arrow { color: #a3aeb9; font-weight: 400; padding: 0 8px; }
.scroll { overflow-x: auto; padding: 8px 22px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; font-weight: 600; color: var(--muted); }
th, td { padding: 9px 0 9px 18px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; align-items: stretch; }
figure { margin: 16px 0 0; padding: 18px 16px 12px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 14px; padding: 8px 6px 0; }
dl { display: flex; flex-wrap: wrap; gap: 12px 44px; margin: 16px 0 0; padding: 16px 22px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
details { margin-top: 16px; padding: 12px 22px; }
summary { cursor: pointer; font-weight: 600; }
code { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
pre { margin: 0; padding: 16px 22px; white-space: pre-wrap; }
footer { margin-top: 40px; color: var(--muted); font-size: 13px; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG for the page. `alt` and `caption` are plain text."""

    name: str
    png: bytes
    alt: str
    caption: str


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


def text(value: str) -> str:
    """Data as it may stand in the page."""
    return html.escape(clean(value), quote=True)


def render(page: Page) -> bytes:
    """The page as UTF-8."""
    body = [
        f"<header><h1>{text(page.job)}</h1><p>{_subtitle(page)}</p>{f'<p>{text(page.stop)}</p>' if page.stop else ''}</header>",
        _headline(page),
        _results(page),
        _further(page),
        _pictures(page.overview),
        *(_section(section) for section in page.sections),
        _reproduce(page),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(page.job)}: noisy student report</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    ).encode()


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _subtitle(page: Page) -> str:
    students = max(model.generation for model in page.models)
    if not students:
        return f"A teacher without students, tested on {page.images:,} images that nothing was trained or tuned on."
    return (
        f"Noisy Student training in {students} generation{'s' if students > 1 else ''}, tested on {page.images:,} images that "
        "nothing was trained or tuned on."
    )


def _headline(page: Page) -> str:
    teacher, last = page.models[0], page.models[-1]
    cards = []
    if len(page.models) > 1:
        gain = 100 * (last.top1 - teacher.top1)
        cards.append(
            f'<div class="card wide"><b><span style="all:unset;color:{colour(0)}">{percent(teacher.top1)}</span><span '
            f'class="arrow" style="font-size:inherit">→</span><span style="all:unset;color:{colour(last.generation)}">'
            f"{percent(last.top1)}</span></b><span>top-1 accuracy, teacher → {last.label}</span></div>"
        )
        cards.append(_card(f"{gain:+.1f}", "points over the teacher"))
    else:
        cards.append(_card(percent(teacher.top1), "top-1 accuracy of the teacher"))
    cards.append(_card(f"{last.images_per_second:,.0f}", f"images/s, {last.label}"))
    cards.append(_card(short(last.parameters), f"parameters, {last.label}"))
    return f'<div class="headline">{"".join(cards)}</div>'


def _card(number: str, meaning: str) -> str:
    return f'<div class="card"><b>{number}</b><span>{meaning}</span></div>'


def _results(page: Page) -> str:
    teacher = page.models[0]
    rows = []
    for model in page.models:
        gain = f"{100 * (model.top1 - teacher.top1):+.1f}" if model is not teacher else ""
        cells = (
            percent(model.top1),
            percent(model.top5),
            "" if model.ece is None else f"{model.ece:.3f}",
            gain,
            f"{model.parameters:,}",
            f"{model.images_per_second:,.0f}",
            f"{model.size} px",
        )
        rows.append(
            f"<tr>{_name(model.label, model.generation)}<td><code>{text(model.model)}</code></td>{_cells(cells)}</tr>"
        )
    numbers = ("top-1", "top-5", "ECE", "gain", "parameters", "images/s", "image size")
    return _table(("stage", "model"), numbers, rows)


def _further(page: Page) -> str:
    if not page.further:
        return ""
    rows = []
    for one in page.further:
        cells = (f"{one.size} px", percent(one.top1), percent(one.top5), f"{one.ece:.3f}")
        rows.append(f"<tr>{_name(one.label, one.generation)}<td>{one.weights}</td>{_cells(cells)}</tr>")
    return "<h2>Other image sizes and weights</h2>" + _table(
        ("stage", "weights"), ("image size", "top-1", "top-5", "ECE"), rows
    )


def _table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in words)
    head += "".join(f'<th class="number">{name}</th>' for name in numbers)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _name(label: str, generation: int) -> str:
    return f'<td><span class="dot" style="background:{colour(generation)}"></span>{label}</td>'


def _cells(values: Sequence[str]) -> str:
    return "".join(f'<td class="number">{value}</td>' for value in values)


def _pictures(pictures: Sequence[Picture]) -> str:
    groups = itertools.groupby(pictures, key=lambda picture: _width(picture) <= 100 * HALF)
    return "".join(
        f'<div class="pair">{"".join(map(_figure, group))}</div>' if narrow else "".join(map(_figure, group))
        for narrow, group in groups
    )


def _width(picture: Picture) -> int:
    """Pixels of the page, of which the picture has two each; from the PNG's header."""
    return int.from_bytes(picture.png[16:20], "big") // 2


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text(picture.alt)}" width="{_width(picture)}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
    )


def _section(section: Section) -> str:
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in section.facts.items())
    bad = ""
    if section.bad:
        rows = "".join(
            f"<tr><td><code>{text(shard)}</code></td><td><code>{text(key)}</code></td><td>{text(why)}</td>"
            f"<td><code>{text(start)}</code></td></tr>"
            for shard, key, why, start in section.bad
        )
        bad = (
            f'<details class="card"><summary>{text(section.bad_title)}</summary><table><tr><th>shard</th><th>sample</th>'
            f"<th>what is wrong</th><th>it begins with</th></tr>{rows}</table></details>"
        )
    return (
        f'<section><h2><i style="background:{colour(section.generation)}"></i>Generation {section.generation}'
        f"<small>{section.teacher} labels, {section.student} learns</small></h2>"
        f'<p class="lead">{text(section.lead)}</p><dl class="card">{facts}</dl>{_pictures(section.pictures)}{bad}</section>'
    )


def _reproduce(page: Page) -> str:
    rows = "".join(
        f"<tr><td>{text(stage)}</td><td><code>{text(folder)}</code></td><td><code>{text(print_)}</code></td>"
        f'<td class="number">{text(seconds)}</td></tr>'
        for stage, folder, print_, seconds in page.stages
    )
    notes = "".join(f'<p class="lead">{text(note)}</p>' for note in page.notes)
    return (
        f'<section><h2>How to reproduce</h2><p class="lead">Every setting of the job stands in job.yaml in the run folder; '
        "a stage's fingerprint covers all that decides what it computes, so equal fingerprints mean equal work. "
        f'What is done is not done again; a new output starts from nothing.</p>{notes}<div class="card"><pre><code>'
        f"{text(page.command)}</code></pre></div>"
        f'<div class="card scroll" style="margin-top:16px"><table><thead><tr><th>stage</th><th>folder</th><th>fingerprint</th>'
        f'<th class="number">seconds</th></tr></thead><tbody>{rows}</tbody></table></div></section>'
    )
