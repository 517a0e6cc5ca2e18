"""Detections as Label Studio regions and back."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface.interface import LabelInterface

from backend.label_studio.label_config import parse_label_config
from backend.label_studio.regions import boxes_from_regions, regions_from_detections
from model.types import Detections, Mask

BOXES_XML = (
    '<View><Image name="photo" value="$image"/>'
    '<RectangleLabels name="box" toName="photo"><Label value="facing"/><Label value="tag"/></RectangleLabels></View>'
)
MASKS_XML = BOXES_XML.replace(
    "</View>",
    '<PolygonLabels name="outline" toName="photo"><Label value="any"/><Label value="tag"/></PolygonLabels>'
    '<BrushLabels name="mask" toName="photo"><Label value="any"/></BrushLabels></View>',
)
BOXES = parse_label_config(BOXES_XML).images[0]
MASKS = parse_label_config(MASKS_XML).images[0]


def detections(*boxes: tuple[float, float, float, float], masks: list[Mask] | None = None) -> Detections:
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    return Detections(boxes_xyxy=np.array(boxes, np.float32), scores=scores, masks=masks)


def percent_pixels(points: list[list[float]], size_wh: tuple[int, int]) -> Any:
    return np.array(points) * size_wh / 100


def test_no_detections_are_no_regions() -> None:
    assert regions_from_detections(detections(), (100, 100), BOXES) == []


def test_a_region_is_what_label_studio_stores() -> None:
    (region,) = regions_from_detections(detections((30, 40, 90, 160)), (300, 400), BOXES)
    assert region == {
        "id": region["id"],
        "from_name": "box",
        "to_name": "photo",
        "type": "rectanglelabels",
        "original_width": 300,
        "original_height": 400,
        "image_rotation": 0,
        "score": 0.9,
        "value": {"x": 10.0, "y": 10.0, "width": 20.0, "height": 30.0, "rotation": 0, "rectanglelabels": ["facing"]},
    }


def test_given_ids_are_kept_and_the_others_are_new_and_unlike() -> None:
    boxes = [(i, 0, i + 1, 1) for i in range(150)]
    ids = ["kept", *[None] * 149]
    got = [region["id"] for region in regions_from_detections(detections(*boxes), (200, 200), BOXES, ids=ids)]
    assert got[0] == "kept"
    assert len(set(got)) == 150
    assert {len(region_id) for region_id in got[1:]} == {10}


def test_labels_are_those_of_the_box_control() -> None:
    boxes = [(0, 0, 9, 9)] * 3
    regions = regions_from_detections(detections(*boxes), (10, 10), BOXES, labels=["tag", "facing", "tag"])
    assert [region["value"]["rectanglelabels"] for region in regions] == [["tag"], ["facing"], ["tag"]]
    defaults = regions_from_detections(detections(*boxes), (10, 10), BOXES)
    assert [region["value"]["rectanglelabels"] for region in defaults] == [["facing"]] * 3


def test_a_label_that_the_box_control_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: expected labels of \('facing', 'tag'\), got 'click'"):
        regions_from_detections(detections((0, 0, 9, 9)), (10, 10), BOXES, labels=["click"])


@pytest.mark.parametrize("argument", ["labels", "ids"])
def test_labels_and_ids_must_be_one_for_each_detection(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: expected 2 values, one for each detection, got 1"):
        regions_from_detections(detections((0, 0, 9, 9), (0, 0, 9, 9)), (10, 10), BOXES, **{argument: ["x"]})


def test_boxes_without_area_in_the_photo_are_left_out_with_their_masks() -> None:
    masks = [Mask(bitmap=np.ones((2, 2), np.bool_), left=0, top=0)] * 3
    found = detections((5, 5, 5, 5), (-9, 2, 0, 8), (5, 5, 20, 20), masks=masks)
    regions = regions_from_detections(found, (10, 10), MASKS, ids=["a", "b", "c"])
    assert [region["id"] for region in regions if region["type"] == "rectanglelabels"] == ["c"]
    assert len(regions) == 3


coordinates = st.floats(-50, 2050, width=32)


@st.composite
def photo_boxes(draw: st.DrawFn) -> list[tuple[float, float, float, float]]:
    corners = draw(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=20))
    return [(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for x0, y0, x1, y1 in corners]


@given(boxes=photo_boxes(), width=st.integers(1, 4000), height=st.integers(1, 4000), labels=st.data())
def test_regions_lie_in_the_photo_with_a_label_of_the_config_and_come_back_as_the_same_boxes(
    boxes: list[tuple[float, float, float, float]], width: int, height: int, labels: st.DataObject
) -> None:
    names = [labels.draw(st.sampled_from(["facing", "tag"])) for _ in boxes]
    ids = [str(i) for i in range(len(boxes))]
    regions = regions_from_detections(detections(*boxes), (width, height), BOXES, labels=names, ids=ids)
    for region in regions:
        value = region["value"]
        assert value["rectanglelabels"][0] in BOXES.boxes.labels
        assert min(value["x"], value["y"]) >= 0
        assert max(value["x"] + value["width"], value["y"] + value["height"]) <= 100 + 1e-9
        assert 0 <= region["score"] <= 1
    size = np.array([width, height, width, height])
    clipped = np.clip(np.array(boxes, np.float64).reshape(-1, 4), 0, size)[[int(region["id"]) for region in regions]]
    assert np.abs(boxes_from_regions(regions, (width, height)) - clipped).max(initial=0) <= 0.01


def test_boxes_are_read_from_rectangles_only_and_turned_ones_give_their_bounds() -> None:
    regions: list[dict[str, Any]] = [
        {"type": "choices", "value": {"choices": ["empty shelf"]}},
        {"type": "rectanglelabels", "value": {"x": 10, "y": 20, "width": 30, "height": 40}},
        {"type": "rectangle", "value": {"x": 50, "y": 50, "width": 10, "height": 20, "rotation": 90}},
        {"type": "rectanglelabels", "value": {"x": 50, "y": 50, "width": 10, "height": 10, "rotation": 45}},
    ]
    boxes = boxes_from_regions(regions, (200, 100))
    diagonal = 100 + 10 / 2**0.5 * -1, 50, 100 + 20 / 2**0.5, 50 + 30 / 2**0.5
    assert boxes == pytest.approx(np.array([(20, 20, 80, 60), (80, 50, 100, 70), diagonal]), abs=1e-4)
    assert boxes_from_regions([], (200, 100)).shape == (0, 4)


def test_a_malformed_rectangle_is_named() -> None:
    with pytest.raises(ValueError, match="width: expected a finite number, got None"):
        boxes_from_regions([{"type": "rectanglelabels", "value": {"x": 1, "y": 1, "height": 1}}], (10, 10))


def blob_mask() -> Mask:
    canvas = np.zeros((60, 50), np.uint8)
    cv2.ellipse(canvas, (22, 30), (18, 26), 15, 0, 360, 1, -1)
    cv2.rectangle(canvas, (45, 2), (48, 5), 1, -1)
    return Mask(bitmap=canvas.astype(np.bool_), left=100, top=70)


def test_masks_become_a_polygon_and_a_brush_region_of_the_same_object() -> None:
    mask, size_wh = blob_mask(), (400, 300)
    regions = regions_from_detections(detections((100, 70, 150, 130), masks=[mask]), size_wh, MASKS, labels=["tag"])
    _, polygon, brush = regions
    assert [region["from_name"] for region in regions] == ["box", "outline", "mask"]
    assert [region["type"] for region in regions] == ["rectanglelabels", "polygonlabels", "brushlabels"]
    assert polygon["value"]["polygonlabels"] == ["tag"]
    assert brush["value"]["brushlabels"] == ["any"]
    assert len({region["id"] for region in regions}) == 3
    assert len({region["score"] for region in regions}) == 1

    assert polygon["value"]["closed"] is True
    drawn = np.zeros((300, 400), np.uint8)
    points = percent_pixels(polygon["value"]["points"], size_wh)
    cv2.fillPoly(drawn, [np.round(points - 0.5).astype(np.int32)], 1)
    largest = mask.in_photo(size_wh).copy()
    largest[:, 145:] = False
    assert (drawn.astype(bool) & largest).sum() / (drawn.astype(bool) | largest).sum() > 0.93
    assert len(points) < 30

    assert brush["value"]["format"] == "rle"
    decoded = decode_rle(brush["value"]["rle"]).reshape(300, 400, 4)
    assert (decoded == mask.in_photo(size_wh)[:, :, None] * 255).all()


@pytest.mark.parametrize(
    "bitmap", [np.ones((1, 1)), np.ones((1, 30)), np.ones((30, 1)), np.eye(9)], ids=["dot", "row", "column", "diagonal"]
)
def test_the_thinnest_masks_still_give_a_polygon_that_encloses_something(bitmap: Any) -> None:
    mask = Mask(bitmap=bitmap.astype(np.bool_), left=3, top=4)
    regions = regions_from_detections(detections((3, 4, 40, 40), masks=[mask]), (50, 50), MASKS)
    points = percent_pixels(regions[1]["value"]["points"], (50, 50))
    assert len(points) >= 3
    assert cv2.contourArea(points.astype(np.float32)) > 0


def test_an_empty_mask_leaves_only_the_box_and_a_config_without_mask_controls_ignores_masks() -> None:
    empty = Mask(bitmap=np.zeros((5, 5), np.bool_), left=0, top=0)
    found = detections((0, 0, 5, 5), (100, 70, 150, 130), masks=[empty, blob_mask()])
    kinds = [region["type"] for region in regions_from_detections(found, (400, 300), MASKS)]
    assert kinds == ["rectanglelabels", "rectanglelabels", "polygonlabels", "brushlabels"]
    assert len(regions_from_detections(found, (400, 300), BOXES)) == 2


def test_label_studios_own_validation_accepts_the_regions() -> None:
    found = detections((100, 70, 150, 130), masks=[blob_mask()])
    result = regions_from_detections(found, (400, 300), MASKS)
    assert LabelInterface(MASKS_XML).validate_prediction({"result": result, "score": 0.5}, return_errors=True) == []
