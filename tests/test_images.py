"""From the address in a task to pixels, over real local servers: whom it asks, what it sends, when it gives up.

Each server of these tests listens on a port of its own on 127.0.0.1, and so is an origin of its own.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import shutil
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.errors import PhotoDecodeError, PhotoError, PhotoForbidden, PhotoTooLarge, PhotoUnreachable, SettingsError
from backend.photos import addresses, downloads, tokens
from backend.photos import loader as images
from backend.photos.loader import Access, PhotoLoader
from backend.settings import Settings
from model.types import DeadlineExceeded, Photo

Answer = Callable[[BaseHTTPRequestHandler], None]
LEGACY = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """A host on the network: answers the paths it was given and records what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []  # target, Authorization
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers.get("Authorization")))
                answer = server.answers.get(self.path.partition("?")[0], partial(status, 404))
                with suppress(OSError):  # the client may have had enough
                    answer(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    @property
    def targets(self) -> list[str]:
        return [target for target, _ in self.asked]

    @property
    def authorizations(self) -> list[str | None]:
        return [authorization for _, authorization in self.asked]


def status(code: int, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(code)
    handler.end_headers()
    handler.wfile.write(b"no photo here")


def body(content: bytes, handler: BaseHTTPRequestHandler, *, content_type: str = "image/png") -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def redirect(location: str, handler: BaseHTTPRequestHandler, *, code: int = 302) -> None:
    handler.send_response(code)
    handler.send_header("Location", location)
    handler.end_headers()


def png(colour: tuple[int, int, int] = (200, 30, 60), size_wh: tuple[int, int] = (5, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size_wh, colour).save(file, "PNG")
    return file.getvalue()


PNG = png()


@pytest.fixture
def servers() -> Iterator[Callable[[], Server]]:
    opened: list[Server] = []

    def serve() -> Server:
        opened.append(Server())
        return opened[-1]

    yield serve
    for server in opened:
        server.close()


@pytest.fixture
def label_studio(servers: Callable[[], Server]) -> Server:
    server = servers()
    server.answers["/data/upload/1/a.png"] = partial(body, PNG)
    return server


@pytest.fixture
def elsewhere(servers: Callable[[], Server]) -> Server:
    server = servers()
    server.answers["/a.png"] = partial(body, PNG)
    return server


def load(
    value: Any,
    *,
    url: str = "",
    token: str = LEGACY,
    task_id: int | None = 7,
    deadline: float | None = None,
    loader: PhotoLoader | None = None,
    **settings: Any,
) -> Photo:
    loader = loader or PhotoLoader(Settings(**settings))
    return loader.load(value, task_id=task_id, access=Access(label_studio_url=url, token=token), deadline=deadline)


# Where photos come from


def test_an_upload_is_asked_of_label_studio_with_the_token(label_studio: Server) -> None:
    photo = load("/data/upload/1/a.png", url=label_studio.url)
    assert photo.size_wh == (5, 3)
    assert (photo.pixels == (200, 30, 60)).all()
    assert label_studio.asked == [("/data/upload/1/a.png", f"Token {LEGACY}")]


def test_the_settings_address_and_key_come_before_those_of_setup(label_studio: Server, elsewhere: Server) -> None:
    load(
        "/data/upload/1/a.png",
        url=elsewhere.url,
        token="from-setup",
        label_studio_url=label_studio.url,
        label_studio_api_key="from-settings",
    )
    assert label_studio.authorizations == ["Token from-settings"]
    assert elsewhere.asked == []


def test_local_files_are_asked_of_label_studio_by_default(label_studio: Server) -> None:
    label_studio.answers["/data/local-files/"] = partial(body, PNG)
    load("/data/local-files/?d=shop/a%20b.png", url=label_studio.url)
    assert label_studio.targets == ["/data/local-files/?d=shop/a%20b.png"]


@pytest.mark.parametrize("uri", ["s3://shelves/2026/ä b.jpg", "gs://shelves/a.jpg", "azure-blob://shelves/a.jpg"])
def test_cloud_storage_is_resolved_by_label_studio_and_the_token_stays_there(
    uri: str, label_studio: Server, elsewhere: Server
) -> None:
    label_studio.answers["/tasks/7/resolve/"] = partial(redirect, f"{elsewhere.url}/a.png?X-Sig=5ec", code=303)
    load(uri, url=label_studio.url)
    (target,) = label_studio.targets
    assert base64.urlsafe_b64decode(target.removeprefix("/tasks/7/resolve/?fileuri=")).decode() == uri
    assert label_studio.authorizations == [f"Token {LEGACY}"]
    assert elsewhere.asked == [("/a.png?X-Sig=5ec", None)]


def test_cloud_storage_that_label_studio_hands_through_is_read_too(label_studio: Server) -> None:
    label_studio.answers["/tasks/7/resolve/"] = partial(body, PNG)
    assert load("s3://shelves/a.jpg", url=label_studio.url).size_wh == (5, 3)


def test_a_web_address_is_asked_without_any_token(label_studio: Server, elsewhere: Server) -> None:
    load(f"{elsewhere.url}/a.png", url=label_studio.url)
    assert elsewhere.authorizations == [None]
    assert label_studio.asked == []


def test_a_full_address_of_label_studio_gets_the_token(label_studio: Server) -> None:
    load(f"{label_studio.url}/data/upload/1/a.png", url=label_studio.url)
    assert label_studio.authorizations == [f"Token {LEGACY}"]


def test_a_data_address_is_read_as_it_is() -> None:
    content = base64.b64encode(PNG).decode()
    assert load(f"data:image/png;base64,{content}").size_wh == (5, 3)


# Local files


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    root = tmp_path / "shop"
    (root / "aisle").mkdir(parents=True)
    (root / "aisle" / "a+b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "shop-private").mkdir()
    (tmp_path / "shop-private" / "a.png").write_bytes(PNG)
    (root / "inside.png").symlink_to(root / "aisle" / "a+b.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "value",
    [
        "/data/local-files/?d=aisle/a%2Bb.png",
        "/data/local-files?d=aisle/a%2Bb.png",
        "/data/local-files/?d=/aisle/../aisle/a%2Bb.png",
        "/data/local-files/?d=inside.png",
    ],
)
def test_local_files_are_read_from_their_folder_when_it_is_known(value: str, shop: Path) -> None:
    assert load(value, local_files_root=str(shop)).size_wh == (5, 3)


@pytest.mark.parametrize(
    ("d", "error", "words"),
    [
        ("../secret.png", PhotoForbidden, "leads out of it"),
        ("%2e%2e/secret.png", PhotoForbidden, "leads out of it"),
        ("aisle/../../secret.png", PhotoForbidden, "leads out of it"),
        ("../shop-private/a.png", PhotoForbidden, "leads out of it"),
        ("outside.png", PhotoForbidden, "leads out of it"),
        ("up/secret.png", PhotoForbidden, "leads out of it"),
        ("loop.png", PhotoForbidden, "leads nowhere"),
        ("a%00.png", PhotoForbidden, "leads nowhere"),
        ("/etc/passwd", PhotoUnreachable, "No such file"),
        ("none.png", PhotoUnreachable, "No such file"),
        ("", PhotoDecodeError, "a folder or a device"),
        ("aisle", PhotoDecodeError, "a folder or a device"),
        ("pipe.png", PhotoDecodeError, "a folder or a device"),
    ],
)
def test_local_files_stay_within_their_folder(d: str, error: type[PhotoError], words: str, shop: Path) -> None:
    with pytest.raises(PhotoError, match=words) as caught:
        load(f"/data/local-files/?d={d}", local_files_root=str(shop))
    assert type(caught.value) is error
    assert str(caught.value).startswith("'/data/local-files/?d=")
    assert str(shop) not in str(caught.value)


def test_the_whole_disk_is_no_folder_of_photos() -> None:
    with pytest.raises(SettingsError, match="LOCAL_FILES_ROOT"):
        PhotoLoader(Settings(local_files_root="/"))


# Bad input: each row one kind, its status and its message


def nothing(_: BaseHTTPRequestHandler) -> None:
    pass


def short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(PNG)


def huge(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**12))
    handler.end_headers()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def unannounced(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(bytes(20_001))


ANSWERS: dict[str, Answer] = {
    "/a.png": partial(body, PNG),
    "/401": partial(status, 401),
    "/403": partial(status, 403),
    "/500": partial(status, 500),
    "/799": partial(status, 799),
    "/nothing": nothing,
    "/short": short,
    "/huge": huge,
    "/endless": endless,
    "/unannounced": unannounced,
    "/empty": partial(body, b""),
    "/html": partial(body, b"<!DOCTYPE html><h1>Log in</h1>", content_type="text/html"),
    "/cut.png": partial(body, PNG[:-30]),
    "/big.png": partial(body, png(size_wh=(400, 300))),
    "/loop": partial(redirect, "/loop"),
    "/nowhere": partial(redirect, "", code=302),
    "/to-file": partial(redirect, "file:///etc/passwd"),
    "/to-login": partial(redirect, "http://me:5ec@127.0.0.1/"),
    "/to-metadata": partial(redirect, "http://169.254.169.254/latest/meta-data/?5ec"),
    "/to-invalid": partial(redirect, "http://[::1/"),
}

HERE = "{host}"  # replaced by the address of a server with ANSWERS, which is not Label Studio
THERE = "{label studio}"


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (None, 422, "photo: expected its address in the task's data, got None"),
        ("", 422, "photo: expected its address in the task's data, got ''"),
        ("  ", 422, "expected its address in the task's data"),
        (["/a.png"], 422, r"expected its address in the task's data, got \['/a.png'\]"),
        ({"url": "x" * 10_000}, 422, "expected its address in the task's data, got "),
        ("\ud800", 422, "expected its address in the task's data"),
        ("a.png", 403, "'a.png': expected /…, http://, https://, s3://, gs://, azure-blob:// or data:"),
        ("//evil.example/a.png", 403, "'//evil.example/a.png': expected /…"),
        ("file:///etc/passwd", 403, "'file:///etc/passwd': expected /…"),
        ("ftp://h/a.png?5ec", 403, "'ftp://h/a.png': expected /…"),
        ("javascript:alert(1)", 403, "expected /…"),
        ("data:text/plain,5ec", 422, "expected data:<type>;base64,<content>"),
        ("data:image/png;base64,!5ec", 422, "'data:image/png;base64,…': expected valid base64"),
        ("data:image/png;base64,", 422, "expected an image, got 0 bytes of 'image/png'"),
        ("data:image/png;base64," + "A" * 40_000, 413, "expected at most 20,000 bytes, got 30,000"),
        ("http://me:5ec@h/a.png", 403, "'http://h/a.png': expected an address without user and password"),
        ("http://h:99999/a.png", 403, "'http://h:99999/a.png': expected a valid"),
        ("http://169.254.169.254/latest?5ec", 403, r"got 169.254.169.254 \(link-local\)"),
        ("http://[fe80::1]/a.png", 403, "link-local"),
        ("http://[fd00:ec2::254]/a.png", 403, "cloud metadata"),
        ("http://100.100.100.200/a.png", 403, "cloud metadata"),
        ("http://0/a.png", 403, "unspecified"),
        ("http://224.0.0.1/a.png", 403, "multicast"),
        ("http://no.such.host.invalid/a.png", 502, "'no.such.host.invalid' cannot be resolved"),
        ("http://127.0.0.1:1/a.png?5ec", 502, "'http://127.0.0.1:1/a.png': expected a connection .*refused"),
        (f"{HERE}/missing.png?5ec", 502, "/missing.png': expected 200 OK, got 404 Not Found"),
        (f"{HERE}/500?5ec", 502, "/500': expected 200 OK, got 500 Internal Server Error"),
        (f"{HERE}/799", 502, "/799': expected 200 OK, got 799"),
        (f"{HERE}/401", 403, "/401': expected 200 OK, got 401 Unauthorized$"),
        (f"{THERE}/401", 403, "got 401 Unauthorized; Label Studio refuses the access token: set LABEL_STUDIO_API_KEY"),
        ("/403", 403, "/403': expected 200 OK, got 403 Forbidden; Label Studio refuses the access token"),
        (f"{HERE}/nothing", 502, "/nothing': expected an answer, got: RemoteDisconnected"),
        (f"{HERE}/short", 502, r"/short': expected an answer, got: \d+ of 1,000 bytes"),
        (f"{HERE}/huge", 413, "/huge': expected at most 20,000 bytes, got 1,000,000,000,000"),
        (f"{HERE}/endless", 413, "/endless': expected at most 20,000 bytes, got more"),
        (f"{HERE}/unannounced", 413, "/unannounced': expected at most 20,000 bytes, got more"),
        (f"{HERE}/empty", 422, "/empty': expected an image, got 0 bytes of 'image/png'"),
        (f"{HERE}/html?5ec", 422, "/html': expected a JPEG, .* got 30 bytes of 'text/html' that begin with"),
        (f"{HERE}/cut.png", 422, "/cut.png': expected a whole PNG image"),
        (f"{HERE}/big.png", 413, "/big.png': expected at most 10,000 pixels, got 400 x 300"),
        (f"{HERE}/loop", 502, "/loop': expected at most 5 redirects, got more"),
        (f"{HERE}/nowhere", 502, "/nowhere': expected 200 OK, got 302 Found"),
        (f"{HERE}/to-file", 403, "/to-file': 'file:///etc/passwd': expected an http:// or https:// address"),
        (f"{HERE}/to-login", 403, "/to-login': 'http://127.0.0.1/': expected an address without user and password"),
        (f"{HERE}/to-metadata", 403, r"/to-metadata': 'http://169.254.169.254/latest/meta-data/': .*link-local"),
        (f"{HERE}/to-invalid", 403, "/to-invalid': expected a redirect to a valid address"),
        ("s3://shelves/gone.jpg?5ec", 502, "'s3://shelves/gone.jpg': 'http://127.0.0.1:.*got 404 Not Found"),
    ],
)
def test_bad_input_is_answered_by_status_and_one_line(
    value: Any, code: int, words: str, label_studio: Server, elsewhere: Server
) -> None:
    label_studio.answers |= ANSWERS
    elsewhere.answers |= ANSWERS
    if isinstance(value, str):
        value = value.replace(HERE, elsewhere.url).replace(THERE, label_studio.url)
    with pytest.raises(PhotoError, match=words) as caught:
        load(value, url=label_studio.url, max_photo_bytes=20_000, max_photo_pixels=10_000)
    assert caught.value.status == code
    message = str(caught.value)
    assert "\n" not in message
    assert "5ec" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("value", "url", "task_id", "words"),
    [
        ("/data/upload/1/a.png", "", 7, "expected to know Label Studio's address, from /setup or LABEL_STUDIO_URL"),
        ("s3://shelves/a.jpg", "", 7, "expected to know Label Studio's address"),
        ("s3://shelves/a.jpg", "http://ls", None, "expected a task id to resolve it with, got None"),
    ],
)
def test_what_only_label_studio_can_serve_says_what_is_missing(
    value: str, url: str, task_id: int | None, words: str
) -> None:
    with pytest.raises(PhotoUnreachable, match=words):
        load(value, url=url, task_id=task_id)


def test_without_a_token_the_message_says_how_to_give_one(label_studio: Server) -> None:
    label_studio.answers["/401"] = partial(status, 401)
    with pytest.raises(PhotoForbidden, match="no access token is known: set LABEL_STUDIO_API_KEY"):
        load("/401", url=label_studio.url, token="")
    assert label_studio.authorizations == [None]


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "smörgås", "tab\tbed"])
def test_a_token_that_fits_no_header_is_refused_and_not_quoted(token: str, label_studio: Server) -> None:
    with pytest.raises(PhotoForbidden, match="printable ASCII") as caught:
        load("/data/upload/1/a.png", url=label_studio.url, token=token)
    assert token not in str(caught.value)
    assert label_studio.asked == []


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


