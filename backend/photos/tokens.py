"""Label Studio's access tokens: which kind one is, and the short-lived ones that a personal one is exchanged for.

Knows the two kinds. Knows neither HTTP nor photos: the exchange itself is handed in.

A legacy token goes out as `Authorization: Token`. A personal access token is a refresh JWT: Label Studio refuses it as
it is and exchanges it for an access JWT, which lives five minutes and goes out as `Authorization: Bearer`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jwt
from cachetools import LRUCache

from backend.errors import PhotoForbidden, PhotoUnreachable
from backend.photos.addresses import Address

ACCESS_LIFETIME_S = 300.0  # of access JWTs that do not state theirs
RENEW_BEFORE_S = 30.0
KEPT_ACCESS_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class LabelStudio:
    """A Label Studio and the token for it, which stays out of `repr`. An empty token: none is known."""

    address: Address
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if not (self.token.isascii() and self.token.isprintable()) or " " in self.token:
            raise PhotoForbidden("access token: expected printable ASCII characters without spaces, got other text")

    @property
    def identity(self) -> str:
        """Stands for address and token without giving the token away: equal for equal ones."""
        return hashlib.blake2b(repr((self.address, self.token)).encode(), digest_size=16).hexdigest()

    @property
    def token_is_personal(self) -> bool:
        """Whether the token is a personal access token, which has to be exchanged first."""
        return is_jwt(self.token) and _claims(self.token).get("token_type") != "access"


@dataclass
class _Access:
    lock: threading.Lock = field(default_factory=threading.Lock)
    token: str | None = None
    renew_at: float = 0.0


class Authorizations:
    """The `Authorization` header for each Label Studio, exchanging personal tokens when needed. Thread-safe.

    exchange: gives the access JWT for a Label Studio with a personal token, by a `time.monotonic()` value.
    """

    def __init__(self, exchange: Callable[[LabelStudio, float], str]) -> None:
        self._exchange = exchange
        self._lock = threading.Lock()
        self._kept: LRUCache[str, _Access] = LRUCache(KEPT_ACCESS_TOKENS)

    def header(self, label_studio: LabelStudio, *, until: float, refused: str | None = None) -> str:
        """The header's value.

        refused: the value that Label Studio has just answered 401 to; a personal token is then exchanged anew, unless
        another thread has done so meanwhile.
        """
        if not is_jwt(label_studio.token):
            return f"Token {label_studio.token}"
        if not label_studio.token_is_personal:
            return f"Bearer {label_studio.token}"
        with self._lock:
            access = self._kept.setdefault(label_studio.identity, _Access())
        if not access.lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise PhotoUnreachable("expected an access token in time, got none")
        try:
            if access.token is None or time.monotonic() >= access.renew_at or f"Bearer {access.token}" == refused:
                access.token = self._exchange(label_studio, until)
                access.renew_at = time.monotonic() + _lifetime_s(access.token) - RENEW_BEFORE_S
            return f"Bearer {access.token}"
        finally:
            access.lock.release()


def is_jwt(token: str) -> bool:
    """Whether a token has the shape of a JSON web token: three parts of URL-safe base64."""
    parts = token.split(".")
    return len(parts) == 3 and all(part and part.replace("-", "").replace("_", "").isalnum() for part in parts)


def _claims(token: str) -> dict[str, Any]:
    """What a token states. Its signature is Label Studio's to check, and only Label Studio could."""
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.InvalidTokenError, RecursionError):
        return {}
    return claims


def _lifetime_s(access_token: str) -> float:
    """How long an access JWT lives: a difference of the issuer's own times, so that clocks need not agree."""
    claims = _claims(access_token)
    try:
        return float(claims["exp"]) - float(claims["iat"])
    except (KeyError, TypeError, ValueError):
        return ACCESS_LIFETIME_S
