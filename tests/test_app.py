"""The protocol, as Label Studio speaks it: answers, refusals, who may ask, what is counted and logged."""

from __future__ import annotations

import base64
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from fakes import FakeEngine, data_url, painted_photo
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from backend.errors import CommandError, FacingsError, SettingsError
from backend.photos.loader import Access
from backend.settings import Settings
from backend.transports.gunicorn import serve
from backend.transports.label_studio_app import MAX_PROJECTS, STATUSES, Setup, Setups, create_app
from model import EngineOptions, Observer

ROOT = Path(__file__).parents[1]
# Requests that Label Studio 1.23.2 sent: bodies as they came, but for long lists of regions, which are cut.
CAPTURES = ROOT / "tests" / "data" / "label_studio"

BOXES = '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/></RectangleLabels>'
POINTS = '<KeyPointLabels name="point" toName="image" smart="true"><Label value="click"/></KeyPointLabels>'
CONFIG = f'<View><Image name="image" value="$image"/>{POINTS}{BOXES}</View>'
OTHER_CONFIG = CONFIG.replace('"box"', '"crate"').replace("facing", "bottle").replace("image", "photo")

RED, GREEN = (255, 0, 0), (0, 255, 0)
PHOTO = data_url(painted_photo({RED: (20, 20, 60, 60)}))
CLICK = {
    "type": "keypointlabels",
    "from_name": "point",
    "to_name": "image",
    "is_positive": True,
    "value": {"x": 15, "y": 30, "width": 0.3, "keypointlabels": ["click"]},
}


def new_app(engine: FakeEngine | None = None, **settings: Any) -> Flask:
    return create_app(Settings(**settings), engine or FakeEngine())  # type: ignore[arg-type]


def setup_body(**more: Any) -> dict[str, Any]:
    return {
        "project": "3.17",
        "schema": CONFIG,
        "hostname": "http://127.0.0.1:8080",
        "access_token": "0123456789abcdef",
        "extra_params": None,
        **more,
    }


def predict_body(photos: list[str], context: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "tasks": [{"id": i, "data": {"image": photo}} for i, photo in enumerate(photos)],
        "project": "3.17",
        "label_config": CONFIG,
        "params": {"login": None, "password": None, "context": context},
        **more,
    }


def predict(app: Flask, photos: list[str], context: Any = None, **more: Any) -> list[dict[str, Any]]:
    response = app.test_client().post("/predict", json=predict_body(photos, context, **more))
    assert response.status_code == 200
    results: list[dict[str, Any]] = response.json["results"]  # type: ignore[index]
    return results


def metric(app: Flask, sample: str) -> float:
    """The value of a line of /metrics; 0 where there is none."""
    text = app.test_client().get("/metrics").text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


APP = new_app()


def is_one_line_of_json(response: TestResponse) -> bool:
    return response.text.count("\n") == 1 and response.text.endswith("}\n") and response.is_json


# -- what each route answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "answer"),
    [
        ("GET", "/health", None, {"status": "UP", "model_class": "FacingsAnnotator", "state": "ready"}),
        ("GET", "/ready", None, {"status": "READY", "model_version": "fake-12345678"}),
        ("POST", "/setup", setup_body(), {"model_version": "fake-12345678"}),
        ("POST", "/setup", setup_body(project=3, hostname=None, access_token=None), {"model_version": "fake-12345678"}),
        ("GET", "/versions", None, {"versions": ["fake-12345678"]}),
        ("POST", "/webhook", {"action": "TASKS_CREATED", "tasks": []}, {"status": "ok"}),
        ("POST", "/predict", predict_body([]), {"results": []}),
        ("POST", "/predict", predict_body([], params=None), {"results": []}),
    ],
)
def test_routes_answer_as_label_studio_expects(method: str, path: str, body: Any, answer: Any) -> None:
    response = new_app().test_client().open(path, method=method, json=body)
    assert (response.status_code, response.json) == (200, answer)
    assert is_one_line_of_json(response)