# Tokens


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


def test_a_token_that_stayed_behind_at_a_redirect_is_told(label_studio: Server, elsewhere: Server) -> None:
    label_studio.answers["/away"] = partial(redirect, f"{elsewhere.url}/401?X-Sig=5ec")
    elsewhere.answers["/401"] = partial(status, 401)
    with pytest.raises(PhotoForbidden, match="the access token was not sent there") as caught:
        load("/away", url=label_studio.url)
    assert f"from '{elsewhere.url}/401'" in str(caught.value)
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
def test_a_failing_exchange_says_so(answer: Answer, error: type[PhotoError], words: str, label_studio: Server) -> None:
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
def test_a_personal_access_token_is_told_by_its_shape(token: str, personal: bool) -> None:
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
    told = []
    for token in ("5ec5ec5ec", personal):
        for value in ("/401", "/403", "/nothing", "/short", "/html", "/away", "/to-login", "s3://b/k.jpg?v=5ec"):
            with pytest.raises(PhotoError) as caught:
                load(value, url=label_studio.url, token=token)
            told += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert len(told) == 48
    for text in [*told, caplog.text]:
        assert "5ec" not in text
        assert personal.rpartition(".")[0] not in text


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


# Memory


def test_a_known_photo_is_not_fetched_again(label_studio: Server) -> None:
    loader = PhotoLoader(Settings())
    first = load("/data/upload/1/a.png", loader=loader, url=label_studio.url)
    second = load(f"{label_studio.url}/data/upload/1/a.png", loader=loader, url=label_studio.url)
    assert second is first
    assert len(label_studio.asked) == 1
    stats = loader.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.bytes) == (1, 1, 1, 5 * 3 * 3)


