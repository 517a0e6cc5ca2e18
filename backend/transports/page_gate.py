"""What of Gradio can be reached from outside: the routes that the page needs, and calls of a size that it makes.

Knows ASGI and the names of Gradio's routes. Does not know what is behind them.
"""

from __future__ import annotations

import re

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio has more, such as files by their path, recordings and calls of a model; none of them is wanted here.
ROUTES = re.compile(
    r"/|/(metrics|config|login|logout|theme\.css|favicon\.ico|manifest\.json|(static|assets|svelte)/.+)"
    r"|/gradio_api/(upload|upload_progress|app_id|heartbeat/\w+|run/\w+)"
)
UPLOADS = "/gradio_api/upload"  # Gradio counts their bytes while it writes them to a file
MAX_BYTES = 64 << 10  # of the body of any other request: a click is a few hundred


class Gate:
    """Answers what is none of ROUTES with 404, and a body of more than MAX_BYTES with 413 before the app reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["path"] == UPLOADS):
            await self._app(scope, receive, send)
        elif not ROUTES.fullmatch(scope["path"]):
            await Response(status_code=404)(scope, receive, send)
        elif (messages := await _small_body(receive)) is None:
            text = f"expected a body of at most {MAX_BYTES >> 10} KiB"
            await Response(text, status_code=413, headers={"Connection": "close"})(scope, receive, send)
        else:

            async def received() -> Message:
                return messages.pop(0) if messages else await receive()

            await self._app(scope, received, send)


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
