"""What it costs in recall, and saves in points, not to ask the grid's points in objects that are surely found already.

Knows the engine's grid and photos with known boxes. Measuring returns values; printing is apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model import EngineOptions
from model.checkpoints import Checkpoint, find_checkpoint
from model.detect import DenseFinder, PointGrid, result_of
from model.device import Placement, choose_placement
from model.network import Features, Network, TilePrompt
from model.stages import untimed
from model.tiling import Tile
from scripts.measure.evaluate import average_precision, count_corrections, photos_with, without_nan

if TYPE_CHECKING:
    from model.types import Detections, Photo
    from scripts.labels import Truth

#: Masks that count are less sure than the engine wants them, as few of a small checkpoint's are that sure.
GRID = PointGrid(min_score=0.6, min_stability=0.7)
#: Predicted IoU and stability of masks that hide their points. None; the engine's; less sure ones; all that count.
SURE = ((math.inf, math.inf), (PointGrid.sure_score, PointGrid.sure_stability), (0.8, 0.9), (0.6, 0.7))


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The grid on all photos, without points in masks of at least `sure_score` and `sure_stability` (None: with all).

    recall_50: share of the facings with a box of IoU 0.5 or more. ar300: COCO's average recall over IoU 0.50:0.95, of
    300 boxes a photo. Both NaN without facings.
    """

    sure_score: float | None
    sure_stability: float | None
    points: int
    boxes: int
    recall_50: float
    ar300: float


@dataclass(frozen=True, kw_only=True)
class PruningResult:
    """One row for each of SURE, the one that asks all points first. min_score, min_stability: of masks that count."""

    checkpoint: str
    min_score: float
    min_stability: float
    photos: int
    facings: int
    rows: Sequence[Pruned]


class RememberingNetwork(Network):
    """Answers each point of a photo once, and from memory when it is asked again; counts all prompts.

    Masks are kept in the machine's memory in float16: those of a photo of 4:3 take 0.7 to 2 GB.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        super().__init__(checkpoint, placement)
        self.asked = 0
        self._features: dict[Tile, Features] = {}
        self._answers: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def forget(self) -> None:
        """Before another photo, whose tiles and points lie at the same places."""
        self._features.clear()
        self._answers.clear()

    def features_of(self, photo: Photo, tiles: Sequence[Tile]) -> list[Features]:
        """Those of each tile of one photo; see `forget`."""
        unknown = [tile for tile in tiles if tile not in self._features]
        if unknown:
            self._features.update(zip(unknown, self.encode(photo.pixels, unknown), strict=True))
        return [self._features[tile] for tile in tiles]

    def decode(self, prompts: Sequence[TilePrompt], *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As Network.decode does, for prompts of one point."""
        self.asked += len(prompts)
        places = [(prompt.features.tile, *prompt.points_xy[0].tolist()) for prompt in prompts]
        unknown = [number for number, place in enumerate(places) if place not in self._answers]
        if unknown:
            logits, iou = super().decode([prompts[number] for number in unknown], multimask=multimask)
            answers = zip(logits.half().cpu(), iou.cpu(), strict=True)
            self._answers.update(zip([places[number] for number in unknown], answers, strict=True))
        known = [self._answers[place] for place in places]
        logits, iou = (torch.stack(answers).to(self._placement.device) for answers in zip(*known, strict=True))
        return logits.float(), iou


def measure_pruning(options: EngineOptions, photos_dir: Path, truths: Sequence[Truth]) -> PruningResult:
    """Asks the grid of every tile of every photo, once with all points, and reads from that what it would have found
    with fewer. Raises CommandError as `photos_with` does."""
    placement = choose_placement(options.device)
    checkpoint = find_checkpoint(
        options.checkpoint, config=options.checkpoint_config, has_gpu=placement.device.type == "cuda"
    )
    network = RememberingNetwork(checkpoint, placement)
    finders = [
        DenseFinder(
            network=network,
            proposer=None,
            falls_back_to_grid=False,
            features_of=network.features_of,
            timed=untimed,
            grid=replace(GRID, sure_score=sure_score, sure_stability=sure_stability),
        )
        for sure_score, sure_stability in SURE
    ]
    found: list[list[Detections]] = [[] for _ in finders]
    points = [0] * len(finders)
    for _, photo in photos_with(truths, photos_dir):
        network.forget()
        for row, finder in enumerate(finders):
            before = network.asked
            found[row].append(result_of(finder.find(photo, score_threshold=0.0, limit=options.max_detections)))
            points[row] += network.asked - before
    rows = [
        _row(finder.grid, truths, detections, points=asked)
        for finder, detections, asked in zip(finders, found, points, strict=True)
    ]
    facings = sum(len(truth.boxes_xyxy) for truth in truths)
    return PruningResult(
        checkpoint=checkpoint.version,
        min_score=GRID.min_score,
        min_stability=GRID.min_stability,
        photos=len(truths),
        facings=facings,
        rows=rows,
    )


def _row(grid: PointGrid, truths: Sequence[Truth], found: Sequence[Detections], *, points: int) -> Pruned:
    (corrections,) = count_corrections(truths, found, [0.0])
    return Pruned(
        sure_score=grid.sure_score if math.isfinite(grid.sure_score) else None,
        sure_stability=grid.sure_stability if math.isfinite(grid.sure_stability) else None,
        points=points,
        boxes=sum(map(len, found)),
        recall_50=1 - corrections.per_100(corrections.missed) / 100,
        ar300=average_precision(truths, found).ar300,
    )


def print_pruning(result: PruningResult) -> None:
    """A line for each way; the last line is JSON, in which what does not exist is null."""
    print(f"{result.checkpoint}: the grid on {result.photos} photos, {result.facings} facings")
    print(f"masks count from a predicted IoU of {result.min_score} and a stability of {result.min_stability}")
    print(f"{'points left out in masks of':<28} {'points':>8} {'boxes':>7} {'recall':>7} {'AR300':>6}")
    for row in result.rows:
        sure = "none" if row.sure_score is None else f"IoU {row.sure_score}, stability {row.sure_stability}"
        print(f"{sure:<28} {row.points:>8} {row.boxes:>7} {row.recall_50:>7.3f} {row.ar300:>6.3f}")
    rows = [{name: without_nan(value) for name, value in asdict(row).items()} for row in result.rows]
    print(json.dumps({**asdict(result), "rows": rows}))
