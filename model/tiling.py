"""A large photo as overlapping square tiles, and the boxes of tiles as boxes of the photo.

Knows numbers only. A 40-pixel facing of an 8-megapixel photo is lost when the whole photo is squeezed into a network's
1,024 pixels, so the photo is also looked at through smaller windows. In a panorama facings are lost as well when the
longer side decides: there even the largest windows follow the shorter side, and stand along the photo's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.types import BoolArray, FloatArray

#: Side of the tiles of each level, as a share of level 0's, which is the whole photo unless that is a panorama.
LEVELS = (1.0, 0.58, 0.34)
#: A photo that is longer than this many times its shorter side is a panorama.
PANORAMA_SHAPE = 2.0
#: Side of the tiles of a panorama's level 0, as a share of its shorter side: as if it were photos of 4:3 in a row.
PANORAMA_SIDE = 4 / 3
#: Levels that pre-annotation looks at; the finer ones serve prompts on small objects.
DENSE_LEVELS = 2
#: A prompt is answered from the level where its object takes up about this share of the tile's side.
SUITED_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A square window of the photo that the network sees at `size` × `size` pixels.

    left, top, side: photo pixels; the window may reach beyond the photo's right and bottom edge (filled with grey).
    level: index into LEVELS.
    """

    left: int
    top: int
    side: int
    size: int
    level: int

    @property
    def scale(self) -> float:
        """Tile pixels for each photo pixel."""
        return self.size / self.side

    def to_tile(self, points_xy: FloatArray) -> FloatArray:
        """Photo pixels `[..., 2]` as tile pixels."""
        return ((points_xy - np.array([self.left, self.top], np.float32)) * self.scale).astype(np.float32)

    def to_photo(self, boxes_xyxy: FloatArray) -> FloatArray:
        """Tile pixels `[..., 4]` as photo pixels."""
        return (boxes_xyxy / self.scale + np.array([self.left, self.top] * 2, np.float32)).astype(np.float32)

    def is_cut(self, boxes_xyxy: FloatArray, size_wh: tuple[int, int], margin: float) -> BoolArray:
        """Which boxes `[N, 4]` (photo pixels) end within `margin` tile pixels of an edge that the photo goes on behind.

        Such a box may show part of an object only; a neighbouring tile sees it whole.
        """
        reach = margin / self.scale
        width, height = size_wh
        return np.asarray(
            ((boxes_xyxy[:, 0] < self.left + reach) & (self.left > 0))
            | ((boxes_xyxy[:, 1] < self.top + reach) & (self.top > 0))
            | ((boxes_xyxy[:, 2] > self.left + self.side - reach) & (self.left + self.side < width))
            | ((boxes_xyxy[:, 3] > self.top + self.side - reach) & (self.top + self.side < height))
        )


def tiles_of(size_wh: tuple[int, int], size: int, level: int) -> tuple[Tile, ...]:
    """The tiles of one level, row by row; evenly spread, the last ones flush with the photo's edges.

    A level above 0 that would enlarge the photo more than twofold has none.
    """
    side = round(_largest_side(size_wh, size) * LEVELS[level])
    if level > 0 and side * 2 < size:
        return ()
    # Nothing coarser sees what the seams of level 0 cut, so that these overlap more.
    overlap = side // 4 if level == 0 else side // 8
    starts = [_starts(extent, side, overlap) for extent in size_wh]
    return tuple(Tile(left=x, top=y, side=side, size=size, level=level) for y in starts[1] for x in starts[0])


def _largest_side(size_wh: tuple[int, int], size: int) -> int:
    """Side of the tiles of level 0: that of the whole photo; of a panorama as much as keeps its facings large. A photo
    that the network would enlarge stays whole."""
    shorter, longer = min(size_wh), max(size_wh)
    if longer <= max(PANORAMA_SHAPE * shorter, size):
        return longer
    return max(round(PANORAMA_SIDE * shorter), size)


def _whole(size_wh: tuple[int, int], size: int) -> Tile:
    return Tile(left=0, top=0, side=max(size_wh), size=size, level=0)


def _starts(extent: int, side: int, overlap: int) -> list[int]:
    if extent <= side:
        return [0]
    count = -(-(extent - overlap) // (side - overlap))
    return [round(i * (extent - side) / (count - 1)) for i in range(count)]


def dense_tiles(size_wh: tuple[int, int], size: int) -> tuple[Tile, ...]:
    """All tiles that pre-annotation looks at."""
    return tuple(tile for level in range(DENSE_LEVELS) for tile in tiles_of(size_wh, size, level))


def tile_for_box(box_xyxy: FloatArray, size_wh: tuple[int, int], size: int, *, levels: int = len(LEVELS)) -> Tile:
    """The tile in which an object of about this box is seen best: suited in size, whole, and far from the edges.

    levels: how many of them to choose from, the coarsest first; the whole photo is always one of the choices.
    """
    longer_side = float(max(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]))
    wanted = longer_side / SUITED_SHARE
    whole = _whole(size_wh, size)
    choices = [(whole,), *(tiles for level in range(levels) if (tiles := tiles_of(size_wh, size, level)))]
    for tiles in sorted(choices, key=lambda tiles: abs(np.log(tiles[0].side / wanted))):
        best = max(tiles, key=lambda tile: _margin(tile, box_xyxy, size_wh))
        if _margin(best, box_xyxy, size_wh) >= 0.15 * longer_side:
            return best
    return whole


def tile_for_points(points_xy: FloatArray, size_wh: tuple[int, int], size: int) -> Tile:
    """The finest tile of pre-annotation that holds all points, the one with the largest margin around them; the whole
    photo where none holds them all."""
    hull = np.concatenate([points_xy.min(0), points_xy.max(0)])
    for level in reversed(range(DENSE_LEVELS)):
        tiles = tiles_of(size_wh, size, level)
        if tiles:
            best = max(tiles, key=lambda tile: _margin(tile, hull, size_wh))
            if _margin(best, hull, size_wh) >= 0.05 * best.side:
                return best
    return _whole(size_wh, size)


def _margin(tile: Tile, box_xyxy: FloatArray, size_wh: tuple[int, int]) -> float:
    """Least distance in photo pixels between the box and an edge of the tile that the photo goes on behind."""
    distances: Sequence[float] = (
        box_xyxy[0] - tile.left if tile.left > 0 else np.inf,
        box_xyxy[1] - tile.top if tile.top > 0 else np.inf,
        tile.left + tile.side - box_xyxy[2] if tile.left + tile.side < size_wh[0] else np.inf,
        tile.top + tile.side - box_xyxy[3] if tile.top + tile.side < size_wh[1] else np.inf,
    )
    return float(min(distances))
