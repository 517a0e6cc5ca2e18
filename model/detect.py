"""All facings of one photo. Each class is one way to find them, and the engine chooses one when it loads.

Knows networks, tiles, prompts and merging; nothing of queues or requests. Every way is a generator that yields between
its batches, so that a click can overtake it.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar, cast

import numpy as np
import torch

from model import boxes as geometry
from model import tiling
from model.feature_cache import KnownBoxes, TileFeatures
from model.features import MASK_STRIDE, Features, TilePrompt
from model.memory import batches
from model.merging import DUPLICATE_IOU, merge_proposals
from model.network import Network
from model.proposer import point_grid, prior_box
from model.stages import UNOBSERVED, Observer, timed
from model.tiling import Tile
from model.types import Detections, FloatArray, Photo

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Generator[None, None, T]
TileBoxes = tuple[FloatArray, FloatArray]  # boxes [N, 4] with scores [N]

MERGED_LIMIT, MERGED_PER_TILE = 1000, 200  # boxes that are merged and remembered at least, however few are asked for
GRID_DUPLICATE_IOU = 0.7  # SAM2AutomaticMaskGenerator's
CUT_MARGIN = 4.0  # tile pixels: a box this close to an inner edge of its tile is cut
PROMPT_MARGIN = 0.15  # of the sides of a box that prompts SAM 2: its object may reach this far beyond it
LEAST_PROMPT_IOU = 0.5  # of SAM 2's box with its prompt; below, the decoder took a part or a group for the object


class Detector(Protocol):
    """One way to find the facings of photos."""

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        """At most `limit` boxes with a score of at least `score_threshold`, best first."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadDetector:
    """The boxes that a network's learned head proposes, merged from all tiles.

    features: of that network. known_boxes: where all boxes of the photo are kept, whatever their score.
    excess_width: by how much of their width the boxes of this head are too wide.
    """

    features: TileFeatures
    known_boxes: KnownBoxes
    excess_width: float = 0.0
    observer: Observer = UNOBSERVED

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        tiles = tiling.dense_tiles(photo.size_wh, self.features.network.size)
        proposed: list[TileBoxes] = []
        for batch in self.features.of(photo, tiles):
            for features in batch:
                if features.proposals is None:
                    raise TypeError("HeadDetector: expected a network with a proposal head")
                own = features.proposals
                proposed.append(_without_cut_ones((own.boxes_xyxy, own.scores), features.tile, photo))
            yield
        with timed(self.observer, "merge"):
            merged_limit = max(limit, MERGED_LIMIT, MERGED_PER_TILE * len(tiles))
            boxes, scores = merge_proposals(*_joined(proposed), limit=merged_limit)
        boxes = geometry.clip_boxes(geometry.with_width(boxes, 1 - self.excess_width), photo.size_wh)
        found = Detections(boxes_xyxy=boxes, scores=scores)
        self.known_boxes.put(photo, found)
        return _best(found, score_threshold, limit)


@dataclass(frozen=True, kw_only=True)
class PromptedDetector:
    """The boxes of another detector, each refined by SAM 2, which is prompted with it. The detector's scores stay.

    detector: finds the boxes. features: of the network that is prompted.
    """

    detector: Detector
    features: TileFeatures
    observer: Observer = UNOBSERVED

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        detected = yield from self.detector.find(photo, score_threshold=score_threshold, limit=limit)
        network = self.features.network
        boxes = np.array(detected.boxes_xyxy)
        rows_of: dict[Tile, list[int]] = {}
        for row, box in enumerate(boxes):
            tile = tiling.tile_for_box(box, photo.size_wh, network.size, levels=tiling.DENSE_LEVELS)
            rows_of.setdefault(tile, []).append(row)
        for batch in self.features.of(photo, list(rows_of)):
            for features in batch:
                yield
                for rows in batches(rows_of[features.tile], network.decode_batch):
                    with timed(self.observer, "decode"):
                        boxes[rows] = _refined(network, features, boxes[rows])
                    yield
        with timed(self.observer, "merge"):
            boxes = geometry.clip_boxes(boxes, photo.size_wh)
            keep = geometry.nms(torch.from_numpy(boxes), torch.tensor(detected.scores), DUPLICATE_IOU).numpy()
        return Detections(boxes_xyxy=boxes[keep], scores=detected.scores[keep])


@dataclass(frozen=True, kw_only=True)
class PointGrid:
    """How a tile is asked, with the defaults of SAM2AutomaticMaskGenerator: points along each side, and the least
    predicted IoU and stability of a mask that counts."""

    points_per_side: int = 32
    min_score: float = 0.8
    min_stability: float = 0.95


@dataclass(frozen=True, kw_only=True)
class GridDetector:
    """Objects of any kind: whatever SAM 2 finds under a grid of points."""

    features: TileFeatures
    grid: PointGrid = PointGrid()
    observer: Observer = UNOBSERVED

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        network = self.features.network
        answers: list[TileBoxes] = []
        for batch in self.features.of(photo, tiling.dense_tiles(photo.size_wh, network.size)):
            for features in batch:
                answer = yield from ask_grid(network, features, self.grid, observer=self.observer)
                answers.append(_without_cut_ones(answer, features.tile, photo))
            yield
        with timed(self.observer, "merge"):
            boxes, scores = _joined(answers)
            keep = geometry.nms(torch.from_numpy(boxes), torch.from_numpy(scores), GRID_DUPLICATE_IOU).numpy()
        return _best(Detections(boxes_xyxy=boxes[keep], scores=scores[keep]), score_threshold, limit)


