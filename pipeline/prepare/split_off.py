"""Splits validation and test images off labelled ones: the same share of every class, identical images on one side.

Which images they are depends on the images, their classes and the seed, whatever the files are called and whatever
order they come in.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.images import BadImage
from pipeline.errors import ConfigError, DataError
from pipeline.prepare.shard_writer import read_image

SPLITS = {"validation": "val", "val": "val", "test": "test"}  # as a job's default patterns want them
LEAST = 2  # images of a class in each split: of one, nothing can be told


def shares_in(text: str) -> dict[str, float]:
    """`validation=0.15,test=0.15` as {name: share}. ConfigError."""
    found: dict[str, float] = {}
    for item in text.split(",") if text else ():
        name, _, share = (word.strip() for word in item.partition("="))
        try:
            number = float(share)
        except ValueError:
            raise ConfigError(f"--split-off is '{text}'; write validation=0.15,test=0.15") from None
        if name in found:
            raise ConfigError(f"--split-off is '{text}', which names {name} twice; name it once")
        found[name] = number
    return found


def shares_of(split_off: Mapping[str, float], kept: str = "labelled") -> dict[str, float]:
    """{first part of the shard names: share} of what is to be split off `kept`. ConfigError."""
    found: dict[str, float] = {}
    for name, share in split_off.items():
        if name not in SPLITS:
            raise ConfigError(f"'{name}' cannot be split off; what can is validation and test")
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
            raise ConfigError(f"the share to split off for {name} is {share}; it is between 0 and 1, such as 0.15")
        if SPLITS[name] in found:
            raise ConfigError(f"{name} is to be split off twice; name it once")
        found[SPLITS[name]] = float(share)
    if sum(found.values()) >= 1:
        raise ConfigError(f"splitting off {sum(found.values()):g} of the images leaves none to learn from; name less")
    if kept in found:
        raise ConfigError(f"'{kept}' cannot be split off itself; name another split, such as labelled")
    return found


def divide(
    hashes: Sequence[str | None], labels: Sequence[int], shares: Mapping[str, float], names: Sequence[str], seed: int
) -> list[str | None]:
    """For each image the split that it goes to, None where it stays.

    hashes: of their content, None for a bad image, which stays; labels: class indexes into `names`; shares: of the
    distinct images of each class, rounded, at least LEAST. DataError: a class has too few.
    """
    of_class: dict[int, list[str]] = defaultdict(list)
    first: dict[str, int] = {}  # an image under two labels counts for the class of the lesser index
    for content, label in sorted((content, label) for content, label in zip(hashes, labels, strict=True) if content):
        if first.setdefault(content, label) == label:
            of_class[label].append(content)
    goes_to: dict[str, str] = {}
    for label in sorted(set(labels)):
        drawn = sorted(set(of_class[label]), key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest())
        wanted = {split: max(LEAST, round(share * len(drawn))) for split, share in shares.items()}
        least = LEAST * (1 + len(shares))
        if len(drawn) - sum(wanted.values()) < LEAST:
            raise DataError(
                f"class '{names[label]}' has {len(drawn)} different readable images; splitting off "
                f"{' and '.join(f'{share:g} for {split}' for split, share in shares.items())} takes at least {least}, "
                f"{LEAST} in each split and {LEAST} to learn from: add images, merge the class into another, or split "
                "off less"
            )
        for split, number in wanted.items():
            goes_to |= dict.fromkeys(drawn[:number], split)
            drawn = drawn[number:]
    return [goes_to.get(content) if content else None for content in hashes]


def content_hashes(paths: Sequence[str]) -> list[str | None]:
    """sha256 of each image file, None for one that cannot be read or decoded."""

    def hashed(path: str) -> str | None:
        try:
            return hashlib.sha256(read_image(path)).hexdigest()
        except BadImage:
            return None

    with ThreadPoolExecutor() as threads:
        return list(threads.map(hashed, paths))
