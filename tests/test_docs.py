"""Docs that must not go stale."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_setting_is_in_the_docs_as_declared() -> None:
    """If this fails, run `python docs/make_configuration.py`."""
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()


def test_files_that_the_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w./-]+)\)", text)) | set(
        re.findall(r"`((?:pipeline|models|jobs|conf|docs)/[\w./-]+\.\w+)`", text)
    )
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_label_file_docs_name_every_column() -> None:
    from pipeline.data import labels, selection

    text = (ROOT / "docs" / "label_files.md").read_text()
    for field in [*labels.SCHEMA, *selection.SCHEMA]:
        assert f"`{field.name}`" in text
