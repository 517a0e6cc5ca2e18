"""Who is asked for a photo over HTTP, in which time, and what of the answers is understood."""

# ruff: noqa: F811 - fixtures are imported
from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from photo_hosts import (  # noqa: F401 - fixtures
    ANSWERS,
    LEGACY,
    PNG,
    Answer,
    Server,
    body,
    elsewhere,
    label_studio,
    load,
    png,
    redirect,
    servers,
    status,
)

from backend.errors import PhotoForbidden, PhotoUnreachable
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


def test_an_address_from_setup_earns_no_trust(label_studio: Server) -> None:
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


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on PATH: install it to make a certificate for this test")
    file = tmp_path / "server.pem"
    subprocess.run(
        [
            openssl,
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            file,
            "-out",
            f"{file}.crt",
        ],
        check=True,
        capture_output=True,
    )
    with file.open("a") as joined:
        joined.write(Path(f"{file}.crt").read_text())
    return file


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
