"""Where facings may be: the learned proposal head, and the point grid for checkpoints without one.

Knows tensors and geometry, neither sam2 nor photos: everything here is in the pixels of one tile.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from model.boxes import iou_matrix
from model.trunk import convolution
from model.types import BoolArray, FloatArray

AGREEING_OVERLAP = 0.6  # IoU of a proposal with the decoder's box, from which both mean the same object
CLICK_SPREAD = 0.1  # of clicks around the middle of their object: square of the distance in shares of the sides
STRIDE = 4  # pixels of the tile for each cell of the head's maps


class ProposalHead(nn.Module):
    """One box for each cell of the finest feature map: the confidence that a facing is centred here, and how far its
    edges are.

    A centre heatmap with four distances (CenterNet, Zhou et al. 2019; distances as in FCOS, Tian et al. 2019).

    quality_power: None, or how much a third answer counts, which guesses the IoU of the box: the score is then
    `centre ** (1 - quality_power) * quality ** quality_power`, so that boxes that fit well come first.
    """

    def __init__(self, in_channels: int, channels: int, quality_power: float | None = None) -> None:
        super().__init__()
        self.quality_power = quality_power
        self.tower = nn.Sequential(
            convolution(in_channels, channels),
            nn.ReLU(inplace=True),
            convolution(channels, channels),
            nn.ReLU(inplace=True),
        )
        self.centre = nn.Conv2d(channels, 1, kernel_size=1)
        self.edges = nn.Conv2d(channels, 4, kernel_size=1)
        self.quality = None if quality_power is None else nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.constant_(self.centre.bias, -4.6)  # type: ignore[arg-type]  # sigmoid 0.01: few cells are centres
        nn.init.constant_(self.edges.bias, math.log(6.0))  # type: ignore[arg-type]

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[B, C, h, w]` to centre logits `[B, h, w]` and distances left, top, right, bottom `[B, 4, h, w]`.

        Distances are in tile pixels and positive.
        """
        centre, distances, quality = self.answers(features)
        if quality is None or self.quality_power is None:
            return centre, distances
        log_score = (1 - self.quality_power) * functional.logsigmoid(centre)
        log_score = log_score + self.quality_power * functional.logsigmoid(quality)
        return log_score - torch.log1p(-log_score.exp().clamp(max=1 - 1e-6)), distances

    def answers(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Centre logits `[B, h, w]`, distances `[B, 4, h, w]` and, with a `quality_power`, logits of each box's IoU
        `[B, h, w]`."""
        tower = self.tower(features)
        # In bf16 the logarithm of a distance would be off by up to 1 %: the last, cheap step is done in fp32.
        with torch.autocast(tower.device.type, enabled=False):
            tower = tower.float()
            distances = torch.exp(self.edges(tower).clamp(-3.0, 6.0)) * STRIDE
            return self.centre(tower)[:, 0], distances, None if self.quality is None else self.quality(tower)[:, 0]


def cell_centres_xy(height: int, width: int, *, device: torch.device) -> torch.Tensor:
    """Tile pixel of each cell's centre, `[height, width, 2]`."""
    ys = (torch.arange(height, device=device) + 0.5) * STRIDE
    xs = (torch.arange(width, device=device) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)


def boxes_of_cells(distances: torch.Tensor) -> torch.Tensor:
    """Distances `[B, 4, h, w]` to boxes `[B, h, w, 4]`, xyxy in tile pixels."""
    centres = cell_centres_xy(*distances.shape[2:], device=distances.device)
    left_top = centres - distances[:, :2].permute(0, 2, 3, 1)
    right_bottom = centres + distances[:, 2:].permute(0, 2, 3, 1)
    return torch.cat([left_top, right_bottom], dim=-1)


def peaks(centre_logits: torch.Tensor, distances: torch.Tensor, *, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `limit` strongest local maxima of each heatmap: boxes `[B, limit, 4]` and scores `[B, limit]`.

    Cells that are no local maximum of their 3×3 neighbourhood score zero.
    """
    scores = centre_logits.sigmoid()
    highest = functional.max_pool2d(scores[:, None], kernel_size=3, stride=1, padding=1)[:, 0]
    scores = torch.where(scores == highest, scores, scores.new_zeros(()))
    top_scores, cells = scores.flatten(1).topk(min(limit, scores[0].numel()), dim=1)
    boxes = boxes_of_cells(distances).flatten(1, 2)
    return boxes.gather(1, cells[..., None].expand(-1, -1, 4)), top_scores


def prior_box(boxes_xyxy: FloatArray, scores: FloatArray, points_xy: FloatArray) -> FloatArray | None:
    """The proposal `[4]` that the object under these foreground points `[N, 2]` probably fills: the most confident one
    that holds them all. A single click is usually near the middle, so that proposals count more in whose middle it is.
    None where there is none.
    """
    likelihood = np.where(holds(boxes_xyxy, points_xy).all(1), scores, 0.0)
    if len(points_xy) == 1:
        centres, sides = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        offset = (points_xy - centres) / np.maximum(sides, 1e-6)
        likelihood = likelihood * np.exp(-(offset**2).sum(1) / CLICK_SPREAD)
    return np.asarray(boxes_xyxy[likelihood.argmax()]) if likelihood.any() else None


def holds(boxes_xyxy: FloatArray, points_xy: FloatArray) -> BoolArray:
    """Which boxes `[M, 4]` have which points `[N, 2]` inside: `[M, N]`."""
    inside = (points_xy > boxes_xyxy[:, None, :2]) & (points_xy < boxes_xyxy[:, None, 2:])
    return np.asarray(inside.all(-1))


def averaged_with_proposal(box_xyxy: FloatArray, boxes_xyxy: FloatArray, scores: FloatArray) -> FloatArray:
    """The decoder's box `[4]` and the proposal `[N, 4]` that agrees with it best, averaged; the box itself where none
    does. Their errors are independent: one follows a mask's edge, the other regresses the sides."""
    overlap = iou_matrix(box_xyxy[None], boxes_xyxy)[0]
    weights = np.where(overlap > AGREEING_OVERLAP, overlap * np.sqrt(scores), 0)
    if not weights.any():
        return box_xyxy
    best = weights.argmax()
    return np.asarray((box_xyxy + weights[best] * boxes_xyxy[best]) / (1 + weights[best]))


def point_grid(points_per_side: int, size: int) -> torch.Tensor:
    """Evenly spread points `[points_per_side², 2]` over a square tile of `size` pixels, as in SAM's generator."""
    offset = 0.5 / points_per_side
    ticks = torch.linspace(offset, 1 - offset, points_per_side) * size
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(-1, 2)
