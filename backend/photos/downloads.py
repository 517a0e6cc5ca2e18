"""HTTP as far as photos need it: one GET within limits, redirects by hand, tokens on Label Studio's own origin only.

Knows HTTP. Knows neither sockets nor tasks nor pixels. Neither a token nor the query of a URL (it may be a signature)
ever stands in a message; errors are raised without their cause, which could quote one.
"""

from __future__ import annotations

import json
import ssl
import time
import weakref
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote

import httpcore

from backend.errors import (
    PhotoDecodeError,
    PhotoError,
    PhotoForbidden,
    PhotoMissing,
    PhotoTooLarge,
    PhotoUnreachable,
    photo_label,
)
from backend.photos.addresses import Address, Origin
from backend.photos.connections import open_pool
from backend.photos.tokens import Authorizations, LabelStudio, is_jwt

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_TOKEN_ANSWER_BYTES = 1 << 16
MAX_SKIPPED_BYTES = 1 << 16  # of an answer that is only read so that its connection can be used again

GZIP_MAGIC = b"\x1f\x8b"

_FAILURES = (OSError, httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)


@dataclass(frozen=True, kw_only=True)
class Download:
    """What was fetched. content_type: as the server named it, or empty."""

    content: bytes
    content_type: str


class Downloader:
    """Fetches over http(s) and keeps connections for the next photo. Thread-safe.

    allow_private: whether loopback and private IP addresses may be asked.
    trusted: an origin that may be asked on such an address all the same, or None.
    max_bytes: the largest body that is taken, as it comes and after decompression.
    """

    def __init__(self, *, allow_private: bool, trusted: Origin | None, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pool = open_pool(allow_private=allow_private, trusted=trusted)
        weakref.finalize(self, self._pool.close)
        self._authorizations = Authorizations(self._exchange_token)

    def get(self, asked: Address, *, label_studio: LabelStudio | None, until: float) -> Download:
        """The body behind an address.

        label_studio: its token goes along while the address, and every redirect so far, is on its origin.
        until: `time.monotonic()` value by which all has to be there, redirects and token exchange included.
        Raises PhotoUnreachable, PhotoForbidden, PhotoTooLarge, PhotoDecodeError; their messages name other addresses
        than `asked`.
        """
        token_owner = label_studio if label_studio is not None and label_studio.token else None
        address = asked
        for _ in range(MAX_REDIRECTS + 1):
            if token_owner is not None and address.origin != token_owner.address.origin:
                token_owner = None
            with ExitStack() as labels:
                if address != asked:
                    labels.enter_context(photo_label(address.label))
                answer = self._ask(address, token_owner, until)
                if answer.status == HTTPStatus.OK:
                    return Download(content=answer.content, content_type=answer.text("content-type"))
                if answer.status not in REDIRECTS or not answer.location:
                    raise _not_ok(answer.status, asked, label_studio, token_sent=token_owner is not None)
                address = address.redirected(answer.location)
        raise PhotoUnreachable(f"expected at most {MAX_REDIRECTS} redirects, got more")

    def _ask(self, address: Address, token_owner: LabelStudio | None, until: float) -> _Answer:
        if token_owner is None:
            return self._request(address, until=until, max_bytes=self._max_bytes)
        authorization = self._authorizations.header(token_owner, until=until)
        answer = self._request(
            address, headers={"Authorization": authorization}, until=until, max_bytes=self._max_bytes
        )
        if answer.status == HTTPStatus.UNAUTHORIZED and token_owner.token_is_personal:
            # Its access token may have been revoked early: once more, with a new one.
            authorization = self._authorizations.header(token_owner, until=until, refused=authorization)
            answer = self._request(
                address, headers={"Authorization": authorization}, until=until, max_bytes=self._max_bytes
            )
        return answer

    def _exchange_token(self, label_studio: LabelStudio, until: float) -> str:
        address = label_studio.address.at("/api/token/refresh/")
        with photo_label(address.label):
            answer = self._request(
                address,
                method="POST",
                headers={"Content-Type": "application/json"},
                content=json.dumps({"refresh": label_studio.token}).encode(),
                until=until,
                max_bytes=MAX_TOKEN_ANSWER_BYTES,
            )
            if answer.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise PhotoForbidden(
                    f"expected an access token for the personal one, got {_phrase(answer.status)}; "
                    "LABEL_STUDIO_API_KEY is wrong, expired or revoked"
                )
            if answer.status != HTTPStatus.OK:
                raise PhotoUnreachable(f"expected 200 OK, got {_phrase(answer.status)}")
            try:
                token = json.loads(answer.content)["access"]
            except (ValueError, KeyError, TypeError, RecursionError):
                token = None
            if not isinstance(token, str) or not token.isascii() or not is_jwt(token):
                raise PhotoUnreachable("expected JSON with an access token, got something else")
            return token

    def _request(
        self,
        address: Address,
        *,
        method: str = "GET",
        headers: Mapping[bytes | str, bytes | str] | None = None,
        content: bytes | None = None,
        until: float,
        max_bytes: int,
    ) -> _Answer:
        """One request and its whole answer, all of it by `until`. max_bytes: of the body, if the status is 200."""
        origin = address.origin
        url = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=address.target)
        all_headers: dict[bytes | str, bytes | str] = {
            "Host": address.host_header,
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
            **(headers or {}),
        }
        timeouts = dict.fromkeys(("connect", "read", "write"), until)  # a time, not seconds: see `connections`
        started = time.monotonic()
        while True:
            events: list[str] = []
            extensions = {"timeout": timeouts, "trace": lambda event, _, events=events: events.append(event)}
            try:
                with self._pool.stream(
                    method, url, headers=all_headers, content=content, extensions=extensions
                ) as response:
                    return _read(response, max_bytes)
            except _FAILURES as error:
                if time.monotonic() >= until:
                    reason = f"no end within {until - started:.1f} s"
                elif not {"connection.connect_tcp.started", "http11.receive_response_headers.complete"} & set(events):
                    continue  # a kept connection that the server has closed meanwhile
                else:
                    reason = _reason(error)
                raise PhotoUnreachable(f"expected an answer, got: {reason}") from None


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """headers: by lower-case name. content: decompressed; empty unless the status is 200."""

    status: int
    headers: Mapping[str, bytes]
    content: bytes

    def text(self, name: str) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    @property
    def location(self) -> str:
        """Where a redirect leads to. Servers send other characters than ASCII as they are, mostly in UTF-8."""
        raw = self.headers.get("location", b"")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return quote(raw, safe=bytes(range(0x21, 0x7F)))


