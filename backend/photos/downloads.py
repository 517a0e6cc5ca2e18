"""HTTP as far as photos need it: one GET within limits, redirects by hand, tokens on Label Studio's own origin only.

Knows HTTP. Knows neither tasks nor pixels. Neither a token nor the query of a URL (it may be a signature) ever stands
in a message; errors are raised without their cause, which could quote one.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

import certifi

from backend.errors import PhotoError, PhotoForbidden, PhotoMissing, PhotoTooLarge, PhotoUnreachable
from backend.photos.addresses import Address, Origin, connect
from backend.photos.tokens import Authorizations, LabelStudio, is_jwt

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
CHUNK_BYTES = 1 << 16
MAX_TOKEN_ANSWER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Download:
    """What was fetched. content_type: as the server named it, or empty."""

    content: bytes
    content_type: str


class Downloader:
    """Fetches over http(s). Thread-safe.

    allow_private: whether loopback and private IP addresses may be asked.
    trusted: an origin that may be asked on such an address all the same, or None.
    max_bytes: the largest body that is taken.
    """

    def __init__(self, *, allow_private: bool, trusted: Origin | None, max_bytes: int) -> None:
        self._allow_private = allow_private
        self._trusted = trusted
        self._max_bytes = max_bytes
        self._authorizations = Authorizations(self._exchange_token)

    def get(self, asked: Address, *, label_studio: LabelStudio | None, until: float) -> Download:
        """The body behind an address.

        label_studio: its token goes along while the address, and every redirect so far, is on its origin.
        until: `time.monotonic()` value by which all has to be there, redirects and token exchange included.
        Raises PhotoUnreachable, PhotoForbidden, PhotoTooLarge.
        """
        address, redirects, refused = asked, 0, None
        token_owner = label_studio if label_studio is not None and label_studio.token else None
        while True:
            if token_owner is not None and address.origin != token_owner.address.origin:
                token_owner = None
            headers = {}
            if token_owner is not None:
                headers["Authorization"] = self._authorizations.header(token_owner, until=until, refused=refused)
            with self._request(address, headers=headers, until=until) as response:
                location = response.headers.get("Location")
                if response.status == HTTPStatus.OK:
                    return self._read(response, address, self._max_bytes)
                if response.status in REDIRECTS and location:
                    redirects += 1
                    if redirects > MAX_REDIRECTS:
                        raise PhotoUnreachable(f"{asked.shown!r}: expected at most {MAX_REDIRECTS} redirects, got more")
                    address = address.redirected(location)
                elif response.status == HTTPStatus.UNAUTHORIZED and token_owner is not None and refused is None:
                    # A personal token's access token may have been revoked early: once more, with a new one.
                    if not token_owner.token_is_personal:
                        raise _not_ok(response.status, asked, address, label_studio, token_sent=True)
                    refused = headers["Authorization"]
                else:
                    raise _not_ok(response.status, asked, address, label_studio, token_sent=token_owner is not None)

    def _exchange_token(self, label_studio: LabelStudio, until: float) -> str:
        address = label_studio.address.at("/api/token/refresh/")
        body = json.dumps({"refresh": label_studio.token}).encode()
        headers = {"Content-Type": "application/json"}
        with self._request(address, method="POST", headers=headers, body=body, until=until) as response:
            if response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise PhotoForbidden(
                    f"{address.shown!r}: expected an access token for the personal one, got "
                    f"{_phrase(response.status)}; LABEL_STUDIO_API_KEY is wrong, expired or revoked"
                )
            if response.status != HTTPStatus.OK:
                raise PhotoUnreachable(f"{address.shown!r}: expected 200 OK, got {_phrase(response.status)}")
            content = self._read(response, address, MAX_TOKEN_ANSWER_BYTES).content
        try:
            token = json.loads(content)["access"]
        except (ValueError, KeyError, TypeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not is_jwt(token):
            raise PhotoUnreachable(f"{address.shown!r}: expected JSON with an access token, got something else")
        return token

    @contextmanager
    def _request(
        self,
        address: Address,
        *,
        method: str = "GET",
        headers: Mapping[str, str],
        body: bytes | None = None,
        until: float,
    ) -> Iterator[http.client.HTTPResponse]:
        """One request and its response; cut off at `until`, however slowly the single bytes come."""
        started = time.monotonic()
        allow_private = self._allow_private or address.origin == self._trusted
        sock = connect(address, allow_private=allow_private, until=until)
        try:
            with _cut_off(sock, until):
                if address.origin.scheme == "https":
                    sock = tls_context().wrap_socket(sock, server_hostname=address.origin.host)
                connection = http.client.HTTPConnection(address.origin.host, address.origin.port)
                connection.sock = sock  # so it opens none of its own
                accepted = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity", "Connection": "close"}
                connection.request(
                    method, address.target, body=body, headers={"Host": address.host_header, **accepted, **headers}
                )
                with closing(connection.getresponse()) as response:
                    yield response
                if time.monotonic() >= until:
                    raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _reason(error) if time.monotonic() < until else f"no end within {until - started:.1f} s"
            raise PhotoUnreachable(f"{address.shown!r}: expected an answer, got: {reason}") from None
        finally:
            sock.close()

    def _read(self, response: http.client.HTTPResponse, address: Address, max_bytes: int) -> Download:
        announced = response.length
        if announced is not None and announced > max_bytes:
            raise PhotoTooLarge(f"{address.shown!r}: expected at most {max_bytes:,} bytes, got {announced:,}")
        chunks, size = [], 0
        while chunk := response.read(CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise PhotoTooLarge(f"{address.shown!r}: expected at most {max_bytes:,} bytes, got more")
        if announced is not None and size < announced:
            raise ConnectionError(f"{size:,} of {announced:,} bytes")
        return Download(content=b"".join(chunks), content_type=response.headers.get("Content-Type", ""))


@contextmanager
def _cut_off(sock: socket.socket, until: float) -> Iterator[None]:
    """Ends the connection at `until`. A time-out of the socket alone bounds each read, but not their sum."""
    lifeline = sock.dup()  # survives the wrapping in TLS

    def cut() -> None:
        with suppress(OSError):  # the peer may have ended it already
            lifeline.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, until - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        lifeline.close()


@cache
def tls_context() -> ssl.SSLContext:
    """Trusts the system's certificates, those of `SSL_CERT_FILE`, and certifi's where the system has none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"a certificate that does not hold ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"broken TLS ({error.reason})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error) is ConnectionError:
        return str(error)
    return type(error).__name__


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _not_ok(
    status: int, asked: Address, answering: Address, label_studio: LabelStudio | None, *, token_sent: bool
) -> PhotoError:
    message = f"{asked.shown!r}: expected 200 OK, got {_phrase(status)}"
    if answering != asked:
        message += f" from {answering.shown!r}"
    if status not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        gone = status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
        return PhotoMissing(message) if gone else PhotoUnreachable(message)
    if token_sent:
        message += (
            "; Label Studio refuses the access token: set LABEL_STUDIO_API_KEY (legacy tokens may be disabled there)"
        )
    elif label_studio is not None and asked.origin == label_studio.address.origin:
        if label_studio.token:
            message += "; the access token was not sent there, as it is not Label Studio's own address"
        else:
            message += "; no access token is known: set LABEL_STUDIO_API_KEY"
    return PhotoForbidden(message)
