"""Who is asked for a photo over HTTP, in which time, and what of the answers is understood."""

from __future__ import annotations

import gzip
import socket
import ssl
import time
import zlib
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from photo_hosts import PNG, Answer, Server, body, load, redirect

from backend.errors import PhotoDecodeError, PhotoError, PhotoForbidden, PhotoTooLarge, PhotoUnreachable
from backend.photos import addresses, connections
from backend.photos.loader import PhotoLoader
from backend.settings import Settings
from model.types import DeadlineExceeded

# Which addresses may be asked


def test_private_addresses_are_refused_by_setting_but_for_the_label_studio_of_the_settings(
    label_studio: Server, elsewhere: Server
) -> None:
    loader = PhotoLoader(Settings(allow_private_addresses=False, label_studio_url=label_studio.url))
    assert load("/data/upload/1/a.png", loader=loader).size_wh == (5, 3)
    with pytest.raises(PhotoForbidden, match="loopback, see ALLOW_PRIVATE_ADDRESSES"):
        load(f"{elsewhere.url}/a.png", loader=loader)
    label_studio.answers["/away"] = partial(redirect, f"{elsewhere.url}/a.png")
    with pytest.raises(PhotoForbidden, match="loopback"):
        load("/away", loader=loader)
    assert elsewhere.asked == []


def test_an_address_from_setup_is_not_trusted(label_studio: Server) -> None:
    with pytest.raises(PhotoForbidden, match="loopback"):
        load("/data/upload/1/a.png", url=label_studio.url, allow_private_addresses=False)
    assert label_studio.asked == []


def test_a_redirect_to_metadata_is_refused_without_connecting(
    elsewhere: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.answers["/to-metadata"] = partial(redirect, "http://169.254.169.254/latest/meta-data/")
    connected: list[str] = []

    class Recording(addresses.socket.socket):  # type: ignore[name-defined,misc]
        def connect(self, address: Any) -> None:
            connected.append(address[0])
            super().connect(address)

    monkeypatch.setattr(addresses.socket, "socket", Recording)
    with pytest.raises(PhotoForbidden, match="link-local"):
        load(f"{elsewhere.url}/to-metadata")
    assert connected == ["127.0.0.1"]


# Time


def dribble(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    for _ in range(1000):
        handler.wfile.write(b"a")
        time.sleep(0.02)


def dribbled_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(PNG[:8])
    dribble(handler)


def silence(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1)  # until the client hangs up


@pytest.mark.parametrize("answer", [dribble, dribbled_body, silence])
def test_a_slow_server_is_left_after_the_fetch_timeout(answer: Answer, elsewhere: Server) -> None:
    elsewhere.answers["/slow.png"] = answer
    started = time.monotonic()
    with pytest.raises(PhotoUnreachable, match=r"/slow.png': expected an answer, got: no end within 0\.2 s"):
        load(f"{elsewhere.url}/slow.png", fetch_timeout_s=0.2)
    assert 0.2 <= time.monotonic() - started < 3


def test_redirects_and_answers_share_one_timeout(elsewhere: Server) -> None:
    def slow_redirect(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.15)
        redirect("/hop", handler)

    elsewhere.answers["/hop"] = slow_redirect
    with pytest.raises(PhotoUnreachable, match=r"no end within|timed out"):
        load(f"{elsewhere.url}/hop", fetch_timeout_s=0.3)
    assert len(elsewhere.asked) <= 3


@pytest.mark.parametrize("answer", [dribble, dribbled_body, silence])
def test_a_deadline_that_ends_a_fetch_is_not_the_photos_fault(answer: Answer, elsewhere: Server) -> None:
    elsewhere.answers["/slow.png"] = answer
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"/slow.png': the deadline passed"):
        load(f"{elsewhere.url}/slow.png", deadline=started + 0.2)
    assert time.monotonic() - started < 3


def test_a_passed_deadline_asks_nobody_but_still_gives_what_is_kept(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    passed = time.monotonic() - 1
    with pytest.raises(DeadlineExceeded):
        load(f"{elsewhere.url}/a.png", loader=loader, deadline=passed)
    assert elsewhere.asked == []
    load(f"{elsewhere.url}/a.png", loader=loader)
    assert load(f"{elsewhere.url}/a.png", loader=loader, deadline=passed).size_wh == (5, 3)


# TLS


def test_https_is_checked_against_trusted_certificates(
    elsewhere: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    elsewhere.http.socket = context.wrap_socket(elsewhere.http.socket, server_side=True)
    monkeypatch.setattr(elsewhere.http, "handle_error", lambda *_: None)  # it complains of clients that hang up
    url = elsewhere.url.replace("http://", "https://")
    with pytest.raises(PhotoUnreachable, match="a certificate that does not hold"):
        load(f"{url}/a.png")
    monkeypatch.setattr(connections, "tls_context", lambda: ssl.create_default_context(cafile=str(certificate)))
    assert load(f"{url}/a.png").size_wh == (5, 3)
    elsewhere.answers["/slow.png"] = dribbled_body
    with pytest.raises(PhotoUnreachable, match="no end within"):
        load(f"{url}/slow.png", fetch_timeout_s=0.3)


# What of HTTP is understood


def raw(answer: bytes, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(answer)


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n" + WHOLE,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + WHOLE,
        b"HTTP/1.0 200\r\n\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG),
    ],
)
def test_answers_of_every_shape_are_read(answer: bytes, elsewhere: Server) -> None:
    elsewhere.answers["/a.png"] = partial(raw, answer)
    assert load(f"{elsewhere.url}/a.png").size_wh == (5, 3)


def encoded(encoding: str, content: bytes, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", encoding)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


RAW_DEFLATE = zlib.compress(PNG)[2:-4]


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", gzip.compress(PNG)),
        ("X-GZIP", gzip.compress(PNG)),
        ("gzip", gzip.compress(PNG) + b"trailing"),
        ("gzip", PNG),  # announced, but not done
        ("deflate", zlib.compress(PNG)),
        ("deflate", RAW_DEFLATE),
        ("identity", PNG),
    ],
)
def test_content_that_is_compressed_though_nobody_asked_is_read(
    encoding: str, content: bytes, elsewhere: Server
) -> None:
    elsewhere.answers["/a.png"] = partial(encoded, encoding, content)
    assert load(f"{elsewhere.url}/a.png").size_wh == (5, 3)


@pytest.mark.parametrize(
    ("encoding", "content", "error", "words"),
    [
        ("gzip", gzip.compress(bytes(10_000_000)), PhotoTooLarge, "at most 20,000 bytes after decompression"),
        ("deflate", zlib.compress(bytes(20_001)), PhotoTooLarge, "at most 20,000 bytes after decompression"),
        ("gzip", gzip.compress(PNG)[:-20], PhotoDecodeError, "expected whole gzip content, got a part of it"),
        ("gzip", gzip.compress(PNG)[:10] + b"\xff\xff\xff\xff", PhotoDecodeError, "expected gzip content as announced"),
        ("br", b"junk", PhotoDecodeError, "not compressed, or by gzip or deflate, got 'br'"),
        ("gzip, gzip", b"junk", PhotoDecodeError, "got 'gzip, gzip'"),
    ],
)
def test_compressed_content_stays_within_the_limit_and_has_to_be_whole(
    encoding: str, content: bytes, error: type[PhotoError], words: str, elsewhere: Server
) -> None:
    elsewhere.answers["/a.png"] = partial(encoded, encoding, content)
    with pytest.raises(PhotoError, match=words) as caught:
        load(f"{elsewhere.url}/a.png", max_photo_bytes=20_000)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/ä b.png?ü=1".encode(), "/%C3%A4%20b.png?%C3%BC=1"),
        ("/ä.png".encode("latin-1"), "/%E4.png"),
        (b"/%C3%A4.png", "/%C3%A4.png"),
    ],
)
def test_redirects_are_followed_whatever_their_characters(location: bytes, target: str, elsewhere: Server) -> None:
    moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\nLocation: " + location + b"\r\n\r\n"
    elsewhere.answers["/moved"] = partial(raw, moved)
    elsewhere.answers[target.partition("?")[0]] = partial(body, PNG)
    assert load(f"{elsewhere.url}/moved").size_wh == (5, 3)
    assert elsewhere.targets == ["/moved", target]


