"""The token of a Label Studio on every request to it: one `httpx.Auth` for the SDK and for requests of our own.

Knows how Label Studio exchanges tokens over httpx. Which header a token becomes, and when it is exchanged anew, is
known by backend.photos.tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping

import httpx

from backend.errors import PhotoUnreachable
from backend.label_studio.retry import require_success
from backend.photos.addresses import parse_address
from backend.photos.tokens import Authorizations, LabelStudio, is_jwt


class TokenAuth(httpx.Auth):
    """Sends a legacy token as it is, and what a personal one was exchanged for; exchanges it again after a 401.

    Label Studio's clock may run ahead of ours, and a request may have waited there until its access token was over.
    exchange: POSTs JSON to an address, without this authentication. timeout_s: for an exchange.
    """

    def __init__(
        self, url: str, token: str, *, exchange: Callable[[str, dict[str, str]], httpx.Response], timeout_s: float
    ) -> None:
        self._label_studio = LabelStudio(address=parse_address(url), token=token)
        self._refresh_url = f"{url}/api/token/refresh/"
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._authorizations = Authorizations(self._access_token)

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = header = self._header()
        response = yield request
        if response.status_code == httpx.codes.UNAUTHORIZED and self._label_studio.token_is_personal:
            request.headers["Authorization"] = self._header(refused=header)
            yield request

    def _header(self, *, refused: str | None = None) -> str:
        until = time.monotonic() + self._timeout_s
        return self._authorizations.header(self._label_studio, until=until, refused=refused)

    def _access_token(self, label_studio: LabelStudio, _until: float) -> str:
        body = require_success(self._exchange(self._refresh_url, {"refresh": label_studio.token})).json()
        token = body.get("access") if isinstance(body, Mapping) else None
        if not isinstance(token, str) or not is_jwt(token):
            raise PhotoUnreachable("expected JSON with an access token, got something else")
        return token
