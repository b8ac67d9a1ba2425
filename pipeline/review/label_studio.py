"""Writes the images for Label Studio: tasks with what the models say as predictions, and the labelling interface.

Import the .json as a project's data, and paste the .xml as its labelling interface (code).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from xml.sax.saxutils import quoteattr

from pipeline.data.corrections import DROP
from pipeline.review.items import Item

CLASS = "class"


def tasks(items: Sequence[Item], names: Sequence[str]) -> bytes:
    """A task an image: the columns of a corrections file, its label, and why it is shown."""
    return json.dumps([_task(item, names) for item in items], ensure_ascii=False, indent=1).encode()


def interface(names: Sequence[str]) -> bytes:
    """Choices of the classes, and `drop`."""
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in names)
    return f"""<View>
  <Header value="$why"/>
  <Image name="image" value="$image"/>
  <Header value="labelled: $label" size="5"/>
  <Choices name="{CLASS}" toName="image" choice="single" showInline="true" required="true">
{choices}
    <Choice value="{DROP}" hint="it shows none of them"/>
  </Choices>
</View>
""".encode()


def _task(item: Item, names: Sequence[str]) -> dict[str, object]:
    one = item.wanted
    row = {"source": one.shard.source, "shard": one.shard.name, "index": one.index, "path": item.path}
    label = "" if one.label is None else names[one.label]
    said, sure = one.said[0]
    result = {"from_name": CLASS, "to_name": "image", "type": "choices", "value": {"choices": [names[said]]}}
    return {
        "data": {**row, "sha256": item.sha256, "label": label, "why": one.why, "image": item.picture},
        "predictions": [{"model_version": one.by, "score": sure, "result": [result]}],
    }
