"""Logging and client errors: one line of log for each event, and one line of error for each client.

Knows the logging module and both trees of errors, the model's and the backend's. Knows no HTTP. Fields are given by
name, so that nothing is logged that nobody named; text from outside is quoted and escaped, so that it can neither start
a line nor hide one.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import traceback

from backend.errors import EngineDeadline, EngineFailure, EngineNotReady, FacingsError
from model.types import DeadlineExceeded, EngineError, NotReady

LOGGER = logging.getLogger("backend")

MAX_TEXT = 500
MAX_TRACEBACK = 10_000
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)


def configure_logging(level: str) -> None:
    """Sends this process's log to standard error. level: a name such as "info"."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=level.upper())
    for library in ("azure", "httpx"):  # a line for each of their requests, with its address
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))


def log_event(level: int, event: str, /, **fields: str | int | float | None) -> None:
    """One line `event=… name=value …`. Fields that are None are left out."""
    if LOGGER.isEnabledFor(level):
        pairs = [f"{name}={_value(value)}" for name, value in fields.items() if value is not None]
        LOGGER.log(level, "%s", " ".join([f"event={event}", *pairs]))


def to_client_error(error: Exception) -> FacingsError:
    """The error as a client may see it.

    An unforeseen one goes to the log with its traceback, and the client gets the number to look for there.
    """
    match error:
        case FacingsError():
            return error
        case NotReady():
            return EngineNotReady(str(error))
        case DeadlineExceeded():
            return EngineDeadline(str(error))
        case EngineError():
            return EngineFailure(str(error))
    incident = secrets.token_hex(4)
    trace = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
    LOGGER.error("%s", f"event=incident incident={incident} traceback={json.dumps(trace)}")
    return FacingsError(f"internal error: the server's log has the details at incident={incident}")


def _value(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, str):
        return str(value)
    if len(value) > MAX_TEXT:
        value = f"{value[:MAX_TEXT]}..."
    return value if _PLAIN.fullmatch(value) else json.dumps(value)
