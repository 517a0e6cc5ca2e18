"""The protocol, as Label Studio speaks it: answers, tasks and projects."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from apps import (
    CLICK,
    CONFIG,
    GREEN,
    OTHER_CONFIG,
    PHOTO,
    RED,
    is_one_line_of_json,
    metric,
    new_app,
    predict,
    predict_body,
    setup_body,
)
from fakes import FakeEngine, data_url, painted_photo

from backend.photos.loader import Access
from backend.transports.label_studio_app import MAX_PROJECTS, Setup, Setups

ROOT = Path(__file__).parents[1]
# Requests that Label Studio 1.23.2 sent: bodies as they came, but for long lists of regions, which are cut.
CAPTURES = ROOT / "tests" / "data" / "label_studio"


APP = new_app()


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
