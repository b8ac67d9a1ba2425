"""Renders the page on which people look at images and correct labels: one file, pictures and script inside.

The page is page.html.j2. Nothing is fetched; what is decided stays in the browser until its button writes
corrections.csv. Text from data is put into the page by the script as text, never as markup.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline import storage
from pipeline.data.corrections import COLUMNS
from pipeline.printable import shown
from pipeline.review.items import Item


def render(
    job: str,
    output: str,
    names: Sequence[str],
    groups: Mapping[str, tuple[str, str]],
    items: Sequence[Item],
    corrections: str | None = None,
) -> bytes:
    """The page of a job whose run folder is `output`; groups: {name: (title, how its images were found)}. The file that
    it writes begins with the rows of the job's `corrections`."""
    data = {
        "store": f"noisy-lambda review {hashlib.sha256(output.encode()).hexdigest()[:16]}",
        "classes": list(names),
        "groups": [{"name": name, "title": title, "line": line} for name, (title, line) in groups.items()],
        "columns": COLUMNS,
        "earlier": _rows(corrections) if corrections else [],
        "items": [_plain(item) for item in items],
    }
    environment = Environment(
        loader=PackageLoader("pipeline", "review"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script
    page = environment.get_template("page.html.j2").render(job=shown(job), data=Markup(text))
    return page.encode("utf-8", "backslashreplace")


def _rows(corrections: str) -> list[list[str]]:
    """The rows of a corrections file that was read without a mistake, in the order of COLUMNS."""
    text = storage.read_bytes(corrections).decode("utf-8-sig")
    return [[row[name] for name in COLUMNS] for row in csv.DictReader(io.StringIO(text, newline=""))]


def _plain(item: Item) -> dict[str, Any]:
    one = item.wanted
    return {
        "group": one.group,
        "source": one.shard.source,
        "shard": one.shard.name,
        "index": one.index,
        "path": item.path,
        "sha256": item.sha256,
        "label": one.label,
        "by": one.by,
        "said": [[number, round(sure, 4)] for number, sure in one.said],
        "why": shown(one.why),
        "picture": item.picture,
        "width": item.width,
        "height": item.height,
    }
