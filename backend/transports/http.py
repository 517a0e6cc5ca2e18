"""What the HTTP apps share: bodies that may end early, and errors as a status and one line of JSON.

Knows Flask. Every error leaves as one line of JSON, and again as the HTTP reason phrase: of a failed /health or /setup,
Label Studio shows its admin nothing else. It renders that as HTML, so the phrase is ASCII without angle brackets.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from flask import Response, request
from werkzeug.exceptions import ClientDisconnected, HTTPException, MethodNotAllowed, RequestEntityTooLarge

from backend.errors import AuthError, RequestError
from backend.reporting import log_event, to_client_error
from backend.service import Service
from backend.settings import MIB

# The HTTP status of an error of each kind, see backend.errors.
STATUSES = {
    "internal": 500,
    "settings": 500,
    "auth": 401,
    "request": 400,
    "label_config": 400,
    "prompt": 400,
    "photo": 422,
    "photo_unreachable": 502,
    "photo_forbidden": 403,
    "photo_too_large": 413,
    "photo_decode": 422,
    "engine": 500,
    "not_ready": 503,
    "deadline": 504,
}
MAX_REASON_CHARS = 400


def read_body() -> bytes:
    """The whole body of the request. Raises RequestError, RequestEntityTooLarge."""
    try:
        content = request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise
    except (OSError, ClientDisconnected) as error:
        raise RequestError("body: expected all of it, got a part: the client left or stopped sending") from error
    except MemoryError:
        raise
    except Exception as error:  # each WSGI server has errors of its own for this
        raise RequestError("body: expected well-formed chunks, got others") from error
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(content) >= limit:
        raise RequestEntityTooLarge  # werkzeug cuts a body that does not announce its length
    return content


def json_response(values: Mapping[str, Any]) -> Response:
    """The values as a line of JSON."""
    return Response(json.dumps(values) + "\n", mimetype="application/json")


def refusal(error: Exception, service: Service, *, server: str) -> Response:
    """Any error as its status and one line, counted and logged. server: what this one is, for unknown routes."""
    headers = {}
    match error:
        case RequestEntityTooLarge():
            limit = request.max_content_length or 0
            status, kind, message = 413, "request_too_large", f"expected a body of at most {limit // MIB} MiB"
        case MethodNotAllowed():
            allowed = headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
            status, kind = 405, "method"
            message = f"{request.path}: expected {allowed}, got {request.method}"
        case HTTPException() if error.code == HTTPStatus.NOT_FOUND:
            status, kind, message = 404, "route", f"expected a route of {server}, got {request.path!r}"
        case HTTPException():
            status, kind, message = error.code or 400, "request", str(error.description)
        case _:
            reason = to_client_error(error)
            status, kind, message = STATUSES[reason.kind], reason.kind, str(reason)
            if isinstance(reason, AuthError):
                headers["WWW-Authenticate"] = 'Basic realm="Facings"'
    message = " ".join(message.split())
    service.metrics.count_error(kind)
    log_event(logging.WARNING, "refused", path=request.path, status=status, kind=kind, reason=message)
    response = json_response({"error": message, "kind": kind})
    response.status = f"{status} {_reason_phrase(message)}"
    response.headers.update(headers)
    return response


def _reason_phrase(message: str) -> str:
    """The message as it may stand on the status line; see the module's docstring."""
    text = message.encode("ascii", "backslashreplace").decode("ascii")
    text = re.sub(r"[^ -~]", "?", text).replace("<", r"\x3c").replace(">", r"\x3e")
    return text if len(text) <= MAX_REASON_CHARS else f"{text[: MAX_REASON_CHARS - 3]}..."