# Connections


@pytest.fixture
def keeping(servers: Callable[[], Server]) -> Server:
    """A host that keeps connections open; it answers all photos, and `connections` counts."""
    server = servers()
    server.http.RequestHandlerClass.protocol_version = "HTTP/1.1"
    server.answers |= {f"/{i}.png": partial(body, PNG) for i in range(4)}
    return server


def test_photos_of_one_host_share_a_connection(keeping: Server) -> None:
    keeping.answers["/moved"] = partial(redirect, "/0.png", extra={"Content-Length": "0"})
    loader = PhotoLoader(Settings())
    for path in ("0.png", "1.png", "moved", "2.png"):
        load(f"{keeping.url}/{path}", loader=loader)
    assert len(keeping.targets) == 5
    assert keeping.connections == 1


def test_another_port_is_another_connection(keeping: Server, elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    load(f"{keeping.url}/0.png", loader=loader)
    load(f"{elsewhere.url}/a.png", loader=loader)
    assert (keeping.connections, elsewhere.connections) == (1, 1)


def test_a_connection_that_the_host_has_closed_meanwhile_is_opened_again(keeping: Server) -> None:
    def answer_and_hang_up(handler: BaseHTTPRequestHandler) -> None:
        body(PNG, handler)  # without a word of the end of the connection
        handler.close_connection = True

    def hang_up_when_asked_again(handler: BaseHTTPRequestHandler) -> None:
        if keeping.targets.count("/again.png") == 1:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            body(PNG, handler)

    loader = PhotoLoader(Settings())
    keeping.answers["/0.png"] = answer_and_hang_up
    keeping.answers["/again.png"] = hang_up_when_asked_again
    for path in ("0.png", "1.png", "again.png"):
        assert load(f"{keeping.url}/{path}", loader=loader).size_wh == (5, 3)


def test_a_new_connection_that_ends_without_an_answer_is_not_tried_again(keeping: Server) -> None:
    def hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    keeping.answers["/a.png"] = hang_up
    with pytest.raises(PhotoUnreachable, match="Server disconnected without sending a response"):
        load(f"{keeping.url}/a.png")
    assert keeping.targets == ["/a.png"]


def test_a_kept_connection_has_a_new_deadline_for_each_photo(keeping: Server) -> None:
    loader = PhotoLoader(Settings(fetch_timeout_s=0.5))
    load(f"{keeping.url}/0.png", loader=loader)
    time.sleep(0.6)
    load(f"{keeping.url}/1.png", loader=loader)
    keeping.answers["/slow.png"] = dribbled_body
    with pytest.raises(PhotoUnreachable, match=r"no end within 0\.5 s"):
        load(f"{keeping.url}/slow.png", loader=loader)
    assert keeping.connections == 1
