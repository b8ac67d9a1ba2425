"""Writes a first job for a folder of photos or of shards: `noisy-lambda init FOLDER`.

It looks at what is there (classes, unlabelled images, counts, sizes), chooses a recipe, and says in comments why. The
job runs as it is.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.data import images, shards
from pipeline.data.classes import read_classes
from pipeline.errors import DataError, OutputError
from pipeline.prepare.picture_files import images_below
from pipeline.prepare.split_off import LEAST
from pipeline.printable import printable

ROLES = {
    "labelled": ("labelled", "labeled", "train", "training"),
    "unlabelled": ("unlabelled", "unlabeled"),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
PREFIXES = {"labelled": "labelled", "unlabelled": "unlabelled", "validation": "val", "test": "test"}  # of shards
SHARE = 0.15  # of each class, for validation and for test
FEW_TO_VALIDATE = 20
MEASURED = 50  # images whose size is looked at, and shards of a source that are counted, at least
SMALL = 40  # pixels: at most these are trained on at 32
MANY = 20_000  # labelled images from which on a ResNet-50 pays, where there is a GPU
STEP = 96  # pseudo-labelled images in a step: one class alone shall fill it
Z = 1.96  # of a 95 % interval
Element = TypeVar("Element")


@dataclass
class Seen:
    """What a folder holds. `sources` by what they are for: folders, or patterns of shards; `images` by the same."""

    sources: dict[str, str]
    images: dict[str, int]
    classes: list[str]
    least: int
    """Labelled images of the smallest class."""
    pixels: int
    """Median of the shorter side."""
    sharded: bool = False
    split_off: dict[str, float] = field(default_factory=dict)


def init(folder: str, out: str | None) -> list[str]:
    """Write the job, and return what is to be said. UserError: there is nothing to make a job of, or a file there."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(folder).absolute().name).strip("_") or "photos"
    target = Path(out or f"{name}.yaml")
    if target.exists():
        raise OutputError(f"{target} is there already, and is not written over; name another file with --out")
    if not Path(folder).is_dir():
        raise DataError(f"there is no folder {folder}; give one of photos in class sub-folders, or of shards")
    seen = _shards(Path(folder)) if any(Path(folder).glob("*.tar")) else _photos(Path(folder))
    text = "\n".join(_job(name, folder, seen, _gpu())) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{target} is there already, and is not written over; name another with --out") from None
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; name another file with --out") from error
    return [*_facts(seen), f"wrote {target}; noisy-lambda plan {target} shows it, noisy-lambda run {target} does it"]


