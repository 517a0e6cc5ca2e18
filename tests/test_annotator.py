"""The model class of label-studio-ml: tasks and contexts in, predictions out."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from fakes import FakeEngine, data_url, painted_photo

import backend.transports.annotator
from backend.errors import LabelConfigError, PromptError
from backend.metrics import Metrics
from backend.photos.loader import Access, PhotoLoader
from backend.service import Service
from backend.settings import Settings
from model import NotReady

BOXES = '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/></RectangleLabels>'
POINTS = '<KeyPointLabels name="point" toName="image" smart="true"><Label value="click"/></KeyPointLabels>'
POLYGONS = '<PolygonLabels name="outline" toName="image"><Label value="facing"/></PolygonLabels>'
IMAGE = '<Image name="image" value="$image"/>'
CONFIG = f"<View>{IMAGE}{POINTS}{BOXES}</View>"

RED, GREEN = (255, 0, 0), (0, 255, 0)
RED_BOX = {"x": 10, "y": 20, "width": 20, "height": 40, "rotation": 0, "rectanglelabels": ["facing"]}
GREEN_BOX = {"x": 50, "y": 50, "width": 10, "height": 10, "rotation": 0, "rectanglelabels": ["facing"]}
PHOTO = data_url(painted_photo({RED: (20, 20, 60, 60), GREEN: (100, 50, 120, 60)}))
EMPTY_PHOTO = data_url(painted_photo({}))


def new_service(engine: FakeEngine) -> Service:
    return Service(engine=engine, photos=PhotoLoader(Settings()), metrics=Metrics())


def new_annotator(engine: FakeEngine, config: str = CONFIG, deadline: float | None = None) -> Any:
    annotator_class = backend.transports.annotator.annotator_class(new_service(engine))
    return annotator_class(label_config=config, deadline=deadline)


def task(photo: str = PHOTO, task_id: int = 1) -> dict[str, Any]:
    return {"id": task_id, "data": {"image": photo}}


def click(x: float, y: float, **more: Any) -> dict[str, Any]:
    """A keypoint of the context, in percent."""
    value = {"x": x, "y": y, "width": 0.3, "keypointlabels": ["click"]}
    return {"type": "keypointlabels", "from_name": "point", "to_name": "image", "value": value, **more}


def values(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    return [region["value"] for region in prediction["result"]]


def test_it_predicts_as_the_server_of_label_studio_ml_calls_it() -> None:
    annotator_class = backend.transports.annotator.annotator_class(new_service(FakeEngine()))
    model = annotator_class(label_config=CONFIG, train_output={}, hostname="http://ls", access_token="token")
    params = {"login": None, "password": None}

    (dense,) = model.predict([task()], context=None, **params)
    assert values(dense) == [RED_BOX, GREEN_BOX]
    (prompted,) = model.predict([task()], context={"result": [click(55, 55)]}, **params)
    assert values(prompted) == [GREEN_BOX]


def test_the_address_and_token_of_label_studio_reach_the_photo_loader() -> None:
    asked: list[dict[str, Any]] = []

    class Loader:
        def load(self, value: str, **more: Any) -> None:
            asked.append({"value": value, **more})
            raise RuntimeError("enough")

    service = Service(engine=FakeEngine(), photos=Loader(), metrics=Metrics())  # type: ignore[arg-type]
    model = backend.transports.annotator.annotator_class(service)(
        label_config=CONFIG, hostname="http://ls", access_token="token"
    )
    model.predict([task("/data/upload/3/a.jpg", task_id=7)])
    assert asked == [
        {
            "value": "/data/upload/3/a.jpg",
            "task_id": 7,
            "access": Access(label_studio_url="http://ls", token="token"),
            "deadline": None,
        }
    ]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (None, [RED_BOX, GREEN_BOX]),
        ({}, [RED_BOX, GREEN_BOX]),
        ({"result": []}, []),
        ({"result": [click(55, 55, is_positive=False)]}, []),
        ({"result": [click(55, 55, is_positive=True)]}, [GREEN_BOX]),
        ({"result": [click(20, 40)]}, [RED_BOX]),
    ],
)
def test_the_context_decides_what_is_asked(context: dict[str, Any] | None, expected: list[dict[str, Any]]) -> None:
    (prediction,) = new_annotator(FakeEngine()).predict([task()], context)
    assert values(prediction) == expected


@pytest.mark.parametrize(
    ("photo", "score"),
    [(EMPTY_PHOTO, 0.0), (PHOTO, 0.85), (data_url(painted_photo({RED: (0, 0, 9, 9)})), 0.9)],
)
def test_a_prediction_scores_the_mean_of_its_regions(photo: str, score: float) -> None:
    (prediction,) = new_annotator(FakeEngine()).predict([task(photo)])
    assert prediction["score"] == score
    assert prediction["model_version"] == "fake-12345678"


def test_no_tasks_give_no_predictions_even_without_an_engine() -> None:
    assert new_annotator(FakeEngine(state="loading")).predict([]) == []


def test_an_emptied_context_needs_no_engine() -> None:
    (prediction,) = new_annotator(FakeEngine(state="loading")).predict([task()], {"result": []})
    assert prediction["result"] == []


def test_without_an_engine_the_request_fails_as_a_whole() -> None:
    with pytest.raises(NotReady, match="fake is loading"):
        new_annotator(FakeEngine(state="loading")).predict([task()])


@pytest.mark.parametrize(
    ("config", "threshold", "found"),
    [
        (CONFIG, None, 2),
        (CONFIG.replace('smart="false"', 'smart="false" model_score_threshold="0.85"'), 0.85, 1),
        (CONFIG.replace('smart="false"', 'smart="false" model_score_threshold="0"'), 0.0, 2),
    ],
)
def test_the_label_config_may_set_the_threshold(config: str, threshold: float | None, found: int) -> None:
    engine = FakeEngine()
    (prediction,) = new_annotator(engine, config).predict([task()])
    assert engine.calls[0]["score_threshold"] == threshold
    assert len(prediction["result"]) == found


@pytest.mark.parametrize(
    ("config", "types"),
    [
        (CONFIG, ["rectanglelabels"]),
        (CONFIG.replace(BOXES, BOXES + POLYGONS), ["rectanglelabels", "polygonlabels"]),
    ],
)
def test_masks_are_asked_for_when_a_control_takes_them(config: str, types: list[str]) -> None:
    engine = FakeEngine()
    (prediction,) = new_annotator(engine, config).predict([task()], {"result": [click(55, 55)]})
    assert [region["type"] for region in prediction["result"]] == types
    assert engine.calls[0]["want_masks"] is (len(types) > 1)


@pytest.mark.parametrize(("tasks", "lane"), [(1, "interactive"), (2, "bulk")])
def test_a_task_alone_is_one_that_somebody_waits_for(tasks: int, lane: str) -> None:
    engine = FakeEngine()
    new_annotator(engine).predict([task()] * tasks)
    assert {call["lane"] for call in engine.calls} == {lane}


def test_every_task_of_a_prompted_request_is_answered() -> None:
    other = data_url(painted_photo({GREEN: (100, 40, 120, 60)}))
    first, second = new_annotator(FakeEngine()).predict([task(), task(other)], {"result": [click(55, 55)]})
    assert values(first) == [GREEN_BOX]
    assert values(second) == [{**GREEN_BOX, "y": 40, "height": 20}]


@pytest.mark.parametrize(
    ("failing", "kind", "reason"),
    [
        ({}, "request", "task data: expected the key 'image' of the label config, got []"),
        ({"data": None}, "request", "task data: expected the key 'image' of the label config, got []"),
        ({"data": {"text": "a"}}, "request", "task data: expected the key 'image' of the label config, got ['text']"),
        ({"data": {"image": 7}}, "photo_decode", "7"),
        ({"data": {"image": "data:image/png;base64,AAAA"}}, "photo_decode", ""),
    ],
)
def test_a_task_that_fails_has_its_reason_and_costs_its_neighbours_nothing(
    failing: dict[str, Any], kind: str, reason: str
) -> None:
    before, failed, after = new_annotator(FakeEngine()).predict([task(), {"id": 2, **failing}, task()])
    assert values(before) == values(after) == [RED_BOX, GREEN_BOX]
    assert "result" not in failed
    assert failed["kind"] == kind
    assert reason in failed["error"]
    assert "\n" not in failed["error"]


def test_an_unforeseen_failure_has_a_number_for_the_client_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stumble() -> None:
        raise RuntimeError("secret detail\nof two lines")

    (prediction,) = new_annotator(FakeEngine(on_call=stumble)).predict([task()])
    assert prediction["kind"] == "internal"
    assert "secret" not in prediction["error"]
    incident = prediction["error"].rpartition("=")[2]
    (line,) = [r.getMessage() for r in caplog.records if "event=incident" in r.getMessage()]
    assert incident in line
    assert "secret detail" in line
    assert "\n" not in line


def test_ids_may_repeat_and_the_order_is_the_requests() -> None:
    photos = [data_url(painted_photo({RED: (0, 0, 10 + i, 10)})) for i in range(12)]
    predictions = new_annotator(FakeEngine()).predict([task(photo, task_id=5) for photo in photos])
    assert [values(p)[0]["width"] for p in predictions] == [(10 + i) / 2 for i in range(12)]


def test_at_the_deadline_what_is_done_is_returned_and_the_rest_is_not() -> None:
    photos = [data_url(painted_photo({RED: (0, 0, 10 + i, 10)})) for i in range(10)]
    started = time.monotonic()
    annotator = new_annotator(FakeEngine(seconds=0.1), deadline=started + 0.55)
    predictions = annotator.predict([task(photo) for photo in photos])
    assert time.monotonic() - started < 1.5
    done = ["result" in prediction for prediction in predictions]
    assert 1 <= sum(done) <= 5
    assert done == sorted(done, reverse=True)
    assert {prediction["kind"] for prediction in predictions if "result" not in prediction} == {"deadline"}


def test_a_photo_that_does_not_come_is_not_waited_for_beyond_the_deadline() -> None:
    come = threading.Event()

    class Loader:
        def load(self, value: str, **more: Any) -> None:
            come.wait(10)

    service = Service(engine=FakeEngine(), photos=Loader(), metrics=Metrics())  # type: ignore[arg-type]
    started = time.monotonic()
    model = backend.transports.annotator.annotator_class(service)(label_config=CONFIG, deadline=started + 0.2)
    predictions = model.predict([task()] * 8)
    come.set()
    assert time.monotonic() - started < 2
    assert [prediction["kind"] for prediction in predictions] == ["deadline"] * 8


def test_later_photos_are_read_while_the_engine_works_but_only_a_few() -> None:
    fetched: list[str] = []
    seen_at_first_call: list[int] = []

    class Loader(PhotoLoader):
        def load(self, value: str, **more: Any) -> Any:
            photo = super().load(value, **more)
            fetched.append(value)
            return photo

    def look() -> None:
        if not seen_at_first_call:
            time.sleep(0.3)
            seen_at_first_call.append(len(fetched))

    photos = [data_url(painted_photo({RED: (0, 0, 10 + i, 10)})) for i in range(12)]
    engine = FakeEngine(on_call=look)
    service = Service(engine=engine, photos=Loader(Settings()), metrics=Metrics())
    backend.transports.annotator.annotator_class(service)(label_config=CONFIG).predict(
        [task(photo) for photo in photos]
    )
    assert seen_at_first_call == [1 + backend.transports.annotator.READ_AHEAD]
    assert len(fetched) == 12


def test_a_task_with_two_photos_keeps_the_boxes_of_the_one_that_can_be_read() -> None:
    second = IMAGE.replace("image", "back") + BOXES.replace('"box"', '"back_box"').replace('"image"', '"back"')
    two = {"id": 1, "data": {"image": PHOTO, "back": "data:image/png;base64,AAAA"}}
    annotator = new_annotator(FakeEngine(), CONFIG.replace("</View>", f"{second}</View>"))
    (prediction,) = annotator.predict([two])
    assert values(prediction) == [RED_BOX, GREEN_BOX]
    assert {region["to_name"] for region in prediction["result"]} == {"image"}
    (both,) = annotator.predict([{"id": 1, "data": {"image": PHOTO, "back": PHOTO}}])
    assert [region["to_name"] for region in both["result"]] == ["image", "image", "back", "back"]


@pytest.mark.parametrize(
    ("config", "context", "error"),
    [
        ("<View/>", None, LabelConfigError),
        ("<View", None, LabelConfigError),
        (CONFIG, {"result": [{"type": "keypointlabels"}]}, PromptError),
        (CONFIG, {"result": "all"}, PromptError),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_the_engine_is_asked(
    config: str, context: Any, error: type[Exception]
) -> None:
    engine = FakeEngine()
    with pytest.raises(error):
        new_annotator(engine, config).predict([task()], context)
    assert engine.calls == []
