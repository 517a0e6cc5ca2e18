"""The errors of the backend: each is one line, a kind, and whether trying again may help.

Knows no transport and no protocol: a transport maps kinds to what it speaks (the Label Studio app: to HTTP statuses),
`metrics` counts by kind. retryable: the same request may succeed later without a change by anybody.

                            kind               retryable
FacingsError                internal           no   unforeseen; the server's log holds the rest
├── SettingsError           settings           no   a setting is missing, unknown or out of range
├── AuthError               auth               no   the client's name or password is not the one that was set
├── RequestError            request            no   the request is not what the protocol asks for
├── LabelConfigError        label_config       no   the label config has no place for boxes
├── PromptError             prompt             no   an interactive prompt is malformed
├── PhotoError              photo              no   the photo of a task is unavailable
│   ├── PhotoUnreachable    photo_unreachable  yes  its host does not answer, or answers with an error
│   │   └── PhotoMissing    photo_unreachable  no   its host answers that it has no such photo
│   ├── PhotoForbidden      photo_forbidden    no   its address is refused here, or our token is refused there
│   ├── PhotoTooLarge       photo_too_large    no   more bytes or pixels than the limits
│   └── PhotoDecodeError    photo_decode       no   the bytes are not a photo that can be decoded
└── EngineFailure           engine             no   the engine raised
    ├── EngineNotReady      not_ready          yes  it is loading, failed to load, or its encoder's server is away
    └── EngineDeadline      deadline           yes  the deadline passed before the answer was there

Inside the backend, a deadline that passes is the model's DeadlineExceeded and an engine that is not ready its NotReady.
`reporting.to_client_error` alone turns them into EngineDeadline and EngineNotReady.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class FacingsError(Exception):
    """Base of the errors that a client may see. The message is one line, whatever it was made of."""

    kind: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SettingsError(FacingsError):
    """A setting is missing, unknown or out of range."""

    kind = "settings"


class AuthError(FacingsError):
    """The client's name or password is not the one that was set."""

    kind = "auth"


class RequestError(FacingsError):
    """The request is not what the protocol asks for."""

    kind = "request"


class LabelConfigError(FacingsError):
    """The label config has no place for boxes, or cannot be read; the message names what to add.

    The message is ASCII without angle brackets: it travels in an HTTP reason phrase that Label Studio renders as HTML.
    """

    kind = "label_config"

    def __init__(self, message: str) -> None:
        text = message.encode("ascii", "backslashreplace").decode("ascii")
        super().__init__(text.replace("<", r"\x3c").replace(">", r"\x3e"))


class PromptError(FacingsError):
    """An interactive prompt is malformed."""

    kind = "prompt"


class PhotoError(FacingsError):
    """The photo of a task is unavailable."""

    kind = "photo"


class PhotoUnreachable(PhotoError):
    """Its host does not answer, or answers with an error."""

    kind = "photo_unreachable"
    retryable = True


class PhotoMissing(PhotoUnreachable):
    """Its host answers that it has no such photo: asking again will not help."""

    retryable = False


class PhotoForbidden(PhotoError):
    """Its address is refused here, or our token is refused there."""

    kind = "photo_forbidden"


class PhotoTooLarge(PhotoError):
    """More bytes or pixels than the limits."""

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
    """The engine is still loading, has failed to load, or its encoder's server is away."""

    kind = "not_ready"
    retryable = True


class EngineDeadline(EngineFailure):
    """The deadline passed before the answer was there."""

    kind = "deadline"
    retryable = True


@contextmanager
def extra_needed(extra: str, what: str) -> Iterator[None]:
    """Turns an import that fails inside into a CommandError that names the optional extra. what: that needs it."""
    try:
        yield
    except ImportError as error:
        raise CommandError(
            f"{what}: expected the extra {extra}, got none: install facings[{extra}] ({error})"
        ) from error


class CommandError(Exception):
    """An expected failure of a command, in one line. exit_status: of the process that it ends."""

    exit_status = 1


class OptionError(CommandError):
    """An option that is wrong, or does not go with another."""

    exit_status = 2


class Interrupted(CommandError):
    """The run was interrupted: Ctrl-C, or a request to terminate."""

    exit_status = 130
