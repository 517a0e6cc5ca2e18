"""What every answer to a prompt keeps: it holds its prompt, and Alt-clicks only take away from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.answers import EDGE_REACH, LEAST_DRAWN_IOU, SURE_INSIDE, answer_to, inside_photo, trimmed_box
from model.boxes import iou_matrix
from model.masks import FoundObject
from model.types import Mask, Prompt

SIZE_WH = (400, 300)
NOTHING = np.zeros((0, 4), np.float32)

places = st.tuples(st.floats(-40, 440), st.floats(-40, 340))
sides = st.tuples(st.floats(2, 200), st.floats(2, 200))


def box_at(place: tuple[float, float], side: tuple[float, float]) -> np.ndarray:
    return np.array([*place, place[0] + side[0], place[1] + side[1]], np.float32)


boxes = st.builds(box_at, places, sides)
points = st.lists(st.tuples(places, st.booleans()), max_size=4)


def prompt_of(marked: list[tuple[tuple[float, float], bool]], box: np.ndarray | None) -> Prompt | None:
    """The prompt's part in the photo; None where it names nothing."""
    if box is None and not any(is_foreground for _, is_foreground in marked):
        return None
    return inside_photo(
        Prompt(
            points_xy=np.array([xy for xy, _ in marked], np.float32).reshape(-1, 2),
            is_foreground=np.array([is_foreground for _, is_foreground in marked], bool),
            box_xyxy=box,
        ),
        SIZE_WH,
    )


def seen(box: np.ndarray | None, score: float, *, with_mask: bool = False) -> FoundObject | None:
    """What a network saw within the photo."""
    if box is None:
        return None
    box = np.clip(box, 0, np.array(SIZE_WH * 2, np.float32)).astype(np.float32)
    mask = None
    if with_mask and (box[2:] - box[:2] >= 1).all():
        left, top, right, bottom = (int(value) for value in box)
        mask = Mask(bitmap=np.ones((bottom - top, right - left), bool), left=left, top=top)
        box = np.array([left, top, right, bottom], np.float32)
    return FoundObject(box_xyxy=box, score=score, mask=mask)


@given(points, st.none() | boxes, st.none() | boxes, st.floats(0, 1), st.lists(boxes, max_size=5), st.booleans())
def test_an_answer_holds_its_prompt_or_there_is_none(
    marked: list[tuple[tuple[float, float], bool]],
    drawn: np.ndarray | None,
    found: np.ndarray | None,
    score: float,
    accepted: list[np.ndarray],
    with_mask: bool,
) -> None:
    prompt = prompt_of(marked, drawn)
    if prompt is None:
        return
    neighbours = np.array(accepted, np.float32).reshape(-1, 4)
    answer = answer_to(prompt, seen(found, score, with_mask=with_mask), neighbours, SIZE_WH)
    if answer is None:
        return
    box, slack = answer.box_xyxy, 1e-3
    foreground, background = prompt.points_xy[prompt.is_foreground], prompt.points_xy[~prompt.is_foreground]
    assert (box[2:] > box[:2]).all()
    assert (box >= -slack).all()
    assert (box[2:] <= np.array(SIZE_WH) + slack).all()
    assert ((foreground >= box[:2] - slack) & (foreground <= box[2:] + slack)).all()
    assert not ((background > box[:2] + slack) & (background < box[2:] - slack)).all(1).any()
    if prompt.box_xyxy is not None:
        assert iou_matrix(box[None], prompt.box_xyxy[None])[0, 0] >= LEAST_DRAWN_IOU - 1e-3


