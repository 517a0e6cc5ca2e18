"""Which of the decoder's masks is the facing, and its pixels in the photo."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from model.boxes import enlarged
from model.features import Features, TilePrompt
from model.masks import choose_masks, read_object
from model.tiling import Tile

SIZE = 1000


@pytest.mark.parametrize(
    ("sides", "iou", "chosen"),
    [
        ([50, 100, 900], [0.9, 0.85, 0.95], 1),
        ([50, 100, 200], [0.9, 0.7, 0.6], 0),
        ([0, 100, 0], [0.9, 0.3, 0.9], 1),
        ([700, 800, 900], [0.9, 0.5, 0.4], 0),
        ([80], [0.1], 0),
    ],
    ids=["the unit, not its label, nor the shelf", "a much surer part", "empty masks", "all too large", "only one"],
)
def test_of_three_masks_the_facing_is_chosen(sides: list[float], iou: list[float], chosen: int) -> None:
    boxes = torch.tensor([[[0.0, 0.0, side, side] for side in sides]])
    assert choose_masks(boxes, torch.tensor([iou]), SIZE).tolist() == [chosen]


@pytest.mark.parametrize("side", [1024, 700, 1414, 4000])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (130, 57)])
def test_the_mask_of_an_object_is_enlarged_as_sam2s_predictor_enlarges_it(side: int, left: int, top: int) -> None:
    """A smooth blob in the middle of a tile; its edge may differ in the pixels where the logits are all but zero."""
    noise = np.random.default_rng(side).normal(0, 1, (256, 256)).astype(np.float32)
    plane = cv2.GaussianBlur(noise, (0, 0), 6) * 20 + 2
    plane[:60] = plane[200:] = plane[:, :70] = plane[:, 190:] = -3
    tile = Tile(left=left, top=top, side=side, size=1024, level=0)
    prompt = TilePrompt(
        features=Features(tile=tile, cells=None, proposals=None),  # type: ignore[arg-type]
        points_xy=np.full((1, 2), 512, np.float32),
        is_foreground=np.ones(1, np.bool_),
        box_xyxy=None,
    )
    size_wh = left + side, top + side
    mask = read_object(prompt, plane, 0.9, size_wh, want_mask=True).mask
    assert mask is not None
    _, parts = cv2.connectedComponents((plane > 0).astype(np.uint8), connectivity=4)
    part = np.where(parts == parts[128, 128], plane, np.minimum(plane, -1e-3))
    wanted = enlarged(torch.from_numpy(part)[None], side)[0].numpy()
    differs = mask.in_photo(size_wh)[top:, left:] != (wanted > 0)
    assert (wanted > 0).sum() > side * side / 100
    assert not differs[np.abs(wanted) > 1e-4].any()
