"""Access tokens: sent to Label Studio's own origin only, exchanged when personal, never in a message."""

from __future__ import annotations

import base64
import json
import logging
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from photo_hosts import (
    ANSWERS,
    LEGACY,
    PNG,
    Answer,
    Server,
    body,
    load,
    redirect,
    status,
)

from backend.errors import PhotoError, PhotoForbidden, PhotoTooLarge, PhotoUnreachable
from backend.photos import addresses, tokens
from backend.photos.loader import PhotoLoader
from backend.settings import Settings


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "smörgås", "tab\tbed"])
def test_a_token_that_fits_no_header_is_refused_and_not_quoted(token: str, label_studio: Server) -> None:
    with pytest.raises(PhotoForbidden, match="printable ASCII") as caught:
        load("/data/upload/1/a.png", url=label_studio.url, token=token)
    assert token not in str(caught.value)
    assert label_studio.asked == []


def test_a_redirect_within_label_studio_keeps_the_token(label_studio: Server) -> None:
    label_studio.answers["/moved"] = partial(redirect, "/data/upload/1/a.png", code=301)
    load("/moved", url=label_studio.url)
    assert label_studio.authorizations == [f"Token {LEGACY}"] * 2


def test_a_redirect_away_drops_the_token_for_good(label_studio: Server, elsewhere: Server) -> None:
    label_studio.answers["/away"] = partial(redirect, f"{elsewhere.url}/back")
    elsewhere.answers["/back"] = partial(redirect, f"{label_studio.url}/data/upload/1/a.png")
    load("/away", url=label_studio.url)
    assert elsewhere.authorizations == [None]
    assert label_studio.authorizations == [f"Token {LEGACY}", None]


def test_the_message_explains_that_a_redirect_left_the_token_behind(label_studio: Server, elsewhere: Server) -> None:
    label_studio.answers["/away"] = partial(redirect, f"{elsewhere.url}/401?X-Sig=5ec")
    elsewhere.answers["/401"] = partial(status, 401)
    with pytest.raises(PhotoForbidden, match="the access token was not sent there") as caught:
        load("/away", url=label_studio.url)
    assert f": '{elsewhere.url}/401': expected 200 OK" in str(caught.value)
    assert "5ec" not in str(caught.value)


def jwt(**claims: Any) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


class FakeLabelStudio:
    """Label Studio's side of personal access tokens: takes the one it knows, gives numbered access tokens."""

    def __init__(self, server: Server, lifetime_s: float = 300) -> None:
        self.personal = jwt(token_type="refresh", jti="5ec")
        self.valid: set[str] = set()
        self.given = 0
        self.lifetime_s = lifetime_s
        self.server = server
        server.answers["/api/token/refresh/"] = self.refresh
        server.answers["/data/upload/1/a.png"] = self.photo
        server.answers["/data/upload/1/b.png"] = self.photo

    def refresh(self, handler: BaseHTTPRequestHandler) -> None:
        sent = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.command != "POST" or sent != {"refresh": self.personal}:
            status(401, handler)
            return
        self.given += 1
        access = jwt(token_type="access", iat=1000, exp=1000 + self.lifetime_s, jti=self.given)
        self.valid.add(f"Bearer {access}")
        body(json.dumps({"access": access}).encode(), handler, content_type="application/json")

    def photo(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Authorization") in self.valid:
            body(PNG, handler)
        else:
            status(401, handler)


def test_a_personal_access_token_is_exchanged_once_and_never_sent_as_it_is(label_studio: Server) -> None:
    fake = FakeLabelStudio(label_studio)
    loader = PhotoLoader(Settings(label_studio_url=label_studio.url, label_studio_api_key=fake.personal))
    load("/data/upload/1/a.png", loader=loader)
    load("/data/upload/1/b.png", loader=loader)
    assert label_studio.targets == ["/api/token/refresh/", "/data/upload/1/a.png", "/data/upload/1/b.png"]
    assert fake.personal not in str(label_studio.authorizations)


@pytest.mark.parametrize(("lifetime_s", "exchanges"), [(300, 1), (20, 2)])
def test_an_access_token_is_renewed_before_it_expires(lifetime_s: float, exchanges: int, label_studio: Server) -> None:
    fake = FakeLabelStudio(label_studio, lifetime_s)
    loader = PhotoLoader(Settings(label_studio_url=label_studio.url, label_studio_api_key=fake.personal))
    load("/data/upload/1/a.png", loader=loader)
    load("/data/upload/1/b.png", loader=loader)
    assert fake.given == exchanges


def test_a_revoked_access_token_is_renewed_once(label_studio: Server) -> None:
    fake = FakeLabelStudio(label_studio)
    loader = PhotoLoader(Settings())
    load("/data/upload/1/a.png", loader=loader, url=label_studio.url, token=fake.personal)
    fake.valid.clear()
    load("/data/upload/1/b.png", loader=loader, url=label_studio.url, token=fake.personal)
    assert fake.given == 2
    label_studio.answers["/never"] = partial(status, 401)
    label_studio.asked.clear()
    with pytest.raises(PhotoForbidden, match="Label Studio refuses the access token"):
        load("/never", loader=loader, url=label_studio.url, token=fake.personal)
    assert label_studio.targets == ["/never", "/api/token/refresh/", "/never"]


def test_a_legacy_token_is_not_tried_twice(label_studio: Server) -> None:
    label_studio.answers["/never"] = partial(status, 401)
    with pytest.raises(PhotoForbidden, match="Label Studio refuses the access token"):
        load("/never", url=label_studio.url)
    assert len(label_studio.asked) == 1


def test_threads_share_one_exchange(label_studio: Server) -> None:
    fake = FakeLabelStudio(label_studio)
    loader = PhotoLoader(Settings())
    names = [f"/data/upload/1/{i}.png" for i in range(8)]
    label_studio.answers |= dict.fromkeys(names, fake.photo)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: load(name, loader=loader, url=label_studio.url, token=fake.personal), names))
    assert fake.given == 1