@given(points, st.none() | boxes, boxes, st.floats(0, 1))
def test_alt_clicks_only_take_away(
    marked: list[tuple[tuple[float, float], bool]], drawn: np.ndarray | None, found: np.ndarray, score: float
) -> None:
    prompt = prompt_of(marked, drawn)
    clean = prompt_of([(xy, is_foreground) for xy, is_foreground in marked if is_foreground], drawn)
    if prompt is None or clean is None:
        return
    before = answer_to(clean, seen(found, score), NOTHING, SIZE_WH)
    after = answer_to(prompt, seen(found, score), NOTHING, SIZE_WH)
    if after is not None:
        assert before is not None
        assert (after.box_xyxy[:2] >= before.box_xyxy[:2] - 1e-3).all()
        assert (after.box_xyxy[2:] <= before.box_xyxy[2:] + 1e-3).all()


@pytest.mark.parametrize(
    ("alt_click", "edges"),
    [
        ((95, 50), [0, 0, 91, 100]),
        ((5, 50), [9, 0, 100, 100]),
        ((50, 96), [0, 0, 100, 92.8]),
        ((150, 50), [0, 0, 100, 100]),
        ((100, 50), [0, 0, 100, 100]),
    ],
    ids=["right", "left", "bottom", "outside", "on the edge"],
)
def test_an_alt_click_moves_the_edge_that_costs_least_a_little_beyond_itself(
    alt_click: tuple[float, float], edges: list[float]
) -> None:
    click = np.array([[50, 50]], np.float32)
    box = trimmed_box(np.array([0, 0, 100, 100], np.float32), np.array([alt_click], np.float32), click)
    assert box is not None
    assert box.tolist() == pytest.approx(edges, abs=0.01)


def test_what_was_clicked_stays_when_an_alt_click_is_close_to_it() -> None:
    click, alt_click = np.array([[90, 50]], np.float32), np.array([[95, 50]], np.float32)
    box = trimmed_box(np.array([0, 0, 100, 100], np.float32), alt_click, click)
    assert box is not None
    assert 90 < box[2] <= 95


def test_a_click_and_an_alt_click_on_one_place_have_no_answer() -> None:
    place = np.array([[50, 50]], np.float32)
    assert trimmed_box(np.array([0, 0, 100, 100], np.float32), place, place) is None


@pytest.mark.parametrize("found", [None, [300.0, 200, 380, 280], [0.0, 0, 400, 300]])
def test_a_rectangle_stays_as_drawn_where_nothing_or_something_else_is_found(found: list[float] | None) -> None:
    drawn = np.array([50, 50, 110, 130], np.float32)
    network = None if found is None else seen(np.array(found, np.float32), 0.9)
    answer = answer_to(Prompt(box_xyxy=drawn), network, NOTHING, SIZE_WH)
    assert answer is not None
    assert (answer.box_xyxy.tolist(), answer.score) == (drawn.tolist(), 0.0)


def test_the_less_sure_the_network_is_the_more_a_rectangle_counts() -> None:
    drawn, found = np.array([50, 50, 110, 130], np.float32), np.array([55, 50, 110, 130], np.float32)
    lefts = []
    for score in (1.0, 0.95, 0.85, 0.3):
        answer = answer_to(Prompt(box_xyxy=drawn), seen(found, score), NOTHING, SIZE_WH)
        assert answer is not None
        lefts.append(float(answer.box_xyxy[0]))
    assert lefts[0] == 55
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[2] == lefts[3] > 50


def test_no_edge_of_a_rectangle_moves_further_than_a_hand_errs() -> None:
    drawn, found = np.array([50, 50, 110, 130], np.float32), np.array([70, 50, 112, 130], np.float32)
    answer = answer_to(Prompt(box_xyxy=drawn), seen(found, 1.0), NOTHING, SIZE_WH)
    assert answer is not None
    assert answer.box_xyxy.tolist() == pytest.approx([50 + EDGE_REACH * 60, 50, 112, 130])


def test_a_small_object_inside_a_rectangle_is_believed_only_where_the_network_is_sure() -> None:
    drawn, found = np.array([50, 50, 150, 150], np.float32), np.array([60, 60, 125, 125], np.float32)
    boxes = []
    for score in (SURE_INSIDE, SURE_INSIDE - 0.01):
        answer = answer_to(Prompt(box_xyxy=drawn), seen(found, score), NOTHING, SIZE_WH)
        assert answer is not None
        boxes.append(answer.box_xyxy.tolist())
    assert boxes == [found.tolist(), drawn.tolist()]


