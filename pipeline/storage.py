"""The one module that knows where files live: local paths and fsspec URLs (s3://, gs://, memory:// …).

Every path is a plain string. Local: temporary name, fsync, rename. Object store: one PUT at the final name.
A file is therefore either absent or whole, whenever the process dies. fsspec objects are opened where they
are used (after any fork) and never kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.errors import DataError, OutputError

LOCK_NAME = ".lock"
LOCK_STALE_SECONDS = 60.0


def is_url(path: str) -> bool:
    return "://" in path


def join(base: str, *parts: str) -> str:
    if is_url(base):
        return "/".join([base.rstrip("/"), *parts])
    return os.path.join(base, *parts)


def name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def redact(path: str) -> str:
    """The path as it may be recorded: URLs without user info and query."""
    if not is_url(path):
        return path
    url = urlsplit(path)
    if "@" not in url.netloc and not url.query:
        return path  # as it is: taking apart and joining again would lose slashes of sqlite:////
    host = url.netloc.rpartition("@")[2]
    return urlunsplit((url.scheme, host, url.path, "", ""))


def filesystem(path: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it); `pipe:` and unknown schemes end in one sentence."""
    import fsspec

    scheme = path.split(":", 1)[0]
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"cannot open {redact(path)}: {error}; known are local paths and fsspec URLs such as s3://, "
            f"gs:// or https:// (the driver of '{scheme}' may have to be installed)"
        ) from error


def exists(path: str) -> bool:
    if is_url(path):
        fs, inner = filesystem(path)
        return bool(fs.exists(inner))
    return os.path.exists(path)


def listdir(path: str) -> list[str]:
    """Sorted names directly inside a folder, without temporary files; [] where there is no such folder."""
    if is_url(path):
        fs, inner = filesystem(path)
        fs.invalidate_cache()
        try:
            names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False)]
        except FileNotFoundError:
            return []
    else:
        try:
            names = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for name in names if not is_temporary(name))


def walk(path: str) -> dict[str, int]:
    """{path relative to the folder: bytes} of every file below it, without temporary files."""
    if is_url(path):
        fs, inner = filesystem(path)
        fs.invalidate_cache()
        root = fs._strip_protocol(inner).rstrip("/")
        found = fs.find(root, detail=True)
        sizes = {name[len(root) + 1 :]: int(info["size"] or 0) for name, info in found.items()}
    else:
        base = Path(path)
        sizes = {}
        for file in base.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a file that vanished while we looked
                if file.is_file():
                    sizes[file.relative_to(base).as_posix()] = file.stat().st_size
    return {name: size for name, size in sorted(sizes.items()) if not is_temporary(name.rsplit("/", 1)[-1])}


def open_read(path: str) -> IO[bytes]:
    if is_url(path):
        fs, inner = filesystem(path)
        return fs.open(inner, "rb")
    return open(path, "rb")


def read_bytes(path: str) -> bytes:
    with open_read(path) as file:
        return file.read()


def sha256(path: str) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def is_temporary(name: str) -> bool:
    return name.startswith(".tmp-")


@contextlib.contextmanager
def writing(path: str) -> Iterator[str]:
    """Yield a local temporary path; when the block ends well, its content appears at `path` in one step."""
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "file")
            yield temporary
            fs, inner = filesystem(path)
            with open(temporary, "rb") as source, fs.open(inner, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-{name[-200:]}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder or ".")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            f"cannot write {path}: {(error.strerror or '').lower()}; choose another place for it"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def sync_folder(folder: str) -> None:
    """Make the names in a local folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str, data: bytes) -> None:
    if is_url(path):
        fs, inner = filesystem(path)
        fs.pipe_file(inner, data)
        return
    with writing(path) as temporary:
        Path(temporary).write_bytes(data)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n").encode())


def make_folder(path: str) -> None:
    if is_url(path):
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {path}: {error.strerror}; choose another `output`") from error


def remove(path: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
    if is_url(path):
        fs, inner = filesystem(path)
        if fs.exists(inner):
            fs.rm(inner, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sweep(folder: str) -> None:
    """Delete the temporary files that killed writers left in a local folder (only while holding its lock)."""
    if is_url(folder) or not os.path.isdir(folder):
        return
    for parent, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            if is_temporary(name):
                remove(os.path.join(parent, name))


TOKEN_NAME = ".token"


def write_token(output: str) -> str:
    """A fresh word in `output`; every worker must be able to read it (`require_token`)."""
    token = uuid.uuid4().hex
    write_bytes(join(output, TOKEN_NAME), token.encode())
    return token


def require_token(output: str, token: str) -> None:
    """OutputError unless this process sees the same `output` as the driver."""
    try:
        found = read_bytes(join(output, TOKEN_NAME)).decode()
    except OSError:
        found = ""
    if found != token:
        raise OutputError(
            f"a worker on {os.uname().nodename} does not see the driver's files in {redact(output)}: the path is not "
            "shared by the nodes; set `output` to a folder on shared storage or to a URL such as s3://bucket/run"
        )


@contextlib.contextmanager
def lock(output: str) -> Iterator[None]:
    """Hold `output` for this run. A second run on the same output at the same time is an OutputError.

    Local: flock on `.lock`, freed by the kernel when the process dies. Object store: a lock object with a
    heartbeat, stale after 60 s.
    """
    if is_url(output):
        with _lock_object(output):
            yield
        return
    make_folder(output)
    try:
        file = open(os.path.join(output, LOCK_NAME), "a+")  # noqa: SIM115 - held open for the whole run
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
        yield


@contextlib.contextmanager
def _lock_object(output: str) -> Iterator[None]:
    path, mine = join(output, LOCK_NAME), uuid.uuid4().hex
    fs, inner = filesystem(path)

    def beat() -> None:
        fs.pipe_file(inner, json.dumps({"owner": mine, "time": time.time()}).encode())

    if exists(path):
        held = read_json(path)
        age = time.time() - held["time"]
        if age < LOCK_STALE_SECONDS:
            raise OutputError(
                f"output {redact(output)} is in use by another run (its lock was renewed {age:.0f} s ago); "
                f"wait for it to end, or {LOCK_STALE_SECONDS:.0f} s if it was killed, or choose another `output`"
            )
        remove(path)
    try:
        # Conditional creation: of two runs that start together only one wins.
        fs.pipe_file(inner, json.dumps({"owner": mine, "time": time.time()}).encode(), mode="create")
    except FileExistsError as error:
        raise OutputError(f"output {redact(output)} is in use by another run; choose another `output`") from error
    except TypeError:  # a file system without conditional creation
        beat()
    stop = threading.Event()

    def heart() -> None:
        while not stop.wait(LOCK_STALE_SECONDS / 4):
            with contextlib.suppress(Exception):
                beat()

    thread = threading.Thread(target=heart, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        remove(path)
