"""The Redis wire format of the SAM command-line tools, with a real Redis."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import redis
from brokers import start_redis
from fakes import FakeEngine, in_thread, painted_photo, png_of
from PIL import Image

from backend.errors import CommandError
from backend.service import Service
from backend.settings import Settings
from backend.transports import redis_sam
from backend.transports.redis_sam import Channels, sam_request, serve
from scripts.demo.processes import LOOPBACK, free_port

RED, BLUE = (255, 0, 0), (0, 0, 255)
CHANNELS = Channels(requests="images", answers="predictions", errors="errors")


def photo(size_wh: tuple[int, int] = (200, 100)) -> bytes:
    return png_of(painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)}, size_wh))


@contextmanager
def answering(url: str, *, engine: FakeEngine | None = None, max_bytes: int = 1 << 20) -> Iterator[Service]:
    """A Facings that answers on the channels, in a thread."""
    service = Service.open(Settings(), engine=engine or FakeEngine())
    with in_thread(lambda stop: serve(service, url, CHANNELS, stop, max_bytes=max_bytes)):
        until_heard(redis.Redis.from_url(url), CHANNELS.requests)
        yield service


def until_heard(client: redis.Redis, channel: str) -> None:
    deadline = time.monotonic() + 60
    while dict(client.pubsub_numsub(channel))[channel.encode()] == 0:
        assert time.monotonic() < deadline, "nobody listens"
        time.sleep(0.05)


class Listener:
    """Subscribed before anything is asked, so that nothing is missed."""

    def __init__(self, url: str) -> None:
        self._subscription = redis.Redis.from_url(url).pubsub(ignore_subscribe_messages=True)
        self._subscription.subscribe(CHANNELS.answers, CHANNELS.errors)
        time.sleep(0.1)

    def next(self, timeout_s: float = 30.0) -> tuple[str, dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self._subscription.get_message(timeout=0.2)
            if message is not None:
                return message["channel"].decode(), json.loads(message["data"])
        raise AssertionError("no answer")


def test_a_point_is_answered_with_a_mask_and_contours(redis_url: str) -> None:
    prompt = {"points": [{"x": 110, "y": 20, "label": 1}, {"x": 30, "y": 50, "label": 0}]}
    listener = Listener(redis_url)
    with answering(redis_url):
        redis.Redis.from_url(redis_url).publish("images", sam_request(photo(), prompt))
        channel, answer = listener.next()

    assert channel == "predictions"
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    assert mask.shape == (100, 200)
    assert mask[20, 110] == 255
    assert mask[50, 30] == 0
    assert int((mask == 255).sum()) == 20 * 30
    (contour,) = answer["contours"]["objects"]
    assert contour["bbox"] == {"left": 100, "top": 10, "right": 120, "bottom": 40}
    assert answer["meta"]["prompt"] == prompt


def test_a_box_is_answered_too(redis_url: str) -> None:
    listener = Listener(redis_url)
    with answering(redis_url):
        box = {"x0": 8, "y0": 18, "x1": 62, "y1": 82}
        redis.Redis.from_url(redis_url).publish("images", sam_request(photo(), {"box": box}))
        _, answer = listener.next()

    assert answer["contours"]["objects"][0]["bbox"] == {"left": 10, "top": 20, "right": 60, "bottom": 80}


POINT = {"points": [{"x": 110, "y": 20, "label": 1}]}


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"", "request", "request: expected JSON"),
        (b"\xff\xfe\x00", "request", "request: expected JSON"),
        (b"[1]", "request", "expected a JSON object, got a list"),
        (b"{}", "request", "prompt: expected an object with points or a box, got nothing"),
        (json.dumps({"prompt": POINT}).encode(), "request", "image: expected a photo in base64, got nothing"),
        (json.dumps({"prompt": POINT, "image": "%"}).encode(), "request", "expected valid base64"),
        (json.dumps({"prompt": {}, "image": ""}).encode(), "prompt", "expected a box or at least one foreground point"),
        (sam_request(b"no photo", POINT), "photo_decode", "expected a JPEG"),
        (sam_request(photo()[:100], POINT), "photo_decode", "expected"),
        (sam_request(photo(), {"points": [{"x": "1", "y": 2}]}), "prompt", "points.x: expected a number, got a string"),
        (sam_request(photo(), {"points": [{"x": 1e300, "y": 2}]}), "prompt", "expected a number of pixels"),
        (sam_request(b"0" * (1 << 20), POINT), "request", "expected at most 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_answered_is_an_error_and_the_next_request_is_answered(
    redis_url: str, content: bytes, kind: str, reason: str
) -> None:
    listener = Listener(redis_url)
    with answering(redis_url):
        client = redis.Redis.from_url(redis_url)
        client.publish("images", content)
        client.publish("images", sam_request(photo(), POINT))
        channel, error = listener.next()
        next_channel, _ = listener.next()

    assert (channel, error["kind"], error["retryable"]) == ("errors", kind, False)
    assert reason in error["error"]
    assert next_channel == "predictions"


def test_requests_beyond_what_may_wait_are_refused_and_may_be_sent_again(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_sam, "MAX_WAITING", 2)
    gate = threading.Event()
    listener = Listener(redis_url)
    with answering(redis_url, engine=FakeEngine(on_call=lambda: gate.wait(30))):
        client = redis.Redis.from_url(redis_url)
        for _ in range(6):
            client.publish("images", sam_request(photo(), POINT))
        channel, error = listener.next()
        gate.set()

    assert (channel, error["kind"], error["retryable"]) == ("errors", "not_ready", True)


def test_a_redis_that_goes_away_is_connected_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_sam, "CONNECT_AGAIN_S", 0.2)
    port = free_port()
    url = f"redis://{LOOPBACK}:{port}/0"
    with start_redis(tmp_path / "redis", port) as first, answering(url):
        psutil.Process(first.pid).send_signal(signal.SIGKILL)
        time.sleep(1)
        with start_redis(tmp_path / "redis", port):
            client = redis.Redis.from_url(url)
            until_heard(client, "images")
            listener = Listener(url)
            client.publish("images", sam_request(photo(), POINT))
            assert listener.next()[0] == "predictions"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://localhost", "expected redis://host:port/db"),
        ("redis://user:secret@127.0.0.1:1/0", r"^redis://127.0.0.1:1/0: ConnectionError: .*refused"),
    ],
)
def test_a_server_that_is_none_is_refused_in_one_line_without_its_password(url: str, reason: str) -> None:
    with Service.open(Settings(), engine=FakeEngine()) as service, pytest.raises(CommandError, match=reason) as caught:
        serve(service, url, CHANNELS, threading.Event(), max_bytes=1)
    assert "secret" not in str(caught.value)


def test_the_commands_send_a_photo_and_receive_its_mask(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo())
    command = [sys.executable, "-m", "scripts.cli"]
    client = redis.Redis.from_url(redis_url)
    with answering(redis_url):
        receiving = [*command, "redis-recv", str(tmp_path / "masks"), redis_url, "--count", "1"]
        with subprocess.Popen(receiving, stdout=subprocess.PIPE, text=True) as receiver:
            until_heard(client, "predictions")
            sending = [*command, "redis-send", str(tmp_path / "a.png"), redis_url, "--point", "110,20"]
            sent = subprocess.run(sending, capture_output=True, text=True, check=True)
            printed, _ = receiver.communicate(timeout=60)

    assert "on which 1 listen" in sent.stdout
    mask = Path(printed.strip())
    with Image.open(mask) as picture:
        assert picture.size == (200, 100)
    assert json.loads(mask.with_suffix(".json").read_text())["objects"][0]["bbox"]["left"] == 100


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["a.txt", "--point", "1,2"], "expected a photo"),
        (["a.png"], "expected a box or at least one foreground point"),
        (["a.png", "--point", "1"], "expected 2 numbers with commas between them, got '1'"),
        (["a.png", "--prompt", "{"], "--prompt: expected JSON"),
        (["a.png", "--prompt", "missing.prompt"], "No such file or directory: 'missing.prompt'"),
        (["missing.png", "--point", "1,2"], "No such file or directory: 'missing.png'"),
    ],
)
def test_what_redis_send_cannot_send_is_refused_in_one_line(
    redis_url: str, tmp_path: Path, options: list[str], reason: str
) -> None:
    (tmp_path / "a.png").write_bytes(photo())
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "scripts.cli", "redis-send", options[0], redis_url, *options[1:]]
    environ = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.returncode != 0
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_thousand_requests_leave_the_memory_as_it_was(redis_url: str) -> None:
    process = psutil.Process()
    client = redis.Redis.from_url(redis_url)
    listener = Listener(redis_url)
    request = sam_request(photo(), POINT)
    sizes = []
    with answering(redis_url):
        for _ in range(4):
            for _ in range(250):
                client.publish("images", request)
                assert listener.next()[0] == "predictions"
            sizes.append(process.memory_info().rss)

    assert sizes[-1] - sizes[0] < 30 * 2**20
