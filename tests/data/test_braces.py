"""Braces: what they stand for, by examples, by an independent implementation, and how much is written out at once."""

from __future__ import annotations

import random
import re
import tracemalloc

import pytest

from pipeline.data import braces
from pipeline.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", "a.tar"),
        ("{8..11}", "8 9 10 11"),
        ("{08..11}", "08 09 10 11"),
        ("{3..1}", "3 2 1"),
        ("{002..000}", "002 001 000"),
        ("{098..101}", "098 099 100 101"),
        ("{5..5}", "5"),
        ("{a,b}-{0..1}", "a-0 a-1 b-0 b-1"),
        ("x{,y}", "x xy"),
        ("{a,b,a}", "a b"),
        ("{train-{0..1},val}", "train-0 train-1 val"),
        ("{{a,b},{c,d}}", "a b c d"),
        # As Bash has it, and unlike our own reading before:
        ("{08..100..46}", "008 054 100"),
        ("{1..03}", "01 02 03"),
        ("{10..08}", "10 09 08"),
        ("{-1..1}", "-1 0 1"),
        ("{a..c}", "a b c"),
        ("{a}", "{a}"),
        ("{}", "{}"),
        ("{{a,b}}", "{a} {b}"),
        # No backslash escapes: it is part of a name.
        ("\\{a,b}", "\\a \\b"),
    ],
)
def test_what_braces_stand_for(pattern: str, names: str) -> None:
    assert braces.expand(pattern) == names.split()


@pytest.mark.parametrize("pattern", ["x{", "x}", "{a,b", "a,b}", "}{", "{a,{b}", "x}{a,b}{y", "{0..3}}"])
def test_a_brace_without_its_partner(pattern: str) -> None:
    with pytest.raises(DataError) as caught:
        braces.expand(pattern)
    assert str(caught.value) == (
        f"pattern {pattern} has a brace without its partner; add the missing one, "
        "or write ? for a brace that is part of a name"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}",
        "{0..99999999999\n}",
        "{0..1000000}",
        "{0..999}{0..999}{0..9}",
        "{a,{0..999}{x{0..999},{0..999}}}",
        "{a,b}" * 20,
        "{{a..z},{0..999}{0..999}}",
    ],
)
def test_too_many_names_are_refused_before_they_are_written_out(pattern: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="stands for more than 1000000 names; write a wildcard instead"):
            braces.expand(pattern)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_as_many_names_as_are_allowed() -> None:
    names = braces.expand("{000..999}/{000..999}")
    assert (len(names), names[0], names[-1]) == (1_000_000, "000/000", "999/999")


# ---- random patterns ---------------------------------------------------------------------------------------


def expand_innermost_first(pattern: str) -> list[str]:
    """An independent implementation for patterns of plain ranges and lists: the innermost brace is replaced first."""
    found = [pattern]
    while any("{" in text for text in found):
        wider: list[str] = []
        for text in found:
            match = re.search(r"\{([^{}]*)\}", text)
            if match is None:
                wider.append(text)
                continue
            wider += [text[: match.start()] + choice + text[match.end() :] for choice in choices(match[1])]
        found = wider
    return list(dict.fromkeys(found))


def choices(inside: str) -> list[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if match is None:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    width = len(match[1]) if match[1].startswith("0") else 0
    return [f"{n:0{width}d}" for n in (range(first, last + 1) if first <= last else range(first, last - 1, -1))]


def random_pattern(rng: random.Random, depth: int) -> str:
    """Literals, ranges, and lists of two or more, with lists in them down to `depth`."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["literal", "range", "list"])
        if kind == "literal":
            parts.append(rng.choice(["a", "b-", "/", "0", "*", "x.tar", ".", ""]))
        elif kind == "range":
            width = rng.randint(1, 3)
            low = rng.randint(0, 10**width - 1)
            ends = [low, min(low + rng.randint(0, 3), 10**width - 1)]
            rng.shuffle(ends)
            zeros = width if ends[0] < 10 ** (width - 1) else 0  # in both ends, or in none
            parts.append(f"{{{ends[0]:0{zeros}d}..{ends[1]:0{zeros}d}}}")
        else:
            inner = [random_pattern(rng, depth - 1) if depth else rng.choice(["", "c", "7"]) for _ in range(2)]
            parts.append("{" + ",".join(inner) + "}")
    return "".join(parts)


def test_random_patterns_against_an_independent_implementation() -> None:
    rng = random.Random(0)
    several = 0
    for _ in range(600):
        depth = rng.randint(0, 1)
        pattern = random_pattern(rng, depth)
        if (braces.count(pattern) or 0) > 200:
            continue
        found, expected = braces.expand(pattern), expand_innermost_first(pattern)
        several += len(found) > 1
        if depth:  # what stands in nested braces is ordered by the outer ones
            found, expected = sorted(found), sorted(expected)
        assert found == expected, pattern
    assert several > 300


def test_random_text_is_counted_as_it_is_written_out_or_refused() -> None:
    rng = random.Random(1)
    counted = refused = 0
    for _ in range(20_000):
        tokens = ["{", "}", ",", "..", "0", "12", "-3", "07", "a", "Z", "\\", "\n", "{0..3}", "{b..e..2}", "{9..1..0}"]
        pattern = "".join(rng.choices(tokens, k=rng.randint(1, 9)))
        names = braces.count(pattern)
        if names is None:
            refused += 1
            with pytest.raises(DataError, match="has a brace without its partner"):
                braces.expand(pattern)
        else:
            counted += 1
            assert names == len(list(braces.braceexpand(pattern, escape=False))), pattern
    assert min(counted, refused) > 1000