def _read(response: httpcore.Response, max_bytes: int) -> _Answer:
    headers = {name.lower().decode("latin-1"): value for name, value in response.headers}
    announced = int(headers["content-length"]) if headers.get("content-length", b"").isdigit() else None
    if response.status != HTTPStatus.OK:
        if announced is not None and announced <= MAX_SKIPPED_BYTES:
            response.read()
        return _Answer(status=response.status, headers=headers, content=b"")
    if announced is not None and announced > max_bytes:
        raise PhotoTooLarge(f"expected at most {max_bytes:,} bytes, got {announced:,}")
    content = bytearray()
    for chunk in response.iter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise PhotoTooLarge(f"expected at most {max_bytes:,} bytes, got more")
    encoding = headers.get("content-encoding", b"").decode("latin-1").strip().lower()
    return _Answer(status=response.status, headers=headers, content=_decompressed(bytes(content), encoding, max_bytes))


def _decompressed(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """Of a server that compresses although it was asked not to. Makes at most one byte more than `max_bytes`."""
    if encoding in ("", "identity", "none"):
        return content
    if encoding in ("gzip", "x-gzip"):
        if not content.startswith(GZIP_MAGIC):
            return content  # announced, but not done
        wbits = 16 + zlib.MAX_WBITS
    elif (
        encoding == "deflate"
    ):  # with zlib's two bytes before it, as the standard has it, or without, as some servers do
        has_header = len(content) > 1 and content[0] & 0x0F == zlib.DEFLATED and int.from_bytes(content[:2]) % 31 == 0
        wbits = zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS
    else:
        raise PhotoDecodeError(f"expected content that is not compressed, or by gzip or deflate, got {encoding[:60]!r}")
    inflate = zlib.decompressobj(wbits)
    try:
        inflated = inflate.decompress(content, max_bytes + 1)
    except zlib.error:
        raise PhotoDecodeError(f"expected {encoding} content as announced, got something else") from None
    if len(inflated) > max_bytes:
        raise PhotoTooLarge(f"expected at most {max_bytes:,} bytes after decompression, got more")
    if not inflate.eof:
        raise PhotoDecodeError(f"expected whole {encoding} content, got a part of it")
    return inflated


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"a certificate that does not hold ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"a TLS error ({error.reason})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, httpcore.ProtocolError):
        return str(error).partition(":")[0]  # what follows may quote the answer
    return type(error).__name__


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _not_ok(status: int, asked: Address, label_studio: LabelStudio | None, *, token_sent: bool) -> PhotoError:
    message = f"expected 200 OK, got {_phrase(status)}"
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