def test_the_address_in_a_browser_answers_what_this_is_and_its_state() -> None:
    answer = new_app().test_client().get("/").json
    assert answer == {
        "name": "Facings, a Label Studio ML backend",
        "state": "ready",
        "model_version": "fake-12345678",
        "failure": None,
    }


def test_a_photo_comes_back_with_its_boxes() -> None:
    (item,) = predict(new_app(), [PHOTO])
    (region,) = item["result"]
    assert region.pop("id")
    assert region == {
        "from_name": "box",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "score": 0.9,
        "value": {"x": 10, "y": 20, "width": 20, "height": 40, "rotation": 0, "rectanglelabels": ["facing"]},
    }
    assert (item["score"], item["model_version"]) == (0.9, "fake-12345678")


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*.json")), ids=lambda path: path.stem)
def test_requests_that_label_studio_sent_are_accepted(path: Path) -> None:
    client = new_app().test_client()
    for sent in json.loads(path.read_text()):
        for task in (sent["body"] or {}).get("tasks", []) if sent["path"] == "/predict" else []:
            task["data"]["image"] = PHOTO
        response = client.open(sent["path"], method=sent["method"], json=sent["body"])
        assert response.status_code == 200, response.text
        if sent["path"] == "/predict":
            items = response.json["results"]  # type: ignore[index]
            assert len(items) == len(sent["body"]["tasks"])
            assert all("result" in item for item in items)


# -- refusals ---------------------------------------------------------------------------------------------------------

