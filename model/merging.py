"""One box for each facing, from the proposals of all tiles.

Knows torch, boxes and scores; nothing of tiles or networks. Built on what shelves are like: facings hardly overlap, and
they stand in rows and stacks of equals, so that a doubtful box is believed when its neighbours look like it.
"""

from __future__ import annotations

import torch

from model.boxes import ROWS_AT_A_TIME, nms, overlapping_pairs
from model.types import FloatArray

DUPLICATE_IOU = 0.5  # facings overlap little: two boxes that share more are one facing
VOTING_IOU = 0.65  # boxes of one facing that agree this well are averaged
AGREEMENT = 1.0  # log-odds for a facing that another tile has seen with a score of 1, in proportion to the score
SUPPORT = 2.0  # log-odds between no support from neighbours and full support
USUAL_SUPPORT = 0.25  # at which a score stays as it is
SUPPORTERS = 2  # neighbours that count: the best ones
REACH = 6.0  # how far neighbours of a row stand apart at most, in widths
STACK_REACH = 2.5  # the same of a stack, in heights
SLOPE = 0.2  # heights by which a row rises at most from one unit to the next, widths by which a stack leans
ALIKE_WIDTH, ALIKE_HEIGHT = 0.4, 0.35  # relative differences of size that halve the support, roughly


def merge_proposals(boxes_xyxy: FloatArray, scores: FloatArray, *, limit: int) -> tuple[FloatArray, FloatArray]:
    """At most `limit` boxes `[K, 4]` and scores `[K]`, best first, from overlapping ones `[N, 4]`, `[N]`.

    Non-maximum suppression; each box that stays becomes the mean of those that agree with it, weighted by score and
    overlap (box voting, Gidaris and Komodakis 2015); scores are raised by agreement of other tiles and by support of
    neighbours.
    """
    boxes, confidence = torch.from_numpy(boxes_xyxy), torch.from_numpy(scores)
    keep = nms(boxes, confidence, DUPLICATE_IOU)[:limit]
    if not len(keep):
        return boxes_xyxy[:0], scores[:0]
    kept, other, overlap = overlapping_pairs(boxes[keep], boxes)
    votes = overlap * confidence[other] * (overlap > VOTING_IOU)
    total = torch.zeros(len(keep)).index_add(0, kept, votes)
    voted = torch.zeros(len(keep), 4).index_add(0, kept, votes[:, None] * boxes[other]) / total[:, None]
    second = _second_scores(keep, kept, other, overlap, confidence)
    log_odds = confidence[keep].logit(1e-4) + AGREEMENT * second
    log_odds += SUPPORT * (_support(voted, log_odds.sigmoid()) - USUAL_SUPPORT)
    order = log_odds.argsort(descending=True, stable=True)
    return voted[order].numpy(), log_odds[order].sigmoid().numpy()


def _second_scores(
    keep: torch.Tensor, kept: torch.Tensor, other: torch.Tensor, overlap: torch.Tensor, confidence: torch.Tensor
) -> torch.Tensor:
    """For each box that stays the best score of its duplicates `[K]`, zero without any. A duplicate counts for the box
    that it overlaps most. kept, other, overlap: the pairs of a box that stays and any box."""
    best_overlap = torch.zeros(len(confidence)).scatter_reduce(0, other, overlap, "amax")
    best_overlap[keep] = torch.inf  # boxes that stay are no duplicates
    is_duplicate = (overlap > DUPLICATE_IOU) & (overlap == best_overlap[other])
    return torch.zeros(len(keep)).scatter_reduce(0, kept[is_duplicate], confidence[other[is_duplicate]], "amax")


def _support(boxes_xyxy: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """In [0, 1] for each box `[K]`: mean score of its SUPPORTERS best neighbours, less where they differ in size."""
    rows = torch.split(torch.arange(len(scores)), ROWS_AT_A_TIME)
    return torch.cat([_support_of(part, boxes_xyxy, scores) for part in rows])


def _support_of(rows: torch.Tensor, boxes_xyxy: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    centres, sides = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    columns = zip(centres.T.contiguous(), sides.T, strict=True)
    across, down = ((centre[rows, None] - centre).abs() / side[rows, None] for centre, side in columns)
    in_row = (across > 0.6) & (across < REACH) & (down < SLOPE * across.clamp(min=1))
    in_stack = (down > 0.6) & (down < STACK_REACH) & (across < 2 * SLOPE)
    box, neighbour = (in_row | in_stack).nonzero(as_tuple=True)
    wider, higher = (sides[rows[box]] / sides[neighbour]).log().unbind(1)
    likeness = (-((wider / ALIKE_WIDTH) ** 2) - (higher / ALIKE_HEIGHT) ** 2).exp()
    support = scores.new_zeros(len(rows), len(scores))
    support[box, neighbour] = likeness * scores[neighbour]
    return support.topk(min(SUPPORTERS, len(scores)), dim=1).values.mean(1)
