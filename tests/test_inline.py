"""`data:` addresses give the bytes that a browser takes from them."""

from __future__ import annotations

import base64

import pytest

from backend.errors import PhotoDecodeError
from backend.photos.inline import read_inline

CONTENT = bytes(range(256)) + b"\xfb\xff\xfe"
BASE64 = base64.b64encode(CONTENT[:-1]).decode()  # ends with "="


@pytest.mark.parametrize(
    ("value", "content", "media_type"),
    [
        ("data:,", b"", ""),
        ("data:;base64,", b"", ""),
        (f"data:image/png;base64,{BASE64}", CONTENT[:-1], "image/png"),
        (f"DATA:image/png;BASE64,{BASE64}", CONTENT[:-1], "image/png"),
        (f"data:image/png; base64,{BASE64}", CONTENT[:-1], "image/png"),
        (f"data:image/png;charset=x;base64,{BASE64}", CONTENT[:-1], "image/png;charset=x"),
        (f"data:image/png;base64,{BASE64.rstrip('=')}", CONTENT[:-1], "image/png"),
        (f"data:image/png;base64,{BASE64[:100]}\r\n {BASE64[100:]}\n", CONTENT[:-1], "image/png"),
        (f"data:image/png;base64,{BASE64.replace('/', '%2F').replace('=', '%3d')}", CONTENT[:-1], "image/png"),
        (f"data:image/png;base64,{BASE64[:100]}%0A{BASE64[100:]}", CONTENT[:-1], "image/png"),
        (f"data:image/png;base64,{base64.urlsafe_b64encode(CONTENT).decode()}", CONTENT, "image/png"),
        (f"data:image/png;base64,{BASE64}#fragment", CONTENT[:-1], "image/png"),
        ("data:image/png,%89PNG+a,b", b"\x89PNG+a,b", "image/png"),
    ],
)
def test_content_and_type_are_read(value: str, content: bytes, media_type: str) -> None:
    assert read_inline(value) == (content, media_type)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,A", "valid base64"),
        ("data:image/png;base64,AAAA!", "valid base64"),
        ("data:image/png;base64,AA=A", "valid base64"),
        ("data:image/png;base64,ÄÄÄÄ", "valid base64"),
    ],
)
def test_other_text_is_refused(value: str, words: str) -> None:
    with pytest.raises(PhotoDecodeError, match=words):
        read_inline(value)
