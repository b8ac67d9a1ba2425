"""What a terminal would obey is escaped wherever a name from outside is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.printable import counted, printable
from tests import small
from tests.data import tars
from tests.data.tars import picture

EVIL = "a\x1b]0;owned\x07\x1b[2J\r\u202egnp"


def test_control_characters_and_undecodable_bytes_become_escapes() -> None:
    assert printable("plain, ä – \n ☃") == "plain, ä – \n ☃"
    assert printable(EVIL) == r"a\x1b]0;owned\x07\x1b[2J\r\u202egnp"
    assert printable("caf\udce9") == r"caf\xe9"


@pytest.mark.parametrize("where", ["key", "label", "class"])
def test_no_name_reaches_the_terminal_as_it_is(tmp_path: Path, where: str) -> None:
    world = small.make(tmp_path, generations=[])
    if where == "class":
        (world.shards / "classes.json").write_text('["cat", "dog", "owl", "\\u001b[31mred"]')
    else:
        key, label = (EVIL, b"0") if where == "key" else ("a", EVIL.encode())
        tars.make(world.shards / "labelled-000.tar", [(f"{key}.png", picture(1)), (f"{key}.cls", label)] * 2 + [
            (f"{key}b.png", b"none"), (f"{key}b.cls", label)])  # fmt: skip
    ran = world.run()
    shown = ran.out + ran.err
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown, shown
    assert r"\x1b" in shown


def test_one_is_singular_and_the_rest_plural() -> None:
    assert [counted(number, "image") for number in (0, 1, 2, 1234)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,234 images",
    ]
    assert (counted(1, "class"), counted(3, "class"), counted(2, "leaf", "leaves")) == (
        "1 class",
        "3 classes",
        "2 leaves",
    )
