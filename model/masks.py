"""What is read from the decoder's masks: which of them is the facing, its box, and its pixels in the photo.

Knows prompts on tiles and mask logits; nothing of networks or queues.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch

from model import boxes as geometry
from model.features import MASK_STRIDE, TilePrompt
from model.proposer import averaged_with_proposal
from model.tiling import Tile
from model.types import BoolArray, FloatArray, Mask

SHELF_SHARE = 0.35  # a mask whose box covers more of the tile than this is no facing but the shelf
OUTLINE_TOLERANCE_PX = 1.0  # by how much an outline may miss the edge of its mask
SMALL_HOLE_SHARE = 0.01  # of a mask's pixels: a smaller hole is none
WHOLE_UNIT_TOLERANCE = 0.1  # a larger mask is preferred when its predicted IoU is lower by no more than this


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundObject:
    """One prompt's object: box `[4]` in photo pixels, score in [0, 1], and its mask when masks are wanted."""

    box_xyxy: FloatArray
    score: float
    mask: Mask | None


def choose_masks(boxes: torch.Tensor, iou: torch.Tensor, size: int) -> torch.Tensor:
    """Which of each prompt's masks is the facing: index `[P]` from boxes `[P, M, 4]` and predicted IoU `[P, M]`.

    SAM 2 answers a single click with three masks, often a part (the label), the unit, and the whole shelf. Masks that
    fill more than SHELF_SHARE of the tile are set aside; of the rest the largest wins whose predicted IoU is within
    WHOLE_UNIT_TOLERANCE of the best, because an annotator who clicks on a label means the product.
    """
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    is_shelf = areas > SHELF_SHARE * size * size
    is_shelf &= ~is_shelf.all(1, keepdim=True)
    usable = iou.masked_fill(is_shelf | (areas == 0), -1.0)
    close = usable >= usable.max(1, keepdim=True).values - WHOLE_UNIT_TOLERANCE
    return areas.masked_fill(~close, -1.0).argmax(1)


def read_object(
    prompt: TilePrompt, plane: FloatArray, score: float, size_wh: tuple[int, int], *, want_mask: bool
) -> FoundObject | None:
    """The object of one mask plane `[h, w]`: the connected parts that the prompt touches, their box and their mask;
    None for an empty plane.

    size_wh: of the photo.
    """
    tile = prompt.features.tile
    part = _touched_part(plane > 0, prompt)
    if part is None:
        return None
    plane = np.where(part, plane, np.minimum(plane, -1e-3))
    box = geometry.mask_boxes(torch.from_numpy(plane)[None], MASK_STRIDE).numpy()[0]
    proposals = prompt.proposals
    if proposals is not None and not want_mask:  # a mask that is handed out must fill its box exactly
        box = averaged_with_proposal(box, proposals.boxes_xyxy, proposals.scores)
    box = geometry.clip_boxes(tile.to_photo(box), size_wh)
    mask = _mask_in_photo(plane, box, tile) if want_mask else None
    return FoundObject(box_xyxy=box, score=score, mask=mask)


def outline_of(mask: Mask) -> npt.NDArray[np.float64]:
    """The outer contour of the largest part of a mask that is not empty, simplified.

    Points `[N, 2]` in photo pixels; at least three, unless that part is smaller.
    """
    # Contours run through pixel centres: on doubled pixels they lie a quarter of a pixel inside the mask, and a line of
    # single pixels still encloses something.
    doubled = mask.bitmap.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    simple = cv2.approxPolyDP(largest, 2 * OUTLINE_TOLERANCE_PX, closed=True)
    if len(simple) < 3:  # a part so small that the tolerance swallowed it
        simple = largest
    return np.asarray((simple.reshape(-1, 2) + 0.5) / 2 + (mask.left, mask.top), np.float64)


def outlined(mask: Mask) -> Mask:
    """The mask, not empty, as its outline encloses it: its largest part, without holes, its edge simplified."""
    points = np.floor(outline_of(mask) - (mask.left, mask.top)).astype(np.int32)
    bitmap = cv2.fillPoly(np.zeros(mask.bitmap.shape, np.uint8), [points], 1)
    return Mask(bitmap=bitmap.astype(bool), left=mask.left, top=mask.top)


def without_small_holes(mask: Mask) -> Mask:
    """The mask with its holes of less than SMALL_HOLE_SHARE of it filled."""
    background = np.pad(~mask.bitmap, 1, constant_values=True).astype(np.uint8)  # connected around the object
    _, labels, stats, _ = cv2.connectedComponentsWithStats(background, connectivity=4)
    is_hole = stats[:, cv2.CC_STAT_AREA] < SMALL_HOLE_SHARE * mask.bitmap.sum()
    is_hole[[0, labels[0, 0]]] = False  # the object itself, and what is around it
    return Mask(bitmap=mask.bitmap | is_hole[labels[1:-1, 1:-1]], left=mask.left, top=mask.top)


def _touched_part(mask: BoolArray, prompt: TilePrompt) -> BoolArray | None:
    """The connected parts of `mask` under the foreground points, else the one with most pixels in the prompt's box,
    else the largest; None for an empty mask."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 2:
        return None
    height, width = mask.shape
    cells = np.clip((prompt.points_xy[prompt.is_foreground] / MASK_STRIDE).astype(int), 0, (width - 1, height - 1))
    touched = np.unique(labels[cells[:, 1], cells[:, 0]])
    if touched.any():
        return np.isin(labels, touched[touched > 0])
    if prompt.box_xyxy is not None:
        x0, y0, x1, y1 = (prompt.box_xyxy / MASK_STRIDE).round().astype(int).clip(0, max(height, width))
        inside = np.bincount(labels[y0:y1, x0:x1].ravel(), minlength=count)[1:]
        if inside.any():
            return np.asarray(labels == 1 + inside.argmax())
    return np.asarray(labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())


def _mask_in_photo(plane: FloatArray, box: FloatArray, tile: Tile) -> Mask:
    """The mask `plane > 0` at the photo's resolution, enlarged bilinearly inside its box only.

    Not with cv2.warpAffine or cv2.resize: they round positions to a 32nd of a cell, half a pixel of a large photo.
    """
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.maximum(np.ceil(box[2:]).astype(int), (left + 1, top + 1))
    above, below, share_below = _between(np.arange(top, bottom) - tile.top, plane.shape[0], tile)
    before, after, share_after = _between(np.arange(left, right) - tile.left, plane.shape[1], tile)
    # By hand, and not as a product of matrices: the threads of NumPy's BLAS and those of torch wait for each other.
    rows = plane[above] + share_below[:, None] * (plane[below] - plane[above])
    values = rows[:, before] + share_after * (rows[:, after] - rows[:, before])
    return Mask(bitmap=np.asarray(values > 0), left=int(left), top=int(top))


def _between(
    pixels: npt.NDArray[np.int64], cells: int, tile: Tile
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]:
    """The two cells of a line of `cells` that each pixel lies between, and the second one's share; outer cells reach to
    the edge."""
    places = ((pixels + 0.5) * tile.scale / MASK_STRIDE - 0.5).clip(0, cells - 1)
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, cells - 1), (places - first).astype(np.float32)
