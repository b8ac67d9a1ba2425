"""Reads and writes files on local paths and fsspec URLs (s3://, gs://, memory:// …), each whole or not at all.

Every path is a plain string. Local: temporary name, fsync, rename. Object store: one PUT at the final name.
A file is therefore either absent or whole, whenever the process dies. fsspec objects are opened where they
are used (after any fork) and never kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pipeline.errors import DataError, OutputError
from pipeline.printable import redact as redact
from pipeline.storage import fork_safety as fork_safety  # before anything is opened
from pipeline.storage import range_requests, remote_file

Value = TypeVar("Value")


def is_url(path: str) -> bool:
    return "://" in path


def join(base: str, *parts: str) -> str:
    if is_url(base):
        return "/".join([base.rstrip("/"), *parts])
    return os.path.join(base, *parts)


def name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def filesystem(path: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it); `pipe:` and unknown schemes end in one sentence."""
    import fsspec

    scheme = path.split(":", 1)[0]
    try:
        # Without its memory of listings: other processes write there too.
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"cannot open {redact(path)}: {error}; known are local paths and fsspec URLs such as s3://, "
            f"gs:// or https:// (the driver of '{scheme}' may have to be installed)"
        ) from error


def exists(path: str) -> bool:
    if is_url(path):
        return ask(path, lambda fs, inner: bool(fs.exists(inner)))
    return os.path.exists(path)


def open_read(path: str) -> IO[bytes]:
    """A seekable file; behind a URL one that outlives broken connections (pipeline.storage.remote_file)."""
    if is_url(path):
        return cast(IO[bytes], remote_file.RemoteFile(*filesystem(path), redact(path)))
    return open(path, "rb")


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; fewer where the file ends before."""
    if is_url(path):
        return remote_file.read_range(*filesystem(path), redact(path), offset, size)
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
            data += more
        return data


def describe(path: str) -> tuple[int, str]:
    """(size, ETag or time of change) of the object behind a URL."""
    return ask(path, range_requests.describe)


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
    """The JSON in a file. ValueError: it is none. FileNotFoundError."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_temporary(name: str) -> bool:
    return name.startswith(".tmp-")


UMASK = os.umask(0o022)
os.umask(UMASK)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk, a user's share of it, what a file may hold


@contextlib.contextmanager
def writing(path: str) -> Iterator[str]:
    """Yield a local temporary path; when the block ends well, its content appears at `path` in one step."""
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "file")
            yield temporary
            # Not `fs.open`: when copying into it fails, closing it would put the first half in place.
            _send(path, lambda fs, inner: fs.put_file(temporary, inner))
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-{name[-200:]}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), 0o666 & ~UMASK)  # safetensors makes files that nobody else may read
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder or ".")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            f"cannot write {path}: {(error.strerror or '').lower()}; choose another place for it"
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutputError(
            f"cannot write {path}: {os.strerror(error.errno or 0).lower()}; make room there and run again: what is "
            "finished is kept"
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
        _send(path, lambda fs, inner: fs.pipe_file(inner, data))
        return
    with writing(path) as temporary:
        Path(temporary).write_bytes(data)


def copy(source: str, target: str) -> None:
    """Put a file that nobody changes in place a second time, in one step; both paths are in one store."""
    if is_url(target):
        inside = filesystem(source)[1]
        _send(target, lambda fs, inner: fs.cp_file(inside, inner))
        return
    with writing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links, or another one
            shutil.copyfile(source, temporary)


def _send(path: str, send: Callable[[Any, str], Any]) -> None:
    """Write an object; sent again while it fails for what may pass."""
    fs, inner = filesystem(path)
    try:
        remote_file.persist(redact(path), lambda: send(fs, inner), OutputError)
    except FileNotFoundError as error:
        raise OutputError(f"cannot write {redact(path)}: there is no such bucket or host; correct the name") from error


def ask(path: str, ask: Callable[[Any, str], Value]) -> Value:
    """Ask a remote file system about names; asked again while it fails for what may pass."""
    fs, inner = filesystem(path)
    return remote_file.persist(redact(path), lambda: ask(fs, inner))


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
        with contextlib.suppress(FileNotFoundError):
            ask(path, lambda fs, inner: fs.rm(inner, recursive=True))
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


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
