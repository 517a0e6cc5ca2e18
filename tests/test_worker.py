"""Photos through message brokers, with real ones: nothing is lost, and each request is answered.

Kafka's protocol is spoken by Tansu, which keeps everything in memory: what a restart of Kafka does, and how a group of
several workers is balanced anew, is not shown here.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import briskdb
import psutil
import pymongo
import pytest
from brokers import STARTERS
from fakes import FakeEngine, data_url, in_thread, painted_photo, png_of
from PIL import Image

from backend.errors import CommandError
from backend.service import Service
from backend.settings import Settings
from backend.transports import worker as transport
from backend.transports.brokers import Broker, BrokerError, Delivery, Topics, connector
from backend.transports.mongodb import MongoStore
from backend.transports.worker import Counts, work
from scripts.demo.processes import LOOPBACK, Server, free_port

RED, BLUE = (255, 0, 0), (0, 0, 255)
PIXELS = painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)})
BOXES = [{"box": [10, 20, 60, 80], "score": 0.9}, {"box": [100, 10, 120, 40], "score": 0.8}]
TOPICS = Topics()
REDELIVER_S = 3.0
QUICK_GROUPS = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500}
ROOT = Path(__file__).parents[1]


def photo(**fields: Any) -> dict[str, Any]:
    return {"url": data_url(PIXELS), **fields}


def connecting(url: str, topics: Topics = TOPICS) -> Callable[[], Broker]:
    return connector(url, topics, redeliver_after_s=REDELIVER_S, max_bytes=10 << 20, kafka_config=QUICK_GROUPS)


@contextmanager
def client(url: str) -> Iterator[Client]:
    """What asks, and reads answers and errors. One that has read is not asked for the same again."""
    asked, answered, failed = TOPICS.requests, TOPICS.answers, TOPICS.errors
    answers = connecting(url, Topics(requests=answered, answers=asked, errors=failed, group="a"))()
    errors = connecting(url, Topics(requests=failed, answers=asked, errors=answered, group="e"))()
    with closing(answers), closing(errors):
        yield Client(answers, errors)


class Client:
    def __init__(self, answers: Broker, errors: Broker) -> None:
        self._answers, self._errors = answers, errors

    def ask(self, request: dict[str, Any] | bytes, key: str = "k") -> None:
        content = request if isinstance(request, bytes) else json.dumps(request).encode()
        self._answers.publish(TOPICS.requests, key, content)

    def answer(self) -> dict[str, Any]:
        return _next(self._answers)

    def error(self) -> dict[str, Any]:
        return _next(self._errors)


def _next(broker: Broker, timeout_s: float = 90.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if delivery := broker.take(0.5):
            broker.done(delivery)
            return json.loads(delivery.content)
    raise AssertionError("no answer")


@contextmanager
def working(
    url: str, *, engine: FakeEngine | None = None, store: Any = None, connect: Callable[[], Broker] | None = None
) -> Iterator[Counts]:
    """A worker in a thread."""
    counts = Counts()

    def run(stop: threading.Event) -> None:
        with Service.open(Settings(), engine=engine or FakeEngine()) as service:
            ended = work(service, connect or connecting(url), TOPICS, stop, store=store)
        counts.answered, counts.failed = ended.answered, ended.failed

    with in_thread(run):
        yield counts


def test_a_photo_is_answered_with_its_boxes_and_the_keys_stay(broker_url: str) -> None:
    with client(broker_url) as asking, working(broker_url) as counts:
        asking.ask(photo(id="shelf-1"))
        asking.ask(photo(prompts=[{"points": [{"x": 110, "y": 20}]}], masks=True), key="shelf-2")
        asking.ask({"id": 3, "base64": base64.b64encode(png_of(PIXELS)).decode(), "score_threshold": 0.85})
        first, second, third = (asking.answer() for _ in range(3))

    assert first == {
        "id": "shelf-1", "width": 200, "height": 100, "model_version": "fake-12345678", "boxes": BOXES
    }  # fmt: skip
    assert second["boxes"][0]["prompt"] == 0
    assert Image.open(io.BytesIO(base64.b64decode(second["boxes"][0]["mask"]["png"]))).size == (200, 100)
    assert third["id"] == "3"
    assert third["boxes"] == BOXES[:1]
    assert (counts.answered, counts.failed) == (3, 0)


def test_what_cannot_be_answered_goes_to_the_errors_and_its_neighbours_are_answered(broker_url: str) -> None:
    poison = [
        (b"\xff\x00 no json", "request", "request: expected JSON"),
        (b"[]", "request", "expected a JSON object, got a list"),
        (b"{}", "request", "expected the photo's url or its bytes in base64, got neither"),
        ({"url": "a", "base64": "b"}, "request", "got url and base64"),
        ({"url": 3}, "request", "url: expected a string, got a number"),
        ({"base64": "%%"}, "request", "expected valid base64"),
        ({"base64": "AAAA"}, "photo_decode", "expected a JPEG"),
        ({"url": "file:///etc/passwd"}, "photo_forbidden", "got another kind of address"),
        ({"url": "http://169.254.169.254/latest"}, "photo_forbidden", "169.254.169.254"),
        (photo(id=[1]), "request", "id: expected a text"),
        (photo(id="x" * 201), "request", "id: expected a text of at most 200 characters"),
        (photo(score_threshold=2), "request", "score_threshold: expected 0 to 1, got 2"),
        (photo(prompts=[{}]), "prompt", "prompts[0]: prompt: expected a box or at least one foreground point"),
        (photo(prompts=[{"points": [{"x": 1, "y": 1, "label": "yes"}]}]), "prompt", "1 (on the object) or 0"),
        (photo(masks="yes"), "request", "masks: expected true or false, got a string"),
    ]
    with client(broker_url) as asking, working(broker_url) as counts:
        for number, (request, _, _) in enumerate(poison):
            asking.ask(request, key=f"poison-{number}")
        asking.ask(photo(id="healthy"))
        errors = [asking.error() for _ in poison]
        assert asking.answer()["id"] == "healthy"

    for error, (request, kind, reason) in zip(errors, poison, strict=True):
        assert (error["kind"], error["retryable"]) == (kind, False), error
        assert reason in error["error"]
        if isinstance(request, dict):
            assert json.loads(error["request"]) == request
    assert (counts.answered, counts.failed) == (1, len(poison))


def test_a_request_that_a_worker_took_and_never_answered_is_answered_by_the_next(broker_url: str) -> None:
    with client(broker_url) as asking:
        asking.ask(photo(id="given-back"))
        with closing(connecting(broker_url)()) as dying:
            deadline = time.monotonic() + 90
            while dying.take(0.5) is None:
                assert time.monotonic() < deadline
        with working(broker_url):
            assert asking.answer()["id"] == "given-back"


def test_a_request_that_comes_twice_is_answered_twice_with_one_key(broker_url: str) -> None:
    stored: dict[str, Any] = {}

    class Store:
        def put(self, key: str, document: dict[str, Any]) -> None:
            stored[key] = document

    with client(broker_url) as asking, working(broker_url, store=Store()):
        request = photo()
        asking.ask(request, key="")
        asking.ask(request, key="")
        first, second = asking.answer(), asking.answer()

    assert first == second
    assert list(stored) == [first["id"]]


def test_an_answer_that_the_broker_did_not_take_is_made_again(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CONNECT_AGAIN_S", 0.2)
    failing = iter((True, False))

    class Flaky:
        """A connection that fails once, when the answer is published."""

        def __init__(self) -> None:
            self._broker = connecting(broker_url)()

        def take(self, timeout_s: float) -> Delivery | None:
            return self._broker.take(timeout_s)

        def publish(self, topic: str, key: str, content: bytes) -> None:
            if next(failing, False):
                raise BrokerError("away")
            self._broker.publish(topic, key, content)

        def done(self, delivery: Delivery) -> None:
            self._broker.done(delivery)

        def close(self) -> None:
            self._broker.close()

    engine = FakeEngine()
    with client(broker_url) as asking, working(broker_url, engine=engine, connect=Flaky):
        asking.ask(photo(id="again"))
        assert asking.answer()["id"] == "again"
    assert len(engine.calls) == 2


@pytest.mark.parametrize("kind", ["redis", "nats", "amqp"])
def test_a_broker_that_restarts_loses_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CONNECT_AGAIN_S", 0.2)
    port = free_port()
    url = f"{kind}://{LOOPBACK}:{port}"
    with STARTERS[kind](tmp_path / "broker", port) as first, working(url, engine=FakeEngine(seconds=0.3)):
        with client(url) as asking:
            for number in range(10):
                asking.ask(photo(id=str(number)), key=str(number))
            before = [asking.answer()["id"]]
        first.stop()
        with STARTERS[kind](tmp_path / "broker", port), client(url) as asking:
            seen = set(before)
            while len(seen) < 10:
                seen.add(asking.answer()["id"])
    assert seen == set(map(str, range(10)))


WORKER = """
import sys, threading
sys.path.insert(0, {tests!r})
from fakes import FakeEngine
from backend.service import Service
from backend.settings import Settings
from backend.transports.brokers import Topics, connector
from backend.transports.worker import work
with Service.open(Settings(), engine=FakeEngine(seconds=0.2)) as service:
    connect = connector({url!r}, Topics(), redeliver_after_s=3, max_bytes=10 << 20)
    print("working", flush=True)
    work(service, connect, Topics(), threading.Event())
