"""Makes one request for a part of a remote file, and tells what its failure means.

s3://, http(s)://   the answer is read as it comes: what had arrived before a connection broke is kept
other drivers       blocks of 8 MiB through fsspec's common `cat_file`: a block that breaks is asked for again

The fsspec file objects are not used: they hold a block of 50 MB and start it over when it breaks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

log = logging.getLogger(__name__)
BLOCK = 8 << 20
PIECE = 1 << 16  # aiohttp buffers a few times as much as it is asked for, and loses it when the connection breaks
STAMPS = ("ETag", "etag", "generation", "mtime", "LastModified", "Last-Modified", "updated", "created")
# Errors of connections, by class name: the drivers' modules need not be there to be recognised.
PASSING = {
    "HTTPClientError", "ConnectionError", "ConnectionClosedError", "EndpointConnectionError", "ResponseParserError",
    "IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "FSTimeoutError",
    "ClientPayloadError", "ClientConnectionError", "ServerTimeoutError", "EOFError", "TimeoutError",
}  # fmt: skip
PASSING_CODES = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}


class Answer(Protocol):
    """The bytes of a file from somewhere on. `size` is that of the whole file, `stamp` its ETag or time of change."""

    size: int
    stamp: str

    def read(self, wanted: int) -> bytes:
        """At most `wanted` bytes, b"" at the end of the answer, whether or not that is the end of the file."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    def ask(self, start: int, stop: int | None) -> Answer:
        """The bytes from `start` to `stop` (None: the end of the file)."""
        ...


def source(fs: Any, inner: str) -> Source:
    protocols = _protocols(fs)
    return _S3(fs, inner) if "s3" in protocols else _Http(fs, inner) if "http" in protocols else _Blocks(fs, inner)


def streams(fs: Any) -> bool:
    """Whether answers of this driver are read as they come."""
    return not _protocols(fs).isdisjoint(("s3", "http"))


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def stamp_of(info: dict[str, Any]) -> str:
    """The mark of change in what a driver tells of a file; every driver has its own name for it."""
    return str(next((info[key] for key in STAMPS if info.get(key)), "")).strip('"')


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if one can be found."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            if response.get("Error", {}).get("Code") in PASSING_CODES:
                return 503
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(response, int):
                return response
        for name in ("status", "status_code", "code"):
            if isinstance(value := getattr(seen, name, None), int) and 300 <= value < 600:
                return value
        seen = seen.__cause__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    # Before its status: aiohttp gives one of 400 to a body that broke off.
    if isinstance(error, (ConnectionError, TimeoutError, EOFError)) or _is_named(error, PASSING):
        return True
    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    # What s3fs makes of 503 and 500.
    return isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO)


