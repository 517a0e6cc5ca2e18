"""Connections for HTTP that are opened to judged IP addresses only, end at a deadline, and are used again.

Knows sockets and TLS, as httpcore asks for them. Knows neither HTTP nor tokens nor photos.

Every `timeout` here is a `time.monotonic()` value by which all has to be done, not a number of seconds: so one deadline
holds for a whole answer, however slowly its single bytes come. httpcore hands timeouts through as they are.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import certifi
import httpcore

from backend.photos.addresses import Origin, connect

KEPT_CONNECTIONS = 16
KEPT_IDLE_S = 10.0
QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux


def open_pool(*, allow_private: bool, trusted: Origin | None) -> httpcore.ConnectionPool:
    """Connections by origin; idle ones are kept for KEPT_IDLE_S. There is no limit on those in use.

    allow_private: whether loopback and private IP addresses may be asked. trusted: an origin that may be in any case.
    """
    logging.getLogger("httpcore").setLevel(logging.INFO)  # its debugging lines quote signed addresses of redirects
    backend = _JudgedNetwork(allow_private=allow_private, trusted=trusted)
    return httpcore.ConnectionPool(
        ssl_context=tls_context(),
        network_backend=backend,
        max_connections=None,
        max_keepalive_connections=KEPT_CONNECTIONS,
        keepalive_expiry=KEPT_IDLE_S,
    )


@cache
def tls_context() -> ssl.SSLContext:
    """Trusts the system's certificates, those of `SSL_CERT_FILE`, and certifi's where the system has none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


class _JudgedNetwork(httpcore.NetworkBackend):
    def __init__(self, *, allow_private: bool, trusted: Origin | None) -> None:
        self._allow_private = allow_private
        self._trusted = (trusted.host, trusted.port) if trusted else None

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        until = _deadline(timeout)
        allow_private = self._allow_private or (host, port) == self._trusted
        sock = connect(host, port, allow_private=allow_private, until=until)
        return _Stream(sock)


class _Stream(httpcore.NetworkStream):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if QUICK_ACK is not None:
            # Servers that send head and body apart, such as Label Studio's own, wait for the head to be acknowledged,
            # which on a connection that is used again takes 40 ms. The system forgets the option, so it is set again.
            self._sock.setsockopt(socket.IPPROTO_TCP, QUICK_ACK, 1)
        self._sock.settimeout(_left_s(timeout))
        return self._sock.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._sock.settimeout(_left_s(timeout))
        try:
            self._sock.sendall(buffer)
        except TimeoutError:
            raise
        except OSError as error:  # httpcore then looks whether the server has answered before it hung up
            raise httpcore.WriteError from error

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._sock.settimeout(_left_s(timeout))
            return _Stream(ssl_context.wrap_socket(self._sock, server_hostname=server_hostname))
        except BaseException:
            self.close()
            raise

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: whether there is something to read; of an idle connection, that the server has closed it."""
        if info != "is_readable":
            return None
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))


def _deadline(timeout: float | None) -> float:
    if timeout is None:
        raise ValueError("timeout: expected a time.monotonic() value to be done by, got None")
    return timeout


def _left_s(timeout: float | None) -> float:
    left_s = _deadline(timeout) - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
