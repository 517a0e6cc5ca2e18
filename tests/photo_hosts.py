"""Hosts on this machine that serve photos, for the tests of loading them.

Each listens on a port of its own on 127.0.0.1, and so is an origin of its own.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.photos.loader import Access, PhotoLoader
from backend.settings import Settings
from model.types import Photo

Answer = Callable[[BaseHTTPRequestHandler], None]
LEGACY = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """A host on the network: answers the paths it was given, records what it was asked, counts its connections."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []  # target, Authorization
        self.connections = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                server.connections += 1
                super().setup()

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


def redirect(
    location: str, handler: BaseHTTPRequestHandler, *, code: int = 302, extra: Mapping[str, str] | None = None
) -> None:
    handler.send_response(code)
    for name, value in {"Location": location, **(extra or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()


def png(colour: tuple[int, int, int] = (200, 30, 60), size_wh: tuple[int, int] = (5, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size_wh, colour).save(file, "PNG")
    return file.getvalue()


PNG = png()


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


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a key and its certificate for 127.0.0.1."""
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
