"""The gRPC service, over real connections."""

from __future__ import annotations

import base64
import io
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from fakes import FakeEngine, data_url, painted_photo, png_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from backend.errors import CommandError
from backend.service import Service
from backend.settings import Settings
from backend.transports import facings_pb2 as pb
from backend.transports.facings_pb2_grpc import FacingsStub
from backend.transports.grpc_server import STATUSES, Server
from backend.transports.http import STATUSES as HTTP_STATUSES
from scripts.demo.processes import LOOPBACK, free_port
from scripts.demo.processes import Server as Process

RED, BLUE = (255, 0, 0), (0, 0, 255)
PIXELS = painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)})
SETTINGS = Settings(host=LOOPBACK, max_request_mb=1)
ROOT = Path(__file__).parents[1]


@contextmanager
def serving(engine: FakeEngine | None = None, **settings: Any) -> Iterator[tuple[Server, Service]]:
    with Service.open(replace(SETTINGS, **settings), engine=engine or FakeEngine()) as service:
        server = Server(service, replace(SETTINGS, **settings))
        try:
            yield server, service
        finally:
            server.close()


@contextmanager
def calling(server: Server) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"{LOOPBACK}:{server.port}", options=options) as channel:
        yield channel


@pytest.fixture(scope="module")
def facings() -> Iterator[FacingsStub]:
    with serving() as (server, _), calling(server) as channel:
        yield FacingsStub(channel)


def boxes(answer: Any) -> list[list[float]]:
    return np.reshape(answer.boxes, (-1, 4)).tolist()


@pytest.mark.parametrize(
    "photo",
    [
        {"encoded": png_of(PIXELS)},
        {"raw": pb.Raw(height=100, width=200, rgb=PIXELS.tobytes())},
        {"url": data_url(PIXELS)},
    ],
    ids=["encoded", "raw", "url"],
)
def test_a_photo_is_answered_with_all_boxes(facings: FacingsStub, photo: dict[str, Any]) -> None:
    answer = facings.Find(pb.Request(id="a", **photo), timeout=30)
    assert (answer.id, answer.width, answer.height, answer.model_version) == ("a", 200, 100, "fake-12345678")
    assert boxes(answer) == [[10, 20, 60, 80], [100, 10, 120, 40]]
    assert np.allclose(answer.scores, [0.9, 0.8])
    assert (list(answer.prompts), list(answer.masks)) == ([], [])


def test_prompts_and_masks(facings: FacingsStub) -> None:
    prompts = [
        pb.Prompt(points=[pb.Point(x=110, y=20), pb.Point(x=30, y=50, is_background=True)]),
        pb.Prompt(box=pb.Box(x0=8, y0=18, x1=62, y1=82)),
    ]
    answer = facings.Find(pb.Request(encoded=png_of(PIXELS), prompts=prompts, masks=True), timeout=30)
    assert boxes(answer) == [[100, 10, 120, 40], [10, 20, 60, 80]]
    assert list(answer.prompts) == [0, 1]
    mask = np.asarray(Image.open(io.BytesIO(answer.masks[0].png)))
    assert int((mask == 255).sum()) == 20 * 30


def test_a_score_threshold_and_masks_of_all_facings(facings: FacingsStub) -> None:
    answer = facings.Find(pb.Request(encoded=png_of(PIXELS), masks=True, score_threshold=0.85), timeout=30)
    assert boxes(answer) == [[10, 20, 60, 80]]
    assert len(answer.masks) == 1


