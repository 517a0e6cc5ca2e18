"""All facings of one photo: the proposals of a learned head, redrawn by another network where that is asked for, or all
that a grid of points finds.

Knows networks, tiles and merging; nothing of queues, caches or requests. Every way is a generator that yields between
its batches, so that a click can overtake, and returns Detections.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar, cast

import numpy as np
import torch

from model import boxes as geometry
from model import tiling
from model.masks import SHELF_SHARE
from model.merging import DUPLICATE_IOU, merge_proposals
from model.network import MASK_STRIDE, Features, Network, Proposals, TilePrompt
from model.proposer import point_grid, prior_box
from model.stages import Timed
from model.tiling import Tile
from model.types import Detections, FloatArray, Photo

T = TypeVar("T")
Work = Generator[None, None, T]
Found = tuple[FloatArray, FloatArray]  # boxes [N, 4] with scores [N]

GRID_DUPLICATE_IOU = 0.7  # SAM2AutomaticMaskGenerator's
CUT_MARGIN = 4.0  # tile pixels: a box this close to an inner edge of its tile is cut
REDRAW_MARGIN = 0.15  # of a proposal's sides, by which its object may reach beyond it
REDRAW_LEAST_IOU = 0.5  # of a redrawn box with its proposal; else the decoder took a part or a group for the object


@dataclass(frozen=True, kw_only=True)
class PointGrid:
    """How a tile is asked, with the defaults of SAM2AutomaticMaskGenerator: points along each side, and the least
    predicted IoU and stability of a mask that counts.

    sure_score, sure_stability: the same of a mask that is surely an object, in which no more points are asked; less
    sure ones hide their neighbours (docs/speed.md says how many). Upstream asks all points: infinity.
    """

    points_per_side: int = 32
    min_score: float = 0.8
    min_stability: float = 0.95
    sure_score: float = 0.85
    sure_stability: float = 0.95

    def rounds(self, size: int) -> list[FloatArray]:
        """The points of each round `[N, 2]`, in pixels of a tile of `size`: every fourth along each side first, then
        every other, then the rest."""
        points = point_grid(self.points_per_side, size).numpy()
        line = np.arange(self.points_per_side)
        place = np.where(line % 4 == 2, 0, np.where(line % 2 == 0, 1, 2))  # the round of each line of points
        round_of = np.maximum(place[:, None], place[None]).ravel()
        return [points[round_of == number] for number in range(3)]


@dataclass(frozen=True, kw_only=True)
class DenseFinder:
    """Finds the facings of photos.

    network: encodes and decodes. proposer: whose head proposes: the network itself, another one, None for the grid.
    falls_back_to_grid: whether the grid is asked where another network proposes nothing at all.
    features_of: the network's features of a photo's tiles. timed: see model.stages.
    """

    network: Network
    proposer: Network | None
    falls_back_to_grid: bool
    features_of: Callable[[Photo, Sequence[Tile]], list[Features]]
    timed: Timed
    grid: PointGrid = PointGrid()

    def find(self, photo: Photo, *, score_threshold: float, limit: int) -> Work[Detections]:
        """At most `limit` boxes, best first. What is below `score_threshold` may be left out, and is not redrawn."""
        if self.proposer is None:
            return (yield from self._by_grid(photo, limit))
        found = yield from self._by_head(self.proposer, photo, limit)
        if self.proposer is self.network:
            return found
        found = found.above(score_threshold)
        if not len(found) and self.falls_back_to_grid:
            return (yield from self._by_grid(photo, limit))
        return (yield from self._redrawn(photo, found))

    def _by_head(self, proposer: Network, photo: Photo, limit: int) -> Work[Detections]:
        found: list[Found] = []
        for tiles in batches(tiling.dense_tiles(photo.size_wh, proposer.size), proposer.encode_batch):
            proposals: Iterable[Proposals | None]
            if proposer is self.network:
                proposals = [features.proposals for features in self.features_of(photo, tiles)]
            else:
                proposals = proposer.propose(photo.pixels, tiles)
            found += [
                _whole_ones((entry.boxes_xyxy, entry.scores), tile, photo)
                for tile, entry in zip(tiles, proposals, strict=True)
                if entry is not None
            ]
            yield
        with self.timed("merge"):
            boxes, scores = merge_proposals(*_joined(found), limit=limit)
        return Detections(boxes_xyxy=boxes, scores=scores)

    def _redrawn(self, photo: Photo, proposed: Detections) -> Work[Detections]:
        """The proposals as the network's decoder draws them; their scores stay."""
        size = self.network.size
        boxes = np.array(proposed.boxes_xyxy)
        rows_of: dict[Tile, list[int]] = {}
        for row, box in enumerate(boxes):
            tile = tiling.tile_for_box(box, photo.size_wh, size, levels=tiling.DENSE_LEVELS)
            rows_of.setdefault(tile, []).append(row)
        for tiles in batches(rows_of, self.network.encode_batch):
            for features in self.features_of(photo, tiles):
                yield
                for rows in batches(rows_of[features.tile], self.network.decode_batch):
                    with self.timed("decode"):
                        boxes[rows] = self._redraw(features, boxes[rows])
                    yield
        with self.timed("merge"):
            boxes = geometry.clip_boxes(boxes, photo.size_wh)
            keep = geometry.nms(torch.from_numpy(boxes), torch.tensor(proposed.scores), DUPLICATE_IOU).numpy()
        return Detections(boxes_xyxy=boxes[keep], scores=proposed.scores[keep])

    def _redraw(self, features: Features, boxes_xyxy: FloatArray) -> FloatArray:
        """Boxes `[P, 4]` of one tile, in photo pixels; one stays as it is where the decoder sees something else."""
        tile = features.tile
        asked = tile.to_tile(boxes_xyxy.reshape(-1, 2)).reshape(-1, 4)
        no_points, no_labels = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
        prompts = [
            TilePrompt(features=features, points_xy=no_points, is_foreground=no_labels, box_xyxy=box) for box in asked
        ]
        logits, _ = self.network.decode(prompts, multimask=False)
        sides = asked[:, 2:] - asked[:, :2]
        windows = asked + REDRAW_MARGIN * np.concatenate([-sides, sides], axis=1)
        inside = geometry.cells_inside(torch.from_numpy(windows).to(logits.device), logits.shape[-1], MASK_STRIDE)
        drawn = geometry.mask_boxes(logits[:, 0].masked_fill(~inside, -32.0), MASK_STRIDE).cpu().numpy()
        agrees = geometry.iou_matrix(drawn, asked).diagonal() >= REDRAW_LEAST_IOU
        return np.where(agrees[:, None], tile.to_photo(drawn), boxes_xyxy)

    def _by_grid(self, photo: Photo, limit: int) -> Work[Detections]:
        found: list[Found] = []
        for tiles in batches(tiling.dense_tiles(photo.size_wh, self.network.size), self.network.encode_batch):
            for features in self.features_of(photo, tiles):
                answer = yield from ask_grid(self.network, features, self.grid, timed=self.timed)
                found.append(_whole_ones(answer, features.tile, photo))
            yield
        with self.timed("merge"):
            boxes, scores = _joined(found)
            keep = geometry.nms(torch.from_numpy(boxes), torch.from_numpy(scores), GRID_DUPLICATE_IOU).numpy()[:limit]
        return Detections(boxes_xyxy=boxes[keep], scores=scores[keep])


