"""What of Gradio can be reached from outside: the routes that the page needs, with bodies as small as the page sends.

Knows ASGI and the names of Gradio's routes. Does not know what is behind them.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio has more, such as files by their path, recordings and calls of a model; none of them is wanted here.
ROUTES = re.compile(
    r"/|/(metrics|config|login|logout|theme\.css|favicon\.ico|manifest\.json|(static|assets|svelte)/.+)"
    r"|/gradio_api/(upload|upload_progress|app_id|heartbeat/\w+|run/\w+)"
)
UPLOADS = "/gradio_api/upload"
MAX_BYTES = 64 << 10  # of a body, beside the bytes of a photo: a click is a few hundred


class Gate:
    """Answers what is none of ROUTES with 404, and a body of more than MAX_BYTES with 413 before the app reads it.

    An upload may have `max_photo_bytes` more. It goes to the app while it comes in; one that does not tell its length
    and gets too large is cut off there, as if the visitor had left.
    """

    def __init__(self, app: ASGIApp, max_photo_bytes: int) -> None:
        self._app, self._max_upload_bytes = app, max_photo_bytes + MAX_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == UPLOADS and _length(scope) <= self._max_upload_bytes:
            await self._app(scope, _cut_off(receive, self._max_upload_bytes), send)
        elif scope["path"] == UPLOADS:
            await _too_large(f"{self._max_upload_bytes:,} bytes")(scope, receive, send)
        elif not ROUTES.fullmatch(scope["path"]):
            await Response(status_code=404)(scope, receive, send)
        elif (messages := await _small_body(receive)) is None:
            await _too_large(f"{MAX_BYTES >> 10} KiB")(scope, receive, send)
        else:

            async def received() -> Message:
                return messages.pop(0) if messages else await receive()

            await self._app(scope, received, send)


def _length(scope: Scope) -> int:
    """What a request tells about the length of its body; 0 without."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isdecimal() else 0


def _too_large(limit: str) -> Response:
    return Response(f"expected a body of at most {limit}", status_code=413, headers={"Connection": "close"})


def _cut_off(receive: Receive, max_bytes: int) -> Receive:
    """The messages of a request; behind so many bytes of its body, that its sender has left."""
    size = 0

    async def received() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return message if size <= max_bytes else {"type": "http.disconnect"}

    return received


async def _small_body(receive: Receive) -> list[Message] | None:
    """The messages of a request's body; None when it is too large."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if size > MAX_BYTES:
            return None
        if not message.get("more_body", False):
            return messages