NO_BOXES = '<View><Text name="text" value="$text"/></View>'
REFUSALS = [
    # name, method, path, body, status, kind, message (its beginning)
    ("unknown route", "GET", "/nothing", None, 404, "route", "expected a route of an ML backend, got '/nothing'"),
    ("slash at the end", "GET", "/health/", None, 404, "route", "expected a route of an ML backend, got '/health/'"),
    ("wrong method", "GET", "/predict", None, 405, "method", "/predict: expected OPTIONS, POST, got GET"),
    ("no body", "POST", "/predict", b"", 400, "request", "body: expected JSON, got 0 bytes that are not: "),
    ("not JSON", "POST", "/predict", b"tasks=1", 400, "request", "body: expected JSON, got 7 bytes that are not: "),
    ("half a body", "POST", "/setup", b'{"project": "3', 400, "request", "body: expected JSON, got 14 bytes"),
    ("not UTF-8", "POST", "/setup", b'{"a": "\xff"}', 400, "request", "body: expected JSON, got 10 bytes"),
    ("too deep", "POST", "/setup", b"[" * 100_000, 400, "request", "body: expected JSON, got 100000 bytes that are"),
    ("a list", "POST", "/webhook", b"[]", 400, "request", "body: expected a JSON object, got a list"),
    ("a number", "POST", "/setup", b"7", 400, "request", "body: expected a JSON object, got a number"),
    ("empty object", "POST", "/setup", {}, 400, "request", "project: expected the project's key, got nothing"),
    ("no schema", "POST", "/setup", {"project": "3"}, 400, "request", "schema: expected a string, got nothing"),
    ("schema list", "POST", "/setup", setup_body(schema=[]), 400, "request", "schema: expected a string, got a list"),
    ("host", "POST", "/setup", setup_body(hostname=7), 400, "request", "hostname: expected a string, got a number"),
    ("token", "POST", "/setup", setup_body(access_token={}), 400, "request", "access_token: expected a string, got an"),
    ("project", "POST", "/setup", setup_body(project=True), 400, "request", "project: expected the project's key, got"),
    ("no XML", "POST", "/setup", setup_body(schema="<View"), 400, "label_config", "label config: "),
    ("no boxes", "POST", "/setup", setup_body(schema=NO_BOXES), 400, "label_config", "label config: no Image"),
    (
        "long XML",
        "POST",
        "/setup",
        setup_body(schema=" " * 300_000),
        400,
        "label_config",
        "label config: expected at most 262144 characters, as MAX_LABEL_CONFIG_CHARS allows, got 300000",
    ),
    ("no action", "POST", "/webhook", {}, 400, "request", "action: expected the name of an action, got nothing"),
    ("no tasks", "POST", "/predict", {"project": "3"}, 400, "request", "tasks: expected a list of tasks, got nothing"),
    (
        "task 7",
        "POST",
        "/predict",
        {"project": "3", "tasks": [7]},
        400,
        "request",
        "tasks: expected an object for each",
    ),
    (
        "params",
        "POST",
        "/predict",
        predict_body([PHOTO], params=[]),
        400,
        "request",
        "params: expected an object, got a list",
    ),
    ("context", "POST", "/predict", predict_body([PHOTO], "all"), 400, "request", "context: expected an object, got a"),
    (
        "no label config",
        "POST",
        "/predict",
        predict_body([PHOTO], label_config=None),
        400,
        "request",
        "label_config: expected the label config of project '3.17', got none",
    ),
    (
        "bad label config",
        "POST",
        "/predict",
        predict_body([PHOTO], label_config=NO_BOXES),
        400,
        "label_config",
        "label config: no Image",
    ),
    (
        "bad prompt",
        "POST",
        "/predict",
        predict_body([PHOTO], {"result": [{**CLICK, "value": {"x": "left", "y": 1}}]}),
        400,
        "prompt",
        "prompt 0 (id None): x: expected a finite number, got 'left'",
    ),
    (
        "too large",
        "POST",
        "/setup",
        b" " * ((1 << 20) + 1),
        413,
        "request_too_large",
        "expected a body of at most 1 MiB",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "message"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_bad_requests_are_refused_in_one_line_and_counted(
    method: str, path: str, body: Any, status: int, kind: str, message: str
) -> None:
    app = new_app(max_request_mb=1)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    response = app.test_client().open(path, method=method, data=content, content_type="application/json")
    assert is_one_line_of_json(response)
    answer = response.json
    assert answer is not None
    assert (response.status_code, answer["kind"]) == (status, kind)
    assert answer["error"].startswith(message)
    assert response.status.startswith(f"{status} {message.encode('ascii', 'backslashreplace').decode()}")
    assert metric(app, f'facings_errors_total{{kind="{kind}"}}') == 1
    route = path if status not in (404, 405) else "unknown"
    assert metric(app, f'facings_requests_total{{route="{route}",status="{status}"}}') == 1


def test_the_content_type_does_not_matter() -> None:
    response = new_app().test_client().post("/setup", data=json.dumps(setup_body()), content_type="text/plain")
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (CONFIG.replace('value="$image"', 'value="größe\x7f"'), r"gr\xf6\xdfe"),
        (f"<View>{'x' * 3000}", "..."),
    ],
)
def test_the_reason_phrase_is_short_printable_ascii(schema: str, reason: str) -> None:
    response = new_app().test_client().post("/setup", json=setup_body(schema=schema))
    assert response.status_code == 400
    assert response.status.isascii()
    assert response.status.isprintable()
    assert len(response.status) <= 410


@given(st.text())
def test_no_reason_phrase_holds_a_tag_which_label_studio_would_render(text: str) -> None:
    response = APP.test_client().post("/setup", json={"project": "3", "schema": f"<View>{text}"})
    assert response.status_code == 400
    assert not set(response.status) & set("<>")
    refused = APP.test_client().get(f"/<b>{quote(text, safe='')}")
    assert refused.status.startswith("404 expected a route of an ML backend, got ")
    assert not set(refused.status) & set("<>")


