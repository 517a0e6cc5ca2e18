"""The errors of the Label Studio side: each is one line, an HTTP status and a kind.

Knows neither HTTP answers nor Label Studio: `app` turns a status into an answer, `metrics` counts by kind.

FacingsError               500  internal           unforeseen; the server's log holds the rest
├── SettingsError          500  settings           a setting is missing, unknown or out of range
├── AuthError              401  auth               the client's name or password is not the one that was set
├── RequestError           400  request            the body is not what the protocol says
├── LabelConfigError       400  label_config       the labelling interface has no place for boxes
├── PromptError            400  prompt             an interactive prompt is malformed
├── PhotoError             422  photo              the photo of a task cannot be had
│   ├── PhotoUnreachable   502  photo_unreachable  its host does not answer, or answers with an error
│   │   └── PhotoMissing   502  photo_unreachable  its host answers that it has no such photo
│   ├── PhotoForbidden     403  photo_forbidden    its address is refused here, or our token is refused there
│   ├── PhotoTooLarge      413  photo_too_large    more bytes or pixels than the limits
│   └── PhotoDecodeError   422  photo_decode       the bytes are not a photo that can be decoded
└── EngineFailure          500  engine             the engine raised
    ├── EngineNotReady     503  not_ready          it is still loading, or has failed to load
    └── DeadlinePassed     504  deadline           time was up before the answer was there
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class FacingsError(Exception):
    """Base of the errors that may be shown to a client. The message is one line, whatever it was made of."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SettingsError(FacingsError):
    """A setting is missing, unknown or out of range."""

    kind = "settings"


class AuthError(FacingsError):
    """The client's name or password is not the one that was set."""

    status = 401
    kind = "auth"


class RequestError(FacingsError):
    """The body is not what the protocol says."""

    status = 400
    kind = "request"


class LabelConfigError(FacingsError):
    """The labelling interface has no place for boxes, or cannot be read; the message says what to add."""

    status = 400
    kind = "label_config"


class PromptError(FacingsError):
    """An interactive prompt is malformed."""

    status = 400
    kind = "prompt"


class PhotoError(FacingsError):
    """The photo of a task cannot be had."""

    status = 422
    kind = "photo"


class PhotoUnreachable(PhotoError):
    """Its host does not answer, or answers with an error."""

    status = 502
    kind = "photo_unreachable"


class PhotoMissing(PhotoUnreachable):
    """Its host answers that it has no such photo: asking again will not help."""


class PhotoForbidden(PhotoError):
    """Its address is refused here, or our token is refused there."""

    status = 403
    kind = "photo_forbidden"


class PhotoTooLarge(PhotoError):
    """More bytes or pixels than the limits."""

    status = 413
    kind = "photo_too_large"


class PhotoDecodeError(PhotoError):
    """The bytes are not a photo that can be decoded."""

    kind = "photo_decode"


@contextmanager
def photo_label(label: str) -> Iterator[None]:
    """Puts the photo's label, such as its address, in front of the message of a PhotoError that is raised inside."""
    try:
        yield
    except PhotoError as error:
        raise type(error)(f"{label!r}: {error}") from None


class EngineFailure(FacingsError):
    """The engine raised."""

    kind = "engine"


class EngineNotReady(EngineFailure):
    """The engine is still loading, or has failed to load."""

    status = 503
    kind = "not_ready"


class DeadlinePassed(EngineFailure):
    """Time was up before the answer was there."""

    status = 504
    kind = "deadline"


class CommandError(Exception):
    """An expected failure of a command, in one line. exit_status: of the process that it ends."""

    exit_status = 1


class OptionError(CommandError):
    """An option that is wrong, or does not go with another."""

    exit_status = 2
