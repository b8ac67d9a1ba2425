"""Lets one run at a time work on an output folder.

Local: flock on `.lock`, freed by the kernel when the process dies; what was forked from it lets go at once.
Object store: a lock object, created on the condition that there is none and written again every 15 s; one that
was not for 60 s is stale and may be taken. Ages are differences of the server's times of two objects, so clocks
that are wrong do no harm. Stores without conditional creation leave a moment in which two runs could both
believe to hold it; each file of a run is whole and the same whoever writes it, so even then nothing is lost.

Libraries such as filelock were not taken: they lock local files only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Iterator
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


@contextlib.contextmanager
def lock(output: str) -> Iterator[None]:
    """Hold `output` for this run. A second run on the same output at the same time is an OutputError."""
    with _lock_object(output) if storage.is_url(output) else _lock_file(output):
        yield


@contextlib.contextmanager
def _lock_file(output: str) -> Iterator[None]:
    storage.make_folder(output)
    try:
        file = Path(output, LOCK_NAME).open("a+")  # noqa: SIM115 - held open for the whole run
    except OSError as error:
        raise OutputError(f"output {output} is not writable: {error.strerror}; choose another `output`") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OutputError(
                f"output {output} is in use by {holder}; wait for that run to end, stop it, or choose another `output`"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}\n")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


@contextlib.contextmanager
def _lock_object(output: str) -> Iterator[None]:
    path = storage.join(output, LOCK_NAME)
    mine = json.dumps({"owner": uuid.uuid4().hex}).encode()
    if not _create(path, mine):
        age = _age(path)
        if age is not None and age < STALE_SECONDS:
            raise OutputError(
                f"output {storage.redact(output)} is in use by another run (its lock was renewed {age:.0f} s ago); "
                f"wait for it to end, or {STALE_SECONDS:.0f} s if it was killed, or choose another `output`"
            )
        storage.remove(path)
        if not _create(path, mine):
            raise OutputError(
                f"output {storage.redact(output)} was taken by another run just now; wait for it to end, or choose "
                "another `output`"
            )
    stop = threading.Event()

    def heart() -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a beat that fails is made up for by the next
                if _read(path) in (mine, None):  # else it was taken while this process stood still
                    storage.write_bytes(path, mine)

    thread = threading.Thread(target=heart, daemon=True)
    thread.start()
    try:
        yield
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


def _age(path: str) -> float | None:
    """Seconds since the object was written, by the clock of its server; None where it is gone."""
    probe = f"{path}-{uuid.uuid4().hex[:8]}"
    storage.write_bytes(probe, b"")
    try:
        now, then = (storage.ask(name, lambda fs, inner: fs.modified(inner)) for name in (probe, path))
        return float((now - then).total_seconds())
    except FileNotFoundError:
        return None
    finally:
        storage.remove(probe)
