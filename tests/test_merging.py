"""Proposals of all tiles become one box for each facing, and rows of equals are believed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from model.merging import merge_proposals


def row(count: int, *, top: float = 100, width: float = 40, height: float = 100) -> npt.NDArray[np.float32]:
    return np.array([[width * i, top, width * (i + 1), top + height] for i in range(count)], np.float32)


def merged(boxes: npt.NDArray[np.float32], scores: list[float], limit: int = 100) -> dict[tuple[int, ...], float]:
    found, confidence = merge_proposals(boxes, np.array(scores, np.float32), limit=limit)
    return {tuple(box.round().astype(int).tolist()): float(score) for box, score in zip(found, confidence, strict=True)}


def test_no_proposals_give_no_boxes() -> None:
    boxes, scores = merge_proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), limit=5)
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


def test_two_boxes_of_one_facing_become_their_mean_and_are_believed_more_than_one() -> None:
    twice = np.array([[0, 0, 40, 100], [4, 0, 44, 100]], np.float32)
    ((box, seconded),) = merged(twice, [0.5, 0.5]).items()
    (lone,) = merged(twice[:1], [0.5]).values()
    assert 0 < box[0] < 4
    assert seconded > lone


def test_a_doubtful_unit_in_a_row_of_equals_is_believed_and_one_that_stands_alone_is_not() -> None:
    boxes = np.concatenate([row(5), np.array([[600, 700, 640, 800]], np.float32)])
    scores = merged(boxes, [0.7, 0.7, 0.3, 0.7, 0.7, 0.3])
    assert scores[80, 100, 120, 200] > 0.4
    assert scores[600, 700, 640, 800] < 0.3


def test_a_box_of_another_size_in_a_row_gets_no_support() -> None:
    boxes = np.concatenate([row(4), np.array([[160, 190, 175, 200]], np.float32)])
    scores = merged(boxes, [0.7, 0.7, 0.7, 0.7, 0.3])
    assert scores[160, 190, 175, 200] < 0.3


def test_stacked_units_support_each_other() -> None:
    stack = np.array([[0, 50 * i, 80, 50 * (i + 1)] for i in range(4)], np.float32)
    assert merged(stack, [0.7, 0.3, 0.7, 0.7])[0, 50, 80, 100] > 0.4


def test_no_more_boxes_than_asked_for_the_best_first() -> None:
    _, scores = merge_proposals(row(9), np.linspace(0.1, 0.9, 9, dtype=np.float32), limit=4)
    assert len(scores) == 4
    assert (np.diff(scores) <= 0).all()


@given(
    st.lists(
        st.tuples(*(st.floats(0, 500, width=32) for _ in range(2)), *(st.floats(2, 200, width=32) for _ in range(2))),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 1000),
)
def test_merged_boxes_lie_within_the_given_ones_and_scores_between_zero_and_one(
    corners_and_sides: list[tuple[float, float, float, float]], seed: int
) -> None:
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in corners_and_sides], np.float32)
    scores = np.random.default_rng(seed).uniform(0.02, 1, len(boxes)).astype(np.float32)
    found, confidence = merge_proposals(boxes, scores, limit=100)
    assert 1 <= len(found) <= len(boxes)
    assert (found[:, :2] >= boxes[:, :2].min(0) - 0.01).all()
    assert (found[:, 2:] <= boxes[:, 2:].max(0) + 0.01).all()
    assert ((confidence > 0) & (confidence < 1)).all()
