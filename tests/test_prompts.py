"""What the annotator pointed at, read from contexts as Label Studio sends them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import PromptError
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.prompts import AnnotatorPrompt, Correction, prompts_from_context

# Requests that Label Studio 1.23.2 sent: bodies as they came, but for long lists of regions, which are cut.
CAPTURES = Path(__file__).parent / "data" / "label_studio"

# Prompts with controls and labels of their own, and the smart box control that mixes prompts and boxes.
APART = parse_label_config(
    '<View><Image name="image" value="$image"/>'
    '<KeyPointLabels name="point" toName="image"><Label value="click"/><Label value="tag"/></KeyPointLabels>'
    '<RectangleLabels name="prompt" toName="image" smart="true"><Label value="region"/></RectangleLabels>'
    '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/><Label value="tag"/>'
    "</RectangleLabels></View>"
)
MIXED = parse_label_config(
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="box" toName="image"><Label value="facing"/><Label value="tag"/></RectangleLabels>'
    '<KeyPointLabels name="point" toName="image"><Label value="facing"/></KeyPointLabels></View>'
)
# The front and the back of a shelf, each with a smart box control and points of its own.
TWO_IMAGES = parse_label_config(
    '<View><Image name="front" value="$front"/><Image name="back" value="$back"/>'
    '<RectangleLabels name="front_box" toName="front"><Label value="facing"/></RectangleLabels>'
    '<RectangleLabels name="back_box" toName="back"><Label value="rear"/></RectangleLabels>'
    '<KeyPointLabels name="front_point" toName="front"><Label value="click"/></KeyPointLabels>'
    '<KeyPointLabels name="back_point" toName="back"><Label value="click"/></KeyPointLabels></View>'
)


def keypoint(x: float, y: float, positive: bool | None = True, label: str = "click", **extra: Any) -> dict[str, Any]:
    item = {
        "from_name": "point",
        "type": "keypointlabels",
        "value": {"x": x, "y": y, "width": 0.2, "labels": [label], "keypointlabels": [label]},
        **extra,
    }
    return item if positive is None else {**item, "is_positive": positive}


def rectangle(
    x: float, y: float, width: float, height: float, from_name: str = "prompt", label: str = "region", **extra: Any
) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": from_name, "to_name": "image", "type": "rectanglelabels", "value": value, **extra}


def ask(*items: dict[str, Any], config: LabelConfig = APART) -> tuple[AnnotatorPrompt, ...]:
    return prompts_from_context({"result": list(items)}, config)


def foreground(prompt: AnnotatorPrompt) -> list[tuple[float, float]]:
    return [xy for xy, is_foreground in zip(prompt.points, prompt.is_foreground, strict=True) if is_foreground]


@pytest.mark.parametrize("context", [{}, {"result": []}, {"result": None}])
def test_an_emptied_context_asks_for_nothing(context: dict[str, Any]) -> None:
    assert prompts_from_context(context, APART) == ()


def test_one_click_is_one_foreground_point() -> None:
    assert ask(keypoint(25, 50)) == (AnnotatorPrompt(image_name="image", points=((0.25, 0.5),), is_foreground=(True,)),)


@pytest.mark.parametrize(
    ("is_positive", "expected"), [(None, True), (True, True), (1, True), (False, False), (0, False)]
)
def test_a_keypoint_is_foreground_unless_it_says_otherwise(is_positive: Any, expected: bool) -> None:
    prompts = ask(keypoint(10, 10), keypoint(20, 20, is_positive))
    assert prompts[0].is_foreground == (True, expected)


def test_keypoints_of_one_label_come_together() -> None:
    (prompt,) = ask(keypoint(10, 10), keypoint(12, 14), keypoint(40, 40, False))
    assert prompt.points == ((0.1, 0.1), (0.12, 0.14), (0.4, 0.4))
    assert prompt.is_foreground == (True, True, False)


def test_keypoints_of_two_labels_are_two_objects_with_their_labels() -> None:
    prompts = ask(keypoint(10, 10), keypoint(50, 50, label="tag"), keypoint(12, 12))
    assert [(p.label, len(p.points)) for p in prompts] == [(None, 2), ("tag", 1)]


def test_background_points_alone_correct_what_stands_there() -> None:
    assert ask(keypoint(10, 10, False), keypoint(20, 20, False)) == (
        Correction(image_name="image", points=((0.1, 0.1), (0.2, 0.2))),
    )


def test_every_rectangle_of_a_prompt_control_is_an_object_of_its_own_with_a_new_id() -> None:
    prompts = ask(rectangle(10, 20, 30, 40, id="a"), rectangle(50, 50, 10, 10, id="b"))
    assert [p.box for p in prompts] == [(0.1, 0.2, 0.4, 0.6), (0.5, 0.5, 0.6, 0.6)]
    assert [p.region_id for p in prompts] == [None, None]
    assert [p.label for p in prompts] == [None, None]


def test_a_keypoint_refines_the_smallest_rectangle_around_it_and_the_others_stay_together() -> None:
    prompts = ask(
        rectangle(0, 0, 60, 60),
        rectangle(10, 10, 20, 20),
        keypoint(15, 15, False),
        keypoint(50, 50),
        keypoint(90, 90),
        keypoint(95, 95, False),
    )
    assert [(p.box is not None, p.points, p.is_foreground) for p in prompts] == [
        (True, ((0.5, 0.5),), (True,)),
        (True, ((0.15, 0.15),), (False,)),
        (False, ((0.9, 0.9), (0.95, 0.95)), (True, False)),
    ]


def test_of_all_boxes_of_a_smart_box_control_only_the_new_last_one_is_answered_and_keeps_its_id() -> None:
    accepted = [rectangle(x, 5, 0.5, 5, "box", "tag", id=f"old{x}", score=0.9) for x in range(75)]
    drawn_by_hand = [rectangle(x, 50, 0.5, 5, "box", "tag", id=f"hand{x}") for x in range(75)]
    (prompt,) = ask(*accepted, *drawn_by_hand, rectangle(80, 80, 10, 10, "box", "tag", id="new"), config=MIXED)
    assert (prompt.region_id, prompt.label, prompt.box) == ("new", "tag", (0.8, 0.8, 0.9, 0.9))


def test_boxes_of_a_control_that_is_not_smart_are_no_prompts() -> None:
    assert ask(*(rectangle(x, 5, 5, 5, "box", "facing", id=f"old{x}") for x in (1, 20))) == ()


def test_a_prompt_without_labels_of_its_own_has_the_label_that_comes_with_its_id() -> None:
    """With a label selected, Label Studio sends a prompt again as an item of the box control; a point without sides."""
    config = parse_label_config(
        '<View><Image name="image" value="$image"/><KeyPoint name="point" toName="image"/>'
        '<Rectangle name="prompt" toName="image"/><RectangleLabels name="box" toName="image" smart="false">'
        '<Label value="facing"/><Label value="tag"/></RectangleLabels></View>'
    )
    place = {"x": 25, "y": 50, "width": 0.2, "labels": ["tag"]}
    point = {**keypoint(25, 50, id="p"), "type": "keypoint", "value": place}
    its_label = {**rectangle(25, 50, 0.2, 0, "box", "tag", id="p"), "is_positive": True}
    del its_label["value"]["height"]
    (box, click) = ask(
        rectangle(1, 1, 5, 5, "box", "tag", id="old"),
        point,
        its_label,
        {**rectangle(60, 60, 10, 10, id="r"), "type": "rectangle"},
        rectangle(60, 60, 10, 10, "box", "tag", id="r"),
        config=config,
    )
    assert (click.points, click.label) == (((0.25, 0.5),), "tag")
    assert (box.box, box.label, box.region_id) == (pytest.approx((0.6, 0.6, 0.7, 0.7)), "tag", None)
    (alone,) = ask(point, config=config)
    assert alone.label is None


def test_a_last_box_that_is_an_answer_itself_is_not_answered_again() -> None:
    """Label Studio sends what is left after a box was deleted."""
    assert (
        ask(rectangle(1, 1, 5, 5, "box", id="a"), rectangle(9, 9, 5, 5, "box", id="b", score=0.7), config=MIXED) == ()
    )


def test_ids_sizes_rotation_and_labels_may_be_missing() -> None:
    bare = {"from_name": "box", "type": "rectanglelabels", "value": {"x": 10, "y": 10, "width": 10, "height": 10}}
    assert ask(bare, config=MIXED) == (AnnotatorPrompt(image_name="image", box=(0.1, 0.1, 0.2, 0.2)),)


def test_answers_to_questions_about_the_prompt_region_are_passed_over() -> None:
    note = {"id": "a", "from_name": "why", "to_name": "image", "type": "choices", "value": {"choices": ["dented"]}}
    assert len(ask(rectangle(10, 10, 10, 10, id="a"), note)) == 1


def test_what_lies_outside_the_photo_stays_there() -> None:
    prompts = ask(rectangle(-10, -5, 120, 50), keypoint(101, 120), keypoint(-3, 70))
    assert prompts[0].box == (-0.1, -0.05, 1.1, 0.45)
    assert prompts[1].points == ((1.01, 1.2), (-0.03, 0.7))


@pytest.mark.parametrize(("rotation", "box"), [(0, (20, 20, 50, 40)), (90, (10, 20, 20, 80)), (180, (-10, 0, 20, 20))])
def test_a_turned_rectangle_gives_its_bounding_box_in_the_photos_proportions(
    rotation: float, box: tuple[float, ...]
) -> None:
    """On a photo twice as wide as high: 30 % of the width are 60 % of the height."""
    item = rectangle(20, 20, 30, 20, original_width=2000, original_height=1000)
    item["value"]["rotation"] = rotation
    (prompt,) = ask(item)
    assert prompt.box == pytest.approx([side / 100 for side in box])


def test_a_rectangle_drawn_backwards_is_the_same_rectangle() -> None:
    assert ask(rectangle(40, 60, -30, -40))[0].box == pytest.approx((0.1, 0.2, 0.4, 0.6))


def with_value(item: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**item, "value": {**item["value"], **changes}}


MALFORMED = [
    ("a point", "expected a list of prompts under 'result', got 'a point'"),
    (["a point"], "expected a list of prompts"),
    ([with_value(keypoint(1, 1), x=math.nan)], "prompt 0 (id None): x: expected a finite number, got nan"),
    ([with_value(keypoint(1, 1), y="5")], "y: expected a finite number, got '5'"),
    ([with_value(keypoint(1, 1), y=True)], "y: expected a finite number, got True"),
    ([with_value(keypoint(1, 1), x=10**400)], "x: expected a finite number, got 1000"),
    ([keypoint(1, 1), with_value(rectangle(1, 1, 1, 1, id="q"), width=None)], "prompt 1 (id 'q'): width: expected"),
    ([with_value(rectangle(1, 1, 1, 1), height=math.inf)], "height: expected a finite number, got inf"),
    ([with_value(rectangle(1, 1, 1, 1), rotation=45)], "original_width: expected a finite number, got None"),
    (
        [with_value(rectangle(1, 1, 1, 1, original_width=0, original_height=9), rotation=45)],
        "original_width, original_height: expected at least 1, got (0.0, 9.0)",
    ),
    ([with_value(rectangle(1, 1, 1, 1), rectanglelabels="region")], "rectanglelabels: expected a list of labels"),
    ([{**keypoint(1, 1), "value": None}], "value: expected an object, got None"),
    ([{**keypoint(1, 1), "is_positive": "yes"}], "is_positive: expected true or false, got 'yes'"),
    ([{**keypoint(1, 1), "from_name": "dot"}], "from_name: expected a prompt control ('point'), got 'dot'"),
    ([rectangle(1, 1, 1, 1, "other")], "from_name: expected a prompt control ('prompt'), got 'other'"),
    ([{**keypoint(1, 1), "type": "brushlabels"}], "type: expected a keypoint or a rectangle, got 'brushlabels'"),
    ([{**keypoint(1, 1), "image_rotation": 90}], "image_rotation: expected 0, an upright view, got 90"),
]


@pytest.mark.parametrize(("result", "message"), MALFORMED)
def test_a_malformed_prompt_is_named_with_what_was_expected(result: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        prompts_from_context({"result": result}, APART)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_prompt_in_pixels_follows_the_decoded_size() -> None:
    (prompt,) = ask(rectangle(10, 20, 30, 40), keypoint(25, 50, False))
    pixels = prompt.to_prompt((200, 1000))
    assert pixels.box_xyxy is not None
    assert pixels.box_xyxy.tolist() == pytest.approx([20, 200, 80, 600])
    assert pixels.points_xy.tolist() == [[50, 500]]
    assert pixels.is_foreground.tolist() == [False]


@pytest.mark.parametrize(("width", "height"), [(0, 0), (10, 0), (0.0001, 10)])
def test_a_rectangle_without_area_becomes_a_click_at_its_centre(width: float, height: float) -> None:
    pixels = ask(rectangle(50, 50, width, height))[0].to_prompt((100, 100))
    assert pixels.box_xyxy is None
    assert pixels.points_xy.tolist()[0] == pytest.approx([50 + width / 2, 50 + height / 2])
    assert pixels.is_foreground.tolist() == [True]


def test_a_prompt_goes_to_the_image_of_its_control_and_gets_a_label_of_that_images_boxes() -> None:
    prompts = ask(
        keypoint(10, 10, from_name="front_point"),
        keypoint(20, 20, from_name="back_point"),
        keypoint(30, 30, False, from_name="back_point"),
        config=TWO_IMAGES,
    )
    assert [(p.image_name, p.label, len(p.points)) for p in prompts] == [("front", None, 1), ("back", None, 2)]


def test_a_point_refines_no_rectangle_of_another_image() -> None:
    prompts = ask(rectangle(0, 0, 50, 50, "front_box"), keypoint(25, 25, from_name="back_point"), config=TWO_IMAGES)
    assert [(p.image_name, len(p.points)) for p in prompts] == [("front", 0), ("back", 1)]


def test_only_the_last_box_of_all_images_is_new() -> None:
    (prompt,) = ask(
        rectangle(0, 0, 50, 50, "front_box", id="old"), rectangle(0, 0, 9, 9, "back_box", id="new"), config=TWO_IMAGES
    )
    assert (prompt.image_name, prompt.region_id) == ("back", "new")


percents = st.floats(-20, 120)
keypoints = st.builds(
    keypoint, percents, percents, st.sampled_from([None, True, False]), st.sampled_from(["click", "tag"])
)
rectangles = st.builds(rectangle, percents, percents, percents, percents, st.sampled_from(["prompt", "box"]))


@given(items=st.lists(keypoints | rectangles, max_size=8), width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_every_prompt_has_a_label_of_the_box_control_or_none_and_a_size_in_any_photo(
    items: list[dict[str, Any]], width: int, height: int
) -> None:
    for prompt in ask(*items):
        if isinstance(prompt, Correction):
            continue
        assert prompt.label in (None, *APART.images[0].boxes.labels)
        pixels = prompt.to_prompt((width, height))
        inside = [0 <= x <= 1 and 0 <= y <= 1 for x, y in prompt.points]
        assert (pixels.points_xy[: len(inside)][inside] < (width, height)).all()
        assert pixels.box_xyxy is None or (pixels.box_xyxy[:2] < pixels.box_xyxy[2:]).all()


def captured(name: str) -> tuple[dict[str, Any], LabelConfig]:
    (request,) = json.loads((CAPTURES / f"{name}.json").read_text(encoding="utf-8"))
    body = request["body"]
    return body["params"]["context"], parse_label_config(body["label_config"])


@pytest.mark.parametrize(
    ("name", "is_foreground", "last_point"),
    [
        ("ui_kp_positive", (True,), (0.29016, 0.32988)),
        ("ui_kp_autoaccept", (True,), (0.29016, 0.32988)),
        ("ui_kp_second_positive", (True, True), (0.30973, 0.36960)),
        ("ui_kp_negative", (True, True, False), (0.45020, 0.59931)),
        ("e2e_keypoint", (True,), (0.29016, 0.32988)),
        ("e2e_keypoint_negative", (True, False), (0.45020, 0.59931)),
        ("interactive_api", (True,), (0.3, 0.4)),
    ],
)
def test_captured_keypoints_are_one_object(
    name: str, is_foreground: tuple[bool, ...], last_point: tuple[float, float]
) -> None:
    context, config = captured(name)
    (prompt,) = prompts_from_context(context, config)
    assert prompt.is_foreground == is_foreground
    assert prompt.points[-1] == pytest.approx(last_point, abs=1e-5)
    assert (prompt.box, prompt.label, prompt.region_id) == (None, "product", None)


@pytest.mark.parametrize(
    ("name", "region_id", "box"),
    [
        ("ui_rect_prompt", "UlILbWB4Yt", (0.20035, 0.20035, 0.30052, 0.35060)),
        ("ui_rect_two_pending", "T0wrF9nwP9", (0.50086, 0.50086, 0.59988, 0.64940)),
        ("ui_rect_prompt_2nd_autoaccept", "aLdgkFDcDW", (0.50086, 0.50086, 0.59988, 0.64940)),
        ("e2e_rectangle", "2uK-xDoSne", (0.59988, 0.20035, 0.70006, 0.35060)),
    ],
)
def test_of_captured_rectangles_of_the_box_control_the_last_is_answered_under_its_id(
    name: str, region_id: str, box: tuple[float, ...]
) -> None:
    context, config = captured(name)
    (prompt,) = prompts_from_context(context, config)
    assert prompt.box == pytest.approx(box, abs=1e-5)
    assert (prompt.points, prompt.label, prompt.region_id) == ((), "product", region_id)