def test_a_repeater_is_refused_at_setup_and_a_longer_label_config_is_a_matter_of_the_settings() -> None:
    repeater = '<Repeater on="$a" indexFlag="{{i}}"><Image name="i_{{i}}" value="$a[{{i}}]"/></Repeater>'
    response = (
        new_app().test_client().post("/setup", json=setup_body(schema=CONFIG.replace("</View>", f"{repeater}</View>")))
    )
    assert response.status.startswith("400 label config: a Repeater around images is not supported")
    long = setup_body(schema=CONFIG + " " * 300_000)
    assert new_app(max_label_config_chars=400_000).test_client().post("/setup", json=long).status_code == 200


def test_every_kind_of_error_has_an_http_status() -> None:
    errors = [FacingsError]
    for error in errors:
        errors += error.__subclasses__()
    assert {error.kind for error in errors} == set(STATUSES)


def test_a_method_that_is_refused_names_those_that_are_allowed() -> None:
    response = new_app().test_client().put("/health")
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS"


def test_of_an_unforeseen_failure_the_client_gets_only_the_number(caplog: pytest.LogCaptureFixture) -> None:
    app = new_app()
    service = app.extensions["facings"]

    def stumble(project_key: str) -> None:
        raise RuntimeError("secret detail")

    app.view_functions["versions"] = lambda: stumble("3")
    response = app.test_client().get("/versions")
    assert service.engine.calls == []
    assert response.status_code == 500
    assert is_one_line_of_json(response)
    assert "secret" not in response.text + response.status
    incident = response.json["error"].rpartition("=")[2]  # type: ignore[index]
    (line,) = [record.getMessage() for record in caplog.records if "event=incident" in record.getMessage()]
    assert incident in line
    assert "secret detail" in line


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_one_photo_that_fails_among_many_costs_the_others_nothing() -> None:
    app = new_app()
    photos = [PHOTO] * 30
    photos[7] = "data:image/png;base64,AAAA"
    items = predict(app, photos)
    assert len(items) == 30
    assert [i for i, item in enumerate(items) if "result" not in item] == [7]
    assert items[7]["kind"] == "photo_decode"
    assert metric(app, 'facings_photos_total{outcome="done"}') == 29
    assert metric(app, 'facings_photos_total{outcome="failed"}') == 1
    assert metric(app, 'facings_errors_total{kind="photo_decode"}') == 1
    assert metric(app, 'facings_boxes_total{mode="dense"}') == 29


def test_at_the_deadline_the_done_have_results_and_asking_again_continues() -> None:
    app = new_app(FakeEngine(seconds=0.3), deadline_s=1.0)
    started = time.monotonic()
    items = predict(app, [PHOTO] * 8)
    assert time.monotonic() - started < 2.0
    done = ["result" in item for item in items]
    assert len(items) == 8
    assert 1 <= sum(done) <= 3
    assert done == sorted(done, reverse=True)
    assert metric(app, 'facings_photos_total{outcome="deadline"}') == 8 - sum(done)
    again = predict(app, [PHOTO] * (8 - sum(done)))
    assert "result" in again[0]


def test_a_request_of_300_tasks_with_their_annotations_passes() -> None:
    body = predict_body([data_url(painted_photo({RED: (2, 2, 6, 6)}, (20, 10)))] * 300)
    for task in body["tasks"]:
        task["annotations"] = [{"result": [{"value": {"rle": [255] * 1000}}]}]
    response = new_app().test_client().post("/predict", json=body)
    assert len(response.json["results"]) == 300  # type: ignore[index]


# -- several projects -------------------------------------------------------------------------------------------------


def test_a_request_counts_with_its_own_label_config_whatever_was_set_up_last() -> None:
    app = new_app()
    client = app.test_client()
    client.post("/setup", json=setup_body())
    client.post("/setup", json=setup_body(project="4.18", schema=OTHER_CONFIG))
    (item,) = predict(app, [PHOTO])
    assert item["result"][0]["from_name"] == "box"


def test_without_a_label_config_of_its_own_a_request_takes_that_of_its_project() -> None:
    app = new_app()
    client = app.test_client()
    client.post("/setup", json=setup_body())
    client.post("/setup", json=setup_body(project="4.18", schema=OTHER_CONFIG))
    (item,) = predict(app, [PHOTO], label_config=None)
    assert item["result"][0]["from_name"] == "box"


