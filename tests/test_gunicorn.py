"""The Label Studio app under gunicorn: whole and broken requests over real sockets."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from apps import NO_BOXES, PHOTO, predict_body, setup_body

from backend.errors import CommandError
from backend.settings import Settings
from backend.transports.gunicorn import serve

ROOT = Path(__file__).parents[1]

SERVER = """
import backend.transports.gunicorn, backend.transports.label_studio_app, sys
sys.path.insert(0, "tests")
from fakes import FakeEngine
from backend.settings import Settings
from model import EngineOptions, Observer
from backend.errors import CommandError
from backend.transports.gunicorn import serve
create_app = backend.transports.label_studio_app.create_app
backend.transports.label_studio_app.create_app = lambda settings: create_app(settings, FakeEngine())
backend.transports.gunicorn.READ_TIMEOUT_S = 1.0
backend.transports.gunicorn.serve(Settings(host="127.0.0.1", port=int(sys.argv[1]), threads=4, max_request_mb=1))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Host and port of the app under gunicorn, with a fake engine."""
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(SERVER), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        give_up = time.monotonic() + 300
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except requests.ConnectionError:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < give_up
                time.sleep(0.1)
        yield "127.0.0.1", port
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in log
    finally:
        process.kill()
        process.wait()


def send(address: tuple[str, int], content: bytes, *, ends: bool = True) -> bytes:
    """Everything that comes back for raw bytes; `ends`: whether the client then closes its side."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(content)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
            if b"\r\n\r\n" in received and received.rstrip().endswith(b"}"):
                break
    return received


def test_gunicorn_carries_the_message_in_the_status_line(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}"
    response = requests.post(f"{url}/setup", json=setup_body(schema=NO_BOXES), timeout=10)
    assert response.status_code == 400
    assert response.reason == response.json()["error"]
    assert "add an Image with name" in response.reason
    with pytest.raises(requests.HTTPError, match="400 Client Error: label config: no Image"):
        response.raise_for_status()


def test_gunicorn_serves_predictions(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}"
    response = requests.post(f"{url}/predict", json=predict_body([PHOTO] * 3), timeout=10)
    assert [len(item["result"]) for item in response.json()["results"]] == [1, 1, 1]


BODY = json.dumps(predict_body([])).encode()
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
BROKEN_CHUNKS = {
    "bad size": b"zz\r\nabc\r\n0\r\n\r\n",
    "negative size": b"-5\r\nabc\r\n0\r\n\r\n",
    "endless size": b"1" * 70_000,
    "chunk longer than its size": b"3\r\nabcd\r\n0\r\n\r\n",
    "garbage": b"\x00\xff\xfe garbage\r\n\r\n",
    "cut in a chunk": CHUNK[:-20],
    "no last chunk": CHUNK,
    "garbage for a trailer": CHUNK + b"0\r\nfoo\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("path", ["/predict", "/setup", "/webhook"])
@pytest.mark.parametrize("chunks", BROKEN_CHUNKS.values(), ids=list(BROKEN_CHUNKS))
def test_a_body_of_broken_chunks_is_refused_in_one_line_and_counted(
    address: tuple[str, int], chunks: bytes, path: str
) -> None:
    def count() -> float:
        text = requests.get(f"http://{address[0]}:{address[1]}/metrics", timeout=10).text
        found = re.search(r'^facings_errors_total\{kind="request"\} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = count()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    received = send(address, head + chunks)
    assert received.startswith(b"HTTP/1.1 400 body: expected ")
    assert received.partition(b"\r\n\r\n")[2].count(b"\n") == 1
    assert count() == before + 1


def test_a_body_of_whole_chunks_is_read(address: tuple[str, int]) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert send(address, head + CHUNK + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("ends", [True, False])
def test_half_a_request_is_refused_whether_the_client_leaves_or_stops_sending(
    address: tuple[str, int], ends: bool
) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    started = time.monotonic()
    received = send(address, head + b'{"tasks": [', ends=ends)
    assert received.startswith(b"HTTP/1.1 400 body: ")
    assert b'"kind": "request"' in received
    assert time.monotonic() - started < 5


def test_a_body_without_a_length_is_bounded_too(address: tuple[str, int]) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    received = send(address, head + chunk * 17 + b"0\r\n\r\n", ends=False)
    assert received.startswith(b"HTTP/1.1 413 expected a body of at most 1 MiB")


def test_a_port_in_use_is_named_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError) as caught:
            serve(Settings(host="127.0.0.1", port=port))
    assert str(caught.value).startswith(f"port {port} of '127.0.0.1' is unavailable (Address already in use): ")
    assert "\n" not in str(caught.value)
