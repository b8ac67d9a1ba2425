"""Escapes what a terminal would obey: control characters in keys, names, labels and paths."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes as backslash escapes; line ends stay."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