BAD = [
    (pb.Request(), "INVALID_ARGUMENT", "request", "photo: expected encoded, raw or url"),
    (pb.Request(encoded=b"no photo"), "INVALID_ARGUMENT", "photo_decode", "expected a JPEG"),
    (pb.Request(encoded=b""), "INVALID_ARGUMENT", "photo_decode", "expected"),
    (pb.Request(raw=pb.Raw(height=2, width=2, rgb=b"abc")), "INVALID_ARGUMENT", "request", "12 in all, got 3"),
    (pb.Request(raw=pb.Raw()), "INVALID_ARGUMENT", "request", "raw: expected 0 x 0"),
    (pb.Request(url="file:///etc/passwd"), "PERMISSION_DENIED", "photo_forbidden", "another kind of address"),
    (pb.Request(url="http://169.254.169.254/"), "PERMISSION_DENIED", "photo_forbidden", "link-local"),
    (pb.Request(url="http://127.0.0.1:1/a.jpg"), "NOT_FOUND", "photo_unreachable", "127.0.0.1:1"),
    (pb.Request(encoded=png_of(PIXELS), score_threshold=2), "INVALID_ARGUMENT", "request", "expected 0 to 1, got 2"),
    (
        pb.Request(encoded=png_of(PIXELS), score_threshold=float("nan")),
        "INVALID_ARGUMENT",
        "request",
        "expected 0 to 1, got nan",
    ),
    (pb.Request(encoded=png_of(PIXELS), prompts=[pb.Prompt()]), "INVALID_ARGUMENT", "prompt", "got neither"),
    (
        pb.Request(encoded=png_of(PIXELS), prompts=[pb.Prompt(points=[pb.Point(x=float("nan"))])]),
        "INVALID_ARGUMENT",
        "prompt",
        "finite",
    ),
]


