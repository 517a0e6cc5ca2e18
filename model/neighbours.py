"""What the accepted boxes beside a click tell about the object under it: facings stand in rows of equals.

Knows numpy and boxes in photo pixels; nothing of networks or photos.
"""

from __future__ import annotations

import numpy as np

from model.types import FloatArray

REACH = 4.0  # how far a neighbour's edge may be from the click, in its widths
NEARNESS = 0.7  # widths by which a neighbour's weight falls to 1/e
LEVEL = 0.25  # heights by which a click off a neighbour's middle lets its weight fall to 1/e
COUNTED = 2  # neighbours: the best ones
FULL_WEIGHT = 0.5  # sum of weights from which a row is believed fully
LEAST_WEIGHT = 1e-3  # of the best neighbour; below, there is no row


def row_box(accepted_xyxy: FloatArray, point_xy: FloatArray) -> tuple[FloatArray, float] | None:
    """The box `[4]` of a facing at `point_xy` if it is like its neighbours in the row, and how far that is believed, in
    (0, 1]; None without a neighbour.

    accepted_xyxy: `[N, 4]`. Neighbours are those to the left and the right of the point at its height. The box has
    their top, bottom and width, and the point in the middle of its width.
    """
    boxes: FloatArray = accepted_xyxy.reshape(-1, 4)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = (float(value) for value in point_xy)
    gaps = np.maximum(boxes[:, 0] - x, x - boxes[:, 2])
    beside = (gaps > 0) & (gaps < REACH * widths) & (boxes[:, 1] < y) & (y < boxes[:, 3])
    boxes, widths, heights, gaps = boxes[beside], widths[beside], heights[beside], gaps[beside]
    off_middle = (y - (boxes[:, 1] + boxes[:, 3]) / 2) / heights
    weights = np.exp(-gaps / widths / NEARNESS - (off_middle / LEVEL) ** 2)
    best = np.argsort(-weights)[:COUNTED]
    if not len(best) or weights[best[0]] < LEAST_WEIGHT:
        return None
    share = weights[best] / weights[best].sum()
    width = np.exp(share @ np.log(widths[best]))
    top, bottom = share @ boxes[best, 1], share @ boxes[best, 3]
    box = np.array([x - width / 2, top, x + width / 2, bottom], np.float32)
    return box, float(min(1.0, weights[best].sum() / FULL_WEIGHT))