@pytest.mark.parametrize("change", ["token", "label studio"])
def test_what_one_token_has_opened_is_not_given_to_another(
    change: str, label_studio: Server, elsewhere: Server
) -> None:
    elsewhere.answers["/data/upload/1/a.png"] = partial(body, png((1, 2, 3)))
    loader = PhotoLoader(Settings())
    load("/data/upload/1/a.png", loader=loader, url=label_studio.url)
    if change == "token":
        label_studio.answers["/data/upload/1/a.png"] = partial(status, 403)
        with pytest.raises(PhotoForbidden):
            load("/data/upload/1/a.png", loader=loader, url=label_studio.url, token="another")
    else:
        assert (load("/data/upload/1/a.png", loader=loader, url=elsewhere.url).pixels == (1, 2, 3)).all()


def test_the_same_cloud_address_of_two_tasks_may_be_two_photos(label_studio: Server) -> None:
    for task_id, colour in ((1, (1, 1, 1)), (2, (2, 2, 2))):
        label_studio.answers[f"/tasks/{task_id}/resolve/"] = partial(body, png(colour))
    loader = PhotoLoader(Settings())
    for task_id in (1, 2):
        photo = load("s3://shelves/a.jpg", loader=loader, url=label_studio.url, task_id=task_id)
        assert (photo.pixels == task_id).all()


