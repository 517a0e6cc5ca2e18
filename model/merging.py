"""One box for each facing, from the proposals of all tiles.

Knows torch, boxes and scores; nothing of tiles or networks. Built on what shelves are like: facings hardly overlap, and
they stand in rows and stacks of equals, so that a doubtful box is believed when the boxes beside it look like it.
"""

from __future__ import annotations

import torch
from torchvision.ops import nms

from model.types import FloatArray

DUPLICATE_IOU = 0.5  # facings overlap little: two boxes that share more are one facing
VOTING_IOU = 0.65  # boxes of one facing that agree this well are averaged
AGREEMENT = 1.0  # log-odds for a facing that another tile has seen with a score of 1, in proportion to the score
SUPPORT = 2.0  # log-odds between no support from neighbours and as much as there can be
USUAL_SUPPORT = 0.25  # at which a score stays as it is
SUPPORTERS = 2  # neighbours that count: the best ones
REACH = 6.0  # how far neighbours of a row stand apart at most, in widths
STACK_REACH = 2.5  # and of a stack, in heights
SLOPE = 0.2  # heights by which a row rises at most from one unit to the next, widths by which a stack leans
ALIKE_WIDTH, ALIKE_HEIGHT = 0.4, 0.35  # relative differences of size that halve the support, roughly


def merge_proposals(boxes_xyxy: FloatArray, scores: FloatArray, *, limit: int) -> tuple[FloatArray, FloatArray]:
    """At most `limit` boxes `[K, 4]` and scores `[K]`, best first, from overlapping ones `[N, 4]`, `[N]`.

    Non-maximum suppression; each box that stays becomes the mean of those that agree with it, weighted by score and
    overlap (box voting, Gidaris and Komodakis 2015); scores are raised by what other tiles and neighbours say.
    """
    boxes, confidence = torch.from_numpy(boxes_xyxy), torch.from_numpy(scores)
    keep = nms(boxes, confidence, DUPLICATE_IOU)[:limit]
    if not len(keep):
        return boxes_xyxy[:0], scores[:0]
    kept, other, overlap = _overlaps(boxes[keep], boxes)
    votes = overlap * confidence[other] * (overlap > VOTING_IOU)
    ballots = votes[:, None] * torch.cat([boxes, torch.ones(len(boxes), 1)], 1)[other]
    *sums, total = torch.zeros(len(keep), 5).index_add(0, kept, ballots).unbind(1)
    voted = torch.stack(sums, 1) / total[:, None]
    best = torch.zeros(len(boxes)).scatter_reduce(0, other, overlap, "amax")
    best[keep] = torch.inf  # no duplicates of others
    is_owner = (overlap > DUPLICATE_IOU) & (overlap == best[other])
    seconded = torch.zeros(len(keep)).scatter_reduce(0, kept[is_owner], confidence[other[is_owner]], "amax")
    log_odds = confidence[keep].logit(1e-4) + AGREEMENT * seconded
    log_odds += SUPPORT * (_support(voted, log_odds.sigmoid()) - USUAL_SUPPORT)
    order = log_odds.argsort(descending=True, stable=True)
    return voted[order].numpy(), log_odds[order].sigmoid().numpy()


def _overlaps(kept_xyxy: torch.Tensor, boxes_xyxy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs that overlap at all, one in a hundred: indices into both, and their IoU, each `[P]`."""
    left, top, right, bottom = boxes_xyxy.T.contiguous()  # columns side by side: four times as fast
    x0, y0, x1, y1 = kept_xyxy.T.contiguous()[..., None]
    row, column = ((left < x1) & (x0 < right) & (top < y1) & (y0 < bottom)).nonzero(as_tuple=True)
    first, second = kept_xyxy[row], boxes_xyxy[column]
    shared = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).prod(1)
    areas = [(one[:, 2:] - one[:, :2]).prod(1) for one in (first, second)]
    return row, column, shared / (areas[0] + areas[1] - shared)


def _support(boxes_xyxy: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """In [0, 1] for each box `[K]`: mean score of its SUPPORTERS best neighbours, less where they differ in size."""
    centres, sides = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    columns = zip(centres.T.contiguous(), sides.T, strict=True)
    across, down = ((centre[:, None] - centre).abs() / side[:, None] for centre, side in columns)
    in_row = (across > 0.6) & (across < REACH) & (down < SLOPE * across.clamp(min=1))
    in_stack = (down > 0.6) & (down < STACK_REACH) & (across < 2 * SLOPE)
    asked, neighbour = (in_row | in_stack).nonzero(as_tuple=True)
    wider, higher = (sides[asked] / sides[neighbour]).log().unbind(1)
    alike = (-((wider / ALIKE_WIDTH) ** 2) - (higher / ALIKE_HEIGHT) ** 2).exp()
    says = scores.new_zeros(len(scores), len(scores))
    says[asked, neighbour] = alike * scores[neighbour]
    return says.topk(min(SUPPORTERS, len(scores)), dim=1).values.mean(1)
