"""What the network should have answered: dense targets of the proposal head, and prompts with the masks they name.

Knows numpy only; made from a rendered or annotated photo's boxes and instance ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.proposer import STRIDE
from model.types import BoolArray, FloatArray

CENTRE_SPREAD = 0.09  # standard deviation of a centre's Gaussian, as a share of the box side (TTFNet, Liu et al. 2020)
MAX_PROMPT_TOKENS = 5  # two box corners and three points, or five points
UNKNOWN = -1  # in place of an instance id: there may be facings that nobody boxed
MASK_STRIDE = 4  # pixels of the picture for each cell of the decoder's masks


@dataclass(frozen=True, kw_only=True)
class DenseTargets:
    """centre: float32 `[h, w]`, 1 at each facing's centre cell. boxes_xyxy: float32 `[h, w, 4]` in pixels.
    weight: float32 `[h, w]`, zero where no box is asked for; the weights of one facing's cells sum to 1.
    is_known: bool `[h, w]`, False where there may be facings that nobody boxed."""

    centre: FloatArray
    boxes_xyxy: FloatArray
    weight: FloatArray
    is_known: BoolArray


def dense_targets(boxes_xyxy: FloatArray, instance_ids: npt.NDArray[np.int32]) -> DenseTargets:
    """Targets for a picture; smaller boxes win cells over larger ones.

    instance_ids: `[H, W]`, UNKNOWN where there may be facings that nobody boxed; what else they are does not matter.
    """
    rows, columns = (side // STRIDE for side in instance_ids.shape)
    centre = np.zeros((rows, columns), np.float32)
    boxes = np.zeros((rows, columns, 4), np.float32)
    weight = np.zeros((rows, columns), np.float32)
    areas = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    for box in boxes_xyxy[np.argsort(-areas)]:
        middle = (box[:2] + box[2:]) / 2 / STRIDE - 0.5
        spread = np.maximum((box[2:] - box[:2]) / STRIDE * CENTRE_SPREAD, 0.4)
        cell = np.clip(np.round(middle).astype(int), 0, (columns - 1, rows - 1))
        reach = np.ceil(3 * spread).astype(int)
        x0, y0 = np.maximum(cell - reach, 0)
        x1, y1 = np.minimum(cell + reach + 1, (columns, rows))
        across = np.exp(-0.5 * ((np.arange(x0, x1) - middle[0]) / spread[0]) ** 2)
        down = np.exp(-0.5 * ((np.arange(y0, y1) - middle[1]) / spread[1]) ** 2)
        bell = (down[:, None] * across[None, :]).astype(np.float32)
        bell[cell[1] - y0, cell[0] - x0] = 1.0
        np.maximum(centre[y0:y1, x0:x1], bell, out=centre[y0:y1, x0:x1])
        core = bell >= 0.3
        boxes[y0:y1, x0:x1][core] = box
        weight[y0:y1, x0:x1][core] = (bell / bell[core].sum())[core]
    unknown = (instance_ids == UNKNOWN).reshape(rows, STRIDE, columns, STRIDE).any((1, 3))
    return DenseTargets(centre=centre, boxes_xyxy=boxes, weight=weight, is_known=~unknown | (weight > 0))


@dataclass(frozen=True, kw_only=True)
class PromptTargets:
    """Prompts in SAM's tokens, and what they name.

    coords: float32 `[P, T, 2]` pixels.
    labels: int32 `[P, T]`: 1 foreground, 0 background, 2 and 3 box corners, -1 none.
    prior_xyxy: float32 `[P, 4]`, what is known of the box before: the prompt's own or a proposal's; zeros for nothing.
    masks: float32 `[P, h, w]` share of each mask cell that the object covers. boxes_xyxy: float32 `[P, 4]`.
    is_click: bool `[P]`, True where the prompt is one point alone.
    """

    coords: FloatArray
    labels: npt.NDArray[np.int32]
    prior_xyxy: FloatArray
    masks: FloatArray
    boxes_xyxy: FloatArray
    is_click: BoolArray


def prompt_targets(
    boxes_xyxy: FloatArray, instance_ids: npt.NDArray[np.int32], count: int, rng: np.random.Generator
) -> PromptTargets:
    """`count` prompts (fewer when the picture holds fewer facings) such as annotators give.

    Half are clicks, one near the middle of the object as a rule; the rest rough boxes (each edge off by up to 20 % of
    the side), boxes with a click, and several points with background points on the neighbours.
    """
    height, width = instance_ids.shape
    chosen = rng.permutation(len(boxes_xyxy))[:count]
    coords = np.zeros((len(chosen), MAX_PROMPT_TOKENS, 2), np.float32)
    labels = np.full((len(chosen), MAX_PROMPT_TOKENS), -1, np.int32)
    prior = np.zeros((len(chosen), 4), np.float32)
    masks = np.zeros((len(chosen), height // MASK_STRIDE, width // MASK_STRIDE), np.float32)
    for row, index in enumerate(chosen):
        box = boxes_xyxy[index]
        visible = instance_ids == index + 1
        covered = visible.reshape(height // MASK_STRIDE, MASK_STRIDE, width // MASK_STRIDE, MASK_STRIDE)
        masks[row] = covered.mean((1, 3), dtype=np.float32)
        kind = rng.choice(["click", "box", "box and click", "points"], p=[0.45, 0.3, 0.1, 0.15])
        tokens: list[tuple[FloatArray, int]] = []
        rough = box + (rng.uniform(-0.2, 0.2, 4) * np.tile(box[2:] - box[:2], 2) * rng.uniform(0.2, 1.0))
        if kind in ("box", "box and click"):
            tokens += [(rough[:2], 2), (rough[2:], 3)]
        if kind in ("box", "box and click") or rng.random() < 0.7:
            prior[row] = rough
        if kind != "box":
            tokens.append((_point_inside(visible, box, rng, central=rng.random() < 0.7), 1))
        if kind == "points":
            tokens += [
                (_point_inside(visible, box, rng, central=False), 1)
                if rng.random() < 0.4
                else (_point_outside(visible, box, rng), 0)
                for _ in range(rng.integers(1, 4))
            ]
        for column, (point, label) in enumerate(tokens):
            coords[row, column], labels[row, column] = point, label
    return PromptTargets(
        coords=coords,
        labels=labels,
        prior_xyxy=prior,
        masks=masks,
        boxes_xyxy=boxes_xyxy[chosen],
        is_click=(labels[:, 0] == 1) & (labels[:, 1] == -1),
    )


def _point_inside(visible: BoolArray, box: FloatArray, rng: np.random.Generator, *, central: bool) -> FloatArray:
    """A visible pixel of the object; near the middle of its box when `central` and that is visible."""
    height, width = visible.shape
    if central:
        point = (box[:2] + box[2:]) / 2 + rng.normal(0, 0.12, 2) * (box[2:] - box[:2])
        x, y = np.clip(point.astype(int), 0, (width - 1, height - 1))
        if visible[y, x]:
            return np.array([x, y], np.float32)
    x0, y0, x1, y1 = box.astype(int)
    ys, xs = np.nonzero(visible[y0:y1, x0:x1])
    pick = rng.integers(len(ys))
    return np.array([xs[pick] + x0, ys[pick] + y0], np.float32)


def _point_outside(visible: BoolArray, box: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A pixel that is not the object's, within half a box side around its box."""
    height, width = visible.shape
    side = box[2:] - box[:2]
    for _ in range(8):
        point = rng.uniform(box[:2] - side / 2, box[2:] + side / 2)
        x, y = np.clip(point.astype(int), 0, (width - 1, height - 1))
        if not visible[y, x]:
            return np.array([x, y], np.float32)
    return np.clip(box[2:] + 2, 0, (width - 1, height - 1)).astype(np.float32)
