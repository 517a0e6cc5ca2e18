"""How far the network's answers are from the targets. Knows torch and tensors only."""

from __future__ import annotations

import torch
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss


def centre_loss(logits: torch.Tensor, target: torch.Tensor, is_known: torch.Tensor | None = None) -> torch.Tensor:
    """Penalty-reduced focal loss of CenterNet (Zhou et al. 2019, eq. 1), divided by the number of centres.

    logits, target: `[B, h, w]`; target is 1 at centres and falls off around them. is_known `[B, h, w]`: False where a
    facing that is not labelled may be (None: nowhere).
    """
    probability = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    is_centre = target == 1
    found = -((1 - probability) ** 2) * probability.log()
    empty = -((1 - target) ** 4) * probability**2 * (1 - probability).log()
    if is_known is not None:
        empty = empty * is_known
    return torch.where(is_centre, found, empty).sum() / is_centre.sum().clamp(min=1)


def box_loss(boxes: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - GIoU (Rezatofighi et al. 2019), weighted.

    boxes, truth: `[B, h, w, 4]`, xyxy with x0 < x1 and y0 < y1. weight: `[B, h, w]`, 1 in total for each facing.
    """
    cells = weight > 0
    loss: torch.Tensor = generalized_box_iou_loss(boxes[cells], truth[cells])
    return (loss * weight[cells]).sum() / weight.sum().clamp(min=1)


def quality_loss(logits: torch.Tensor, boxes: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a guess `[B, h, w]` (logits) with the IoU that the box of its cell has; others as `box_loss`."""
    cells = weight > 0
    with torch.no_grad():
        iou = _paired_iou(boxes[cells], truth[cells])
    entropy = functional.binary_cross_entropy_with_logits(logits[cells], iou.clamp(0, 1), reduction="none")
    return (entropy * weight[cells]).sum() / weight.sum().clamp(min=1)


def _paired_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of xyxy boxes `[N, 4]` with their partners."""
    shared = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    areas = sum((part[:, 2:] - part[:, :2]).clamp(min=0).prod(1) for part in (boxes, others))
    return shared.prod(1) / (areas - shared.prod(1)).clamp(min=1e-6)


def window_weights(boxes_xyxy: torch.Tensor, target: torch.Tensor, stride: int) -> torch.Tensor:
    """Weights of the cells of masks `[P, h, w]`: an object's surroundings (half a box side) share 1, all cells 0.2."""
    height, width = target.shape[1:]
    half = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2
    low = (boxes_xyxy[:, :2] - half) / stride - 2
    high = (boxes_xyxy[:, 2:] + half) / stride + 2
    xs = torch.arange(width, device=boxes_xyxy.device) + 0.5
    ys = torch.arange(height, device=boxes_xyxy.device) + 0.5
    across = (xs > low[:, 0:1]) & (xs < high[:, 0:1])
    down = (ys > low[:, 1:2]) & (ys < high[:, 1:2])
    inside = (down[:, :, None] & across[:, None, :]).float()
    return inside / inside.sum((1, 2), keepdim=True).clamp(min=1) + 0.2 / (height * width)


def mask_losses(
    logits: torch.Tensor, predicted_iou: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each mask against its object: cross-entropy in the object's surroundings, and Dice; and of its IoU guess.

    logits `[P, M, h, w]`, predicted_iou `[P, M]`, target `[P, h, w]` in [0, 1], weight as `window_weights` gives.
    Returns two `[P, M]`.
    """
    target = target[:, None].expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (entropy * weight[:, None]).sum((2, 3))
    probability = logits.sigmoid()
    overlap = _dice_loss(probability.flatten(2), target.flatten(2))
    with torch.no_grad():
        mask, truth = logits > 0, target > 0.5
        iou = (mask & truth).sum((2, 3)) / (mask | truth).sum((2, 3)).clamp(min=1)
    return entropy + overlap, (predicted_iou - iou) ** 2


def projection_losses(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Loss of each mask `[P, M]` where only the object's box is known: `target` is the filled box.

    The mask's shadows on both axes are to be the box's sides (BoxInst, Tian et al. 2021, projection term), and outside
    the box there is nothing; what is inside is left to the network. Shapes as for `mask_losses`.
    """
    target = target[:, None].expand_as(logits)
    probability = logits.sigmoid()
    shadows = [_dice_loss(probability.amax(axis), target.amax(axis)) for axis in (2, 3)]
    outside = functional.softplus(logits) * (1 - target) * weight[:, None]
    return outside.sum((2, 3)) + (shadows[0] + shadows[1]) / 2


def _dice_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Dice over the last axis."""
    return 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)