def test_a_rectangle_over_a_wrong_box_counts_more_than_the_network() -> None:
    drawn, found = np.array([50, 50, 110, 130], np.float32), np.array([60, 50, 110, 130], np.float32)
    answer = answer_to(Prompt(box_xyxy=drawn, is_redrawn=True), seen(found, 0.99), NOTHING, SIZE_WH)
    assert answer is not None
    assert answer.box_xyxy[0] < 55


def test_a_rectangle_drawn_far_too_large_becomes_the_object_in_it() -> None:
    found = np.array([80, 80, 130, 140], np.float32)
    answer = answer_to(Prompt(box_xyxy=np.array([60, 60, 150, 160], np.float32)), seen(found, 0.9), NOTHING, SIZE_WH)
    assert answer is not None
    assert answer.box_xyxy.tolist() == found.tolist()


def test_a_click_beside_what_the_network_saw_has_no_answer() -> None:
    click = Prompt(points_xy=np.array([[300, 200]], np.float32), is_foreground=np.ones(1, bool))
    assert answer_to(click, seen(np.array([10, 10, 60, 80], np.float32), 0.9), NOTHING, SIZE_WH) is None


def test_a_click_between_two_accepted_equals_becomes_their_equal_where_the_network_sees_something_else() -> None:
    row = np.array([[10, 100, 50, 200], [90, 100, 130, 200]], np.float32)
    click = Prompt(points_xy=np.array([[70, 150]], np.float32), is_foreground=np.ones(1, bool))
    answer = answer_to(click, seen(np.array([60, 120, 80, 160], np.float32), 0.7), row, SIZE_WH)
    assert answer is not None
    assert answer.box_xyxy.tolist() == pytest.approx([50, 100, 90, 200], abs=0.1)
    sure = answer_to(click, seen(np.array([60, 120, 80, 160], np.float32), 1.0), row, SIZE_WH)
    assert sure is not None
    assert sure.box_xyxy.tolist() == [60, 120, 80, 160]


def test_a_mask_is_cut_with_its_box() -> None:
    prompt = Prompt(points_xy=np.array([[60, 60], [95, 60]], np.float32), is_foreground=np.array([True, False]))
    answer = answer_to(prompt, seen(np.array([20, 20, 100, 100], np.float32), 0.9, with_mask=True), NOTHING, SIZE_WH)
    assert answer is not None
    assert answer.mask is not None
    columns = np.flatnonzero(answer.mask.in_photo(SIZE_WH).any(0))
    assert (columns[0], columns[-1] + 1) == pytest.approx((20, answer.box_xyxy[2]), abs=1)
    assert answer.box_xyxy[2] <= 95


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        (Prompt(points_xy=np.array([[-1, 5]]), is_foreground=np.array([True])), False),
        (Prompt(points_xy=np.array([[401, 5]]), is_foreground=np.array([True])), False),
        (Prompt(box_xyxy=np.array([-50, 10, -2, 90])), False),
        (Prompt(points_xy=np.array([[5, 5], [-1, 5]]), is_foreground=np.array([False, True])), False),
        (Prompt(points_xy=np.array([[5, 5], [-1, 5]]), is_foreground=np.array([True, True])), True),
        (Prompt(box_xyxy=np.array([-50, 10, 20, 90])), True),
    ],
)
def test_what_lies_outside_the_photo_is_no_prompt(prompt: Prompt, left: bool) -> None:
    inside = inside_photo(prompt, SIZE_WH)
    assert (inside is not None) == left
    if inside is not None and inside.box_xyxy is not None:
        assert inside.box_xyxy.tolist() == [0, 10, 20, 90]
    if inside is not None and inside.box_xyxy is None:
        assert inside.points_xy.tolist() == [[5, 5]]
