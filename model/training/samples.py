"""Pictures to learn from, endless: rendered shelves, and crops of labelled photos where a user has some.

Knows the renderer, photos as arrays with boxes, and the targets. Does not know files' formats, losses or the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset

from model.boxes import with_width
from model.quality import Truth
from model.renderer.shelves import MIN_SIDE_PX, MIN_VISIBLE_SHARE, Shelf, Textures, load_textures, render_shelf
from model.tiling import dense_tiles
from model.training.targets import UNKNOWN, dense_targets, prompt_targets
from model.types import FloatArray, PixelArray

#: Typical widths of facings in the pictures, in pixels: what the tiles of shelf photos show. Half of the pictures have
#: less than 48 px; as these show many more facings, most facings that are learned from are small.
FACING_PX = (16.0, 145.0)
BEYOND_RGB = (124, 116, 104)  # what the network sees beyond a photo: the mean colour
MAX_ZOOM = 0.25  # of a piece of a labelled photo against what tiles show, larger or smaller: logarithm
MAX_STRETCH = 0.3  # of its breadth against its height, or the other way round: logarithm
LABELLED_SHARE = 0.5  # of the pictures, when there are labelled photos: the rest keeps what rendered shelves taught

Sample = dict[str, npt.NDArray[Any]]


def _no_boxes() -> FloatArray:
    return np.zeros((0, 4), np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPhoto:
    """A photo's file and the boxes of its facings, float `[N, 4]`, xyxy in pixels of the photo as it is read.

    crowds_xyxy: `[C, 4]`, likewise: areas (COCO's iscrowd) with facings that nobody boxed. Elsewhere all are boxed.
    """

    path: Path
    boxes_xyxy: FloatArray
    crowds_xyxy: FloatArray = field(default_factory=_no_boxes)

    @classmethod
    def known(cls, path: Path, truth: Truth) -> LabelledPhoto:
        """A photo with its known boxes."""
        boxes, crowds = truth.boxes_xyxy.astype(np.float32), truth.crowds_xyxy.astype(np.float32)
        return cls(path=path, boxes_xyxy=boxes, crowds_xyxy=crowds)


@dataclass(frozen=True, kw_only=True)
class LabelledPhotos:
    """Photos to crop from. `read` gives a file's pixels, uint8 `[H, W, 3]`, and is a function that pickle can name."""

    photos: tuple[LabelledPhoto, ...]
    read: Callable[[Path], PixelArray]

    def __post_init__(self) -> None:
        if not any(len(photo.boxes_xyxy) for photo in self.photos):
            raise ValueError(f"labelled photos: expected at least one box, got {len(self.photos)} photos without any")


class Samples(IterableDataset[Sample]):
    """Pictures of `picture_px` × `picture_px` with their targets; picture i of a seed is always the same.

    textures: folder of product photos to use for a part of the rendered faces, or None.
    tile_px: side of the network's tiles; pieces of labelled photos are about as large as tiles show them.
    excess_width: by how much of their width the boxes of the detector that learns are too wide on real photos. It goes
        on to find such boxes, which are narrowed afterwards, so that rendered shelves and photos teach it the same.
    first: number of the picture to begin with.
    """

    def __init__(
        self,
        *,
        seed: int,
        picture_px: int,
        prompts_per_picture: int,
        tile_px: int,
        textures: Path | None = None,
        labelled: LabelledPhotos | None = None,
        excess_width: float = 0.0,
        first: int = 0,
    ) -> None:
        self.seed = seed
        self.picture_px = picture_px
        self.prompts_per_picture = prompts_per_picture
        self.textures_folder = textures
        self.textures: Textures | None = None
        self.labelled = labelled
        self.tile_px = tile_px
        self.excess_width = excess_width
        self.first = first

    def __iter__(self) -> Iterator[Sample]:
        self.textures = load_textures(self.textures_folder) if self.textures_folder else None
        worker = torch.utils.data.get_worker_info()
        index = self.first + (worker.id if worker else 0)
        step = worker.num_workers if worker else 1
        while True:
            yield from self.samples(index)
            index += step

    def samples(self, index: int) -> Iterator[Sample]:
        """Picture `index` as it is and mirrored in other light; none when it shows too few facings to prompt."""
        number = (self.seed << 32) + index
        rng = np.random.default_rng(number)
        is_labelled = self.labelled is not None and rng.random() < LABELLED_SHARE
        if is_labelled and self.labelled is not None:
            photo = self.labelled.photos[rng.integers(len(self.labelled.photos))]
            if not len(photo.boxes_xyxy):
                return
            pixels = self.labelled.read(photo.path)
            height, width = pixels.shape[:2]
            scale = seen_scale((width, height), self.tile_px, rng)
            shelf = cropped(pixels, photo, self.picture_px, scale, rng)
        else:
            facing_px = FACING_PX[0] + (FACING_PX[1] - FACING_PX[0]) * rng.random() ** 2
            size_wh = (self.picture_px, self.picture_px)
            shelf = render_shelf(number, size_wh, textures=self.textures, facing_px=facing_px, decoys=True)
        if len(shelf.boxes_xyxy) < max(1, self.prompts_per_picture):
            return
        for variant in (shelf, mirrored(shelf)):
            yield self._sample(variant, rng, is_labelled=is_labelled)

    def _sample(self, shelf: Shelf, rng: np.random.Generator, *, is_labelled: bool) -> Sample:
        boxes = with_width(shelf.boxes_xyxy, 1 / (1 - self.excess_width)) if is_labelled else shelf.boxes_xyxy
        dense = dense_targets(boxes, shelf.instance_ids)
        prompts = prompt_targets(shelf.boxes_xyxy, shelf.instance_ids, self.prompts_per_picture, rng)
        return {
            "pixels": relit(shelf.photo_rgb, rng),
            "has_masks": np.array(not is_labelled),
            **{f"dense_{name}": value for name, value in vars(dense).items()},
            **{f"prompt_{name}": value for name, value in vars(prompts).items()},
        }


def seen_scale(size_wh: tuple[int, int], tile_px: int, rng: np.random.Generator) -> float:
    """Pixels for each of a photo's, as in the tiles of one of the levels of pre-annotation, up to MAX_ZOOM more or
    less."""
    scales = sorted({tile.scale for tile in dense_tiles(size_wh, tile_px)})
    return float(rng.choice(scales) * np.exp(rng.uniform(-MAX_ZOOM, MAX_ZOOM)))


def cropped(pixels: PixelArray, photo: LabelledPhoto, picture_px: int, scale: float, rng: np.random.Generator) -> Shelf:
    """A square piece of a photo's pixels around one of its facings, at about `scale` pixels for each of the photo's.

    It never shows more than the photo's longer side, and is stretched a little, so that the shapes of facings vary. Its
    instance ids are the boxes themselves, smaller ones before larger ones: what is inside them is not known. In crowds
    they are UNKNOWN. Beyond the photo it is grey. Facings that the piece's edge cuts are labelled as far as they are
    seen, like rendered ones.
    """
    height, width = pixels.shape[:2]
    least = picture_px / max(width, height)
    scale_xy = max(scale, least) * np.exp(rng.uniform(-1, 1) * np.array([MAX_STRETCH, -MAX_STRETCH]) / 2)
    side = np.maximum(picture_px / scale_xy, 1)
    box = photo.boxes_xyxy[rng.integers(len(photo.boxes_xyxy))]
    centre = (box[:2] + box[2:]) / 2 + rng.uniform(-0.3, 0.3, 2) * side
    last = np.maximum(np.array([width, height]) - side, 0)
    left, top = np.clip(centre - side / 2, 0, last).round().astype(int)
    window = pixels[top : top + round(side[1]), left : left + round(side[0])]
    size_wh = tuple(max(1, round(extent * along)) for extent, along in zip(window.shape[1::-1], scale_xy, strict=True))
    picture = np.full((picture_px, picture_px, 3), BEYOND_RGB, np.uint8)
    resized = cv2.resize(window, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    resized = resized[:picture_px, :picture_px]
    picture[: resized.shape[0], : resized.shape[1]] = resized
    corner, scale_xyxy = np.array([left, top, left, top]), np.tile(scale_xy, 2)
    whole = (photo.boxes_xyxy - corner) * scale_xyxy
    seen = whole.clip(0, picture_px)
    sides, whole_sides = seen[:, 2:] - seen[:, :2], whole[:, 2:] - whole[:, :2]
    keep = (sides.prod(1) >= MIN_VISIBLE_SHARE * whole_sides.prod(1)) & (sides >= MIN_SIDE_PX).all(1)
    boxes = seen[keep].astype(np.float32)
    ids = np.zeros((picture_px, picture_px), np.int32)
    for x0, y0, x1, y1 in ((photo.crowds_xyxy - corner) * scale_xyxy).clip(0, picture_px).round().astype(int):
        ids[y0:y1, x0:x1] = UNKNOWN
    for index in np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1)):
        x0, y0, x1, y1 = boxes[index].round().astype(int)
        ids[y0:y1, x0:x1] = index + 1
    visible = np.unique(ids)
    visible = visible[visible > 0]
    renumbered = np.zeros(len(boxes) + 1, np.int32)
    renumbered[visible] = np.arange(1, len(visible) + 1)
    renumbered_ids = np.where(ids > 0, renumbered[ids], ids).astype(np.int32)
    return Shelf(photo_rgb=picture, boxes_xyxy=boxes[visible - 1], instance_ids=renumbered_ids)


def mirrored(shelf: Shelf) -> Shelf:
    """The same shelf seen in a mirror."""
    width = shelf.photo_rgb.shape[1]
    boxes = shelf.boxes_xyxy.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return Shelf(
        photo_rgb=np.ascontiguousarray(shelf.photo_rgb[:, ::-1]),
        boxes_xyxy=boxes,
        instance_ids=np.ascontiguousarray(shelf.instance_ids[:, ::-1]),
    )


def relit(pixels: PixelArray, rng: np.random.Generator) -> PixelArray:
    """The picture with another exposure, colour cast and, now and then, other colours (channels exchanged)."""
    wanted = rng.uniform(60, 165) / 255
    mean = np.clip(pixels.mean() / 255, 0.02, 0.98)
    gamma = np.clip(np.log(wanted) / np.log(mean), 0.45, 1.8)
    ramp = (np.arange(256) / 255) ** gamma
    table = np.clip(ramp[:, None] * rng.uniform(0.88, 1.12, 3) * 255, 0, 255).astype(np.uint8)
    order = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)
    return np.stack([table[pixels[..., order[i]], i] for i in range(3)], axis=-1)
