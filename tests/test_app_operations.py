"""The Label Studio app as its operators see it: states, who may ask, metrics and logs."""

from __future__ import annotations

import base64
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from apps import PHOTO, metric, new_app, predict, predict_body, setup_body
from fakes import FakeEngine

from backend.errors import SettingsError
from backend.transports.label_studio_app import create_app
from model import EngineOptions, Observer

APP = new_app()


# -- the engine's state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "path", "status"),
    [
        ("loading", "/health", 200),
        ("loading", "/setup", 200),
        ("loading", "/versions", 200),
        ("loading", "/ready", 503),
        ("loading", "/predict", 503),
        ("failed", "/health", 503),
        ("failed", "/setup", 503),
        ("failed", "/ready", 503),
        ("failed", "/predict", 503),
        ("failed", "/", 200),
        ("failed", "/metrics", 200),
        ("closed", "/health", 503),
        ("closed", "/ready", 503),
    ],
)
def test_health_is_up_while_weights_load_and_never_when_they_failed(state: Any, path: str, status: int) -> None:
    failure = "weights: expected 3 tensors, got 2" if state == "failed" else None
    client = new_app(FakeEngine(state=state, failure=failure)).test_client()
    bodies: dict[str, Any] = {"/setup": setup_body(), "/predict": predict_body([PHOTO])}
    response = client.post(path, json=bodies[path]) if path in bodies else client.get(path)
    assert response.status_code == status
    if status == 503:
        reason = failure or f"fake is {state}"
        assert response.json == {"error": reason, "kind": "not_ready"}
        assert response.status == f"503 {reason}"


@pytest.mark.parametrize("state", ["loading", "ready"])
def test_health_and_setup_answer_while_requests_wait_for_the_engine(state: Any) -> None:
    """The engine answers nothing until both have: whoever waited for it would wait for ever."""
    release = threading.Event()
    engine = FakeEngine(on_call=lambda: release.wait(60) and None)
    app = new_app(engine)
    client = app.test_client()
    client.post("/setup", json=setup_body())
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(predict, app, [PHOTO] * 3) for _ in range(4)]
        while len(engine.calls) < len(busy):
            time.sleep(0.005)
        engine.state = state
        for _ in range(20):
            assert client.get("/health").status_code == 200
            assert client.post("/setup", json=setup_body()).status_code == 200
        assert not any(request.done() for request in busy)
        engine.state = "ready"
        release.set()
        assert all(len(request.result()) == 3 for request in busy)


# -- who may ask ------------------------------------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


ROUTES = {
    "/": None,
    "/health": None,
    "/ready": None,
    "/versions": None,
    "/metrics": None,
    "/nothing": None,
    "/setup": setup_body(),
    "/predict": predict_body([]),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "header",
    [None, "", "Basic", "Basic ???", basic("me", "wrong"), basic("you", "word"), basic("", ""), "Bearer word"],
)
def test_with_basic_auth_strangers_are_sent_away(path: str, header: str | None) -> None:
    client = new_app(basic_auth_user="me", basic_auth_pass="word").test_client()
    headers = {} if header is None else {"Authorization": header}
    method = "POST" if ROUTES[path] else "GET"
    response = client.open(path, method=method, json=ROUTES[path], headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Basic ")
    assert response.json["kind"] == "auth"  # type: ignore[index]


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/nothing"])
def test_with_basic_auth_friends_are_let_in(path: str) -> None:
    client = new_app(basic_auth_user="me", basic_auth_pass="w:rd").test_client()
    method = "POST" if ROUTES[path] else "GET"
    response = client.open(path, method=method, json=ROUTES[path], headers={"Authorization": basic("me", "w:rd")})
    assert response.status_code == 200


def test_webhooks_come_without_credentials() -> None:
    client = new_app(basic_auth_user="me", basic_auth_pass="word").test_client()
    assert client.post("/webhook", json={"action": "TASKS_DELETED"}).status_code == 200


# -- metrics and logs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample",
    [
        'facings_requests_total{route="/health",status="200"} 1.0',
        'facings_request_seconds_count{route="/health"} 1.0',
        'facings_queue_wait_seconds_count{lane="interactive"} 1.0',
        'facings_queue_wait_seconds_count{lane="bulk"} 1.0',
        'facings_engine_seconds_count{stage="encode"} 1.0',
        'facings_engine_state{state="ready"} 1.0',
        'facings_engine_state{state="loading"} 0.0',
        'facings_queued{lane="bulk"} 1.0',
        "facings_cache_hits_total 3.0",
        "facings_cache_misses_total 2.0",
        "facings_cache_bytes 64.0",
        "facings_photo_cache_misses_total 0.0",
    ],
)
def test_metrics_contain(sample: str) -> None:
    app = new_app()
    metrics = app.extensions["facings"].metrics
    metrics.waited("interactive", 0.2)
    metrics.waited("bulk", 0.2)
    metrics.stage("encode", 0.2)
    app.test_client().get("/health")
    response = app.test_client().get("/metrics")
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert sample in response.text.splitlines()


