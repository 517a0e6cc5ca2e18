"""A task's photos, where its data has them, and the regions that answer it when some of them fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeEngine, data_url, painted_photo
from hypothesis import given
from hypothesis import strategies as st

from backend import tasks
from backend.errors import PhotoDecodeError, RequestError
from backend.label_studio.label_config import ImageControls, parse_label_config
from backend.label_studio.predictions import photo_address, task_data
from backend.label_studio.prompts import prompts_from_context
from backend.metrics import Metrics
from backend.photos.loader import PhotoLoader
from backend.service import Service
from backend.settings import Settings
from model import DeadlineExceeded, EngineError, NotReady

RED, GREEN = (255, 0, 0), (0, 255, 0)
FRONT = data_url(painted_photo({RED: (20, 20, 60, 60)}))
BACK = data_url(painted_photo({GREEN: (100, 50, 120, 60)}))
BROKEN = "data:image/png;base64,AAAA"
TWO_IMAGES = parse_label_config(
    '<View><Image name="front" value="$shelf.front"/><Image name="back" value="$shelf.back"/>'
    '<RectangleLabels name="front_box" toName="front" smart="false"><Label value="facing"/></RectangleLabels>'
    '<RectangleLabels name="back_box" toName="back" smart="false"><Label value="rear"/></RectangleLabels>'
    '<KeyPointLabels name="front_point" toName="front"><Label value="click"/></KeyPointLabels>'
    '<KeyPointLabels name="back_point" toName="back"><Label value="click"/></KeyPointLabels></View>'
)


def image(key: str) -> ImageControls:
    """An image whose photo stands under `key`."""
    box = '<RectangleLabels name="box" toName="image"><Label value="facing"/></RectangleLabels>'
    return parse_label_config(f'<View><Image name="image" value="${key}"/>{box}</View>').images[0]


def new_service(engine: FakeEngine | None = None) -> Service:
    return Service(engine=engine or FakeEngine(), photos=PhotoLoader(Settings()), metrics=Metrics())


def shelf(front: Any, back: Any) -> dict[str, Any]:
    return {"shelf": {"front": front, "back": back}}


def preannotate(service: Service, data: Any, *, deadline: float | None = None) -> list[tuple[str, str, str, float]]:
    """Image, control, label and left edge in percent of each region."""
    photos = tasks.load_photos(service, data, TWO_IMAGES, task_id=7, deadline=deadline)
    regions = tasks.preannotate(service, photos, TWO_IMAGES, deadline=deadline, task_id=7)
    return [(r["to_name"], r["from_name"], r["value"]["rectanglelabels"][0], r["value"]["x"]) for r in regions]


def click(control: str, x: float, y: float) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 0.3, "keypointlabels": ["click"]}
    return {"type": "keypointlabels", "from_name": control, "is_positive": True, "value": value}


def counted(service: Service, sample: str) -> bool:
    return sample in service.metrics.exposition().decode().splitlines()


# -- where the photo stands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("image", {"image": "a"}),
        ("photo.url", {"photo": {"url": "a"}}),
        ("photos[0]", {"photos": ["a", "b"]}),
        ("photos[1]", {"photos": ["b", "a"]}),
        ("a.b[1].c", {"a": {"b": [{}, {"c": "a"}]}}),
        ("photos[front]", {"photos": {"front": "a"}}),
        ("photos[0]", {"photos": {"0": "a"}}),
        ("photos.0", {"photos": ["a"]}),
        ("photo.url", {"photo.url": "a", "photo": {"url": "b"}}),
        ("photos[0]", {"photos[0]": "a"}),
        ("a..b", {"a": {"b": "a"}}),
    ],
)
def test_a_nested_key_is_found_as_label_studio_finds_it(key: str, data: dict[str, Any]) -> None:
    assert photo_address(data, image(key)) == "a"


@pytest.mark.parametrize(
    ("key", "data", "keys"),
    [
        ("image", None, "[]"),
        ("image", [], "[]"),
        ("image", {"text": "a", "photo": "b"}, "['photo', 'text']"),
        ("photo.url", {"photo": "a"}, "['photo']"),
        ("photo.url", {"photo": {"uri": "a"}}, "['photo']"),
        ("photos[2]", {"photos": ["a", "b"]}, "['photos']"),
        ("photos[-1]", {"photos": ["a", "b"]}, "['photos']"),
        ("photos.length", {"photos": ["a"]}, "['photos']"),
        ("photos[0]", {"photos": "abc"}, "['photos']"),
    ],
)
def test_a_key_that_leads_nowhere_is_named_with_the_keys_that_are_there(key: str, data: Any, keys: str) -> None:
    with pytest.raises(RequestError) as caught:
        photo_address(data, image(key))
    assert str(caught.value) == f"task data: expected the key {key!r} of the label config, got {keys}"


@given(st.lists(st.sampled_from(["a", "photo", "url", "[0]", "[2]"]), min_size=1, max_size=5))
def test_data_made_for_a_key_holds_the_address_where_it_is_looked_for(steps: list[str]) -> None:
    key = "".join(step if step.startswith("[") else f".{step}" for step in ["root", *steps])[1:]
    data = task_data(image(key), "address")
    assert photo_address(data, image(key)) == "address"
    assert list(data) == ["root"]


# -- several photos ---------------------------------------------------------------------------------------------------


def test_each_image_of_a_task_gets_its_own_boxes_from_its_own_photo() -> None:
    service = new_service()
    assert preannotate(service, shelf(FRONT, BACK)) == [
        ("front", "front_box", "facing", 10),
        ("back", "back_box", "rear", 50),
    ]
    assert counted(service, 'facings_photos_total{outcome="done"} 2.0')


@pytest.mark.parametrize(
    ("data", "left", "failed", "kind"),
    [
        (shelf(FRONT, BROKEN), "front", "back", "photo_decode"),
        (shelf(BROKEN, BACK), "back", "front", "photo_decode"),
        (shelf(FRONT, None), "front", "back", "photo_decode"),
        ({"shelf": {"back": BACK}}, "back", "front", "request"),
    ],
)
def test_one_photo_that_fails_is_counted_and_logged_and_the_others_keep_their_boxes(
    data: Any, left: str, failed: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = new_service()
    assert [region[0] for region in preannotate(service, data)] == [left]
    assert counted(service, f'facings_errors_total{{kind="{kind}"}} 1.0')
    assert counted(service, 'facings_photos_total{outcome="failed"} 1.0')
    assert counted(service, 'facings_photos_total{outcome="done"} 1.0')
    (line,) = [record for record in caplog.records if "event=photo_failed" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert f"task=7 image={failed} kind={kind}" in line.getMessage()


def test_a_task_fails_with_the_first_reason_when_all_its_photos_fail() -> None:
    with pytest.raises(PhotoDecodeError):
        preannotate(new_service(), shelf(BROKEN, ""))
    with pytest.raises(RequestError, match=r"expected the key 'shelf.front'"):
        preannotate(new_service(), {})


def raises_at(calls: list[int], error: Exception) -> Callable[[], None]:
    """Raises at these calls, counted from 1."""
    count = 0

    def count_calls() -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise error

    return count_calls


@pytest.mark.parametrize("error", [EngineError("out of memory"), RuntimeError("unforeseen")])
def test_a_photo_that_the_engine_fails_on_costs_the_others_nothing(error: Exception) -> None:
    service = new_service(FakeEngine(on_call=raises_at([1], error)))
    assert [region[0] for region in preannotate(service, shelf(FRONT, BACK))] == ["back"]
    with pytest.raises(type(error)):
        preannotate(new_service(FakeEngine(on_call=raises_at([1, 2], error))), shelf(FRONT, BACK))


@pytest.mark.parametrize("error", [DeadlineExceeded("too late"), NotReady("closed")])
def test_a_deadline_and_an_engine_that_is_not_ready_end_the_whole_task_so_that_it_is_asked_again(
    error: Exception,
) -> None:
    with pytest.raises(type(error)):
        preannotate(new_service(FakeEngine(on_call=raises_at([2], error))), shelf(FRONT, BACK))
    with pytest.raises(DeadlineExceeded):
        preannotate(new_service(FakeEngine(seconds=5)), shelf(FRONT, BACK), deadline=time.monotonic() + 0.3)


def test_a_prompt_is_answered_on_the_photo_of_its_image_and_the_other_photo_is_not_read() -> None:
    service = new_service()
    prompts = prompts_from_context({"result": [click("back_point", 55, 55)]}, TWO_IMAGES)
    (region,) = tasks.refine(service, shelf("/unreachable.jpg", BACK), TWO_IMAGES, prompts, task_id=7)
    assert (region["to_name"], region["from_name"], region["value"]["x"]) == ("back", "back_box", 50)
    assert region["value"]["rectanglelabels"] == ["rear"]


def test_prompts_on_two_images_are_answered_each_on_its_own() -> None:
    prompts = prompts_from_context({"result": [click("back_point", 55, 55), click("front_point", 15, 30)]}, TWO_IMAGES)
    regions = tasks.refine(new_service(), shelf(FRONT, BACK), TWO_IMAGES, prompts, task_id=7)
    assert [(region["to_name"], region["value"]["x"]) for region in regions] == [("front", 10), ("back", 50)]


def test_no_prompts_give_no_regions_and_read_no_photo() -> None:
    assert tasks.refine(new_service(), shelf("/unreachable.jpg", None), TWO_IMAGES, (), task_id=7) == []
