"""The flat scene before the lens: colours, and which facing is seen where.

Knows how a drawn unit covers what lies behind it. Does not know what the units are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.renderer.paint import Floats, Pixels, Rgb


@dataclass(kw_only=True, eq=False)
class Sprite:
    """A drawn unit, ready to stamp. alpha is None when it fills its rectangle."""

    rgb: Pixels
    alpha: Pixels | None
    area: int = field(init=False)  # silhouette pixels

    def __post_init__(self) -> None:
        self.area = self.rgb.shape[0] * self.rgb.shape[1]
        if self.alpha is not None:
            cover = self.alpha.astype(np.uint16)[:, :, None]
            self.paint = self.rgb * cover
            self.rest = 255 - cover
            self.solid = self.alpha > 127
            self.area = int(np.count_nonzero(self.solid))


class Canvas:
    """`rgb` uint8 `[H, W, 3]`; `ids` uint16 `[H, W]`, 0 where no facing is seen; `areas` by id, 0 first."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rgb: Pixels = np.zeros((height, width, 3), np.uint8)
        self.ids: npt.NDArray[np.uint16] = np.zeros((height, width), np.uint16)
        self.areas: list[int] = [0]  # silhouette of each facing, seen or not

    def _clip(self, x: int, y: int, w: int, h: int) -> tuple[int, int, int, int] | None:
        x0, y0, x1, y1 = max(0, x), max(0, y), min(self.width, x + w), min(self.height, y + h)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def stamp(self, sprite: Sprite, x: int, y: int, *, facing: bool, grows: bool = False) -> None:
        """Put a unit; a facing gets the next id, or grows the latest one; anything else covers ids."""
        h, w = sprite.rgb.shape[:2]
        clip = self._clip(x, y, w, h)
        if clip is None:
            return
        x0, y0, x1, y1 = clip
        part = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
        number = 0
        if facing:
            if not grows:
                self.areas.append(0)
            number = len(self.areas) - 1
            self.areas[number] += sprite.area
        target = self.rgb[y0:y1, x0:x1]
        if sprite.alpha is None:
            target[:] = sprite.rgb[part]
            self.ids[y0:y1, x0:x1] = number
        else:
            target[:] = (sprite.paint[part] + target * sprite.rest[part]) // 255
            self.ids[y0:y1, x0:x1][sprite.solid[part]] = number

    def fill(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb, *, covers: bool = True) -> None:
        clip = self._clip(int(x0), int(y0), int(x1) - int(x0), int(y1) - int(y0))
        if clip:
            a, b, c, d = clip
            self.rgb[b:d, a:c] = colour
            if covers:
                self.ids[b:d, a:c] = 0

    def scale_light(self, x0: float, y0: float, x1: float, y1: float, gains: Floats) -> None:
        """Multiply rows of a region; gains run from its top to its bottom."""
        clip = self._clip(int(x0), int(y0), int(x1) - int(x0), int(y1) - int(y0))
        if clip is None:
            return
        a, b, c, d = clip
        curve = np.interp(np.linspace(0, 1, int(y1) - int(y0)), np.linspace(0, 1, len(gains)), gains)
        curve = curve[b - int(y0) : d - int(y0)]
        region = self.rgb[b:d, a:c]
        factors = np.broadcast_to((curve * 256).astype(np.uint16)[:, None, None], region.shape)
        region[:] = (
            np.minimum((region * factors) >> 8, 255)
            if curve.max() <= 1
            else np.clip(region * curve[:, None, None], 0, 255)
        )
