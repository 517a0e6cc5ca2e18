"""What every part of the shelf renderer draws with: seeded chance, smooth noise, colours and writing.

Knows numpy and OpenCV only. Does not know packages, shelves or cameras.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

Rgb = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def floats(values: Sequence[float]) -> Floats:
    return np.array(values, np.float32)


class Rng:
    """Seeded random choices; uniform numbers are drawn in blocks, since single draws are slow."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self._generator = np.random.default_rng(seed)
        self._buffer: list[float] = self._generator.random(64).tolist()

    def unit(self) -> float:
        if not self._buffer:
            self._buffer = self._generator.random(256).tolist()
        return float(self._buffer.pop())

    def normal(self) -> float:
        """Standard normal."""
        return float(self._generator.normal())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def log_between(self, low: float, high: float) -> float:
        return low * math.pow(high / low, self.unit())

    def whole(self, low: int, high: int) -> int:
        """low..high, both included."""
        return min(high, low + int(self.unit() * (high - low + 1)))

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[min(len(options) - 1, int(self.unit() * len(options)))]

    def weighted(self, weights: dict[str, float]) -> str:
        mark = self.unit() * sum(weights.values())
        for name, weight in weights.items():
            mark -= weight
            if mark <= 0:
                return name
        return next(iter(weights))


@functools.cache
def _noise_tile() -> Floats:
    """Fixed standard-normal noise, smoothed and normalised; pictures differ by where they cut from it."""
    tile = np.random.default_rng(20).standard_normal((512, 512)).astype(np.float32)
    tile = cast(Floats, cv2.GaussianBlur(tile, (0, 0), 6.0, borderType=cv2.BORDER_REFLECT))
    return cast(Floats, ((tile - tile.mean()) / tile.std()).astype(np.float32))


def smooth_noise(rng: Rng, height: int, width: int, grain: float) -> Floats:
    """Noise in [-2.5, 2.5] of `height` x `width` whose features are about `grain` of the shorter side."""
    tile = _noise_tile()
    cut = int(np.clip(24 / max(grain, 0.02), 16, 500))
    y, x = rng.whole(0, 511 - cut), rng.whole(0, 511 - cut)
    patch = tile[y : y + cut, x : x + cut]
    return cast(Floats, cv2.resize(patch, (width, height), interpolation=cv2.INTER_LINEAR))


def from_hsv(hue: float, saturation: float, value: float) -> Rgb:
    """A printable colour. hue: in turns, any number; the others in [0, 1]."""
    hue = (hue % 1.0) * 6
    if 1.4 < hue < 2.8 or 4.3 < hue < 5.4:  # ink on paper has no bright green and no bright purple
        saturation, value = 0.88 * saturation, 0.82 * value
    sector, f = int(hue) % 6, hue - int(hue)
    p, q, t = value * (1 - saturation), value * (1 - saturation * f), value * (1 - saturation * (1 - f))
    r, g, b = ((value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q))[sector]
    return int(255 * r), int(255 * g), int(255 * b)


def package_hue(rng: Rng) -> float:
    """Packages are red, blue or green more often than anything else."""
    centre = rng.pick((0.0, 0.0, 0.0, 0.01, 0.06, 0.08, 0.11, 0.14, 0.14, 0.3, 0.37, 0.5, 0.57, 0.6, 0.6, 0.62, 0.93))
    return (rng.unit() if rng.chance(0.06) else cast(float, centre)) + rng.between(-0.03, 0.03)


def tint(colour: Rgb, gain: float) -> Rgb:
    r, g, b = (int(min(255, max(0, channel * gain))) for channel in colour)
    return r, g, b


def luma(colour: Rgb) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
    cv2.FONT_HERSHEY_COMPLEX | cv2.FONT_ITALIC,
    cv2.FONT_HERSHEY_DUPLEX | cv2.FONT_ITALIC,
)
_LETTERS = "AEIOUAEIOUBCDFGHKLMNPRSTVWXZ"


def invented_word(rng: Rng, low: int, high: int) -> str:
    word = "".join(rng.pick(_LETTERS) for _ in range(rng.whole(low, high)))
    return word if rng.chance(0.5) else word.capitalize()


def write(
    image: Pixels, text: str, font: int, box: tuple[float, float, float, float], colour: Rgb, weight: float
) -> None:
    """Fit `text` into the box (x, y, w, h in pixels), as large as it goes, centred."""
    x, y, w, h = box
    (text_w, text_h), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(w / max(1, text_w), h / max(1, text_h))
    if scale * text_h < 2.5:
        cv2.rectangle(image, (int(x), int(y + h * 0.3)), (int(x + w), int(y + h * 0.7)), colour, -1)
        return
    thick = max(1, round(scale * text_h * weight))
    at = (int(x + (w - text_w * scale) / 2), int(y + (h + text_h * scale) / 2))
    cv2.putText(image, text, at, font, scale, colour, thick, cv2.LINE_AA)


def resized(image: Pixels, width: int, height: int) -> Pixels:
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cast(Pixels, cv2.resize(image, (width, height), interpolation=method))