def test_an_access_jwt_goes_out_as_it_is(label_studio: Server) -> None:
    access = jwt(token_type="access", exp=2)
    load("/data/upload/1/a.png", url=label_studio.url, token=access)
    assert label_studio.authorizations == [f"Bearer {access}"]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (partial(status, 401), PhotoForbidden, "LABEL_STUDIO_API_KEY is wrong, expired or revoked"),
        (partial(status, 500), PhotoUnreachable, "expected 200 OK, got 500"),
        (partial(redirect, "http://127.0.0.1:1/"), PhotoUnreachable, "expected 200 OK, got 302 Found"),
        (partial(body, b"<html>"), PhotoUnreachable, "expected JSON with an access token"),
        (partial(body, b'{"access": 5}'), PhotoUnreachable, "expected JSON with an access token"),
        (partial(body, b'{"access": "a\\nb"}'), PhotoUnreachable, "expected JSON with an access token"),
        (partial(body, b"[" * 70_000), PhotoTooLarge, "expected at most 65,536 bytes"),
    ],
)
def test_a_failed_exchange_is_named_in_the_message(
    answer: Answer, error: type[PhotoError], words: str, label_studio: Server
) -> None:
    label_studio.answers["/api/token/refresh/"] = answer
    with pytest.raises(PhotoError, match=words) as caught:
        load("/data/upload/1/a.png", url=label_studio.url, token=jwt(token_type="refresh"))
    assert type(caught.value) is error
    assert "/data/upload/1/a.png" in str(caught.value)


@pytest.mark.parametrize(
    ("token", "personal"),
    [
        ("", False),
        (LEGACY, False),
        ("a.b", False),
        ("a.b.c.d", False),
        ("a..c", False),
        ("a.b.c", True),
        (jwt(token_type="refresh"), True),
        (jwt(token_type="access"), False),
        (jwt(), True),
    ],
)
def test_a_personal_access_token_is_recognized_by_its_shape(token: str, personal: bool) -> None:
    known = tokens.LabelStudio(address=addresses.parse_address("http://ls"), token=token)
    assert known.token_is_personal == personal
    assert not token or token not in repr(known)


def test_no_secret_reaches_a_message_a_traceback_or_a_log(
    label_studio: Server, elsewhere: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    label_studio.answers |= ANSWERS
    label_studio.answers["/away"] = partial(redirect, f"{elsewhere.url}/403?X-Sig=5ec")
    elsewhere.answers |= ANSWERS
    label_studio.answers["/tasks/7/resolve/"] = partial(redirect, f"{elsewhere.url}/cut.png?X-Sig=5ec")
    personal = jwt(token_type="refresh", jti="5ec")
    messages = []
    for token in ("5ec5ec5ec", personal):
        for value in ("/401", "/403", "/nothing", "/short", "/html", "/away", "/to-login", "s3://b/k.jpg?v=5ec"):
            with pytest.raises(PhotoError) as caught:
                load(value, url=label_studio.url, token=token)
            messages += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert len(messages) == 48
    for text in [*messages, caplog.text]:
        assert "5ec" not in text
        assert personal.rpartition(".")[0] not in text
