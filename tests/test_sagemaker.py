"""SageMaker's contract: /ping, /invocations, and what its environment variables do."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from fakes import FakeEngine, data_url, painted_photo, png_of
from flask.testing import FlaskClient

from backend.settings import Settings
from backend.transports.sagemaker import create_app, sagemaker_settings
from model.checkpoints import BUNDLED_WEIGHTS
from scripts.demo.processes import LOOPBACK, Server, free_port

RED, BLUE = (255, 0, 0), (0, 0, 255)
PIXELS = painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)})
BOXES = [{"box": [10, 20, 60, 80], "score": 0.9}, {"box": [100, 10, 120, 40], "score": 0.8}]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def client() -> Iterator[FlaskClient]:
    with create_app(Settings(max_request_mb=1), FakeEngine()).test_client() as client:
        yield client


def test_an_image_is_answered_with_its_boxes(client: FlaskClient) -> None:
    answer = client.post("/invocations", data=png_of(PIXELS), content_type="image/png")
    assert answer.status_code == 200
    assert answer.json == {"width": 200, "height": 100, "model_version": "fake-12345678", "boxes": BOXES}


@pytest.mark.parametrize("wrap", [lambda listed: listed, lambda listed: {"instances": listed}])
def test_a_list_is_answered_one_by_one_with_the_ids_and_a_bad_photo_costs_only_itself(
    client: FlaskClient, wrap: Any
) -> None:
    listed = [
        {"_id": "a", "url": data_url(PIXELS)},
        {"_id": 2, "base64": base64.b64encode(b"no photo").decode()},
        {
            "_id": "c",
            "base64": base64.b64encode(png_of(PIXELS)).decode(),
            "prompts": [{"points": [{"x": 110, "y": 20}]}],
        },
        {"_id": "d"},
        "e",
        {"url": "http://169.254.169.254/"},
    ]
    predictions = client.post("/invocations", json=wrap(listed)).json["predictions"]
    assert [one.get("_id") for one in predictions] == ["a", 2, "c", "d", None, None]
    assert predictions[0]["boxes"] == BOXES
    assert predictions[2]["boxes"] == [{"box": [100, 10, 120, 40], "score": 0.8, "prompt": 0}]
    failed = [predictions[place] for place in (1, 3, 4, 5)]
    assert [(one["kind"], one["status"]) for one in failed] == [
        ("photo_decode", 422), ("request", 400), ("request", 400), ("photo_forbidden", 403)
    ]  # fmt: skip


def test_one_request_is_answered_as_one(client: FlaskClient) -> None:
    answer = client.post("/invocations", json={"_id": "a", "url": data_url(PIXELS), "score_threshold": 0.85})
    assert (answer.json["_id"], answer.json["boxes"]) == ("a", BOXES[:1])


@pytest.mark.parametrize(
    ("content", "content_type", "status", "reason"),
    [
        (b"", "image/jpeg", 422, "expected"),
        (b"no photo", "image/jpeg", 422, "expected a JPEG"),
        (b"no photo", "", 422, "expected a JPEG"),
        (b"{", "application/json", 400, "body: expected JSON"),
        (b"3", "application/json", 400, "expected a list of at most 1000 requests, got a number"),
        (b'{"instances": {}}', "application/json", 400, "expected a list of at most 1000 requests, got an object"),
        (b"{}", "application/json", 400, "expected the photo's url or its bytes in base64, got neither"),
        (b'{"url": "ftp://a/b.jpg"}', "application/json", 403, "another kind of address"),
        (bytes(2 << 20), "image/jpeg", 413, "at most 1 MiB"),
    ],
)
def test_a_bad_request_is_a_status_with_one_line(
    client: FlaskClient, content: bytes, content_type: str, status: int, reason: str
) -> None:
    answer = client.post("/invocations", data=content, content_type=content_type)
    assert answer.status_code == status
    assert reason in answer.json["error"]
    assert "\n" not in answer.json["error"]


def test_what_is_not_done_in_time_is_told_and_what_is_done_is_given() -> None:
    app = create_app(Settings(deadline_s=1), FakeEngine(seconds=0.6))
    with app.test_client() as client:
        listed = [{"_id": number, "url": data_url(PIXELS)} for number in range(3)]
        predictions = client.post("/invocations", json=listed).json["predictions"]
    assert predictions[0]["boxes"] == BOXES
    assert [one["kind"] for one in predictions[1:]] == ["deadline", "deadline"]
    assert predictions[1]["retryable"] is True


def test_ping_fails_until_the_weights_are_there() -> None:
    with create_app(Settings(), FakeEngine(state="loading")).test_client() as client:
        assert client.get("/ping").status_code == 503
    with create_app(Settings(), FakeEngine()).test_client() as client:
        assert client.get("/ping").status_code == 200


def test_the_environment_names_port_and_weights(tmp_path: Path) -> None:
    settings = sagemaker_settings(Settings(), {"SM_MODEL_DIR": str(tmp_path), "SAGEMAKER_BIND_TO_PORT": "9191"})
    assert (settings.port, settings.deadline_s, settings.checkpoint) == (9191, 55.0, "auto")
    (tmp_path / "own.safetensors").touch()
    settings = sagemaker_settings(Settings(deadline_s=20), {"SM_MODEL_DIR": str(tmp_path)})
    assert (settings.port, settings.deadline_s) == (8080, 20)
    assert settings.checkpoint == str(tmp_path / "own.safetensors")
    named = sagemaker_settings(replace(Settings(), checkpoint="facings-nano"), {"SM_MODEL_DIR": str(tmp_path)})
    assert named.checkpoint == "facings-nano"


def test_the_command_serves_the_weights_of_the_model_folder(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "model").mkdir()
    shutil.copyfile(BUNDLED_WEIGHTS, tmp_path / "model" / "own.safetensors")
    environ = {
        **os.environ,
        "HOST": LOOPBACK,
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "SM_MODEL_DIR": str(tmp_path / "model"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "scripts.cli", "sagemaker"]
    url = f"http://{LOOPBACK}:{port}"
    with Server("facings", command, environ=environ, cwd=tmp_path, log=tmp_path / "log") as server:
        server.wait_until(lambda: is_ready(url), timeout_s=120, what="ready")
        answer = requests.post(f"{url}/invocations", png_of(PIXELS), headers={"Content-Type": "image/png"}, timeout=60)
        predictions = requests.post(f"{url}/invocations", json=[{"url": data_url(PIXELS)}], timeout=60)
    assert answer.json()["model_version"].startswith("own-")
    assert len(predictions.json()["predictions"]) == 1


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=2).ok
    except requests.ConnectionError:
        return False


def test_a_thousand_requests_leave_the_memory_as_it_was(client: FlaskClient) -> None:
    process = psutil.Process()
    body = json.dumps([{"url": data_url(PIXELS)}])
    sizes = []
    for _ in range(4):
        for _ in range(250):
            assert client.post("/invocations", data=body, content_type="application/json").status_code == 200
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 30 * 2**20
