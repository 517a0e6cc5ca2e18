"""Rendered shelf photos with exact labels, to train on without a single real shelf.

`render_shelf(seed, size_wh)` draws a piece of a shelf the way a shopper's camera sees it: bays of rows, groups of
identical products with their rear units, trays, hooks, stacks, price rails, signs, glass doors, then lens, light, noise
and JPEG. The same seed gives the same picture. Boxes and instance ids come from one id map that went through the same
lens as the pixels, so that boxes are tight around what is visible.

Knows how labels are read off the id map. Does not know how things are drawn (`scene` and what it imports), nor what is
learned from the pictures, nor how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from model.renderer.camera import MARGIN, lens, new_view, photograph
from model.renderer.canvas import Canvas
from model.renderer.paint import Floats, Pixels, Rng
from model.renderer.scene import draw_scene
from model.renderer.shop import Shop
from model.renderer.textures import Textures, load_textures

__all__ = ["MIN_SIDE_PX", "MIN_VISIBLE_SHARE", "Shelf", "Textures", "load_textures", "preview", "render_shelf"]

MIN_SIDE_PX = 6  # of a labelled box
MIN_VISIBLE_SHARE = 0.38  # of a facing's own silhouette, for it to be labelled


@dataclass(frozen=True, kw_only=True, eq=False)
class Shelf:
    """A rendered photo and its labels.

    photo_rgb: uint8 `[H, W, 3]`.
    boxes_xyxy: float32 `[N, 4]`, half-open, tight around the visible pixels of each facing.
    instance_ids: int32 `[H, W]`; 0 is background, i + 1 are the visible pixels of facing i.
    """

    photo_rgb: Pixels
    boxes_xyxy: Floats
    instance_ids: npt.NDArray[np.int32]


def render_shelf(
    seed: int,
    size_wh: tuple[int, int],
    *,
    textures: Textures | None = None,
    facing_px: float | None = None,
    decoys: bool = False,
) -> Shelf:
    """Render one photo. `facing_px` is the typical width of a facing in pixels. `decoys`: some photos also show what
    looks like goods and is none, such as posters of products, banners with large letters, and tiles.

    When None, small pictures are pieces of a shelf with facings of any usual size; from 900 px on the shorter side they
    are photos of a whole shelf with some 100 to 200 facings. Raises ValueError for sides below 32 px.
    """
    width, height = size_wh
    if width < 32 or height < 32:
        raise ValueError(f"size_wh: expected at least 32 x 32 pixels, got {width} x {height}")
    rng = Rng(seed)
    whole = facing_px is None and min(size_wh) >= 900
    if whole:
        facing_px = math.sqrt(width * height / rng.between(520, 720))
    elif facing_px is None:
        facing_px = rng.log_between(14, 110) * min(size_wh) / 512
    canvas = Canvas(round(width * (1 + 2 * MARGIN)), round(height * (1 + 2 * MARGIN)))
    view = new_view(rng, calm=whole)
    draw_scene(Shop(rng, canvas, facing_px, view, textures), whole=whole, decoys=decoys)
    map_x, map_y, area = lens(view, size_wh, (canvas.width, canvas.height))
    rgb = cast(Pixels, cv2.remap(canvas.rgb, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    ids = cast("npt.NDArray[np.uint16]", cv2.remap(canvas.ids, map_x, map_y, cv2.INTER_NEAREST))
    boxes, instance_ids = _labels(ids, area, np.array(canvas.areas, np.float32))
    return Shelf(photo_rgb=photograph(rng, rgb), boxes_xyxy=boxes, instance_ids=instance_ids)


def _labels(ids: npt.NDArray[np.uint16], area: Floats, full: Floats) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Tight boxes of the facings that are visible enough, and the ids renumbered to match."""
    seen = np.bincount(ids.ravel(), weights=area.ravel(), minlength=len(full))
    sides = []
    for grid in (ids, np.ascontiguousarray(ids.T)):
        # First and last line of each id. The extremes lie where the id changes from line to line; of several values
        # written to one index the last one stays, hence forwards for maxima and backwards for minima.
        length = grid.shape[1]
        edge = np.zeros((grid.shape[0] + 1, length), np.bool_)
        edge[0] = edge[-1] = True
        np.not_equal(grid[1:], grid[:-1], out=edge[1:-1])
        lines = grid.ravel()
        starts, ends = np.flatnonzero(edge[:-1])[::-1], np.flatnonzero(edge[1:])
        first, last = np.zeros(len(full), np.int64), np.zeros(len(full), np.int64)
        first[lines[starts]] = starts // length
        last[lines[ends]] = ends // length
        sides.append((first, last + 1))
    (y0, y1), (x0, x1) = sides
    boxes = np.stack([x0, y0, x1, y1], axis=1)
    keep = (seen >= MIN_VISIBLE_SHARE * full) & (seen > 0)
    keep &= (boxes[:, 2] - boxes[:, 0] >= MIN_SIDE_PX) & (boxes[:, 3] - boxes[:, 1] >= MIN_SIDE_PX)
    keep[0] = False
    new = np.zeros(len(full), np.int32)
    new[keep] = np.arange(1, keep.sum() + 1, dtype=np.int32)
    return boxes[keep].astype(np.float32), new[ids]


def preview(path: Path | str, *, textures: Textures | None = None, seed: int = 0) -> None:
    """Write a page of twelve samples with their boxes, and the folders above it.

    Raises OSError when the page cannot be written.
    """
    tiles = []
    for i in range(12):
        shelf = render_shelf(seed + i, (512, 512), textures=textures, decoys=True)
        tile = shelf.photo_rgb.copy()
        if i % 3 != 2:  # every third as the network sees it
            for x0, y0, x1, y1 in shelf.boxes_xyxy.astype(int):
                cv2.rectangle(tile, (int(x0), int(y0)), (int(x1) - 1, int(y1) - 1), (0, 255, 0), 1)
        tiles.append(tile)
    page = np.vstack([np.hstack(tiles[i : i + 4]) for i in range(0, 12, 4)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), page[:, :, ::-1]):
        raise OSError(f"preview: could not write {str(path)!r}")
