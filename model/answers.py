"""From what the network saw under a prompt to the box that is handed out: one that holds its prompt, or none.

Knows prompts, boxes and what annotators do; nothing of networks. All in photo pixels. An annotator who points at
something knows what the network does not: where the middle is, where the object ends, what its neighbours look like.
The less sure the network is of its mask, the more that counts.
"""

from __future__ import annotations

import numpy as np

from model import boxes as geometry
from model.masks import FoundObject
from model.neighbours import row_box
from model.types import FloatArray, Mask, Prompt

SURE, UNSURE = 1.0, 0.85  # predicted IoU at which nothing but the network counts, and at which the rest counts fully
MIDDLE = 0.3  # of the way from the middle of a box to the one click in it, by which the box follows the click
DRAWN = 0.15  # weight of a rough rectangle's edges
EDGE_REACH = 0.1  # of the rectangle's side: how far an edge of the answer may be from it, where both mean one object
REDRAWN = 0.65  # the same where the rectangle is drawn over a wrong box
ROW, ROW_DRAWN = 0.7, 0.45  # weight of the neighbours' edges, for a clicked box and for a rectangle
LIKE_ROW, LIKE_ROW_DRAWN = 0.55, 0.6  # IoU of these with their row, from which they are believed to be like it
ROW_ALONE = 0.6  # doubt times belief in the row, above which a box that is unlike it gives way to it
SAME_OBJECT = 0.5  # IoU of an answer with the rectangle that asked for it; below, it is another object
INSIDE = 0.9  # of an answer's area inside a rectangle, from which that was drawn too large
SURE_INSIDE = 0.9  # predicted IoU from which that is believed; below, the rectangle stays as drawn
LEAST_DRAWN_IOU = 0.3  # of any answer with the rectangle that asked for it
STRETCH = 0.15  # of its sides by which a box is stretched to hold a click
OVERCUT = 1.8  # times the way from an edge to an Alt-click: people click in the middle of what is too much
KEPT = 0.4  # of the way from an Alt-click to what must stay, which no cut takes


def answer_to(
    prompt: Prompt, found: FoundObject | None, accepted_xyxy: FloatArray, size_wh: tuple[int, int]
) -> FoundObject | None:
    """The object that answers a prompt, or None.

    Every foreground point is in the box, no background point is inside it, and a rectangle overlaps it by an IoU of
    LEAST_DRAWN_IOU at least. Background points only take away from the box that the rest of the prompt gets, so that it
    never moves elsewhere.

    prompt: inside a photo of `size_wh`; see `inside_photo`. found: what the network saw; None for nothing. A mask is
    cut to the box. accepted_xyxy: boxes `[N, 4]` of other objects, which the annotator has accepted.
    """
    foreground, background = prompt.points_xy[prompt.is_foreground], prompt.points_xy[~prompt.is_foreground]
    box, score = _box_without_cuts(prompt, found, accepted_xyxy), found.score if found else 0.0
    if box is None and prompt.box_xyxy is not None:
        box, score = prompt.box_xyxy, 0.0
    if box is None:
        return None
    held = _stretched(geometry.clip_boxes(box[None], size_wh)[0], foreground)
    if held is None:
        return None
    trimmed = trimmed_box(held, background, foreground)
    if trimmed is None or (trimmed[2:] - trimmed[:2] < 1).any():
        return None
    if prompt.box_xyxy is not None and _iou(trimmed, prompt.box_xyxy) < LEAST_DRAWN_IOU:
        return None
    if found is None or found.mask is None:
        return FoundObject(box_xyxy=trimmed, score=score, mask=None)
    cut = FoundObject(box_xyxy=trimmed, score=score, mask=_cut(found.mask, trimmed))
    filled = _filled(cut, foreground)
    if prompt.box_xyxy is not None and _iou(filled.box_xyxy, prompt.box_xyxy) < LEAST_DRAWN_IOU:
        return cut
    return filled


