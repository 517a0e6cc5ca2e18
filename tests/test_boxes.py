"""Geometry of boxes and masks, as properties."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.boxes import clip_boxes, iou_matrix, mask_boxes, stability_scores

coordinates = st.floats(-50, 150, width=32)
boxes = st.tuples(coordinates, coordinates, st.floats(0.5, 80, width=32), st.floats(0.5, 80, width=32)).map(
    lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]], np.float32)
)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0),
        ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3),
        ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4),
    ],
    ids=["no area", "touching", "half", "inside"],
)
def test_overlap_is_intersection_over_union(a: list[float], b: list[float], iou: float) -> None:
    assert iou_matrix(np.array([a], np.float32), np.array([b], np.float32))[0, 0] == pytest.approx(iou)


def test_overlap_of_nothing_is_an_empty_matrix() -> None:
    assert iou_matrix(np.zeros((0, 4), np.float32), np.zeros((3, 4), np.float32)).shape == (0, 3)


@given(a=boxes, b=boxes)
def test_overlap_is_symmetric_and_one_with_itself(a: np.ndarray, b: np.ndarray) -> None:
    table = iou_matrix(np.stack([a, b]), np.stack([a, b]))
    assert table[0, 1] == pytest.approx(table[1, 0], abs=1e-6)
    assert table[0, 0] == pytest.approx(1, abs=1e-4)
    assert 0 <= table.min() <= table.max() <= 1 + 1e-4


@given(box=boxes)
def test_clipped_boxes_lie_in_the_photo(box: np.ndarray) -> None:
    clipped = clip_boxes(box[None], (100, 60))[0]
    assert (clipped >= 0).all()
    assert (clipped <= [100, 60, 100, 60]).all()
    assert (clipped[:2] <= clipped[2:]).all()


@given(
    x0=st.floats(6, 90),
    y0=st.floats(6, 90),
    width=st.floats(12, 150),
    height=st.floats(12, 150),
    sharp=st.floats(0.3, 3),
)
def test_a_masks_box_is_read_between_the_cells(x0: float, y0: float, width: float, height: float, sharp: float) -> None:
    """Logits that fall linearly across an edge give the edge itself, far finer than a cell of 4 pixels."""
    centres = (np.arange(64) + 0.5) * 4
    across = np.minimum(centres - x0, x0 + width - centres)
    down = np.minimum(centres - y0, y0 + height - centres)
    logits = torch.from_numpy(np.minimum(across[None, :], down[:, None]) * sharp).float()[None]
    box = mask_boxes(logits, 4)[0].numpy()
    assert box == pytest.approx([x0, y0, x0 + width, y0 + height], abs=0.05)


def test_a_masks_box_is_that_of_the_enlarged_mask() -> None:
    """Random smooth logits: the box between cells is what enlarging bilinearly and thresholding finds, to the size of
    the enlarged mask's pixels."""
    noise = np.random.default_rng(0).normal(size=(20, 16, 16)).astype(np.float32)
    planes = np.stack([cv2.resize(plane, (64, 64), interpolation=cv2.INTER_CUBIC) for plane in noise])
    planes -= np.quantile(planes, 0.9, axis=(1, 2), keepdims=True)
    large = torch.nn.functional.interpolate(torch.from_numpy(planes)[None], scale_factor=32, mode="bilinear")[0] > 0
    for box, mask in zip(mask_boxes(torch.from_numpy(planes), 4).numpy(), large.numpy(), strict=True):
        ys, xs = np.nonzero(mask)
        assert box * 8 == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1.0)


def test_an_empty_mask_has_no_box_and_a_full_one_has_it_all() -> None:
    logits = torch.stack([torch.full((8, 8), -1.0), torch.full((8, 8), 1.0)])
    assert mask_boxes(logits, 4).tolist() == [[0, 0, 0, 0], [0, 0, 32, 32]]


def test_stability_is_how_little_a_mask_changes_with_the_threshold() -> None:
    sure = torch.full((4, 4), -9.0)
    sure[1:3, 1:3] = 9.0
    unsure = torch.full((4, 4), -9.0)
    unsure[1:3, 1] = 9.0
    unsure[1:3, 2] = 0.5
    assert stability_scores(torch.stack([sure, unsure])).tolist() == pytest.approx([1.0, 0.5])