@dataclass(frozen=True, kw_only=True)
class FallbackDetector:
    """What `first` finds, or what `fallback` finds where that is nothing."""

    first: Detector
    fallback: Detector

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        found = yield from self.first.find(photo, score_threshold=score_threshold, limit=limit)
        if len(found):
            return found
        return (yield from self.fallback.find(photo, score_threshold=score_threshold, limit=limit))


def ask_grid(
    network: Network,
    features: Features,
    grid: PointGrid,
    *,
    at_full_resolution: bool = False,
    observer: Observer = UNOBSERVED,
) -> Work[TileBoxes]:
    """Boxes of one tile, in its pixels, of everything that a grid of points finds, before duplicate removal: of the
    masks that each point is answered, those with enough predicted IoU and stability.

    A point is asked as a click is (see model.refine): with a proposal as its prior where the network has one for it,
    else for three masks. Without proposals this is what SAM2AutomaticMaskGenerator finds.

    at_full_resolution: reads boxes and stability from enlarged masks, as upstream does, instead of between the cells of
    the decoder's own; slower, and hardly different.
    """
    boxes: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    prompts = [_click(features, point) for point in point_grid(grid.points_per_side, network.size).numpy()]
    prompts.sort(key=lambda prompt: prompt.is_ambiguous)
    for is_ambiguous, alike in groupby(prompts, key=lambda prompt: prompt.is_ambiguous):
        for batch in batches(alike, network.decode_batch):
            with timed(observer, "decode"):
                logits, iou = network.decode(batch, multimask=is_ambiguous)
                keep = iou.flatten() > grid.min_score
                logits, iou = logits.flatten(0, 1)[keep], iou.flatten()[keep]
                found, stability = _read_masks(logits, features.tile, network.size, at_full_resolution)
                stable = stability >= grid.min_stability
                boxes.append(found[stable].cpu())
                scores.append(iou[stable].clamp(0, 1).cpu())
            yield
    return torch.cat([torch.zeros(0, 4), *boxes]).numpy(), torch.cat([torch.zeros(0), *scores]).numpy()


def result_of(work: Work[T]) -> T:
    """What the work returns, done without a break."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


def _best(found: Detections, score_threshold: float, limit: int) -> Detections:
    """What is handed out of all that was found. Nothing is left out silently, except for its score."""
    good = found.above(score_threshold)
    if len(good) > limit:
        log.warning("%d boxes found in one photo, only the best %d kept: max_detections", len(good), limit)
    return good.first(limit)


def _refined(network: Network, features: Features, boxes_xyxy: FloatArray) -> FloatArray:
    """Boxes `[P, 4]` of one tile, in photo pixels, as SAM 2 sees their objects; a box stays as it is where SAM 2 sees
    something else."""
    tile = features.tile
    prompted = tile.to_tile(boxes_xyxy.reshape(-1, 2)).reshape(-1, 4)
    no_points, no_labels = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
    prompts = [
        TilePrompt(features=features, points_xy=no_points, is_foreground=no_labels, box_xyxy=box) for box in prompted
    ]
    logits, _ = network.decode(prompts, multimask=False)
    sides = prompted[:, 2:] - prompted[:, :2]
    windows = prompted + PROMPT_MARGIN * np.concatenate([-sides, sides], axis=1)
    inside = geometry.cells_inside(torch.from_numpy(windows).to(logits.device), logits.shape[-1], MASK_STRIDE)
    refined = geometry.mask_boxes(logits[:, 0].masked_fill(~inside, -32.0), MASK_STRIDE).cpu().numpy()
    agrees = geometry.iou_matrix(refined, prompted).diagonal() >= LEAST_PROMPT_IOU
    return np.where(agrees[:, None], tile.to_photo(refined), boxes_xyxy)


def _click(features: Features, point_xy: FloatArray) -> TilePrompt:
    yes, proposals = np.ones(1, np.bool_), features.proposals
    prior = prior_box(proposals.boxes_xyxy, proposals.scores, point_xy[None]) if proposals else None
    return TilePrompt(features=features, points_xy=point_xy[None], is_foreground=yes, box_xyxy=None, prior_xyxy=prior)


def _read_masks(
    logits: torch.Tensor, tile: Tile, size: int, at_full_resolution: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes `[P, 4]` in tile pixels, and stability `[P]`, of masks `[P, h, w]`."""
    if not at_full_resolution:
        return geometry.mask_boxes(logits, MASK_STRIDE), geometry.stability_scores(logits)
    boxes, stability = [logits.new_zeros(0, 4)], [logits.new_zeros(0)]
    for part in torch.split(logits, 8):  # a mask takes as many bytes as four of its photo's tile
        large = geometry.enlarged(part, tile.side)
        boxes.append(geometry.pixel_boxes(large, size / tile.side))
        stability.append(geometry.stability_scores(large))
    return torch.cat(boxes), torch.cat(stability)


def _without_cut_ones(found: TileBoxes, tile: Tile, photo: Photo) -> TileBoxes:
    """The boxes of a tile as boxes of the photo, without those that the tile's edge cuts."""
    boxes, scores = geometry.clip_boxes(tile.to_photo(found[0]), photo.size_wh), found[1]
    keep = ~tile.is_cut(boxes, photo.size_wh, CUT_MARGIN) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    return boxes[keep], scores[keep]


def _joined(found: Sequence[TileBoxes]) -> TileBoxes:
    return np.concatenate([boxes for boxes, _ in found]), np.concatenate([scores for _, scores in found])