def test_predicting_works_before_any_setup() -> None:
    assert "result" in predict(new_app(), [PHOTO])[0]


def test_the_photos_of_a_project_are_read_with_the_access_of_its_own_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    app = new_app()
    asked: list[tuple[str, str]] = []

    def load(value: str, *, access: Access | None, **more: Any) -> None:
        asked.append((access.label_studio_url, access.token) if access else ("", ""))
        raise RuntimeError("enough")

    monkeypatch.setattr(app.extensions["facings"].photos, "load", load)
    client = app.test_client()
    client.post("/setup", json=setup_body(hostname="http://one", access_token="first"))
    client.post("/setup", json=setup_body(project="4.18", hostname="http://two", access_token="second"))
    predict(app, ["/data/upload/a.jpg"])
    predict(app, ["/data/upload/a.jpg"], project="4.18")
    predict(app, ["/data/upload/a.jpg"], project="5.19")
    assert asked == [("http://one", "first"), ("http://two", "second"), ("", "")]


def test_two_projects_at_once_each_get_their_own_labels_and_photos() -> None:
    app = new_app(FakeEngine(seconds=0.005))

    def ask(number: int) -> bool:
        is_first = number % 2 == 0
        box = (20, 20, 60, 60) if is_first else (100, 10, 180, 90)
        photo = data_url(painted_photo({(number + 1, 0, 0): box}))
        if is_first:
            body = predict_body([photo])
        else:
            tasks = [{"id": 1, "data": {"photo": photo}}]
            body = predict_body([], project="4.18", label_config=OTHER_CONFIG, tasks=tasks)
        app.test_client().post("/setup", json=setup_body(project=f"{number % 2}.1"))
        (item,) = app.test_client().post("/predict", json=body).json["results"]  # type: ignore[index]
        (region,) = item["result"]
        x = region["value"]["x"]
        return bool((region["from_name"], x) == (("box", 10) if is_first else ("crate", 50)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))


def test_two_annotators_clicking_on_two_photos_each_get_their_own_box() -> None:
    app = new_app(FakeEngine(seconds=0.002))
    photos = {
        RED: data_url(painted_photo({RED: (20, 20, 60, 60)})),
        GREEN: data_url(painted_photo({GREEN: (0, 0, 40, 90)})),
    }
    expected = {RED: (10, 20, 20, 40), GREEN: (0, 0, 20, 90)}

    def clicks(color: tuple[int, int, int]) -> list[bool]:
        right = []
        for _ in range(25):
            (item,) = predict(app, [photos[color]], {"result": [CLICK]})
            value = item["result"][0]["value"]
            right.append((value["x"], value["y"], value["width"], value["height"]) == expected[color])
        return right

    with ThreadPoolExecutor(2) as pool:
        assert all(all(right) for right in pool.map(clicks, photos))


def test_projects_are_forgotten_only_when_there_are_too_many_and_the_unused_go_first() -> None:
    setups = Setups()
    setup = Setup(label_config=CONFIG, access=Access())
    assert setups.get("0") is None
    for number in range(MAX_PROJECTS):
        setups.remember(str(number), setup)
    assert setups.get("0") is setup
    setups.remember("one more", setup)
    assert setups.get("0") is setup
    assert setups.get("1") is None


@pytest.mark.parametrize(
    ("change", "is_new"),
    [({}, False), ({"label_config": OTHER_CONFIG}, True), ({"access": Access(token="new")}, True)],
)
def test_a_setup_is_new_when_anything_in_it_changed(change: dict[str, Any], is_new: bool) -> None:
    setups = Setups()
    known = {"label_config": CONFIG, "access": Access(token="old")}
    assert setups.remember("3", Setup(**known))
    assert setups.remember("3", Setup(**(known | change))) is is_new


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


# -- gunicorn ---------------------------------------------------------------------------------------------------------

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
