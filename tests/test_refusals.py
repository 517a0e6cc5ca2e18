"""What the Label Studio app refuses: with one line, a status, and a count."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from apps import CLICK, CONFIG, NO_BOXES, PHOTO, is_one_line_of_json, metric, new_app, predict_body, setup_body
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import FacingsError
from backend.transports.http import STATUSES

APP = new_app()


# -- refusals ---------------------------------------------------------------------------------------------------------

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
