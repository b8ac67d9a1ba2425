"""Lets one run at a time work on an output folder.

Local: flock on `.lock`, freed by the kernel when the process dies; what was forked from it lets go at once.
Object store: a lock object, created on the condition that there is none and written again every 15 s; one that
was not for 60 s is stale and may be taken: on S3 by a write on the condition that its ETag, which is that of its
owner, is still the one that was looked at. Ages are differences of the server's times of two objects, so clocks
that are wrong do no harm. Other stores leave a moment in which two runs could both believe to hold it; the first
one finds out before its next stage (`Held.check`), and each file of a run is whole and the same whoever writes it.

Libraries such as filelock were not taken: they lock local files only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.storage import remote_file

LOCK_NAME = ".lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 60.0

_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])  # it may outlive us


class Held:
    """A lock that this run holds; `mine` asks whether it still does."""

    def __init__(self, output: str, mine: Callable[[], bool]) -> None:
        self.output, self.mine = output, mine

    def check(self) -> None:
        """OutputError where another run has taken the lock: what both would write next is that run's to write."""
        if not self.mine():
            raise OutputError(
                f"output {storage.redact(self.output)} was taken by another run while this one stood still (its lock "
                "is another's now); wait for that run to end, then run again: what is finished is kept"
            )


@contextlib.contextmanager
def lock(output: str) -> Iterator[Held]:
    """Hold `output` for this run. A second run on the same output at the same time is an OutputError."""
    with _lock_object(output) if storage.is_url(output) else _lock_file(output) as mine:
        yield Held(output, mine)


@contextlib.contextmanager
def _lock_file(output: str) -> Iterator[Callable[[], bool]]:
    storage.make_folder(output)
    path = Path(output, LOCK_NAME)
    files = [_take_file(path, output)]

    def mine() -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(files[-1].fileno()))
        except FileNotFoundError:  # deleted by hand: whoever is first now holds the next one
            with contextlib.suppress(OutputError):
                files.append(_take_file(path, output))
                return True
        return False

    try:
        yield mine
    finally:
        for file in files:
            _held.discard(file)
            file.close()


def _take_file(path: Path, output: str) -> IO[str]:
    """The lock file, held as long as it is open."""
    try:
        file = path.open("a+")
    except OSError as error:
        raise OutputError(f"output {output} is not writable: {error.strerror}; choose another `output`") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise OutputError(
            f"output {output} is in use by {holder}; wait for that run to end, stop it, or choose another `output`"
        ) from error
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()}\n")
    file.flush()
    _held.add(file)
    return file


@contextlib.contextmanager
def _lock_object(output: str) -> Iterator[Callable[[], bool]]:
    path = storage.join(output, LOCK_NAME)
    mine = json.dumps({"owner": uuid.uuid4().hex}).encode()
    if not _create(path, mine):
        age, etag = _look(path)
        if age is not None and age < STALE_SECONDS:
            raise OutputError(
                f"output {storage.redact(output)} is in use by another run (its lock was renewed {age:.0f} s ago); "
                f"wait for it to end, or {STALE_SECONDS:.0f} s if it was killed, or choose another `output`"
            )
        if not _replace(path, etag, mine):
            raise OutputError(
                f"output {storage.redact(output)} was taken by another run just now; wait for it to end, or choose "
                "another `output`"
            )
    _, etag = _look(path)
    stop = threading.Event()

    def still_mine() -> bool:
        return _read(path) == mine or _create(path, mine)

    def heart() -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a beat that fails is made up for by the next
                if still_mine():  # else it was taken while this process stood still
                    _write_over(path, etag, mine)

    thread = threading.Thread(target=heart, daemon=True)
    thread.start()
    try:
        yield still_mine
    finally:
        stop.set()
        thread.join()
        if _read(path) == mine:
            storage.remove(path)


def _create(path: str, content: bytes) -> bool:
    """Write the object if there is none; whether it is ours now."""
    fs, inner = storage.filesystem(path)

    def create() -> Any:
        try:
            return fs.pipe_file(inner, content, mode="create")
        except TypeError:  # a file system without conditional creation
            return fs.exists(inner) or fs.pipe_file(inner, content)

    # A creation whose answer was lost is refused when it is tried again, though it is ours.
    with contextlib.suppress(FileExistsError):
        remote_file.persist(storage.redact(path), create, OutputError)
    return _read(path) == content


def _read(path: str) -> bytes | None:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


def _replace(path: str, etag: str | None, content: bytes) -> bool:
    """`_write_over`, and whether the object is ours now."""
    _write_over(path, etag, content)
    return _read(path) == content


def _write_over(path: str, etag: str | None, content: bytes) -> None:
    """Write over the object with this ETag, if it is that one; without an ETag over whatever is there."""
    fs, inner = storage.filesystem(path)

    def put() -> Any:
        try:
            return fs.pipe_file(inner, content, **({"IfMatch": etag} if etag else {}))
        except OSError as error:
            if etag and error.errno == errno.EINVAL:  # S3's answer where the condition does not hold
                raise FileExistsError(errno.EEXIST, "it is another's", path) from error
            raise

    # As in `_create`, a try more after a lost answer.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        remote_file.persist(storage.redact(path), put, OutputError)


def _look(path: str) -> tuple[float | None, str | None]:
    """(seconds since the object was written, by the clock of its server, its ETag where writing on the condition of one
    is known to work); None where it is gone."""
    probe = f"{path}-{uuid.uuid4().hex[:8]}"
    storage.write_bytes(probe, b"")
    try:
        now, found = storage.ask(probe, lambda fs, inner: (fs.modified(inner), fs.protocol))
        etag = storage.ask(path, lambda fs, inner: fs.info(inner).get("ETag")) if "s3" in found else None
        then = storage.ask(path, lambda fs, inner: fs.modified(inner))
        return float((now - then).total_seconds()), etag
    except FileNotFoundError:
        return None, None
    finally:
        storage.remove(probe)