def inside_photo(prompt: Prompt, size_wh: tuple[int, int]) -> Prompt | None:
    """The part of a prompt that lies in a photo of `size_wh`: points outside are no points, a box ends at the photo's
    edges. None where nothing is left that names an object."""
    inside = ((prompt.points_xy >= 0) & (prompt.points_xy <= np.array(size_wh))).all(1)
    box = None if prompt.box_xyxy is None else geometry.clip_boxes(prompt.box_xyxy[None], size_wh)[0]
    if box is not None and (box[2:] <= box[:2]).any():
        box = None
    if box is None and (prompt.box_xyxy is not None or not prompt.is_foreground[inside].any()):
        return None
    return Prompt(
        points_xy=prompt.points_xy[inside],
        is_foreground=prompt.is_foreground[inside],
        box_xyxy=box,
        is_redrawn=prompt.is_redrawn,
    )


def trimmed_box(box_xyxy: FloatArray, background_xy: FloatArray, foreground_xy: FloatArray) -> FloatArray | None:
    """The box `[4]` without the background points `[N, 2]`: each that lies inside moves the edge that costs the box
    least, a little beyond the point. Foreground points `[M, 2]` stay; None where both cannot be."""
    box = np.array(box_xyxy, np.float32)
    for point in background_xy:
        if not ((box[:2] < point) & (point < box[2:])).all():
            continue
        keep = np.asarray(foreground_xy if len(foreground_xy) else ((box[:2] + box[2:]) / 2)[None], np.float32)
        cuts = [cut for edge in range(4) if (cut := _cut_at(box, edge, float(point[edge % 2]), keep))]
        if not cuts and len(foreground_xy):
            return None
        _, edge, place = min(cuts) if cuts else (0.0, 0, float(point[0]))  # the middle itself: either half is as good
        box[edge] = place
    return box


def _cut_at(box: FloatArray, edge: int, place: float, keep_xy: FloatArray) -> tuple[float, int, float] | None:
    """The share of the box that moving an edge to `place` costs, the edge, and where it moves; None where it would take
    one of the points that stay."""
    axis, is_far = edge % 2, edge >= 2
    nearest = float(keep_xy[:, axis].max() if is_far else keep_xy[:, axis].min())
    if (nearest >= place) if is_far else (nearest <= place):
        return None
    start = float(box[edge])
    overcut, limit = start + OVERCUT * (place - start), place + (1 - KEPT) * (nearest - place)
    end = max(overcut, limit) if is_far else min(overcut, limit)
    return abs(place - start) / float(box[2 + axis] - box[axis]), edge, end


def _box_without_cuts(prompt: Prompt, found: FoundObject | None, accepted_xyxy: FloatArray) -> FloatArray | None:
    """The box of a prompt without its background points; None where nothing is known."""
    if found is not None and found.mask is not None:  # a mask that is handed out must fill its box
        return found.box_xyxy if _agrees(found.box_xyxy, prompt.box_xyxy) else None
    if prompt.box_xyxy is not None:
        return _box_of_rectangle(prompt.box_xyxy, found, accepted_xyxy, is_redrawn=prompt.is_redrawn)
    return _box_of_clicks(prompt.points_xy[prompt.is_foreground], found, accepted_xyxy)


def _box_of_rectangle(
    drawn: FloatArray, found: FoundObject | None, accepted_xyxy: FloatArray, *, is_redrawn: bool
) -> FloatArray | None:
    if found is None or not _agrees(found.box_xyxy, drawn):
        return None
    is_same = _iou(found.box_xyxy, drawn) >= SAME_OBJECT
    if not is_same and found.score < SURE_INSIDE:
        return None
    others = accepted_xyxy[geometry.iou_matrix(accepted_xyxy, drawn[None])[:, 0] < LEAST_DRAWN_IOU]
    doubt = _doubt(found.score)
    trust = REDRAWN if is_redrawn else doubt * DRAWN
    box = found.box_xyxy
    if is_same:
        reach = EDGE_REACH * np.tile(drawn[2:] - drawn[:2], 2)
        box = np.clip((1 - trust) * box + trust * drawn, drawn - reach, drawn + reach)
    row = row_box(others, np.asarray((drawn[:2] + drawn[2:]) / 2, np.float32))
    if row is None or is_redrawn:
        return box
    return _like_row(box, row[0], doubt * ROW_DRAWN * row[1], LIKE_ROW_DRAWN)


