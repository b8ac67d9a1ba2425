"""Class names of any script in plots: written by a font that has them, or numbers and a sentence; never boxes."""

from __future__ import annotations

import warnings

import pytest

from pipeline.report import accuracy, fonts, plots

SCRIPTS = {
    "Latin": "Ångström ć",
    "Greek": "γάτα",
    "Cyrillic": "кошка",
    "Arabic": "قطة",
    "Hebrew": "חתול",
    "Devanagari": "बिल्ली",
    "Han": "猫",
    "Hangul": "고양이",
    "Thai": "แมว",
    "Emoji": "🐈",
    "Cuneiform": "𒀀𒁀",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_name_is_drawn_as_boxes(script: str) -> None:
    names = ["cat", SCRIPTS[script]]
    shown, lacking = fonts.in_plots(names)
    assert shown[0] == "cat" and shown[1] in (SCRIPTS[script], "class 1")
    assert bool(lacking) == (shown[1] == "class 1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is a warning of matplotlib's
        plots.classes(shown, [3, 4], [2, 2], [2, 2], None, 1)


def test_the_font_that_comes_with_matplotlib_is_enough_for_some() -> None:
    names = [SCRIPTS["Latin"], SCRIPTS["Greek"], SCRIPTS["Cyrillic"]]
    assert fonts.in_plots(names) == (names, "") and fonts.families(names) == [fonts.OWN]


def test_what_no_font_has_is_a_number_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [entry for entry in fonts.font_manager.fontManager.ttflist if entry.name == fonts.OWN]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", own)
    shown, lacking = fonts.in_plots(["cat", "𒀀 x", "dog", "𒁀"])
    assert shown == ["cat", "class 1", "dog", "class 3"]
    assert lacking.startswith("No installed font can write 2 class names in the plots, which show their number instead")
    monkeypatch.setattr(fonts, "SHAPED", False)  # an earlier matplotlib, which draws letters one by one
    assert fonts.in_plots(["cat", SCRIPTS["Arabic"]])[0] == ["cat", "class 1"]
    assert not fonts.needs_shaping("Ångstro\u0308m") and fonts.needs_shaping(SCRIPTS["Devanagari"])


def test_the_plot_of_accuracies_too() -> None:
    names, _ = fonts.in_plots(list(SCRIPTS.values()))
    model = plots.Model("gen0-teacher", "d", "m", 1.0, 1.0, 10, 0.5, 16, 8, "CPU", "float32")
    share = accuracy.share_of({"per_class": {"images": [4] * len(names), "right": [3] * len(names)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accuracy.by_class([model], [share], names).startswith(b"\x89PNG")
