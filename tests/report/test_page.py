"""index.html with hostile text in every field that can hold text."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import jinja2
import numpy as np
import pytest

from pipeline.report import page
from pipeline.report.page import Page, Picture
from tests.report.made_up import Parsed, png_of

CONTROL = "\x00\x1b[31m\r\n\x85\u202e\u2066\u2028\ud800"
HOSTILE = f"</code></style>{CONTROL}<script>'\"><img src=x onerror=y> &lt; {{{{ 7 * 7 }}}} {{% endif %}} "
SHOWN = "</code></style>[31m<script>'\"><img src=x onerror=y> &lt; {{ 7 * 7 }} {% endif %} "
NOT_SHOWN = {"Page.overview.Picture.name", "Page.sections.Section.pictures.Picture.name"}
NOT_SHOWN |= {f"Page.models.Model.{name}" for name in ("stage", "dir", "device", "dtype")}
NOT_SHOWN |= {f"Page.detectors.Detected.{name}.key" for name in ("box", "mask")}  # only those of figures are


class Filler:
    """Values for any field that a type describes; `texts` says which text stands where."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.texts: dict[str, str] = {}

    def make(self, kind: Any, where: str) -> Any:
        """An object of a dataclass, with all its fields filled."""
        where = f"{where}.{kind.__name__}" if where else kind.__name__
        hints = get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: self.value(hints[name], f"{where}.{name}") for name in names})

    def value(self, kind: Any, where: str) -> Any:
        origin, inside = get_origin(kind), get_args(kind)
        if dataclasses.is_dataclass(kind):
            return self.make(kind, where)
        if kind is str:
            return self.string(where)
        if kind in (int, float, bool):
            return kind(1)
        if kind is bytes:
            return png_of(np.zeros((2, 1200, 3), np.uint8))
        if origin in (Union, types.UnionType):
            return self.value(next(one for one in inside if one is not type(None)), where)
        if origin is tuple:
            return tuple(self.value(one, f"{where}.{number}") for number, one in enumerate(inside))
        if origin is Sequence:
            return [self.value(inside[0], where)]
        if origin is Mapping:
            return {self.value(inside[0], f"{where}.key"): self.value(inside[1], f"{where}.value")}
        raise NotImplementedError(f"{where} is a {kind}: say here how to make one")

    def string(self, where: str) -> str:
        if where == "Page.models.Model.stage":  # parsed, and never shown
            self.texts[where] = f"gen1-{self.text}"
        else:
            self.texts[where] = f"{self.text}{where}."
        return self.texts[where]


class Everything(Parsed):
    """A page's text, and all its attributes, as a browser understands them."""

    def __init__(self, source: str) -> None:
        self.attributes: list[tuple[str, str, str]] = []
        super().__init__(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def render(text: str) -> tuple[str, Everything, dict[str, str]]:
    filler = Filler(text)
    source = page.render(filler.make(Page, "")).decode()
    return source, Everything(source), filler.texts


def test_hostile_text_in_every_field_is_shown_escaped_and_clean() -> None:
    source, parsed, texts = render(HOSTILE)
    assert len(texts) > 25 and set(texts) >= NOT_SHOWN
    shown = ["".join(parsed.text), *(value for _, _, value in parsed.attributes)]
    for where, text in texts.items():
        assert text not in source, where
        if where not in NOT_SHOWN:
            assert any(f"{SHOWN}{where}." in one for one in shown), f"{where} is not on the page as text"
    assert not set(source) & (set(CONTROL) - set("[31m\n"))
    assert "<script" not in source and "<img src=x" not in source and "&#34;&gt;" in source


def test_hostile_text_makes_no_element_and_no_attribute() -> None:
    _, hostile, _ = render(HOSTILE)
    _, harmless, _ = render("harmless ")
    assert hostile.tags == harmless.tags
    assert [one[:2] for one in hostile.attributes] == [one[:2] for one in harmless.attributes]
    changed = [a for a, b in zip(hostile.attributes, harmless.attributes, strict=True) if a != b]
    assert {(tag, name) for tag, name, _ in changed} == {("img", "alt")}


def test_the_page_asks_for_nothing_and_starts_as_html() -> None:
    source, parsed, _ = render(HOSTILE)
    assert source.startswith("<!doctype html>\n")
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in parsed.attributes
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)


def test_the_template_cannot_forget_to_escape() -> None:
    """Nothing in it switches escaping off, and a misspelt name is an error instead of a gap."""
    environment = page.environment()
    assert environment.loader is not None
    template, _, _ = environment.loader.get_source(environment, page.TEMPLATE)
    assert not re.search(r"\bsafe\b|Markup|autoescape", template)
    assert environment.from_string("{{ text }}").render(text="\x1b<b>") == "&lt;b&gt;"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ picture.captoin }}").render(picture=Picture("a.png", b"", "", ""))


@pytest.mark.parametrize(("students", "words"), [(0, "A teacher without students"), (1, "1 generation,")])
def test_the_number_of_generations_in_words(students: int, words: str) -> None:
    content = Filler("").make(Page, "")
    models = [dataclasses.replace(content.models[0], stage=f"gen{n}-student") for n in range(students + 1)]
    assert words in page.render(dataclasses.replace(content, models=models)).decode()
