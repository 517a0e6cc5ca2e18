"""The values of the model refuse impossible content."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
from fakes import FakeEngine

from model import Detections, Engine, Mask, Photo, Prompt, Sam2Engine


def test_a_photo_is_known_by_its_pixels_and_not_by_its_object() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    same, turned = Photo(pixels=pixels.copy()), Photo(pixels=pixels.reshape(4, 2, 3))
    assert Photo(pixels=pixels).digest == same.digest != turned.digest
    assert same.size_wh == (4, 2)


def test_a_photo_cannot_be_changed() -> None:
    photo = Photo(pixels=np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        photo.pixels[0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        photo.digest = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))],
    ids=["empty", "grey", "alpha", "float"],
)
def test_a_photo_is_eight_bit_rgb(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        Photo(pixels=pixels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a box or at least one foreground point"),
        ({"points_xy": [[1, 2]], "is_foreground": [False]}, "a box or at least one foreground point"),
        ({"points_xy": [[1, 2]], "is_foreground": []}, "expected 1 values"),
        ({"points_xy": [[1, np.nan]], "is_foreground": [True]}, "finite"),
        ({"box_xyxy": [5, 5, 5, 9]}, "x0 < x1"),
        ({"box_xyxy": [5, 5, np.inf, 9]}, "x0 < x1"),
    ],
)
def test_a_prompt_names_an_object(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ([[0, 0, 1, 1]], [], "expected 1 values"),
        ([[2, 0, 1, 1]], [0.5], "x0 <= x1"),
        ([[0, 0, 1, 1]], [1.5], r"\[0, 1\]"),
        ([[0, 0, 1, 1]], [np.nan], r"\[0, 1\]"),
    ],
)
def test_detections_are_boxes_with_scores(boxes: list[list[float]], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detections(boxes_xyxy=np.array(boxes, np.float32), scores=np.array(scores, np.float32))


def test_detections_above_a_threshold_keep_their_order_and_masks() -> None:
    masks = [Mask(bitmap=np.ones((1, n), np.bool_), left=0, top=0) for n in (1, 2, 3)]
    boxes = np.array([[0, 0, n, 1] for n in (1, 2, 3)], np.float32)
    found = Detections(boxes_xyxy=boxes, scores=np.array([0.9, 0.1, 0.5], np.float32), masks=masks).above(0.5)
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert [mask.bitmap.shape[1] for mask in found.masks or ()] == [1, 3]
    assert len(Detections(boxes_xyxy=np.zeros((0, 4)), scores=np.zeros(0)).above(0.0)) == 0


def test_a_mask_lies_where_its_window_is() -> None:
    whole = Mask(bitmap=np.ones((2, 1), np.bool_), left=3, top=1).in_photo((5, 4))
    assert np.argwhere(whole).tolist() == [[1, 3], [2, 3]]


def test_the_fake_engine_has_the_interface_of_the_real_one() -> None:
    """As far as names of methods and parameters go; mypy compares their types as well."""
    wanted = [name for name in vars(Engine) if not name.startswith("_")]
    assert len(wanted) >= 9
    for name in wanted:
        assert hasattr(FakeEngine(), name)
        assert hasattr(Sam2Engine, name)
        if inspect.isfunction(vars(Engine)[name]):
            parameters = list(inspect.signature(vars(Engine)[name]).parameters)
            assert list(inspect.signature(getattr(FakeEngine, name)).parameters) == parameters
            assert list(inspect.signature(getattr(Sam2Engine, name)).parameters) == parameters
