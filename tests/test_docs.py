"""Docs that must not go stale."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from pipeline import cli

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


def test_commands_that_the_docs_show_are_ones() -> None:
    """Of `python -m pipeline`; those with placeholders for arguments are not looked at."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "jobs").glob("*.yaml")]
    shown = [
        (file.name, match[1].strip())
        for file in files
        for match in re.finditer(
            r"-m pipeline ((?:run|plan|status|submit|clean|ui|export|prepare) [^`#\n|]*)", file.read_text()
        )
    ]
    assert len(shown) > 20
    for name, words in shown:
        if words.endswith("\\") or "…" in words:  # alternatives in a table
            continue
        words = re.split(r"  +(?:or|\()", words)[0]
        try:
            cli._parse(shlex.split(words))
        except SystemExit:
            pytest.fail(f"{name} shows: python -m pipeline {words}")


def test_label_file_docs_name_every_column() -> None:
    from pipeline.data import label_files
    from pipeline.selection import select

    text = (ROOT / "docs" / "label_files.md").read_text()
    for field in [*label_files.SCHEMA, *select.SCHEMA]:
        assert f"`{field.name}`" in text