def _is_named(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def words(error: BaseException) -> str:
    """An error of any driver in a few words, without the secrets that a URL may hold."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(://)[^/\s@]+@|\?[^\s'\")]+", r"\1", text)
    return f"{type(error).__name__}: {text[:200]}"


class _Body:
    """An answer that arrives in the event loop of an asynchronous driver."""

    def __init__(
        self, fs: Any, size: int, stamp: str, read: Callable[[int], Awaitable[bytes]], close: Callable[[], Any]
    ) -> None:
        self.size, self.stamp = size, stamp
        self._fs, self._read, self._close = fs, read, close
        self._broken: Exception | None = None

    def read(self, wanted: int) -> bytes:
        from fsspec.asyn import sync

        if self._broken is not None:
            raise self._broken
        data: bytes = sync(self._fs.loop, self._gather, wanted)
        return data

    async def _gather(self, wanted: int) -> bytes:
        # Many small pieces in one change of threads; those before a failure are not lost with it.
        parts, have = [], 0
        try:
            while have < wanted and (part := await self._read(min(PIECE, wanted - have))):
                parts.append(part)
                have += len(part)
        except Exception as error:
            if not parts:
                raise
            self._broken = error
        return b"".join(parts)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended with the program
            self._fs.loop.call_soon_threadsafe(self._close)


class _S3:
    def __init__(self, fs: Any, inner: str) -> None:
        self.fs, self.inner = _without_retries(fs), inner

    def ask(self, start: int, stop: int | None) -> Answer:
        from fsspec.asyn import sync

        try:
            answer: Answer = sync(self.fs.loop, self._ask, start, stop)
        except OSError as error:
            if status_of(error) != 416:
                raise
            return _empty(self.fs, self.inner)
        return answer

    async def _ask(self, start: int, stop: int | None) -> Answer:
        bucket, key, version = self.fs.split_path(self.inner)
        of = {"VersionId": version} if version else {}
        found = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=_range(start, stop), **of)
        body = found["Body"]
        size = int(found["ContentRange"].rpartition("/")[2]) if "ContentRange" in found else found["ContentLength"]
        return _Body(self.fs, size, found["ETag"].strip('"'), body.read, body.close)


def _without_retries(fs: Any) -> Any:
    """The same file system with no patience of its own: two patiences would multiply."""
    config = {**(fs.config_kwargs or {}), "retries": {"total_max_attempts": 1}}
    single = type(fs)(*fs.storage_args, **{**fs.storage_options, "config_kwargs": config})
    single.retries = 1
    return single


class _Http:
    def __init__(self, fs: Any, inner: str) -> None:
        self.fs, self.inner = fs, inner

    def ask(self, start: int, stop: int | None) -> Answer:
        from fsspec.asyn import sync

        answer: Answer = sync(self.fs.loop, self._ask, start, stop)
        return answer

    async def _ask(self, start: int, stop: int | None) -> Answer:
        import aiohttp

        session = await self.fs.set_session()
        # Without a limit on the whole, which may take hours, but on every wait.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
        headers = {"Range": _range(start, stop), "Accept-Encoding": "identity"}
        url = self.fs.encode_url(self.inner)
        response = await session.get(url, **{**self.fs.kwargs, "headers": headers, "timeout": patience})
        try:
            return await self._take(response, start)
        except BaseException:
            response.close()
            raise

    async def _take(self, response: Any, start: int) -> Answer:
        told = response.headers
        read, size = response.content.read, told.get("Content-Range", "").rpartition("/")[2]
        if response.status == 416:  # nothing is there from `start` on
            read = _nothing
        elif response.status == 206 and not told.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(errno.EIO, f"the server was asked for bytes from {start} and sends others")
        elif response.status != 206:
            response.raise_for_status()
            size = told.get("Content-Length", "")
        if not size.isdigit():
            raise OSError(
                errno.EIO, "the server does not tell the file's size, so nobody could say whether it is whole"
            )
        if response.status == 200 and start:
            await self._skip(response, start)
        stamp = told.get("ETag") or told.get("Last-Modified") or ""
        return _Body(self.fs, int(size), stamp.strip('"'), read, response.close)

    async def _skip(self, response: Any, start: int) -> None:
        """A server without ranges sends the file from its start: all of that again, to be thrown away."""
        host = response.url.host
        if host not in _no_ranges:
            _no_ranges.add(host)
            log.warning("%s ignores ranges: whatever lies before the wanted byte is read again; data.cache helps", host)
        left = start
        while left and (part := await response.content.read(min(left, PIECE))):
            left -= len(part)


_no_ranges: set[str] = set()  # hosts that were warned about


async def _nothing(wanted: int) -> bytes:
    return b""


class _Blocks:
    def __init__(self, fs: Any, inner: str) -> None:
        self.fs, self.inner = fs, inner

    def ask(self, start: int, stop: int | None) -> Answer:
        return _BlockAnswer(self.fs, self.inner, start, stop)


class _BlockAnswer:
    def __init__(self, fs: Any, inner: str, start: int, stop: int | None) -> None:
        self.fs, self.inner = fs, inner
        self.size, self.stamp = describe(fs, inner)
        self._at, self._stop = start, self.size if stop is None else min(stop, self.size)
        self._block = memoryview(b"")

    def read(self, wanted: int) -> bytes:
        if not self._block and self._at < self._stop:
            self._block = memoryview(
                self.fs.cat_file(self.inner, start=self._at, end=min(self._at + BLOCK, self._stop))
            )
            self._at += len(self._block)
            if self._at == self._stop and describe(self.fs, self.inner) != (self.size, self.stamp):
                return b""  # asked again, it will be seen to have changed
        data, self._block = bytes(self._block[:wanted]), self._block[wanted:]
        return data

    def close(self) -> None:
        pass


def _empty(fs: Any, inner: str) -> Answer:
    """The answer to a request for what lies behind the end."""
    size, stamp = describe(fs, inner)
    return _Body(fs, size, stamp, _nothing, lambda: None)


def describe(fs: Any, inner: str) -> tuple[int, str]:
    """(size, stamp) of a remote file, as its server has them now."""
    info = fs.info(inner)
    return int(info.get("size") or 0), stamp_of(info)


def _range(start: int, stop: int | None) -> str:
    return f"bytes={start}-" + ("" if stop is None else str(stop - 1))