def interval(right: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share `right` of so many images (Wilson 1927)."""
    middle = (right + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * math.sqrt(right * (1 - right) / images + Z**2 / (4 * images**2))
    return middle - half, middle + half


# ---- looking ---------------------------------------------------------------------------------------------------------


def _photos(folder: Path) -> Seen:
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    roles = {role: path for path in inside for role, names in ROLES.items() if path.name.lower() in names}
    # `train` may be a class too: one holds photos, and not folders of them.
    roles = {
        role: path for role, path in roles.items() if role == "unlabelled" or any(map(Path.is_dir, path.iterdir()))
    }
    labelled = roles.get("labelled", folder)
    apart = [str(path) for role, path in roles.items() if role != "labelled"]
    if labelled == folder and ({"validation", "test"} & roles.keys()):
        raise DataError(
            f"{folder} has a folder {roles.get('validation', roles.get('test'))} and none of labelled images to train "
            f"on; call it {folder / 'train'}"
        )
    paths = images_below(str(labelled), [], apart)
    loose = [path for path in paths if Path(path).parent == labelled]
    if loose:
        raise DataError(
            f"{loose[0]} lies in no class sub-folder of {labelled}; move labelled images into one for each class, and "
            f"unlabelled ones into {folder / 'unlabelled'}"
        )
    counts = Counter(Path(path).relative_to(labelled).parts[0] for path in paths)
    sources = {"labelled": str(labelled.absolute())}
    found = {"labelled": len(paths)}
    for role in ("unlabelled", "validation", "test"):
        if role in roles and (number := len(images_below(str(roles[role]), []))):
            sources[role], found[role] = str(roles[role].absolute()), number
    _check_classes(str(labelled), counts)
    split_off = {role: SHARE for role in ("validation", "test") if role not in sources}
    smallest = min(counts, key=lambda name: counts[name])
    if counts[smallest] < LEAST * (1 + len(split_off)):
        raise DataError(
            f"class '{smallest}' of {labelled} has {counts[smallest]} images, and each needs "
            f"{LEAST * (1 + len(split_off))}: {LEAST} to learn from and {LEAST} for each of "
            f"{' and '.join(split_off) or 'nothing else'}; add some, or move the folder away"
        )
    for role in split_off:
        found[role] = sum(max(LEAST, round(SHARE * number)) for number in counts.values())
    found["labelled"] -= sum(found[role] for role in split_off)
    pixels = _shorter_side(Path(path).read_bytes() for path in _spread(paths))
    return Seen(sources, found, sorted(counts), min(counts.values()), pixels, split_off=split_off)


def _shards(folder: Path) -> Seen:
    sources = {role: f"{prefix}-*.tar" for role, prefix in PREFIXES.items() if any(folder.glob(f"{prefix}-*.tar"))}
    if missing := [role for role in ("labelled", "validation", "test") if role not in sources]:
        raise DataError(
            f"{folder} holds shards, but no {PREFIXES[missing[0]]}-*.tar ({missing[0]}); call them so, or write "
            "photos as shards with `noisy-lambda prepare folder … --split-off validation=0.15,test=0.15`"
        )
    classes = read_classes(str(folder))
    paths = {role: sorted(folder.glob(pattern)) for role, pattern in sources.items()}
    scans = {role: [shards.scan(str(path)).samples for path in _spread(of_role)] for role, of_role in paths.items()}
    found = {}
    for role, of_role in paths.items():  # of many shards some are counted, and the rest by their bytes
        share = sum(path.stat().st_size for path in _spread(of_role)) / sum(path.stat().st_size for path in of_role)
        found[role] = round(sum(map(len, scans[role])) / share)
    labels: Counter[str] = Counter()
    for path, samples in zip(_spread(paths["labelled"]), scans["labelled"], strict=True):
        for text in shards.read_texts(str(path), samples, "cls"):
            label = (text or b"").decode(errors="replace").strip()
            labels[classes[int(label)] if label.isdigit() and int(label) < len(classes) else label] += 1
    _check_classes(str(folder), labels)
    first = str(paths["labelled"][0])
    pixels = _shorter_side(shards.read_at(first, s.offset, s.size) for s in _spread(scans["labelled"][0]))
    return Seen(sources, found, classes, min(labels.values()), pixels, sharded=True)


def _check_classes(where: str, counts: Mapping[str, int]) -> None:
    if len(counts) < 2:
        what = f"the one class {next(iter(counts))}" if counts else "no images in class sub-folders"
        raise DataError(f"{where} holds {what}; a job needs labelled images of two classes or more, a folder for each")


def _spread(all_of: Sequence[Element]) -> Sequence[Element]:
    """Some of them, from everywhere."""
    return all_of[:: max(1, len(all_of) // MEASURED)]


def _shorter_side(data: Iterator[bytes]) -> int:
    sides = []
    for content in data:
        try:
            with images.telling(content):
                sides.append(min(images.read_header(content, images.MAX_PIXELS).size))
        except images.BadImage:
            continue
    if not sides:
        raise DataError("none of the images that were looked at can be read; give JPEG, PNG or WebP files")
    return round(statistics.median(sides))


def _gpu() -> bool:
    import torch  # seconds

    return torch.cuda.is_available()


# ---- writing ---------------------------------------------------------------------------------------------------------


def _facts(seen: Seen) -> list[str]:
    kinds = ", ".join(f"{seen.images[role]:,} {role}" for role in ROLES if role in seen.images)
    named = printable(", ".join(seen.classes[:4])) + (" …" if len(seen.classes) > 4 else "")
    lines = [f"{kinds} images; {len(seen.classes)} classes ({named}), the smallest of {seen.least:,} images"]
    lines.append(f"photos of about {seen.pixels} pixels, by the shorter side")
    if (number := seen.images["validation"]) < FEW_TO_VALIDATE:
        low, high = interval(0.5, number)
        lines.append(
            f"only {number} validation images: of an accuracy of 50 % the 95 % interval is {100 * low:.0f} to "
            f"{100 * high:.0f} %, so small differences between models mean nothing; label more"
        )
    return lines


def _job(name: str, folder: str, seen: Seen, gpu: bool) -> Iterator[str]:
    recipe, settings, why = _recipe(seen, gpu)
    labelled, unlabelled = seen.images["labelled"], seen.images.get("unlabelled", 0)
    where = printable(str(Path(folder).absolute()))
    yield f"# A first job for {where}, by `noisy-lambda init`. Every setting: docs/configuration.md."
    yield "#"
    yield from (f"# {line}" for line in _facts(seen))
    if gpu:
        yield "base: cluster/gpu-1.yaml"
    yield f"name: {_quoted(name)}"
    if seen.sharded:
        yield f"data: {{root: {_quoted(str(Path(folder).absolute()))}}}"
    else:
        yield "prepare:    # `run` writes these photos as shards first; photos that change are written anew"
        yield "  dataset: folder"
        yield "  source:"
        yield from (f"    {role}: {_quoted(path)}" for role, path in seen.sources.items())
        if seen.split_off:
            shares = ", ".join(f"{role}: {share}" for role, share in seen.split_off.items())
            yield f"  split_off: {{{shares}}}    # of each class; identical photos stay together"
    yield "teacher:"
    yield f"  base: {recipe}    # {why}"
    yield from (f"  {line}" for line in settings)
    yield "  # Published weights need fewer photos. Where this machine reaches their hub, in place of the lines above:"
    yield "  #   base: recipe/finetune_pretrained.yaml    # or recipe/probe.yaml: the classifier alone, in minutes"
    yield "  #   model: timm/resnet18"
    yield "  #   pretrained: true                         # or a file: pretrained: weights.safetensors"
    if unlabelled < labelled:
        yield f"generations: []    # no students: of {unlabelled:,} unlabelled images there is little to learn"
        return
    ratio = 3 if unlabelled >= 3 * labelled else 2
    per_class = max(unlabelled // len(seen.classes), STEP)
    yield f"select: {{threshold: 0.3, per_class: {per_class}}}    # the surest, as many of each class"
    yield "student:"
    yield f"  base: {recipe}"
    yield from (f"  {line}" for line in settings)
    yield "  init: teacher    # goes on from the teacher's weights: from new ones takes far more steps"
    yield f"  unlabelled_ratio: {ratio}    # pseudo-labelled images beside each labelled one"
    yield "generations:"
    yield "  - student: {}    # another line is another student, taught by this one"


def _recipe(seen: Seen, gpu: bool) -> tuple[str, list[str], str]:
    """(base, settings over it, why)."""
    labelled = seen.images["labelled"]
    if gpu and labelled >= MANY:
        why = f"{labelled:,} labelled images and a GPU"
        return "recipe/lambda_resnet_50-160.yaml", ["batch: 128", "duration: 30000st", "warmup: 1000st"], why
    settings = []
    if seen.pixels <= SMALL:
        settings.append("resolution: 32               # the photos are this small")
    if labelled < 32:
        settings.append(f"batch: {max(4, labelled // 2)}")
    return "recipe/small_photos.yaml", settings, f"{labelled:,} labelled images, new weights"


def _quoted(text: str) -> str:
    """As YAML reads it back."""
    return json.dumps(text, ensure_ascii=False)
