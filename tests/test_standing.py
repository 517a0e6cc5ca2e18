"""The boxes that stand on a photo while an annotator works, and what prompts make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, data_url, painted_photo

from backend import tasks
from backend.label_studio.corrections import corrected, replaced_by
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.prompts import prompts_from_context
from backend.label_studio.standing import RecentAnswers, StandingBox, standing_boxes, standing_regions
from backend.metrics import Metrics
from backend.photos.loader import PhotoLoader
from backend.service import Service
from backend.settings import Settings

CONFIG = parse_label_config(
    '<View><Image name="image" value="$image"/>'
    '<KeyPointLabels name="point" toName="image" smart="true"><Label value="click"/>'
    '<Label value="tag"/></KeyPointLabels>'
    '<RectangleLabels name="prompt" toName="image" smart="true"><Label value="region"/></RectangleLabels>'
    '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/><Label value="tag"/>'
    '<Label value="maybe" predicted_values="unsure"/></RectangleLabels></View>'
)
(IMAGE,) = CONFIG.images
RED, GREEN = (255, 0, 0), (0, 255, 0)
PHOTO = data_url(painted_photo({RED: (20, 20, 60, 60), GREEN: (100, 50, 120, 60)}))  # 200 × 100 pixels
DRAFT, OLD = "2026-11-26T10:50:41Z", "2026-11-26T10:49:00Z"


def region(region_id: str, x: float, y: float, width: float, height: float, **changes: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["facing"]}
    return {
        "id": region_id,
        "from_name": "box",
        "to_name": "image",
        "type": "rectanglelabels",
        "origin": "prediction",
        "value": value,
        **changes,
    }


def ids(task: dict[str, Any]) -> tuple[list[str], bool]:
    regions, is_submitted = standing_regions(task)
    return [one["id"] for one in regions], is_submitted


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({}, ([], False)),
        ({"predictions": [], "drafts": None, "annotations": "none"}, ([], False)),
        (
            {"predictions": [{"result": [region("old", 1, 1, 1, 1)]}, {"result": [region("new", 1, 1, 1, 1)]}]},
            (["new"], False),
        ),
        (
            {
                "predictions": [{"result": [region("predicted", 1, 1, 1, 1)]}],
                "drafts": [{"updated_at": DRAFT, "annotation": None, "result": [region("drafted", 1, 1, 1, 1)]}],
            },
            (["drafted"], False),
        ),
        (
            {
                "annotations": [{"updated_at": OLD, "result": [region("submitted", 1, 1, 1, 1)]}],
                "drafts": [{"updated_at": DRAFT, "annotation": 5, "result": [region("changed", 1, 1, 1, 1)]}],
            },
            (["changed"], True),
        ),
        (
            {
                "annotations": [
                    {"updated_at": OLD, "result": [region("submitted", 1, 1, 1, 1)]},
                    {"updated_at": DRAFT, "was_cancelled": True, "result": []},
                ]
            },
            (["submitted"], True),
        ),
        ({"predictions": [{"result": ["no region", region("a", 1, 1, 1, 1)]}]}, (["a"], False)),
    ],
    ids=["nothing", "malformed", "newest prediction", "draft", "draft of a submitted one", "skipped", "odd regions"],
)
def test_what_the_annotator_sees_is_the_newest_draft_or_annotation_else_the_newest_prediction(
    task: dict[str, Any], expected: tuple[list[str], bool]
) -> None:
    assert ids(task) == expected


def test_upright_rectangles_of_the_box_control_stand_and_what_the_annotator_touched_is_accepted() -> None:
    regions = [
        region("untouched", 10, 20, 30, 40),
        region("drawn", 50, 50, 10, 10, origin="manual"),
        region("moved", 50, 50, 10, 10, origin="prediction-changed"),
        region("other control", 1, 1, 5, 5, from_name="prompt"),
        region("turned", 1, 1, 5, 5, value={"x": 1, "y": 1, "width": 5, "height": 5, "rotation": 30}),
        region("broken", 1, 1, 5, 5, value={"x": "left"}),
        region("empty", 1, 1, 5, 5, value=None),
        {"id": "point", "type": "keypointlabels", "from_name": "point", "value": {"x": 1, "y": 1}},
    ]
    found = {one.region["id"]: one for one in standing_boxes(regions, IMAGE, is_submitted=False)}
    assert {name: one.is_accepted for name, one in found.items()} == {"untouched": False, "drawn": True, "moved": True}
    assert found["untouched"].bounds == pytest.approx((0.1, 0.2, 0.4, 0.6))
    assert all(one.is_accepted for one in standing_boxes(regions, IMAGE, is_submitted=True))


def test_an_answer_stands_before_the_draft_has_it_and_a_removed_box_does_not() -> None:
    recent = RecentAnswers()
    draft = [region("a", 1, 1, 5, 5), region("b", 10, 10, 5, 5)]
    recent.remember("task", [region("a", 2, 2, 4, 4), {**region("b", 10, 10, 5, 5), "dynamic": True}])
    recent.remember("task", [region("a", 3, 3, 3, 3)])
    (now,) = recent.applied("task", draft)
    assert (now["id"], now["value"]["x"], now["origin"]) == ("a", 3, "manual")
    assert recent.applied("other task", draft) == draft


def standing(*regions: dict[str, Any]) -> list[StandingBox]:
    return standing_boxes(list(regions), IMAGE, is_submitted=False)


def replaced(box: tuple[float, ...], *boxes: dict[str, Any], click: tuple[float, float] | None = None) -> list[str]:
    points = np.array([] if click is None else [click], np.float32).reshape(-1, 2)
    return [one.region["id"] for one in replaced_by(np.array(box, np.float32), points, standing(*boxes))]


def test_an_answer_replaces_the_box_of_the_same_facing_and_leaves_neighbours() -> None:
    boxes = [region("same", 10, 10, 10, 20), region("neighbour", 20, 10, 10, 20), region("twin", 10, 10, 11, 20)]
    assert replaced((0.1, 0.1, 0.2, 0.3)) == []
    assert replaced((0.1, 0.1, 0.2, 0.3), *boxes) == ["same", "twin"]
    assert replaced((0.6, 0.1, 0.7, 0.3), *boxes) == []


def test_a_click_into_a_box_of_two_facings_replaces_it_and_one_beside_it_does_not() -> None:
    double = region("double", 10, 10, 20, 20)
    assert replaced((0.1, 0.1, 0.195, 0.3), double, click=(0.15, 0.2)) == ["double"]
    assert replaced((0.1, 0.1, 0.195, 0.3), double) == []
    assert replaced((0.12, 0.12, 0.14, 0.16), double, click=(0.13, 0.14)) == [], "a small object in a large one"


@pytest.mark.parametrize(
    ("points", "outcome"),
    [
        ([], {}),
        ([(0.9, 0.9)], {}),
        ([(0.15, 0.2)], {"a": None}),
        ([(0.19, 0.2)], {"a": (10, 10, 8.2, 20)}),
        ([(0.15, 0.29)], {"a": (10, 10, 10, 18.2)}),
        ([(0.19, 0.2), (0.55, 0.6)], {"a": (10, 10, 8.2, 20), "b": None}),
        ([(0.19, 0.2), (0.11, 0.2)], {"a": (11.8, 10, 6.4, 20)}),
    ],
    ids=["nothing", "beside all", "in the middle", "at the right", "at the bottom", "two boxes", "twice"],
)
def test_an_alt_click_in_the_middle_of_a_box_removes_it_and_one_near_an_edge_trims_it(
    points: list[tuple[float, float]], outcome: dict[str, tuple[float, ...] | None]
) -> None:
    answer = corrected(standing(region("a", 10, 10, 10, 20), region("b", 50, 50, 10, 20)), points)
    assert [one["id"] for one in answer] == list(outcome)
    for one in answer:
        expected = outcome[one["id"]]
        assert bool(one.get("dynamic")) == (expected is None)
        if expected is not None:
            value = one["value"]
            assert (value["x"], value["y"], value["width"], value["height"]) == pytest.approx(expected, abs=0.01)
            assert value["rectanglelabels"] == ["facing"]


def test_of_two_boxes_around_an_alt_click_the_one_is_trimmed_whose_edge_is_nearer() -> None:
    (answer,) = corrected(standing(region("wide", 10, 10, 40, 40), region("narrow", 10, 10, 12, 40)), [(0.21, 0.3)])
    assert answer["id"] == "narrow"


def ask(*items: dict[str, Any], boxes: list[dict[str, Any]], config: LabelConfig = CONFIG) -> list[dict[str, Any]]:
    service = Service(engine=FakeEngine(), photos=PhotoLoader(Settings()), metrics=Metrics())
    prompts = prompts_from_context({"result": list(items)}, config)
    return tasks.refine(service, {"image": PHOTO}, config, prompts, standing=boxes, task_id=1)


def point(x: float, y: float, *, positive: bool = True, label: str = "click") -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 0.3, "keypointlabels": [label]}
    return {"type": "keypointlabels", "from_name": "point", "is_positive": positive, "value": value}


def test_a_click_in_a_wrong_box_gives_it_other_bounds_and_keeps_its_id_label_and_details() -> None:
    wrong = region("wrong", 8, 18, 25, 45)
    wrong["value"]["rectanglelabels"] = ["tag"]
    choice = {
        "id": "wrong",
        "from_name": "why",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": ["dented"]},
    }
    answer = ask(point(20, 40), boxes=[wrong, choice, region("far", 70, 70, 5, 5)])
    (box,) = [one for one in answer if one["type"] == "rectanglelabels"]
    assert (box["id"], box["value"]["x"], box["value"]["rectanglelabels"]) == ("wrong", 10, ["tag"])
    assert [one["value"] for one in answer if one["type"] == "choices"] == [{"choices": ["dented"]}]


def test_a_label_that_the_prompt_names_comes_before_that_of_the_box() -> None:
    (box,) = ask(point(20, 40, label="tag"), boxes=[region("wrong", 8, 18, 25, 45)])
    assert (box["id"], box["value"]["rectanglelabels"]) == ("wrong", ["tag"])


def test_a_click_beside_all_boxes_makes_a_new_one() -> None:
    (box,) = ask(point(20, 40), boxes=[region("far", 70, 70, 5, 5)])
    assert box["id"] != "far"
    assert box["value"]["rectanglelabels"] == ["facing"]


def test_a_rectangle_over_two_boxes_of_one_facing_leaves_one() -> None:
    drawn = {"type": "rectanglelabels", "from_name": "prompt", "value": {"x": 9, "y": 18, "width": 22, "height": 44}}
    answer = ask(drawn, boxes=[region("one", 10, 20, 20, 40), region("two", 9, 19, 21, 42)])
    assert {one["id"]: bool(one.get("dynamic")) for one in answer} == {"one": False, "two": True}


def test_what_the_annotator_points_at_is_no_longer_unsure() -> None:
    unsure = region("a", 10, 20, 20, 40)
    unsure["value"]["rectanglelabels"] = ["maybe"]
    for prompt in (point(20, 40), point(29, 40, positive=False)):
        (box,) = ask(prompt, boxes=[unsure])
        assert (box["id"], box["value"]["rectanglelabels"]) == ("a", ["facing"])


def test_only_accepted_boxes_are_examples_for_the_engine() -> None:
    engine = FakeEngine()
    service = Service(engine=engine, photos=PhotoLoader(Settings()), metrics=Metrics())
    boxes = [region("seen", 50, 50, 10, 10), region("drawn", 60, 50, 10, 10, origin="manual")]
    prompts = prompts_from_context({"result": [point(20, 40)]}, CONFIG)
    tasks.refine(service, {"image": PHOTO}, CONFIG, prompts, standing=boxes, task_id=1)
    assert engine.calls[0]["accepted"] == [pytest.approx([120, 50, 140, 60])]


def test_alt_clicks_alone_are_answered_without_reading_the_photo() -> None:
    service = Service(engine=FakeEngine(), photos=PhotoLoader(Settings()), metrics=Metrics())
    prompts = prompts_from_context({"result": [point(20, 40, positive=False)]}, CONFIG)
    boxes = [region("a", 10, 20, 20, 40)]
    (answer,) = tasks.refine(service, {"image": "/gone.jpg"}, CONFIG, prompts, standing=boxes, task_id=1)
    assert answer["dynamic"] is True


def test_less_sure_boxes_get_their_label_where_the_label_config_has_one() -> None:
    config = parse_label_config(
        '<View><Image name="image" value="$image"/>'
        '<RectangleLabels name="box" toName="image" model_score_threshold="0.85">'
        '<Label value="facing"/><Label value="maybe" predicted_values="unsure" model_score_threshold="0.5"/>'
        "</RectangleLabels></View>"
    )
    service = Service(engine=FakeEngine(), photos=PhotoLoader(Settings()), metrics=Metrics())
    photos = tasks.load_photos(service, {"image": PHOTO}, config, task_id=1)
    regions = tasks.preannotate(service, photos, config)
    assert [one["value"]["rectanglelabels"] for one in regions] == [["facing"], ["maybe"]]
    (sure_only,) = tasks.detect(service, photos[0], config.images[0]).detections.scores  # type: ignore[arg-type]
    assert sure_only == pytest.approx(0.9)