"""


@pytest.mark.parametrize("kind", ["redis", "nats", "amqp"])
def test_workers_share_the_requests_and_killed_ones_lose_none(kind: str, tmp_path: Path) -> None:
    port = free_port()
    url = f"{kind}://{LOOPBACK}:{port}"
    program = WORKER.format(tests=str(ROOT / "tests"), url=url)

    def start(name: str) -> Server:
        command = [sys.executable, "-c", program]
        return Server(name, command, environ=os.environ, cwd=ROOT, log=tmp_path / f"{name}.log")

    broker = STARTERS[kind](tmp_path / "broker", port)
    with broker, start("one") as one, start("two"), start("three"), client(url) as asking:
        for number in range(40):
            asking.ask(photo(id=str(number)), key=str(number))
        seen = {asking.answer()["id"] for _ in range(3)}
        psutil.Process(one.pid).send_signal(signal.SIGKILL)
        while len(seen) < 40:
            seen.add(asking.answer()["id"])
    assert seen == set(map(str, range(40)))


def test_a_message_that_kills_every_worker_is_given_up(redis_url: str) -> None:
    with client(redis_url) as asking:
        asking.ask(photo(id="deadly"))
        for _ in range(transport.MAX_ATTEMPTS):
            with closing(connecting(redis_url)()) as dying:
                deadline = time.monotonic() + 30
                while dying.take(0.5) is None:
                    assert time.monotonic() < deadline
        with working(redis_url):
            error = asking.error()
    assert "was delivered 6 times, and no worker has told its outcome" in error["error"]


def test_a_photo_that_is_unreachable_is_tried_again_before_it_fails(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRY_AGAIN_S", 0.05)
    with client(redis_url) as asking, working(redis_url):
        asking.ask({"id": "away", "url": f"http://{LOOPBACK}:{free_port()}/a.jpg"})
        error = asking.error()
    assert (error["id"], error["kind"], error["retryable"]) == ("away", "photo_unreachable", True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://localhost", "expected kafka://, redis://, nats:// or amqp://"),
        ("redis://user:secret@127.0.0.1:1", r"redis://127.0.0.1:1: ConnectionError"),
        ("kafka://127.0.0.1:1", r"kafka://127.0.0.1:1: KafkaException"),
        ("nats://user:secret@127.0.0.1:1", r"nats://127.0.0.1:1: "),
        ("amqp://user:secret@127.0.0.1:1", r"amqp://127.0.0.1:1: AMQPConnectionError"),
    ],
)
def test_a_broker_that_is_none_is_refused_in_one_line_without_its_password(url: str, reason: str) -> None:
    with Service.open(Settings(), engine=FakeEngine()) as service, pytest.raises(CommandError, match=reason) as caught:
        work(service, connecting(url), TOPICS, threading.Event())
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_are_documents_by_key_and_an_answer_that_is_not_stored_is_not_lost(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BriskDB speaks a subset of MongoDB's protocol."""
    monkeypatch.setattr(transport, "CONNECT_AGAIN_S", 0.2)
    with briskdb.open(tmp_path / "data", shards=4, documents=True) as database:
        server = database.serve(mongo=f"{LOOPBACK}:0")
        address = str(server.mongo_address)
        url = f"mongodb://{address}/shelves"
        store = MongoStore(url + "?serverSelectionTimeoutMS=500")
        with client(redis_url) as asking, working(redis_url, store=store):
            for identifier in ("a", "b", "a"):
                asking.ask(photo(id=identifier))
            answers = [asking.answer() for _ in range(3)]
            server.close()
            asking.ask(photo(id="later"))
            time.sleep(2)
            with database.serve(mongo=address):
                assert asking.answer()["id"] == "later"
                with pymongo.MongoClient(url) as reader:
                    stored = {one.pop("_id"): one for one in reader.shelves.answers.find()}
        store.close()
    assert sorted(stored) == ["a", "b", "later"]
    assert stored["a"] == answers[0]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://localhost", "InvalidURI"),
        ("mongodb://user:secret@127.0.0.1:1", "No default database"),
        ("mongodb://user:secret@127.0.0.1:1/shelves", "refused"),
    ],
)
def test_a_store_that_is_none_is_refused_in_one_line_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(CommandError, match=reason) as caught:
        MongoStore(f"{url}?serverSelectionTimeoutMS=500" if url.endswith("shelves") else url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_boxes_a_photo_and_ends_when_it_is_told_to(redis_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.cli", "worker", redis_url]
    with (
        client(redis_url) as asking,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
    ):
        asking.ask(photo(id="real"))
        answer = asking.answer()
        process.terminate()
        printed, _ = process.communicate(timeout=60)
    assert answer["id"] == "real"
    assert answer["model_version"].startswith("facings-nano-")
    assert process.returncode == 0
    assert printed == "1 requests answered, 0 failed\n"


def test_a_thousand_requests_leave_the_memory_as_it_was(redis_url: str) -> None:
    process = psutil.Process()
    sizes = []
    with client(redis_url) as asking, working(redis_url):
        for _ in range(4):
            for number in range(250):
                asking.ask(photo(id=str(number)))
            for _ in range(250):
                asking.answer()
            sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 30 * 2**20
