"""`data:` addresses, which hold the photo themselves, read as browsers read them.

Knows the data: URL of the WHATWG's Fetch standard (`data:` URL processor, forgiving-base64). Beyond it the URL-safe
alphabet of base64 is read. Knows nothing of images.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from backend.errors import PhotoDecodeError

_BASE64 = re.compile(r"; *base64$", re.IGNORECASE)
_WHITESPACE = b"\t\n\f\r "
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_inline(value: str) -> bool:
    """Whether this is a `data:` address."""
    return value[:5].lower() == "data:"


def read_inline(value: str) -> tuple[bytes, str]:
    """Content and media type of a `data:` address. Raises PhotoDecodeError, without the address in its message."""
    header, comma, payload = value[5:].partition("#")[0].partition(",")
    if not comma:
        raise PhotoDecodeError("expected data:<type>;base64,<content>, got no comma")
    media_type = header.strip()
    content = unquote_to_bytes(payload)
    if not _BASE64.search(media_type):
        return content, media_type
    digits = content.translate(_URL_SAFE, _WHITESPACE)
    digits = digits.rstrip(b"=")
    try:
        content = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise PhotoDecodeError("expected valid base64, got other characters or a part of it") from None
    return content, _BASE64.sub("", media_type)
