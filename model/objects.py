"""How many objects several clicks name: clicks that nothing explains together are objects of their own.

Knows points, boxes and scores in one system of pixels; nothing of networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.boxes import iou_matrix
from model.proposer import holds
from model.types import BoolArray, FloatArray

SAME_ANSWER = 0.5  # IoU of what two clicks are answered, from which they are on one object


def objects_of(
    points_xy: FloatArray, answers_xyxy: Sequence[FloatArray | None], candidates_xyxy: FloatArray, scores: FloatArray
) -> list[list[int]]:
    """Indices of the points `[N, 2]` of each object, each in order, objects in the order of their first point.

    answers_xyxy: the box `[4]` that each point alone is answered, or None. candidates_xyxy `[M, 4]`, scores `[M]`:
    boxes of possible objects.

    Two points are on one object when their answers are the same box or hold both points, or when the best candidate
    that holds both is at least as likely as that two objects are there: the geometric mean of the best ones that hold
    only one of them.
    """
    inside = holds(candidates_xyxy, points_xy) if len(candidates_xyxy) else np.zeros((0, len(points_xy)), np.bool_)

    def best(which: BoolArray) -> float:
        return float(scores[which].max(initial=0.0))

    def together(i: int, j: int) -> bool:
        one, other = answers_xyxy[i], answers_xyxy[j]
        if one is not None and other is not None:
            pair = points_xy[[i, j]]
            if holds(np.stack([one, other]), pair).all() or iou_matrix(one[None], other[None])[0, 0] >= SAME_ANSWER:
                return True
        joint = best(inside[:, i] & inside[:, j])
        apart = best(inside[:, i] & ~inside[:, j]) * best(inside[:, j] & ~inside[:, i])
        return joint > 0 and joint**2 >= apart

    groups: list[list[int]] = []
    for point in range(len(points_xy)):
        joined = [group for group in groups if any(together(earlier, point) for earlier in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([*(index for group in joined for index in group), point]))
    return sorted(groups)
