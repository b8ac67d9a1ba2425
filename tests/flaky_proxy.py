"""A small HTTP proxy before a server, which breaks things on purpose and counts what it was asked.

Requests are forwarded one to one; what goes wrong is drawn from a seeded schedule or given as a list.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens to one request. `status`: this answer instead of the server's. `cut`: the connection is closed after
    so many bytes of the answer's body. `lost`: the request reaches the server, its answer never comes back.
    `pause`: seconds before every 64 KiB of the body."""

    status: int | None = None
    cut: int | None = None
    lost: bool = False
    pause: float = 0.0


@dataclass
class Seen:
    """One request as it came, and how many bytes of the answer's body were sent so far."""

    method: str
    path: str
    start: int | None  # of the range asked for
    stop: int | None
    fault: Fault | None
    sent: int = 0


@dataclass
class Schedule:
    """Faults for requests whose `method path` matches: the listed ones first, then each with probability `share`."""

    only: str = ""
    listed: list[Fault | None] = field(default_factory=list)
    share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, request: str) -> Fault | None:
        if not re.search(self.only, request):
            return None
        if self.listed:
            return self.listed.pop(0)
        if self._random.random() >= self.share:
            return None
        return self._random.choice([
            Fault(status=500),
            Fault(status=503),
            Fault(lost=True),
            Fault(cut=0),
            Fault(cut=self._random.randrange(1, 300_000)),
            Fault(pause=0.002),
        ])  # fmt: skip


class Proxy:
    """Listens on loopback; `seen` grows by one for every request."""

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.schedule = Schedule()
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @contextlib.contextmanager
    def faults(self, *listed: Fault | None, only: str = "", share: float = 0.0, seed: int = 0) -> Iterator[list[Seen]]:
        """The requests seen inside the block, which meet these faults."""
        self.schedule, before = Schedule(only, list(listed), share, seed), len(self.seen)
        found: list[Seen] = []
        try:
            yield found
        finally:
            self.schedule = Schedule()
            found.extend(self.seen[before:])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def forward(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = (
                self._chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
            )
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (None, None)
            with proxy.lock:
                fault = proxy.schedule.draw(f"{self.command} {self.path}")
                seen = Seen(self.command, self.path, start, stop, fault)
                proxy.seen.append(seen)
            try:
                if fault is not None and fault.status is not None:
                    self._refuse(fault.status)
                else:
                    self._answer(body, fault or Fault(), seen)
            except (BrokenPipeError, ConnectionResetError):  # the client has had enough
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = forward

        def _chunked(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def _refuse(self, status: int) -> None:
            text = b"<html><body>the proxy says no</body></html>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _answer(self, body: bytes, fault: Fault, seen: Seen) -> None:
            server = http.client.HTTPConnection(*proxy.target, timeout=60)
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
            }
            server.request(
                self.command, self.path, body=body or None, headers=headers | {"Content-Length": str(len(body))}
            )
            answer = server.getresponse()
            data = answer.read()
            server.close()
            if fault.lost:
                self.close_connection = True
                return
            self.send_response(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "server", "date"):
                    self.send_header(name, value)
            length = str(len(data)) if self.command != "HEAD" else answer.getheader("Content-Length", "0")
            self.send_header("Content-Length", length)
            self.end_headers()
            whole = memoryview(data)[: fault.cut]
            while seen.sent < len(whole):
                time.sleep(fault.pause)
                part = whole[seen.sent : seen.sent + 65_536]
                seen.sent += len(part)  # before a reader has it, and may ask
                self.wfile.write(part)
            if len(whole) < len(data):
                self.close_connection = True

    return Handler