def test_metrics_contain_the_resident_memory() -> None:
    assert metric(new_app(), "process_resident_memory_bytes") > 1e6


def test_apps_count_apart() -> None:
    first, second = new_app(), new_app()
    first.test_client().get("/health")
    assert metric(second, 'facings_requests_total{route="/health",status="200"}') == 0


def test_the_page_of_a_project_says_what_it_needs() -> None:
    answer = APP.test_client().get("/projects/3")
    assert answer.status_code == 400
    assert answer.json["error"] == "/projects: expected STATE_DIR to be set where this server runs, got none"


def test_invented_paths_and_tasks_do_not_grow_the_metrics() -> None:
    app = new_app()
    client = app.test_client()
    client.get("/metrics")
    client.get("/invented")
    lines = len(client.get("/metrics").text.splitlines())
    for number in range(50):
        client.get(f"/invented{number}")
    assert len(client.get("/metrics").text.splitlines()) == lines


def test_logs_are_one_line_an_event_without_tokens_and_bodies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = new_app()
    client = app.test_client()
    evil = "3\nevent=forged level=\x1b[31m"
    client.post("/setup", json=setup_body(project=evil, hostname=f"http://{evil}"))
    client.post("/webhook", json={"action": evil, "note": "private words"})
    client.get("/a%0Aevent=forged")
    predict(app, ["data:image/png;base64,AAAA", PHOTO], project=evil)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("backend")]
    assert {message.split()[0] for message in messages} >= {
        "event=setup",
        "event=webhook",
        "event=refused",
        "event=predict",
        "event=task_failed",
        "event=request",
    }
    assert all(message.isprintable() and message.isascii() for message in messages)
    assert not any(message.startswith("event=forged") for message in messages)
    text = "\n".join(messages)
    for secret in ("0123456789abcdef", "private words", "<View", PHOTO[30:60]):
        assert secret not in text


def test_a_setup_is_logged_with_what_was_understood_and_only_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = new_app().test_client()
    for _ in range(3):
        client.post("/setup", json=setup_body())
    (line,) = [record.getMessage() for record in caplog.records if "event=setup" in record.getMessage()]
    assert "boxes go to 'box'" in line
    assert "label 'facing' (the only one)" in line


def test_any_wsgi_server_can_make_the_app_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineOptions] = []

    def new_engine(options: EngineOptions, *, observer: Observer) -> FakeEngine:
        made.append(options)
        observer.stage("encode", 0.1)
        return FakeEngine()

    monkeypatch.setattr("backend.service.Sam2Engine", new_engine)
    monkeypatch.setenv("CHECKPOINT", "sam2.1_hiera_tiny")
    app = create_app()
    assert made[0].checkpoint == "sam2.1_hiera_tiny"
    assert metric(app, 'facings_engine_seconds_count{stage="encode"}') == 1


def test_wrong_settings_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "ninety")
    with pytest.raises(SettingsError, match="PORT: expected a whole number from 1 to 65535, got 'ninety'"):
        create_app()
