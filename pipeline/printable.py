"""Makes text fit to be seen: without the secrets in URLs, and without what a terminal would obey."""

from __future__ import annotations

import re
from typing import Any

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PORT = re.compile(r"[^:]*(:\d{0,5})?|\[[^\]]*\](:\d{0,5})?")
AFTER = re.compile(r"[,;|:.(){}\[\]<>'\"`]*$")  # may follow a URL in a text or a list, and is kept


def many(number: float, what: str, several: str = "") -> str:
    """`1 image`, `1,107 images`; `several` where an s is not all."""
    return f"{number:,.0f} {what if number == 1 else several or f'{what}s'}"


def shown(text: str) -> str:
    """The text as a terminal may have it."""
    return printable(redact(text))


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes as backslash escapes; line ends stay."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def redact(text: str) -> str:
    """A path, or any text, with every URL in it (chains, braces and lists of them too) without user info and query."""
    starts = [*URL.finditer(text)]
    if not starts:
        return text
    ends = [*(one.start() for one in starts[1:]), len(text)]
    shown = (one[0] + _without_secrets(one[0], text[one.end() : end]) for one, end in zip(starts, ends, strict=True))
    return text[: starts[0].start()] + "".join(shown)


def redacted(value: Any) -> Any:
    """Settings or facts as they may be recorded: `redact` of every text in them."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _without_secrets(scheme: str, rest: str) -> str:
    """What follows the scheme of a URL, up to the next URL, without its secrets."""
    host = re.split(r"[/?#\s]", rest, maxsplit=1)[0]
    at = rest.find("@")
    # A password may hold what ends a host: then a name and something that is no port come before it.
    if at >= 0 and ("@" in host or not PORT.fullmatch(host)):
        query = rest.find("?", at)
        rest = rest[rest.rfind("@", 0, query if query >= 0 else None) + 1 :]
    url = re.match(r"\S*", rest)[0]  # type: ignore[index]
    # In other stores `?` stands for a letter of a name, and `#` for itself.
    kept = re.split(r"[?#]" if scheme.lower().startswith("http") else r"\?(?=[\w.~%-]+=)", url, maxsplit=1)[0]
    if kept == url:
        return rest
    return kept + AFTER.search(url)[0] + rest[len(url) :]  # type: ignore[index]
