"""Which standing boxes a prompt corrects, and how: an answer replaces them, an Alt-click trims or removes one.

Knows standing boxes, points and bounds in fractions of a photo's sides; nothing of requests or networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backend.label_studio.regions import Region
from backend.label_studio.standing import Bounds, StandingBox
from model.answers import trimmed_box
from model.boxes import iou_matrix
from model.types import BoolArray, FloatArray

SAME_FACING = 0.5  # IoU from which an answer and a standing box are the same facing: facings hardly overlap
WRONG_BOX_IOU = 0.25  # the same for a standing box that was clicked into,
WRONG_BOX_SHARED = 0.7  # if this share of the smaller of both is in both: a box of two facings, or of a half
MIDDLE = 1 / 6  # of a box's sides around its middle: an Alt-click there means the whole box


def replaced_by(box: FloatArray, foreground: FloatArray, standing: Sequence[StandingBox]) -> list[StandingBox]:
    """The standing boxes whose place an answer takes, the most alike first.

    box: `[4]`, the answer. foreground: the points `[N, 2]` that asked for it.
    """
    if not standing:
        return []
    bounds = np.array([one.bounds for one in standing], np.float32)
    iou = iou_matrix(box[None], bounds)[0]
    shared = np.minimum(box[2:], bounds[:, 2:]) - np.maximum(box[:2], bounds[:, :2])
    areas = np.minimum((box[2:] - box[:2]).prod(), (bounds[:, 2:] - bounds[:, :2]).prod(1))
    is_inside = shared.clip(0).prod(1) >= WRONG_BOX_SHARED * areas
    was_clicked = [bool(_holds(one.bounds, foreground).any()) for one in standing]
    is_replaced = (iou >= SAME_FACING) | (np.array(was_clicked) & is_inside & (iou >= WRONG_BOX_IOU))
    order = np.argsort(-iou, kind="stable")
    return [standing[index] for index in order if is_replaced[index]]


def corrected(standing: Sequence[StandingBox], points: Sequence[tuple[float, float]]) -> list[Region]:
    """What Alt-clicks alone make of the boxes that they lie in: one in the middle of a box removes it, others trim it.

    Of several boxes around a point, the one counts whose edge or middle it is nearest to, in shares of its sides.
    """
    bounds = {index: one.bounds for index, one in enumerate(standing)}
    touched: dict[int, Bounds | None] = {}
    for point in np.array(points, np.float32).reshape(-1, 2):
        around = [(_doubt(box, point), index) for index, box in bounds.items() if _holds(box, point[None]).all()]
        if not around:
            continue
        _, index = min(around)
        x0, y0, x1, y1 = bounds[index]
        offset = np.abs(point - [(x0 + x1) / 2, (y0 + y1) / 2]) / [x1 - x0, y1 - y0]
        if (offset < MIDDLE).all():
            touched[index] = None
            del bounds[index]
            continue
        box = trimmed_box(np.array(bounds[index], np.float32), point[None], np.zeros((0, 2), np.float32))
        if box is not None:
            touched[index] = bounds[index] = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    regions: list[Region] = []
    for index, after in touched.items():
        regions += [standing[index].removed()] if after is None else standing[index].moved(after)
    return regions


def _holds(bounds: Bounds, points: FloatArray) -> BoolArray:
    return np.asarray(((points > bounds[:2]) & (points < bounds[2:])).all(-1))


def _doubt(bounds: Bounds, point: FloatArray) -> float:
    """How far a point is from an edge of the box, and from its middle: the less, the clearer what it means."""
    low, high = np.array(bounds[:2]), np.array(bounds[2:])
    share = (point - low) / (high - low)
    return float(min(np.minimum(share, 1 - share).min(), np.abs(share - 0.5).max()))
