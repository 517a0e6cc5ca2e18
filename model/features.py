"""What encoding leaves behind, as values: the features of a tile, the boxes that a head proposes, prompts on a tile.

Knows tensors, tiles and boxes. Knows nothing of networks, photos or how any of these are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.decoder import TileCells
from model.tiling import Tile
from model.types import BoolArray, FloatArray

MASK_STRIDE = 4  # tile pixels for each cell of the decoder's logits


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """Boxes that a learned head proposes: float32 `[N, 4]` with scores `[N]`, best first."""

    boxes_xyxy: FloatArray
    scores: FloatArray

    @property
    def nbytes(self) -> int:
        return self.boxes_xyxy.nbytes + self.scores.nbytes

    def on(self, tile: Tile) -> Proposals:
        """The proposals of a photo, in pixels of one of its tiles."""
        boxes = tile.to_tile(self.boxes_xyxy.reshape(-1, 2)).reshape(-1, 4)
        return Proposals(boxes_xyxy=boxes, scores=self.scores)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What `encode` made of one tile: all that prompts need, on the device, and the proposals, in pixels of the tile,
    when the checkpoint has a head."""

    tile: Tile
    cells: TileCells
    proposals: Proposals | None

    @property
    def nbytes(self) -> int:
        return self.cells.nbytes + (self.proposals.nbytes if self.proposals else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePrompt:
    """A prompt in pixels of the tile of `features`: points `[N, 2]`, foreground or not `[N]`, box `[4]` or None.

    proposals: boxes that a head proposes there, or None. prior_xyxy: the box `[4]` that the object probably fills; the
    decoder gets it as a mask prompt. None without one.
    """

    features: Features
    points_xy: FloatArray
    is_foreground: BoolArray
    box_xyxy: FloatArray | None
    proposals: Proposals | None = None
    prior_xyxy: FloatArray | None = None

    @property
    def is_ambiguous(self) -> bool:
        """One foreground point and nothing else: it may mean a part, a unit or a group, so all three masks count."""
        return self.box_xyxy is None and self.prior_xyxy is None and len(self.points_xy) == 1

    def tokens(self) -> tuple[FloatArray, npt.NDArray[np.int32]]:
        """SAM's points `[T, 2]` and labels `[T]`: box corners first (2 and 3), then points (1 or 0)."""
        corners = np.zeros((0, 2), np.float32) if self.box_xyxy is None else self.box_xyxy.reshape(2, 2)
        corner_labels = np.array([2, 3][: len(corners)], np.int32)
        labels = np.concatenate([corner_labels, self.is_foreground.astype(np.int32)])
        return np.concatenate([corners, self.points_xy]).astype(np.float32), labels
