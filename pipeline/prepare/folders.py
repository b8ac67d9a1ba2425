"""Writes the images of a folder as labelled or unlabelled shards.

Image files are copied byte for byte. Every other file ends in bad_files.txt: what cannot be read or decoded as bad,
what is no picture, or of a kind that is not decoded here, as skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import split_off as splits
from pipeline.prepare.picture_files import Skipped, images_below
from pipeline.prepare.sources import Limits, Source, by_name, write


def folder(
    directory: str,
    out: str,
    *,
    split: str = "labelled",
    labelled: bool = True,
    split_off: Mapping[str, float] | None = None,
    leave_out: Sequence[str] = (),
    **limits: Any,
) -> dict[str, Any]:
    """Shards `<split>-000.tar` … of all images below `directory`, in an order drawn by `seed`.

    `labelled`: the sub-folder directly in `directory` is the class. Where `out` has a classes.json already (another
    split was prepared there), its list is used. `split_off`: shares of each class for shards of their own, such as
    {"validation": 0.15, "test": 0.15} (pipeline.prepare.split_off); `leave_out`: folders that are passed over;
    `limits`: see sources.Limits. Returns counts: shards, images, bad, skipped, classes, and images by split where some
    were split off.
    """
    shares = splits.shares_of(split_off or {}, split)
    if shares and not labelled:
        raise ConfigError("only labelled images can be split off: drop --split-off, or --unlabelled")
    skipped: Skipped = []
    paths = images_below(directory, skipped, leave_out)
    if not paths:
        raise DataError(
            f"{directory} holds no image files"
            + (f", but {len(skipped)} others such as {skipped[0][0]} ({skipped[0][1]})" if skipped else "")
            + f"; known suffixes are {', '.join(IMAGE_SUFFIXES)}"
        )
    inside = [Path(path).relative_to(directory).parts for path in paths]
    sources = [Source(path, name="/".join(parts)) for path, parts in zip(paths, inside, strict=True)]
    if not labelled:
        return write(out, {split: (sources, None)}, [], skipped, Limits(**limits))
    if loose := [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]:
        raise DataError(
            f"{loose[0]} lies in no class sub-folder of {directory}; move it "
            "into one, or prepare the folder as unlabelled"
        )
    numbers, names = by_name(out, {parts[0] for parts in inside})
    labels = [numbers[parts[0]] for parts in inside]
    goes_to: list[str | None] = [None] * len(paths)
    if shares:
        goes_to = splits.divide(splits.content_hashes(paths), labels, shares, names, Limits(**limits).seed)
    parts = {
        name: (
            [source for source, to in zip(sources, goes_to, strict=True) if (to or split) == name],
            [label for label, to in zip(labels, goes_to, strict=True) if (to or split) == name],
        )
        for name in (split, *shares)
    }
    return write(out, parts, names, skipped, Limits(**limits))
