"""Groups the members of a shard into samples: the sample rule, which has a number.

A run is a maximal series of adjacent regular members with the same key: folder and base name up to the first dot. Its
image is, in this order:

1. the first that is named plainly, `key.jpg`, whatever else is there (`key.depth.png`);
2. the only one with a known suffix, `key.left.png`;
3. the only member of an unknown suffix whose content begins as a picture does (`key.jfif`, `key`).

A run with several images of which none is named plainly is no sample: dots in file names cut the key short, so
different pictures fell together. It is skipped and counted, and so is a run without an image. A sample is known by its
shard and its number there, because keys are unique only inside a tar and sometimes not even there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.data.tar import Member
from pipeline.printable import counted

RULE = 2
"""Of what is above, written into files and hashed into fingerprints. 1: the first image of a run, by its suffix."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "ppm", "tif", "tiff")
FOREIGN_SUFFIXES = ("heic", "heif", "jxl", "jp2", "svg", "psd", "dng", "cr2", "nef", "arw")
"""Of pictures that nothing here decodes."""
TEXT_SUFFIXES = ("cls", "json")
OTHER_SUFFIXES = ("txt", "caption", "csv", "xml", "html", "npy", "npz", "pth", "pt", "pkl", "tar", "zip", "mp4", "wav")
"""Of what is no picture by its name, and is not looked into."""
MAX_IMAGE = 256 << 20  # bytes of an image member that are ever read into memory
MAX_TEXT = 1 << 20
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
START = 16  # bytes of a member that are looked at
SKIPPED = "skipped"  # the status of a sample whose image nobody wanted, so it is not a bad one
DROPPED = "dropped"  # of one that a person took out of the labels

MOST_REASONS, OTHERS = 20, "other suffixes"  # names may end in anything, and what is said of a shard stays short
DOTS = "dots in the key"
"""Why a run of several pictures is no sample; all other reasons name suffixes."""


@dataclass(frozen=True)
class Sample:
    """`offset` and `size`: where the image member's data lies; `texts`: the same of `.cls` and `.json`.

    `status` is `ok`; `truncated`: the file ends inside the image (`size` is what is there); `too_large`: more
    than MAX_IMAGE bytes; `unreadable`: a sparse member. Images of the last three are not read.
    """

    index: int
    key: str
    offset: int
    size: int
    suffix: str
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    status: str = "ok"


@dataclass
class Left:
    """What of a shard is in no sample, by reason."""

    images: dict[str, int] = field(default_factory=dict)
    """Pictures: DOTS, or the suffix of a kind that nothing decodes."""
    runs: dict[str, int] = field(default_factory=dict)
    """Runs without a picture, by the suffixes in them."""
    example: dict[str, str] = field(default_factory=dict)
    """The first member of each reason."""
    number: int = 0
    """Runs, of all reasons."""

    def add(self, other: Left) -> None:
        self.number += other.number
        for mine, theirs in ((self.images, other.images), (self.runs, other.runs)):
            for reason, number in theirs.items():
                kept = reason if reason in mine or len(mine) < MOST_REASONS else OTHERS
                mine[kept] = mine.get(kept, 0) + number
                self.example.setdefault(kept, other.example[reason])


def kinds_of(left: Left) -> str:
    """The runs without a picture, the most frequent first: "12 samples (10 .txt, 2 .npy)"."""
    kinds = sorted(left.runs.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:3]) + (" …" if len(kinds) > 3 else "")
    return f"{counted(sum(left.runs.values()), 'sample')} ({shown})"


def looks_like_picture(start: bytes) -> bool:
    """Whether bytes begin as a picture of a kind that is decoded here."""
    return start.startswith(MAGIC) or start[8:12] in (b"WEBP", b"avif", b"avis")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, what follows its dot) of a member; None for a hidden file, which is skipped as if it were not there."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return None
    return f"{folder}/{stem}" if folder else stem if "/" not in name else f"/{stem}", extension


@dataclass
class Run:
    """A run of members, as they come in."""

    key: str
    image: Member | None = None
    suffix: str = ""
    rank: int = 9
    """1, 2 or 3, as the rule counts."""
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    pictures: dict[int, int] = field(default_factory=dict)
    """How many of each rank."""
    suffixes: set[str] = field(default_factory=set)
    first: str = ""

    def add(self, member: Member, extension: str, start: Callable[[], bytes]) -> bool:
        """Take the member in; True where it is the run's image as far as is known. `start` reads its first bytes."""
        suffix = extension.rpartition(".")[2].lower()
        self.first = self.first or member.name
        self.suffixes.add(suffix)
        whole = member.plain and member.present == member.size
        if suffix in TEXT_SUFFIXES and suffix not in self.texts and whole and member.size <= MAX_TEXT:
            self.texts[suffix] = (member.offset, member.size)
        rank = 9
        if suffix in IMAGE_SUFFIXES:
            rank = 1 if "." not in extension else 2
        elif suffix not in (*TEXT_SUFFIXES, *FOREIGN_SUFFIXES, *OTHER_SUFFIXES) and self.rank in (3, 9) and whole:
            rank = 3 if looks_like_picture(start()) else 9
        if rank == 9:
            return False
        self.pictures[rank] = self.pictures.get(rank, 0) + 1
        if rank >= self.rank:
            return False
        self.image, self.suffix, self.rank = member, suffix, rank
        return True

    @property
    def status(self) -> str:
        assert self.image is not None
        if self.image.present < self.image.size:
            return "truncated"
        if self.image.size > MAX_IMAGE:
            return "too_large"
        return "ok" if self.image.plain else "unreadable"

    @property
    def is_sample(self) -> bool:
        return self.image is not None and (self.rank == 1 or self.pictures[self.rank] == 1)

    def sample(self, index: int) -> Sample:
        assert self.image is not None
        size = min(self.image.present, 2**31 - 1)  # int32 in every table
        return Sample(index, self.key, self.image.offset, size, self.suffix, self.texts, self.status)

    def left(self) -> Left:
        """What to say of a run that is no sample."""
        if self.image is not None:
            return Left(images={DOTS: self.pictures[self.rank]}, example={DOTS: self.first}, number=1)
        if foreign := sorted(self.suffixes & set(FOREIGN_SUFFIXES)):
            return Left(images={f".{foreign[0]}": 1}, example={f".{foreign[0]}": self.first}, number=1)
        reason = ", ".join(f".{suffix}" if suffix else "no suffix" for suffix in sorted(self.suffixes))
        return Left(runs={reason[:80]: 1}, example={reason[:80]: self.first}, number=1)


def left_out(shard: str, reason: str, count: int, example: str) -> str:
    """What to say of pictures that are in no sample (Left.images)."""
    if reason == DOTS:
        return (
            f"{counted(count, 'image')} of shard {shard} skipped, the first is '{example}': names end at their first "
            "dot, so several share one; write the shard again by `prepare`, which gives each a name of its own"
        )
    return (
        f"{counted(count, 'image')} of shard {shard} skipped, the first is '{example}': {reason} is not decoded here; "
        "convert them, to JPEG for instance"
    )