@pytest.mark.parametrize(("request_", "status", "kind", "reason"), BAD, ids=[reason for *_, reason in BAD])
def test_a_bad_request_is_a_status_with_one_line(
    facings: FacingsStub, request_: Any, status: str, kind: str, reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        facings.Find(request_, timeout=30)
    assert caught.value.code().name == status
    assert reason in caught.value.details()
    assert "\n" not in caught.value.details()
    assert dict(caught.value.trailing_metadata())["facings-kind"] == kind


def test_a_stream_is_answered_in_order_and_a_bad_photo_costs_its_neighbours_nothing(facings: FacingsStub) -> None:
    good = pb.Request(encoded=png_of(PIXELS))
    requests = []
    for number, (bad, *_) in enumerate(BAD):
        requests += [pb.Request(id=f"good-{number}"), pb.Request(id=f"bad-{number}")]
        requests[-2].MergeFrom(good)
        requests[-1].MergeFrom(bad)
        requests[-1].id = f"bad-{number}"
    answers = list(facings.FindMany(iter(requests), timeout=60))
    assert [answer.id for answer in answers] == [request.id for request in requests]
    for answer in answers:
        assert bool(answer.error.kind) == answer.id.startswith("bad")
        assert bool(answer.boxes) != bool(answer.error.kind)


def test_a_stream_may_wait_for_an_answer_before_it_asks_again_and_may_be_cancelled(facings: FacingsStub) -> None:
    requests: queue.Queue[Any] = queue.Queue()
    stream = facings.FindMany(iter(requests.get, None), timeout=60)
    for number in range(4):
        requests.put(pb.Request(id=str(number), encoded=png_of(PIXELS)))
        assert next(stream).id == str(number)
    stream.cancel()
    requests.put(None)
    assert len(facings.Find(pb.Request(encoded=png_of(PIXELS)), timeout=30).scores) == 2


def test_a_message_beyond_the_limit_is_refused(facings: FacingsStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        facings.Find(pb.Request(encoded=bytes(2 << 20)), timeout=30)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_clients_deadline_reaches_the_engine() -> None:
    engine = FakeEngine(seconds=30)
    with serving(engine) as (server, _), calling(server) as channel:
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            FacingsStub(channel).Find(pb.Request(encoded=png_of(PIXELS)), timeout=1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began < 10


def test_a_server_that_is_loading_says_so() -> None:
    with serving(FakeEngine(state="loading")) as (server, _), calling(server) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            FacingsStub(channel).Find(pb.Request(encoded=png_of(PIXELS)), timeout=30)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata())["facings-retryable"] == "true"
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_and_reflection_tell_the_service() -> None:
    with serving() as (server, _), calling(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + 30
        for name in ("", "facings.v1.Facings"):
            request = health_pb2.HealthCheckRequest(service=name)
            while stub.Check(request).status != health_pb2.HealthCheckResponse.SERVING:
                assert time.monotonic() < deadline
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        assert "facings.v1.Facings" in {one.name for one in answer.list_services_response.service}


@pytest.mark.parametrize(
    ("metadata", "is_allowed"),
    [
        ((("authorization", "Basic " + base64.b64encode(b"me:secret").decode()),), True),
        ((("authorization", "Basic " + base64.b64encode(b"me:wrong").decode()),), False),
        ((("authorization", "Basic %"),), False),
        ((("authorization", "Bearer secret"),), False),
        ((), False),
    ],
)
def test_the_password_of_http_is_that_of_grpc(metadata: tuple[tuple[str, str], ...], is_allowed: bool) -> None:
    with serving(basic_auth_user="me", basic_auth_pass="secret") as (server, _), calling(server) as channel:
        stub = FacingsStub(channel)
        calls = (
            lambda: stub.Find(pb.Request(encoded=png_of(PIXELS)), timeout=30, metadata=metadata),
            lambda: next(stub.FindMany(iter([pb.Request(encoded=png_of(PIXELS))]), timeout=30, metadata=metadata)),
        )
        for call in calls:
            if is_allowed:
                assert len(call().scores) == 2
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_tls_with_files(certificate: Path) -> None:
    cert = key = certificate  # both in one file
    with serving(grpc_tls_cert=str(cert), grpc_tls_key=str(key)) as (server, _):
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(f"{LOOPBACK}:{server.port}", credentials) as channel:
            assert len(FacingsStub(channel).Find(pb.Request(encoded=png_of(PIXELS)), timeout=30).scores) == 2


def test_tls_files_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    path = str(tmp_path / "a.pem")
    with pytest.raises(CommandError, match="gRPC on") as caught, serving(grpc_tls_cert=path, grpc_tls_key=path):
        pass
    assert "\n" not in str(caught.value)


def test_every_kind_of_error_has_a_status() -> None:
    assert STATUSES.keys() == HTTP_STATUSES.keys()


def test_the_server_command_answers_the_client_of_the_documentation(tmp_path: Path) -> None:
    (tmp_path / "shelf.png").write_bytes(png_of(PIXELS))
    client = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "grpc.md").read_text(), re.DOTALL)
    assert client is not None
    http, port = free_port(), free_port()
    environ = {**os.environ, "PORT": str(http), "GRPC_PORT": str(port), "HOST": LOOPBACK, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.cli", "serve", "--grpc"]
    with Process("facings", command, environ=environ, cwd=tmp_path, log=tmp_path / "log") as server:
        server.wait_until(lambda: is_serving(port), timeout_s=120, what="serving")
        done = subprocess.run(
            [sys.executable, "-c", client.group(1), "shelf.png"],
            env={**environ, "FACINGS": f"{LOOPBACK}:{port}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+ facings on 200 x 100\na ", done.stdout)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"GRPC_TLS_CERT": "a.pem", "GRPC_TLS_KEY": "a.pem"}, "GRPC_TLS_CERT and GRPC_TLS_KEY: expected a certificate"),
        ({"GRPC_TLS_CERT": "a.pem"}, "GRPC_TLS_KEY: expected a file next to GRPC_TLS_CERT"),
        ({"GRPC_TLS_CERT": "b.pem", "GRPC_TLS_KEY": "a.pem"}, "GRPC_TLS_CERT: expected an existing file"),
        ({"GRPC_PORT": "none"}, "GRPC_PORT: expected"),
        ({"GRPC_PORT": "{taken}"}, "choose another port with GRPC_PORT"),
    ],
)
def test_what_the_server_command_cannot_use_is_refused_in_one_line(
    tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    with socket.create_server((LOOPBACK, 0)) as taken:
        named = {name: value.format(taken=taken.getsockname()[1]) for name, value in variables.items()}
        environ = {**os.environ, "PORT": str(free_port()), "HOST": LOOPBACK, "PYTHONPATH": str(ROOT), **named}
        command = [sys.executable, "-m", "scripts.cli", "serve", "--grpc"]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def is_serving(port: int) -> bool:
    try:
        with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            return answer.status == health_pb2.HealthCheckResponse.SERVING
    except grpc.RpcError:
        return False


def test_a_thousand_calls_from_four_threads_leave_the_memory_as_it_was() -> None:
    process = psutil.Process()
    sizes = []
    request = pb.Request(encoded=png_of(PIXELS))

    def ask(stub: FacingsStub) -> None:
        for _ in range(63):
            assert len(stub.Find(request, timeout=60).scores) == 2

    with serving() as (server, _), calling(server) as channel:
        stub = FacingsStub(channel)
        for _ in range(4):
            threads = [threading.Thread(target=ask, args=(stub,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 30 * 2**20
