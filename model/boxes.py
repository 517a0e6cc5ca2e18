"""Pure geometry of boxes: overlap, clipping, and the box of a mask.

Knows numpy, torch tensors and arithmetic; nothing of photos, tiles or networks. Boxes are xyxy, half-open.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from model.types import FloatArray

ROWS_AT_A_TIME = 1000  # of a matrix of pairs of boxes: a long panorama has tens of thousands of boxes


def iou_matrix(boxes_a: FloatArray, boxes_b: FloatArray) -> FloatArray:
    """Intersection over union of every pair, float32 `[A, B]` in [0, 1]; zero where a box has no area."""
    a, b = np.asarray(boxes_a, np.float32)[:, None], np.asarray(boxes_b, np.float32)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.clip(sides, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0), np.float32)


def nms(boxes_xyxy: torch.Tensor, scores: torch.Tensor, max_iou: float) -> torch.Tensor:
    """Non-maximum suppression: indices of the boxes `[N, 4]` that stay, best score first, int64 `[K]`."""
    from torchvision.ops import nms as suppress  # imports most of torchvision and torch._dynamo, which takes seconds

    kept: torch.Tensor = suppress(boxes_xyxy, scores, max_iou)
    return kept


def overlapping_pairs(boxes_a: torch.Tensor, boxes_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of boxes `[A, 4]` and `[B, 4]` that overlap at all: indices into both, and their IoU, each `[P]`.

    For many boxes, where a matrix of all pairs would be nearly empty: a facing overlaps one box in a hundred.
    """
    left, top, right, bottom = boxes_b.T.contiguous()  # each column in one piece of memory: four times as fast
    found = []
    for first in range(0, len(boxes_a), ROWS_AT_A_TIME):
        x0, y0, x1, y1 = boxes_a[first : first + ROWS_AT_A_TIME].T.contiguous()[..., None]
        pairs = ((left < x1) & (x0 < right) & (top < y1) & (y0 < bottom)).nonzero()
        pairs[:, 0] += first
        found.append(pairs)
    rows, columns = torch.cat(found).unbind(1) if found else torch.zeros(2, 0, dtype=torch.int64)
    a, b = boxes_a[rows], boxes_b[columns]
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).prod(1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b))
    return rows, columns, shared / (area_a + area_b - shared)


def clip_boxes(boxes_xyxy: FloatArray, size_wh: tuple[int, int]) -> FloatArray:
    """Boxes cut to `[0, width] × [0, height]`."""
    return np.clip(boxes_xyxy, 0, np.array(size_wh * 2, np.float32)).astype(np.float32)


def with_width(boxes_xyxy: FloatArray, share: float) -> FloatArray:
    """Boxes `[N, 4]` with the same middle and heights, and this share of their width."""
    change = (share - 1) / 2 * (boxes_xyxy[:, 2] - boxes_xyxy[:, 0])
    nothing = np.zeros_like(change)
    return np.asarray(boxes_xyxy + np.stack([-change, nothing, change, nothing], axis=1), np.float32)


def cells_inside(boxes_xyxy: torch.Tensor, side: int, stride: float) -> torch.Tensor:
    """Which cells of a map of `side` × `side` cells have their centre in each box: bool `[P, side, side]`.

    stride: pixels of a cell. Boxes `[P, 4]` in pixels.
    """
    cells = (torch.arange(side, device=boxes_xyxy.device) + 0.5) * stride
    across = (cells > boxes_xyxy[:, 0:1]) & (cells < boxes_xyxy[:, 2:3])
    down = (cells > boxes_xyxy[:, 1:2]) & (cells < boxes_xyxy[:, 3:4])
    return down[:, :, None] & across[:, None, :]


def enlarged(logits: torch.Tensor, side: int) -> torch.Tensor:
    """Mask logits `[P, h, w]` at `side` × `side` pixels, as SAM2ImagePredictor enlarges them: bilinearly."""
    return functional.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]


def pixel_boxes(logits: torch.Tensor, stride: float) -> torch.Tensor:
    """Boxes `[P, 4]` around the pixels of the masks `logits > 0`, `[P, h, w]`, `stride` units a pixel.

    As sam2.utils.amg.batched_mask_to_box gives them, but half-open. An empty mask gives a box of zeros.
    """
    columns, rows = (logits > 0).any(1), (logits > 0).any(2)
    sides = []
    for line in (columns, rows):
        first, last = line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack([x0, y0, x1, y1], 1) * stride
    return torch.where(columns.any(1)[:, None], boxes, boxes.new_zeros(()))


def mask_boxes(logits: torch.Tensor, stride: float) -> torch.Tensor:
    """Boxes `[P, 4]` of the masks `logits > 0`, read between the pixels of low-resolution logits `[P, h, w]`.

    A mask's edge lies where the logits cross zero. Along each axis the outermost crossing is found by linear
    interpolation between pixel centres, which is what enlarging the mask bilinearly and thresholding it would find,
    without enlarging. Units: pixels of the tile, `stride` of them a cell. An empty mask gives a box of zeros.
    """
    x0, x1 = _outer_crossings(logits)
    y0, y1 = _outer_crossings(logits.transpose(1, 2))
    boxes = torch.stack([x0, y0, x1, y1], 1) * stride
    return torch.where((logits > 0).any(2).any(1)[:, None], boxes, boxes.new_zeros(()))


def _outer_crossings(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last zero crossing along the rows of each mask `[P, h, w]`, in cells; the border where the mask touches
    it."""
    count = logits.shape[2]
    inside = (logits > 0).any(1)
    first = inside.int().argmax(1)
    last = count - 1 - inside.flip(1).int().argmax(1)

    def crossing(at: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """Share of a cell from the centres of column `at`, the outermost with any cell of the mask, to the farthest
        crossing towards column `outside`, which has none."""
        above, below = (_column(logits, where.clamp(0, count - 1)) for where in (at, outside))
        share = above / (above - below).clamp(min=1e-6)
        return share.masked_fill(above <= 0, 0.0).amax(1).clamp(0, 1)

    start = torch.where(first > 0, first + 0.5 - crossing(first, first - 1), first.new_zeros((), dtype=torch.float32))
    end = torch.where(
        last < count - 1, last + 0.5 + crossing(last, last + 1), torch.full_like(last, count, dtype=torch.float32)
    )
    return start, end


def _column(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Column `index[p]` of each mask `[P, h, w]`: `[P, h]`, float32."""
    return logits.gather(2, index[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0].float()


def stability_scores(logits: torch.Tensor, offset: float = 1.0) -> torch.Tensor:
    """How little masks `[..., h, w]` change between thresholds ±offset, in [0, 1] (Segment Anything, section 5)."""
    high = (logits > offset).sum((-1, -2), dtype=torch.int32)
    low = (logits > -offset).sum((-1, -2), dtype=torch.int32)
    return torch.where(low > 0, high / low.clamp(min=1), torch.ones_like(high, dtype=torch.float32))