def _box_of_clicks(points_xy: FloatArray, found: FoundObject | None, accepted_xyxy: FloatArray) -> FloatArray | None:
    row = row_box(accepted_xyxy, np.asarray(points_xy.mean(0), np.float32))
    if found is None:
        return row[0] if row and row[1] >= 1 else None
    box, doubt = found.box_xyxy, _doubt(found.score)
    if len(points_xy) == 1:
        box = box + np.tile(MIDDLE * doubt * (points_xy[0] - (box[:2] + box[2:]) / 2), 2)
    if row is None:
        return box
    if doubt * row[1] > ROW_ALONE and _iou(box, row[0]) < LIKE_ROW:
        return row[0]
    return _like_row(box, row[0], doubt * ROW * row[1], LIKE_ROW)


def _like_row(box: FloatArray, row: FloatArray, weight: float, least_iou: float) -> FloatArray:
    """The box with a share of its row's top, bottom and width, where it is like its row at all."""
    if _iou(box, row) < least_iou:
        return box
    top, bottom = (1 - weight) * box[[1, 3]] + weight * row[[1, 3]]
    width = (box[2] - box[0]) ** (1 - weight) * (row[2] - row[0]) ** weight
    middle = (box[0] + box[2]) / 2
    return np.array([middle - width / 2, top, middle + width / 2, bottom], np.float32)


def _agrees(box: FloatArray, drawn: FloatArray | None) -> bool:
    """Whether a box may be the object that a rectangle was drawn around: they overlap well, or it is a good part of
    the rectangle's inside, which was drawn too large."""
    if drawn is None or _iou(box, drawn) >= SAME_OBJECT:
        return True
    shared = float((np.minimum(box[2:], drawn[2:]) - np.maximum(box[:2], drawn[:2])).clip(0).prod())
    return _iou(box, drawn) >= LEAST_DRAWN_IOU and shared >= INSIDE * float((box[2:] - box[:2]).prod())


def _doubt(score: float) -> float:
    return float(np.clip((SURE - score) / (SURE - UNSURE), 0, 1))


def _stretched(box: FloatArray, points_xy: FloatArray) -> FloatArray | None:
    """The box stretched a little to hold the points; None where that is not enough."""
    if not len(points_xy):
        return box
    reach = STRETCH * (box[2:] - box[:2])
    low, high = points_xy.min(0), points_xy.max(0)
    if (low < box[:2] - reach).any() or (high > box[2:] + reach).any():
        return None
    return np.asarray(np.concatenate([np.minimum(box[:2], low), np.maximum(box[2:], high)]), np.float32)


def _filled(answer: FoundObject, points_xy: FloatArray) -> FoundObject:
    """The answer with its box tight around what a cut left of its mask, where that still holds the points."""
    mask = answer.mask
    if mask is None or not mask.bitmap.any():
        return answer
    rows, columns = (np.flatnonzero(mask.bitmap.any(axis)) for axis in (1, 0))
    low = np.array([mask.left + columns[0], mask.top + rows[0]], np.float32)
    high = np.array([mask.left + columns[-1] + 1, mask.top + rows[-1] + 1], np.float32)
    box = np.concatenate([np.maximum(answer.box_xyxy[:2], low), np.minimum(answer.box_xyxy[2:], high)])
    if not ((points_xy >= box[:2]) & (points_xy <= box[2:])).all():
        return answer
    return FoundObject(box_xyxy=box, score=answer.score, mask=mask)


def _cut(mask: Mask, box: FloatArray) -> Mask:
    """The mask without what is outside the box, whose outermost pixels count."""
    bitmap = np.array(mask.bitmap)
    left, top = np.floor(box[:2]).astype(int) - (mask.left, mask.top)
    right, bottom = np.ceil(box[2:]).astype(int) - (mask.left, mask.top)
    bitmap[: max(top, 0)] = bitmap[max(bottom, 0) :] = False
    bitmap[:, : max(left, 0)] = bitmap[:, max(right, 0) :] = False
    return Mask(bitmap=bitmap, left=mask.left, top=mask.top)


def _iou(box: FloatArray, other: FloatArray) -> float:
    return float(geometry.iou_matrix(box[None], other[None])[0, 0])
