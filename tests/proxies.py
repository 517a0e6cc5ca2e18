"""A Label Studio that cannot be relied on: an HTTP proxy in front of a real one that fails on purpose."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

# What becomes of a request: a status instead of an answer; a page, as proxies show when they have nothing better; no
# answer, before or after Label Studio has got it; or the request sent to it twice, as when an answer was late and
# something in between tried again.
Fault = Literal["401", "429", "500", "page", "drop", "swallow", "twice"]


class Unreliable(ThreadingHTTPServer):
    """Forwards to `target`. fault: method, path and how many such requests came before → what goes wrong, or None.

    faults: what went wrong so far. count: how many requests of a method and a path have come.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, fault: Callable[[str, str, int], Fault | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.fault = fault
        self.faults: list[str] = []
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, path: str) -> int:
        with self._lock:
            return self._counts.get((method, path), 0)

    def next_fault(self, method: str, path: str) -> Fault | None:
        kind = path.partition("?")[0]
        with self._lock:
            before = self._counts.get((method, kind), 0)
            self._counts[method, kind] = before + 1
            fault = self.fault(method, kind, before)
            if fault is not None:
                self.faults.append(fault)
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    server: Unreliable
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command, self.path)
        if fault in ("401", "429", "500", "page"):
            content = b"<html>be right back</html>" if fault == "page" else b""
            self.send_response(200 if fault == "page" else int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        if fault == "drop":
            self._hang_up()
            return
        for _ in range(2 if fault == "twice" else 1):
            status, headers, content = self._ask(body)
        if fault in ("swallow", "twice"):
            self._hang_up()
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _forward

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        target = self.server.target
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextmanager
def unreliable(target: str, fault: Callable[[str, str, int], Fault | None]) -> Iterator[Unreliable]:
    """The proxy, listening."""
    server = Unreliable(target, fault)
    thread = threading.Thread(target=server.serve_forever, name="proxy", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
