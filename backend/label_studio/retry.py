"""Requests to Label Studio that fail: which may work later, and for how long they are tried again.

Knows the failures of httpx and of the SDK, and HTTP statuses. Knows neither tasks nor predictions.

CommandError
└── ProjectError           exit status 1  Label Studio does not do what was asked
    ├── RequestRejected    exit status 1  it answered, and will give the same answer again
    └── Unavailable        exit status 4  it was away for longer than the retry budget
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx
from label_studio_sdk.core.api_error import ApiError

from backend.errors import CommandError, Interrupted, PhotoForbidden, PhotoUnreachable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STOPPING_S = 10.0  # for what is done already
RETRYABLE_STATUSES = frozenset({408, 425, 429})
DETAIL_LENGTH = 200


class ProjectError(CommandError):
    """Label Studio does not do what was asked."""


class Unavailable(ProjectError):
    """Label Studio was away for longer than the retry budget."""

    exit_status = 4


class RequestRejected(ProjectError):
    """Label Studio answered, and will give the same answer again. status: of HTTP, 0 when none was sent."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class TransientError(Exception):
    """A request failed, or its answer was lost: nobody here knows which. It may work later.

    retry_after_s: how long Label Studio asks to wait, 0 when it does not say.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class RetryBudget:
    """Pauses between attempts of one piece of work, longer and longer, until the seconds of the budget are spent.

    stopping: once it is set, a few seconds are left at most, so that what is done can still be stored.
    """

    def __init__(self, budget_s: float, stopping: threading.Event) -> None:
        self._budget_s = budget_s
        self._stopping = stopping
        self._give_up_at: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._is_stopping = False

    def wait(self, error: TransientError) -> None:
        """Pauses after a failed attempt. Raises Unavailable when the budget is spent, Interrupted when stopping."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._budget_s
        if self._stopping.is_set() and not self._is_stopping:
            self._is_stopping = True
            self._give_up_at = min(self._give_up_at, now + STOPPING_S)
        if now >= self._give_up_at:
            if self._is_stopping:
                raise Interrupted(f"interrupted; {error}")
            raise Unavailable(f"{error}; tried for {self._budget_s:.0f} s")
        # Not all at the same moment, when many wait for the same server.
        pause_s = max(error.retry_after_s, self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        pause_s = min(pause_s, self._give_up_at - now)
        if self._is_stopping:
            time.sleep(min(pause_s, 1.0))
        else:
            self._stopping.wait(pause_s)


def require_success(response: httpx.Response) -> httpx.Response:
    """The response; raises what the SDK raises for any status but 2xx."""
    if not 200 <= response.status_code < 300:
        raise ApiError(status_code=response.status_code, headers=dict(response.headers), body=response.text)
    return response


def classify(where: str, error: Exception) -> Exception:
    """TransientError when the same request may work later, RequestRejected when it will not; else the error itself.

    where: what was asked of whom, for the message.
    """
    match error:
        case ApiError():
            return _classify_status(where, error)
        case httpx.InvalidURL() | httpx.UnsupportedProtocol() | PhotoForbidden():
            return RequestRejected(f"{where}: {error}", 0)
        case httpx.TransportError() | PhotoUnreachable():
            return TransientError(f"{where}: {str(error) or type(error).__name__}")
        case json.JSONDecodeError():
            return TransientError(f"{where}: expected JSON, got something else")
    return error


def _classify_status(where: str, error: ApiError) -> Exception:
    status, detail = error.status_code or 0, _detail(error.body)
    if 200 <= status < 300:  # the page of a proxy in between, where the SDK expects JSON
        return TransientError(f"{where}: expected JSON, got something else")
    if status >= 500 or status in RETRYABLE_STATUSES:
        return TransientError(f"{where}: {status} {detail}".strip(), _retry_after_s(error.headers))
    if status in (401, 403):
        detail += " (--api-key or LABEL_STUDIO_API_KEY)"
    if 300 <= status < 400:
        detail = "expected Label Studio, got a redirect: give the address that it leads to"
    return RequestRejected(f"{where}: {status} {detail}".strip(), status)


def _detail(body: Any) -> str:
    """What Label Studio writes about a failure, in one short line."""
    if isinstance(body, str):
        with suppress(ValueError):
            body = json.loads(body)
    if isinstance(body, Mapping):
        errors = body.get("validation_errors")
        body = errors or body.get("detail") or body
    text = " ".join(str(body or "").split())
    return f"{text[:DETAIL_LENGTH]}…" if len(text) > DETAIL_LENGTH else text


def _retry_after_s(headers: Mapping[str, str] | None) -> float:
    """The seconds that a server asks for, 0 when it does not say or names a date."""
    text = next((value for name, value in (headers or {}).items() if name.lower() == "retry-after"), "")
    return float(text) if text.strip().isdigit() else 0.0
