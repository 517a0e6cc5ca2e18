"""Product photos that rendered packages may wear.

Knows how a folder of pictures becomes faces and cut-out packshots; no other module of the renderer reads files. Does
not know where on a package or a shelf they end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np

from model.renderer.paint import Pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Textures:
    """Product photos in memory.

    faces: RGB photos whose middle shows a product; crops of them become the faces of boxes and bags.
    cutouts: RGBA packshots, cut free from their white background.
    """

    faces: tuple[Pixels, ...] = ()
    cutouts: tuple[Pixels, ...] = ()


def load_textures(folder: Path, *, side_px: int = 160) -> Textures:
    """Read every picture below `folder`, scaled down to `side_px`; those in a folder named `icons` are cut free.

    Raises FileNotFoundError when there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise FileNotFoundError(f"textures: expected .jpg or .png files below {str(folder)!r}, found none")
    faces: list[Pixels] = []
    cutouts: list[Pixels] = []
    for path in paths:
        bgr = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        if bgr is None:
            continue
        scale = min(1.0, side_px / max(bgr.shape[:2]))
        if scale < 1:
            bgr = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        rgb = cast(Pixels, np.ascontiguousarray(bgr[:, :, ::-1]))
        cutout = _cut_free(rgb) if path.parent.name == "icons" else None
        if cutout is not None:
            cutouts.append(cutout)
        else:
            faces.append(rgb)
    return Textures(faces=tuple(faces), cutouts=tuple(cutouts))


def _cut_free(rgb: Pixels) -> Pixels | None:
    """RGBA without the white surroundings, cropped; None when the border is not white all around."""
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    if (border.min(axis=1) > 235).mean() < 0.85:
        return None
    height, width = rgb.shape[:2]
    white = (rgb.min(axis=2) > 240).astype(np.uint8)
    padded = cv2.copyMakeBorder(white, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    _, parts = cv2.connectedComponents(padded, connectivity=4)
    body = (parts != parts[0, 0])[1:-1, 1:-1].astype(np.uint8) * 255
    body = cv2.morphologyEx(body, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    ys, xs = np.nonzero(body)
    if len(ys) < 0.04 * height * width:
        return None
    body = cv2.GaussianBlur(cv2.erode(body, np.ones((3, 3), np.uint8)), (3, 3), 0)
    rgba = np.dstack([rgb, body])[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return cast(Pixels, np.ascontiguousarray(rgba))
