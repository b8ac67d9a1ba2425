"""Finds the jobs and recipes that come with the package: the folders jobs/ and conf/ of the repository.

A wheel holds them inside `pipeline`; in a checkout, an editable installation of it included, they lie beside that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pipeline.errors import ConfigError

JOBS, CONF = "jobs", "conf"


@dataclass(frozen=True)
class Shipped:
    """A job file that comes with the package: its name, the first sentence of its comment, and how long that says it
    takes."""

    name: str
    what: str
    time: str


def folder(name: str) -> Path:
    """Where `jobs` or `conf` lies."""
    package = Path(str(resources.files("pipeline")))
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def job_path(job: Path) -> Path:
    """The file that is meant: the path as written, or else a shipped job of this name. ConfigError: neither is there.

    `noisy_student`, `noisy_student.yaml` and `jobs/noisy_student.yaml` all name the shipped one.
    """
    if _is_file(job):
        return job
    if found := named(job):
        return found
    if job.exists():  # a folder, a pipe
        return job
    close = difflib.get_close_matches(_stem(job), [path.stem for path in _job_files()], 3, 0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"there is no job file {job}; {hint}name a file, or one of the shipped jobs that `noisy-lambda jobs` lists"
    )


def named(job: Path) -> Path | None:
    """The shipped job of this name."""
    found = folder(JOBS) / f"{_stem(job)}.yaml"
    return found if job.parent in (Path(), Path(JOBS)) and found.is_file() else None


def jobs() -> list[Shipped]:
    """All shipped jobs, by name."""
    return [_described(path) for path in _job_files()]


def _job_files() -> list[Path]:
    return sorted(folder(JOBS).glob("*.yaml"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a folder that may not be looked into: reading the file will say so
        return True


def _stem(job: Path) -> str:
    return job.name.removesuffix(".yaml")


def _described(path: Path) -> Shipped:
    comment = list(_header(path.read_text(encoding="utf-8")))
    sentence = re.split(r"(?<=\.)\s", " ".join(comment).strip())[0]
    time = next((line.removeprefix("Time").strip() for line in comment if line.startswith("Time ")), "")
    return Shipped(path.stem, sentence, re.split(r" \(|;|\.(?=\s|$)", time)[0])


def _header(text: str) -> Iterator[str]:
    """The lines of the comment at the top, below the shebang."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        if not line.startswith("#!"):
            yield line.removeprefix("#").strip()