def test_kept_photos_stay_within_their_bytes_and_the_oldest_leave_first(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=1))
    for name in "abcd":
        elsewhere.answers[f"/{name}.png"] = partial(body, png(size_wh=(400, 300)))  # 360,000 bytes decoded
    for name in "abacb":
        load(f"{elsewhere.url}/{name}.png", loader=loader)
    assert elsewhere.targets == ["/a.png", "/b.png", "/c.png", "/b.png"]
    assert loader.stats().entries == 2
    assert loader.stats().bytes == 2 * 360_000


def test_a_photo_larger_than_the_cache_is_given_and_not_kept(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=0))
    assert load(f"{elsewhere.url}/a.png", loader=loader).size_wh == (5, 3)
    assert loader.stats().bytes == loader.stats().entries == 0


def test_a_kept_photo_is_read_anew_after_a_while(elsewhere: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = PhotoLoader(Settings())
    load(f"{elsewhere.url}/a.png", loader=loader)
    monkeypatch.setattr(images, "KEPT_S", 0.0)
    elsewhere.answers["/a.png"] = partial(body, png((1, 2, 3)))
    assert (load(f"{elsewhere.url}/a.png", loader=loader).pixels == (1, 2, 3)).all()
    assert loader.stats().entries == 1


def test_a_failure_is_not_kept(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    with pytest.raises(PhotoUnreachable):
        load(f"{elsewhere.url}/b.png", loader=loader)
    elsewhere.answers["/b.png"] = partial(body, PNG)
    assert load(f"{elsewhere.url}/b.png", loader=loader).size_wh == (5, 3)


def gated(server: Server, path: str, answer: Answer) -> tuple[threading.Event, threading.Event]:
    """Makes `path` answer only once the second event is set; the first tells that it was asked."""
    asked, go = threading.Event(), threading.Event()

    def answer_later(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go.wait(10)
        answer(handler)

    server.answers[path] = answer_later
    return asked, go


@pytest.mark.parametrize("answer", [partial(body, PNG), partial(status, 500)])
def test_requests_at_the_same_time_fetch_a_photo_once(answer: Answer, elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", answer)

    def one(_: int) -> object:
        try:
            return load(f"{elsewhere.url}/a.png", loader=loader)
        except PhotoUnreachable as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(one, 0)]
        assert asked.wait(5)
        answers += [pool.submit(one, i) for i in range(5)]
        time.sleep(0.1)
        go.set()
        given = [answer.result(10) for answer in answers]
    assert len(elsewhere.asked) == 1
    assert len({id(photo) if isinstance(photo, Photo) else photo for photo in given}) == 1


def test_one_who_waits_is_not_bound_by_anothers_deadline(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", partial(body, PNG))
    with ThreadPoolExecutor(2) as pool:
        hasty = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader, deadline=time.monotonic() + 0.3)
        assert asked.wait(5)
        patient = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader)
        with pytest.raises(DeadlineExceeded):
            hasty.result(5)
        go.set()
        assert patient.result(5).size_wh == (5, 3)


def test_one_who_waits_gives_up_at_their_own_deadline(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", partial(body, PNG))
    with ThreadPoolExecutor(2) as pool:
        patient = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader)
        assert asked.wait(5)
        with pytest.raises(DeadlineExceeded):
            load(f"{elsewhere.url}/a.png", loader=loader, deadline=time.monotonic() + 0.1)
        go.set()
        assert patient.result(5).size_wh == (5, 3)


def test_threads_get_the_photos_they_asked_for(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=1))
    for i in range(12):
        elsewhere.answers[f"/{i}.png"] = partial(body, png((i, i, i), size_wh=(300, 300)))
    with ThreadPoolExecutor(8) as pool:
        photos = pool.map(lambda i: load(f"{elsewhere.url}/{i % 12}.png", loader=loader), range(96))
        assert [int(photo.pixels[0, 0, 0]) for photo in photos] == [i % 12 for i in range(96)]
    assert loader.stats().bytes <= 1 << 20


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
    monkeypatch.setattr(downloads, "tls_context", lambda: ssl.create_default_context(cafile=str(certificate)))
    assert load(f"{url}/a.png").size_wh == (5, 3)
    elsewhere.answers["/slow.png"] = dribbled_body
    with pytest.raises(PhotoUnreachable, match="no end within"):
        load(f"{url}/slow.png", fetch_timeout_s=0.3)