def ask_grid(
    network: Network,
    features: Features,
    grid: PointGrid,
    *,
    timed: Timed,
    at_full_resolution: bool = False,
) -> Work[Found]:
    """Boxes of one tile, in its pixels, of everything that a grid of points finds, before duplicate removal: of what
    each point is answered, the masks that are sure and stable.

    A point is asked as a click is (see model.engine): with a proposal as its prior where the network has one for it,
    else for three masks. Without proposals and sure objects this is what SAM2AutomaticMaskGenerator would find.

    at_full_resolution: reads boxes and stability from enlarged masks, as upstream does, instead of between the cells of
    the decoder's own; slower, and hardly different. timed: see model.stages.
    """
    boxes: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    side = network.size // MASK_STRIDE
    is_found = np.zeros((side, side), np.bool_)  # cells of objects
    for points in grid.rounds(network.size):
        column, row = (points / MASK_STRIDE).astype(int).T
        prompts = [_click(features, point) for point in points[~is_found[row, column]]]
        prompts.sort(key=lambda prompt: prompt.is_ambiguous)
        for is_ambiguous, alike in groupby(prompts, key=lambda prompt: prompt.is_ambiguous):
            for batch in batches(alike, network.decode_batch):
                with timed("decode"):
                    logits, iou = network.decode(batch, multimask=is_ambiguous)
                    surest = (iou == iou.amax(1, keepdim=True)).flatten()
                    keep = iou.flatten() > grid.min_score
                    logits, iou, surest = logits.flatten(0, 1)[keep], iou.flatten()[keep], surest[keep]
                    found, stability = _read_masks(logits, features.tile, network.size, at_full_resolution)
                    stable = stability >= grid.min_stability
                    boxes.append(found[stable].cpu())
                    scores.append(iou[stable].clamp(0, 1).cpu())
                    areas = (found[:, 2:] - found[:, :2]).prod(1)
                    objects = stable & surest & (areas <= SHELF_SHARE * network.size**2)
                    objects &= (iou >= grid.sure_score) & (stability >= grid.sure_stability)
                    is_found |= (logits[objects] > 0).any(0).cpu().numpy()
                yield
    return torch.cat([torch.zeros(0, 4), *boxes]).numpy(), torch.cat([torch.zeros(0), *scores]).numpy()


def _click(features: Features, point_xy: FloatArray) -> TilePrompt:
    yes, proposals = np.ones(1, np.bool_), features.proposals
    prior = prior_box(proposals.boxes_xyxy, proposals.scores, point_xy[None], yes, None) if proposals else None
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


def _whole_ones(found: Found, tile: Tile, photo: Photo) -> Found:
    """The boxes of a tile as boxes of the photo, without those that the tile's edge cuts."""
    boxes, scores = geometry.clip_boxes(tile.to_photo(found[0]), photo.size_wh), found[1]
    keep = ~tile.is_cut(boxes, photo.size_wh, CUT_MARGIN) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    return boxes[keep], scores[keep]


def _joined(found: Sequence[Found]) -> Found:
    return np.concatenate([boxes for boxes, _ in found]), np.concatenate([scores for _, scores in found])


def result_of(work: Work[T]) -> T:
    """What the work returns, done without a break."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
