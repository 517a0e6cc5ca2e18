"""Rendered shelf photos with exact labels, to train on without a single real shelf.

`render_shelf(seed, size_wh)` draws a piece of a shelf the way a shopper's camera sees it: bays of rows, groups of
identical products with their rear units, trays, hooks, stacks, price rails, signs, glass doors, then lens, light, noise
and JPEG. The same seed gives the same picture. Boxes and instance ids come from one id map that went through the same
lens as the pixels, so that boxes are tight around what is visible.

Knows numpy and OpenCV only. Does not know what is learned from the pictures, nor how; reads no file, except in
`load_textures`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

Rgb = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MIN_SIDE_PX = 6  # of a labelled box
MIN_VISIBLE_SHARE = 0.38  # of a facing's own silhouette, for it to be labelled
TEXTURED_SHARE = 0.33  # of the products, when textures are given
MARGIN = 0.12  # canvas beyond each edge of the picture, as a share of its side
MAX_PRODUCTS = 36  # designed for one picture; more groups repeat earlier products


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


def _floats(values: Sequence[float]) -> Floats:
    return np.array(values, np.float32)


# --- chance -----------------------------------------------------------------------------------------------------------


class _Dice:
    """A seeded source of everyday choices; buffers uniforms, since single draws are slow."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self.rng = np.random.default_rng(seed)
        self._buffer: list[float] = self.rng.random(64).tolist()

    def unit(self) -> float:
        if not self._buffer:
            self._buffer = self.rng.random(256).tolist()
        return float(self._buffer.pop())

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
def _noise_tile(side: int, blur: float) -> Floats:
    """Fixed standard-normal noise, smoothed and normalised; pictures differ by where they cut from it."""
    tile = np.random.default_rng(20).standard_normal((side, side)).astype(np.float32)
    if blur > 0:
        tile = cast(Floats, cv2.GaussianBlur(tile, (0, 0), blur, borderType=cv2.BORDER_REFLECT))
        tile = ((tile - tile.mean()) / tile.std()).astype(np.float32)
    return tile


def _noise(dice: _Dice, height: int, width: int, grain: float) -> Floats:
    """Noise in [-2.5, 2.5] of `height` x `width` whose features are about `grain` of the shorter side."""
    tile = _noise_tile(512, 6.0)
    cut = int(np.clip(24 / max(grain, 0.02), 16, 500))
    y, x = dice.whole(0, 511 - cut), dice.whole(0, 511 - cut)
    patch = tile[y : y + cut, x : x + cut]
    return cast(Floats, cv2.resize(patch, (width, height), interpolation=cv2.INTER_LINEAR))


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    hue = (hue % 1.0) * 6
    if 1.4 < hue < 2.8 or 4.3 < hue < 5.4:  # ink on paper has no bright green and no bright purple
        saturation, value = 0.88 * saturation, 0.82 * value
    sector, f = int(hue) % 6, hue - int(hue)
    p, q, t = value * (1 - saturation), value * (1 - saturation * f), value * (1 - saturation * (1 - f))
    r, g, b = ((value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q))[sector]
    return int(255 * r), int(255 * g), int(255 * b)


def _hue(dice: _Dice) -> float:
    """Packages are red, blue or green more often than anything else."""
    centre = dice.pick((0.0, 0.0, 0.0, 0.01, 0.06, 0.08, 0.11, 0.14, 0.14, 0.3, 0.37, 0.5, 0.57, 0.6, 0.6, 0.62, 0.93))
    return (dice.unit() if dice.chance(0.06) else cast(float, centre)) + dice.between(-0.03, 0.03)


def _tint(colour: Rgb, gain: float) -> Rgb:
    r, g, b = (int(min(255, max(0, channel * gain))) for channel in colour)
    return r, g, b


def _luma(colour: Rgb) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


# --- package artwork --------------------------------------------------------------------------------------------------

FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
    cv2.FONT_HERSHEY_COMPLEX | cv2.FONT_ITALIC,
    cv2.FONT_HERSHEY_DUPLEX | cv2.FONT_ITALIC,
)
LETTERS = "AEIOUAEIOUBCDFGHKLMNPRSTVWXZ"


@dataclass(kw_only=True)
class _Brand:
    """What variants of one brand share: the palette, the layout and the kind of package."""

    seed: int
    palette: tuple[Rgb, Rgb, Rgb, Rgb]  # ground, second, accent, ink
    kind: str
    aspect: float
    width: float
    variants: int = 0
    word: str = ""
    sub: tuple[str, ...] = ()


def _palette(dice: _Dice) -> tuple[Rgb, Rgb, Rgb, Rgb]:
    hue = _hue(dice)
    ground_kind = dice.weighted({"vivid": 0.4, "white": 0.3, "dark": 0.12, "pastel": 0.12, "metal": 0.06})
    if ground_kind == "vivid":
        ground = _hsv(hue, dice.between(0.5, 0.95), dice.between(0.35, 0.88))
    elif ground_kind == "white":
        ground = _hsv(hue, dice.between(0, 0.08), dice.between(0.85, 1))
    elif ground_kind == "dark":
        ground = _hsv(hue, dice.between(0, 0.8), dice.between(0.05, 0.25))
    elif ground_kind == "pastel":
        ground = _hsv(hue, dice.between(0.12, 0.45), dice.between(0.75, 0.98))
    else:
        ground = _hsv(dice.pick((0.12, 0.6, 0.1)), dice.between(0.03, 0.35), dice.between(0.55, 0.8))
    second = _hsv(hue + dice.pick((0, 0, 0.05, 0.5, 0.33, 0.15)), dice.between(0.25, 0.9), dice.between(0.3, 0.92))
    if dice.chance(0.4):
        second = dice.pick(((250, 250, 250), (20, 20, 22), (235, 225, 200)))
    accent = _hsv(_hue(dice), dice.between(0.5, 0.95), dice.between(0.45, 0.95))
    ink: Rgb = (245, 245, 240) if _luma(ground) < 140 else _hsv(hue, dice.between(0, 1), dice.between(0, 0.4))
    return ground, second, accent, ink


def _word(dice: _Dice, low: int, high: int) -> str:
    word = "".join(dice.pick(LETTERS) for _ in range(dice.whole(low, high)))
    return word if dice.chance(0.5) else word.capitalize()


def _write(
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


def _picture(dice: _Dice, height: int, width: int, colours: Sequence[Rgb]) -> Pixels:
    """Something like a photo printed on a package: smooth blobs between some colours, with texture."""
    a, b, c = (_floats(colour) for colour in (dice.pick(colours), dice.pick(colours), _tint(dice.pick(colours), 0.5)))
    coarse = _noise(dice, height, width, dice.between(0.2, 0.8))[:, :, None]
    fine = _noise(dice, height, width, dice.between(0.06, 0.2))[:, :, None]
    mix = np.clip(0.5 + coarse * 0.6, 0, 1)
    out = (a * mix + b * (1 - mix)) * (1 + 0.12 * fine) + (c - b) * np.clip(fine * 0.5 - 0.3, 0, 0.6)
    return cast(Pixels, np.clip(out, 0, 255).astype(np.uint8))


def _artwork(brand: _Brand, variant: int, width: int, height: int, textures: Textures | None) -> Pixels:
    """The printed face of a product. The layout comes from the brand, some colours and pictures from the variant."""
    layout = _Dice((brand.seed, 1))
    own = _Dice((brand.seed, 2, variant))
    ground, second, accent, ink = brand.palette
    if variant and own.chance(0.8):
        accent = _hsv(_hue(own), own.between(0.5, 0.95), own.between(0.4, 0.95))
    if variant and own.chance(0.35):
        second = accent
    if variant and brand.seed % 4 == 0:  # brands whose variants differ by the ground
        ground = _hsv(_hue(own), own.between(0.4, 0.9), own.between(0.4, 0.9))
        ink = (245, 245, 240) if _luma(ground) < 140 else (30, 28, 34)
    if textures is not None and textures.faces and layout.chance(TEXTURED_SHARE):
        return _photo_face(own, width, height, textures)
    image: Pixels = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    self_ground = layout.weighted(
        {"plain": 3, "gradient": 2, "split": 2.5, "diagonal": 1, "stripes": 1, "disc": 1.2, "photo": 1.6, "arc": 1.2}
    )
    if self_ground == "gradient":
        ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        image[:] = (_floats(ground) * (1 - ramp) + _floats(second) * ramp).astype(np.uint8)
    elif self_ground == "split":
        cut = int(height * layout.between(0.25, 0.75))
        if layout.chance(0.5):
            image[cut:] = second
        else:
            image[:cut] = second
    elif self_ground == "diagonal":
        a, b = int(height * layout.between(0.1, 0.9)), int(height * layout.between(0.1, 0.9))
        cv2.fillPoly(image, [np.array([(0, a), (width, b), (width, height), (0, height)], np.int32)], second)
    elif self_ground == "stripes":
        step = max(2, int(width * layout.between(0.08, 0.35)))
        if layout.chance(0.6):
            for start in range(0, width, 2 * step):
                image[:, start : start + step] = second
        else:
            for start in range(0, height, 2 * step):
                image[start : start + step] = second
    elif self_ground == "disc":
        centre = (int(width * layout.between(0.1, 0.9)), int(height * layout.between(0.2, 0.9)))
        cv2.circle(image, centre, int(width * layout.between(0.35, 0.8)), second, -1)
    elif self_ground == "arc":
        centre = (int(width * layout.between(0.2, 0.8)), int(height * layout.between(0.9, 1.3)))
        cv2.ellipse(image, centre, (int(width * 0.9), int(height * layout.between(0.3, 0.7))), 0, 0, 360, second, -1)
        cv2.ellipse(image, centre, (int(width * 0.9), int(height * layout.between(0.25, 0.6))), 0, 0, 360, accent, -1)
    elif self_ground == "photo":
        image[:] = _picture(own, height, width, (ground, second, accent))
    if layout.chance(0.3):
        image = _tinted_noise(layout, image)

    # a picture of the content
    if layout.chance(0.6):
        _content_picture(layout, own, image, (accent, second))

    # the logo
    font = layout.pick(FONTS)
    w = width * layout.between(0.55, 0.94)
    h = height * layout.between(0.08, 0.24)
    x = (width - w) * layout.between(0.3, 0.7)
    y = height * layout.pick((layout.between(0.04, 0.2), layout.between(0.04, 0.2), layout.between(0.25, 0.55)))
    plate = layout.whole(0, 4)
    logo_ink = ink
    if plate <= 2:
        fill = layout.pick((second, accent, (250, 250, 250), (200, 20, 30)))
        logo_ink = (250, 250, 250) if _luma(fill) < 150 else layout.pick(((20, 20, 30), (180, 10, 20), (10, 40, 120)))
        if plate == 0:
            cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), fill, -1)
        elif plate == 1:
            cv2.ellipse(image, (int(x + w / 2), int(y + h / 2)), (int(w / 2), int(h * 0.7)), 0, 0, 360, fill, -1)
        else:
            cv2.rectangle(image, (0, int(y)), (width, int(y + h)), fill, -1)
    if height > 2.4 * width and layout.chance(0.25):
        turned = np.ascontiguousarray(np.rot90(image))
        _write(turned, brand.word, font, (height * 0.25, width * 0.2, height * 0.55, width * 0.6), logo_ink, 0.16)
        image = np.ascontiguousarray(np.rot90(turned, -1))
    else:
        _write(
            image,
            brand.word,
            font,
            (x + w * 0.06, y + h * 0.15, w * 0.88, h * 0.7),
            logo_ink,
            layout.between(0.08, 0.25),
        )

    # lines of text below
    top = y + h * layout.between(1.1, 1.5)
    for line in brand.sub:
        h = height * layout.between(0.03, 0.08)
        w = width * layout.between(0.3, 0.8)
        if top + h > height * 0.97:
            break
        colour = accent if layout.chance(0.4) else ink
        _write(image, line, font, ((width - w) / 2, top, w, h), colour, 0.1)
        top += h * layout.between(1.3, 2.2)
    if layout.chance(0.35):
        y0 = int(height * layout.between(0.8, 0.95))
        image[y0 : y0 + max(1, int(height * layout.between(0.03, 0.15)))] = accent
    if layout.chance(0.3):
        centre = (int(width * layout.pick((0.22, 0.78))), int(height * layout.between(0.15, 0.85)))
        cv2.circle(image, centre, max(1, int(width * layout.between(0.1, 0.2))), accent, -1, cv2.LINE_AA)
        cv2.circle(image, centre, max(1, int(width * 0.07)), (250, 250, 250), -1)
    if layout.chance(0.1):
        _small_print(layout, image)
    return image


def _content_picture(layout: _Dice, own: _Dice, image: Pixels, colours: Sequence[Rgb]) -> None:
    """The picture of what is inside, in the lower part of a face."""
    height, width = image.shape[:2]
    w, h = int(width * layout.between(0.3, 0.85)), int(height * layout.between(0.18, 0.45))
    x, y = int((width - w) * layout.unit()), int((height - h) * layout.between(0.45, 1))
    if w > 3 and h > 3:
        palette = (*colours, _hsv(own.unit(), 0.7, 0.8), (250, 245, 235))
        picture = _picture(own, h, w, palette)
        mask = np.zeros((h, w), np.uint8)
        form = layout.whole(0, 3)
        if form == 0:
            cv2.ellipse(mask, (w // 2, h // 2), (w // 2, h // 2), 0, 0, 360, 255, -1)
        elif form == 1:
            mask[:] = 255
        elif form == 2:
            for _ in range(own.whole(2, 5)):
                centre = (int(w * own.between(0.15, 0.85)), int(h * own.between(0.2, 0.8)))
                cv2.circle(mask, centre, max(1, int(min(w, h) * own.between(0.15, 0.35))), 255, -1)
        else:
            points = np.array([(own.unit() * w, own.unit() * h) for _ in range(6)], np.int32)
            cv2.fillConvexPoly(mask, cv2.convexHull(points), 255)
        cv2.copyTo(picture, mask, image[y : y + h, x : x + w])


def _tinted_noise(dice: _Dice, image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    noise = 1 + 0.1 * _noise(dice, height, width, dice.between(0.1, 0.8))
    return cast(Pixels, np.clip(image * noise[:, :, None], 0, 255).astype(np.uint8))


def _small_print(dice: _Dice, image: Pixels) -> None:
    """A barcode or a table of nutrition facts, dark on white."""
    height, width = image.shape[:2]
    w, h = int(width * dice.between(0.3, 0.5)), int(height * dice.between(0.12, 0.3))
    x, y = dice.whole(0, max(0, width - w)), dice.whole(height // 3, max(height // 3, height - h))
    image[y : y + h, x : x + w] = 245
    if dice.chance(0.5):
        for i in range(x + 2, x + w - 2, 2):
            if dice.chance(0.6):
                image[y + 1 : y + int(h * 0.8), i : i + 1] = 20
    else:
        for i in range(y + 2, y + h - 1, 3):
            image[i : i + 1, x + 1 : x + int(w * dice.between(0.5, 0.95))] = 70


def _recolour(dice: _Dice, rgb: Pixels, strength: float) -> Pixels:
    """Turn the hue, change saturation and brightness: one photo gives several products."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    if dice.chance(strength):
        ramp = np.arange(256)
        hue = ((ramp + (dice.whole(0, 179) if dice.chance(0.2) else dice.whole(-12, 12))) % 180).astype(np.uint8)
        saturation = np.clip(ramp * dice.between(0.7, 1.3), 0, 255).astype(np.uint8)
        value = np.clip(ramp * dice.between(0.75, 1.15), 0, 255).astype(np.uint8)
        hsv = cv2.LUT(hsv, np.dstack([hue[None], saturation[None], value[None]]).reshape(256, 1, 3))
    return cast(Pixels, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _photo_face(dice: _Dice, width: int, height: int, textures: Textures) -> Pixels:
    """The middle of a product photo, stretched over a face."""
    photo: Pixels = dice.pick(textures.faces)
    rows, columns = photo.shape[:2]
    w, h = int(columns * dice.between(0.28, 0.5)), int(rows * dice.between(0.35, 0.65))
    w, h = max(4, w), max(4, h)
    x = int(np.clip(columns * dice.between(0.45, 0.55) - w / 2, 0, max(0, columns - w)))
    y = int(np.clip(rows * dice.between(0.45, 0.6) - h / 2, 0, max(0, rows - h)))
    crop = _recolour(dice, np.ascontiguousarray(photo[y : y + h, x : x + w]), 0.5)
    if dice.chance(0.3):
        crop = np.ascontiguousarray(crop[:, ::-1])
    return cast(Pixels, cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR))


# --- packages ---------------------------------------------------------------------------------------------------------

# Outline of bodies of revolution: (height from the top, width), both as shares; and where cap and label lie.
_PROFILES: dict[str, tuple[tuple[tuple[float, float], ...], float, tuple[float, float]]] = {
    "bottle": (
        ((0, 0.34), (0.07, 0.36), (0.075, 0.28), (0.18, 0.3), (0.34, 0.92), (0.42, 1), (1, 0.97)),
        0.07,
        (0.42, 0.85),
    ),
    "soda": (
        (
            (0, 0.36),
            (0.06, 0.38),
            (0.065, 0.3),
            (0.12, 0.32),
            (0.3, 0.94),
            (0.36, 1),
            (0.55, 0.97),
            (0.6, 0.93),
            (0.7, 1),
            (0.94, 1),
            (1, 0.8),
        ),
        0.06,
        (0.36, 0.62),
    ),
    "wine": (((0, 0.3), (0.06, 0.32), (0.3, 0.34), (0.42, 0.9), (0.46, 1), (1, 1)), 0.14, (0.52, 0.88)),
    "flask": (
        ((0, 0.5), (0.14, 0.5), (0.15, 0.42), (0.2, 0.75), (0.26, 0.92), (0.36, 1), (0.8, 1), (1, 0.9)),
        0.14,
        (0.3, 0.86),
    ),
    "shampoo": (
        ((0, 0.62), (0.13, 0.66), (0.14, 0.8), (0.22, 0.97), (0.3, 1), (0.97, 0.95), (1, 0.9)),
        0.13,
        (0.2, 0.95),
    ),
    "spray": (((0, 0.6), (0.03, 0.78), (0.22, 0.82), (0.23, 0.86), (0.29, 1), (0.98, 1), (1, 0.95)), 0.22, (0.25, 1)),
    "stick": (((0, 0.75), (0.04, 0.95), (0.3, 1), (0.31, 0.97), (1, 0.97)), 0.3, (0.33, 0.97)),
    "can": (((0, 0.84), (0.03, 0.86), (0.09, 1), (0.92, 1), (0.98, 0.88), (1, 0.86)), 0.05, (0.06, 0.95)),
    "tin": (((0, 1), (0.03, 1), (0.04, 0.96), (0.96, 0.96), (0.97, 1), (1, 1)), 0.04, (0.06, 0.94)),
    "jar": (((0, 0.88), (0.15, 0.9), (0.16, 0.82), (0.24, 1), (0.93, 1), (1, 0.9)), 0.15, (0.3, 0.85)),
    "tub": (((0, 1), (0.1, 1), (0.11, 0.95), (1, 0.78)), 0.1, (0.14, 0.95)),
    "cup": (((0, 1), (0.06, 1), (0.07, 0.9), (1, 0.68)), 0.06, (0.1, 0.96)),
    "tube": (
        ((0, 0.96), (0.06, 0.98), (0.4, 0.95), (0.82, 0.8), (0.83, 0.62), (0.97, 0.62), (1, 0.55)),
        0.0,
        (0.03, 0.8),
    ),
    "canister": (((0, 0.98), (0.12, 1), (0.13, 0.95), (0.97, 0.95), (1, 0.97)), 0.12, (0.14, 0.97)),
}

# kind: (weight, aspect h/w low, high, width relative to the typical facing low, high)
_KINDS: dict[str, tuple[float, float, float, float, float]] = {
    "box": (3.8, 1.0, 4.6, 0.55, 1.7),
    "flatbox": (0.2, 0.35, 0.7, 1.3, 2.6),
    "bag": (1.6, 1.2, 2.4, 0.85, 1.9),
    "pillow": (0.2, 0.5, 1.1, 1.0, 2.0),
    "carton": (0.8, 1.9, 3.4, 0.7, 1.1),
    "blister": (0.5, 1.5, 3.4, 0.7, 1.4),
    "multipack": (0.3, 0.6, 1.3, 1.5, 2.6),
    "trigger": (0.35, 2.2, 3.2, 0.8, 1.2),
    "pump": (0.35, 2.3, 3.6, 0.65, 1.0),
    "jug": (0.4, 1.3, 2.0, 1.1, 1.8),
    "produce": (0.1, 0.7, 1.3, 0.8, 1.3),
    "cutout": (0.0, 0.7, 3.0, 0.8, 1.4),
    "bottle": (1.4, 2.6, 4.6, 0.6, 1.0),
    "soda": (1.2, 2.8, 4.2, 0.65, 1.1),
    "wine": (0.5, 3.2, 4.5, 0.65, 0.95),
    "flask": (0.6, 1.9, 3.3, 0.7, 1.2),
    "shampoo": (1.5, 2.2, 4.0, 0.6, 1.1),
    "spray": (0.9, 2.8, 4.8, 0.55, 0.9),
    "stick": (0.6, 1.9, 3.4, 0.6, 0.9),
    "can": (1.0, 1.6, 2.9, 0.6, 1.0),
    "tin": (0.45, 0.9, 1.6, 0.8, 1.1),
    "jar": (0.9, 1.1, 1.9, 0.8, 1.2),
    "tub": (0.25, 0.6, 1.1, 0.9, 1.6),
    "cup": (0.3, 0.9, 1.6, 0.7, 1.1),
    "tube": (0.6, 2.1, 3.8, 0.6, 0.9),
    "canister": (0.6, 1.1, 2.2, 0.9, 1.5),
}
_STACKABLE = {"box", "flatbox", "can", "tin", "tub", "multipack", "pillow", "cup", "canister", "jar"}
_SQUARE = {"box", "flatbox", "carton", "multipack"}
_LIDDED = {"can", "tin", "tub", "cup"}
_NECKED = {"bottle", "soda", "wine", "flask", "spray", "trigger", "pump"}
_HANGING = {"blister", "bag"}


@dataclass(kw_only=True, eq=False)
class _Sprite:
    """A drawn unit, ready to stamp. alpha is None when it fills its rectangle."""

    rgb: Pixels
    alpha: Pixels | None
    area: int  # silhouette pixels

    def __post_init__(self) -> None:
        if self.alpha is not None:
            cover = self.alpha.astype(np.uint16)[:, :, None]
            self.paint = self.rgb * cover
            self.rest = 255 - cover
            self.solid = self.alpha > 127


def _sprite(rgb: Pixels, alpha: Pixels | None) -> _Sprite:
    area = rgb.shape[0] * rgb.shape[1] if alpha is None else int(np.count_nonzero(alpha > 127))
    return _Sprite(rgb=rgb, alpha=alpha, area=area)


@dataclass(frozen=True, kw_only=True)
class _Print:
    """How one unit differs from its siblings."""

    stretch: float = 1.0
    gain: float = 1.0
    degrees: float = 0.0
    turn: float = 0.0  # about its own axis, as a share of its width


@dataclass(kw_only=True, eq=False)
class _Product:
    """A product and its units: prints[0] is the plain one; all are drawn when first used."""

    kind: str
    width: int
    height: int
    colour: Rgb
    cap: Rgb  # of its lid
    rgb: Pixels  # larger than the units
    alpha: Pixels
    prints: tuple[_Print, ...]
    rear_print: _Print
    _drawn: dict[_Print, _Sprite] = field(default_factory=dict)

    def unit(self, dice: _Dice) -> _Sprite:
        return self._draw(self.prints[0] if dice.chance(0.45) else dice.pick(self.prints))

    def upright(self, dice: _Dice) -> _Sprite:
        return self._draw(dice.pick(self.prints[:3]))

    @property
    def rear(self) -> _Sprite:
        return self._draw(self.rear_print)

    def _draw(self, spec: _Print) -> _Sprite:
        sprite = self._drawn.get(spec)
        if sprite is None:
            sprite = self._drawn[spec] = self._printed(spec)
        return sprite

    def _printed(self, spec: _Print) -> _Sprite:
        width, height = max(4, round(self.width * spec.stretch)), max(4, round(self.height * spec.stretch))
        rgb = np.roll(self.rgb, round(self.rgb.shape[1] * spec.turn), axis=1) if spec.turn else self.rgb
        small = _resized(rgb, width, height)
        solid = self.alpha.min() >= 250
        cover: Pixels | None
        if solid and abs(spec.degrees) <= 0.4:
            cover = None
        elif solid:
            cover = np.full((height, width), 255, np.uint8)
        else:
            cover = _resized(self.alpha, width, height)
        if spec.gain != 1.0:
            small = cast(Pixels, cv2.convertScaleAbs(small, alpha=spec.gain))
        if cover is not None and abs(spec.degrees) > 0.4:
            turn = cv2.getRotationMatrix2D((width / 2, height / 2), spec.degrees, 1.0)
            c, s = abs(turn[0, 0]), abs(turn[0, 1])
            w, h = math.ceil(width * c + height * s), math.ceil(width * s + height * c)
            turn[0, 2] += (w - width) / 2
            turn[1, 2] += (h - height) / 2
            small = cast(Pixels, cv2.warpAffine(small, turn, (w, h), borderMode=cv2.BORDER_REPLICATE))
            cover = cast(Pixels, cv2.warpAffine(cover, turn, (w, h)))
        return _sprite(small, cover)


def _resized(image: Pixels, width: int, height: int) -> Pixels:
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cast(Pixels, cv2.resize(image, (width, height), interpolation=method))


def _shaded(image: Pixels, shade: Floats) -> Pixels:
    return cast(Pixels, np.clip(image * shade[:, :, None], 0, 255).astype(np.uint8))


def _round_body(
    brand: _Brand, variant: int, width: int, height: int, textures: Textures | None
) -> tuple[Pixels, Pixels]:
    points, cap_end, (label_top, label_end) = _PROFILES[brand.kind]
    dice = _Dice((brand.seed, 3))
    ground, second, accent, _ = brand.palette
    own = _Dice((brand.seed, 4, variant))
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    warp = dice.between(0.85, 1.2)
    profile = np.interp(y**warp, [p[0] for p in points], [p[1] for p in points]).astype(np.float32)
    if brand.kind in {"bottle", "flask", "shampoo", "soda"}:
        smooth = cv2.blur(profile[:, None], (1, max(1, height // 24)), borderType=cv2.BORDER_REPLICATE)
        profile = cast(Floats, smooth)[:, 0]
    cap_end, label_top, label_end = (share ** (1 / warp) for share in (cap_end, label_top, label_end))
    body, liquid = ground, ""
    if brand.kind in {"bottle", "soda", "wine", "jar", "flask"} and dice.chance(0.75):
        liquid = dice.weighted(
            {"cola": 1.4, "clear": 1.2, "vivid": 1.1, "green": 0.7, "dark": 0.5, "amber": 0.6, "milk": 0.4}
        )
        body = {
            "cola": (38, 18, 12),
            "clear": (176, 186, 190),
            "vivid": _hsv(_hue(own), 0.8, own.between(0.4, 0.85)),
            "green": (28, 80, 40),
            "dark": (22, 24, 30),
            "amber": (150, 84, 24),
            "milk": (236, 232, 222),
        }[liquid]
    elif brand.kind in {"can", "tin"}:
        body = (168, 170, 174)
    image: Pixels = np.empty((height, width, 3), np.uint8)
    image[:] = body
    if brand.kind in {"bottle", "soda", "jar", "flask"} and dice.chance(0.35):
        level = int(height * dice.between(0.15, 0.4))
        image[int(height * cap_end) : level] = _tint((190, 195, 195), 0.8)
    top, end = int(height * label_top), max(int(height * label_top) + 2, int(height * label_end))
    inset = dice.pick((0.0, 0.0, 0.1)) if brand.kind in {"flask", "shampoo", "jar"} else 0.0
    left = int(width * inset)
    face = _artwork(brand, variant, max(4, width - 2 * left), end - top, textures)
    image[top:end, left : left + face.shape[1]] = face
    cap = max(0, int(height * cap_end))
    cap_colour = dice.pick(((245, 245, 245), (25, 25, 28), accent, second, ground, (190, 160, 80)))
    image[:cap] = cap_colour
    if cap:
        image[cap - 1 : cap] = _tint(cap_colour, 0.6)
    x = (np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1
    across = np.clip(x[None, :] / np.maximum(profile[:, None], 0.05), -1, 1)
    depth = dice.between(0.35, 0.75)
    shade = (1 - depth) + depth * np.sqrt(1.02 - across * across)
    glint, glint_width = dice.between(-0.7, 0.7), dice.between(0.06, 0.25)
    gleam = dice.between(0, 0.5) if brand.kind not in {"can", "soda", "spray"} else dice.between(0.2, 0.9)
    light = gleam * np.exp(-(((across - glint) / glint_width) ** 2))
    out = image * (shade * dice.between(0.95, 1.15))[:, :, None] + (light * 150)[:, :, None]
    alpha = (np.abs(x)[None, :] <= profile[:, None]).astype(np.uint8) * 255
    if liquid in {"clear", "vivid", "green", "amber"}:  # what stands behind shines through, but for cap and label
        through = alpha[cap:top]
        np.minimum(through, 205, out=through)
    if brand.kind == "tube" and dice.chance(0.4):
        out, alpha = out[::-1], alpha[::-1]
    return cast(Pixels, np.clip(out, 0, 255).astype(np.uint8)), cast(Pixels, np.ascontiguousarray(alpha))


def _soft_pack(
    brand: _Brand, variant: int, width: int, height: int, textures: Textures | None
) -> tuple[Pixels, Pixels]:
    """Bags and pouches: wrinkled, bulging, with crimped ends."""
    dice = _Dice((brand.seed, 5))
    image = _artwork(brand, variant, width, height, textures)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    wrinkle = _noise(dice, height, width, dice.between(0.15, 0.5))
    shade = 1.08 - 0.3 * x * x + dice.between(0.06, 0.2) * wrinkle
    shade *= 1 - 0.25 * np.exp(-((y - 0.06) ** 2) / 0.001) - 0.2 * np.exp(-((y - 0.97) ** 2) / 0.001)
    shade += np.clip(wrinkle - 1.0, 0, 1) * dice.between(0, 0.9)
    taper = dice.between(0.0, 0.14)
    top_only = dice.chance(0.5)
    sides = 1 - taper * (1 - y) ** 2 - (0 if top_only else taper * y**2)
    sides = sides - 0.03 * np.abs(_noise(dice, height, 1, 0.3))
    alpha = (np.abs(x) <= sides).astype(np.uint8) * 255
    if dice.chance(0.35):  # rounded or drooping upper edge
        sag = dice.between(0.02, 0.12) * (x * x if dice.chance(0.6) else np.abs(np.sin(3 * x + dice.between(0, 6))))
        alpha[np.broadcast_to(y, alpha.shape) < sag] = 0
    return _shaded(image, shade.astype(np.float32)), alpha


def _blister(brand: _Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """A card with a hole to hang it by and a clear bubble over an object."""
    dice = _Dice((brand.seed, 6))
    image = _artwork(brand, variant, width, height, textures)
    alpha = np.full((height, width), 255, np.uint8)
    hole = (width // 2, max(2, int(height * 0.06)))
    cv2.ellipse(alpha, hole, (max(1, int(width * 0.1)), max(1, int(height * 0.015))), 0, 0, 360, 0, -1)
    if dice.chance(0.7):
        x0, x1 = int(width * dice.between(0.08, 0.3)), int(width * dice.between(0.7, 0.92))
        y0, y1 = int(height * dice.between(0.3, 0.5)), int(height * dice.between(0.85, 0.95))
        inner = image[y0:y1, x0:x1]
        if inner.size:
            inner[:] = (inner * 0.45 + 110).astype(np.uint8)
            h, w = inner.shape[:2]
            for _ in range(dice.whole(1, 3)):
                colour = _hsv(dice.unit(), dice.between(0, 1), dice.between(0.1, 1))
                centre = (int(w * dice.between(0.3, 0.7)), int(h * dice.between(0.3, 0.7)))
                axes = (max(1, int(w * dice.between(0.1, 0.4))), max(1, int(h * dice.between(0.1, 0.45))))
                cv2.ellipse(inner, centre, axes, dice.between(-20, 20), 0, 360, colour, -1)
            cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), (235, 238, 240), 1)
            cv2.line(image, (x0 + w // 5, y0 + 2), (x0 + w // 5, y1 - h // 3), (252, 252, 252), max(1, width // 40))
    return image, alpha


def _multipack(
    brand: _Brand, variant: int, width: int, height: int, textures: Textures | None
) -> tuple[Pixels, Pixels]:
    """Several units in film or in an open carton, sold and labelled as one."""
    dice = _Dice((brand.seed, 7))
    columns = dice.whole(2, 4)
    unit_w = max(6, width // columns)
    kind = dice.pick(("can", "soda", "bottle", "cup", "can"))
    inner = _Brand(
        seed=brand.seed + 1, palette=brand.palette, kind=kind, aspect=1, width=1, word=brand.word, sub=brand.sub
    )
    rgb, alpha = _round_body(inner, variant, unit_w, height, textures)
    image: Pixels = np.empty((height, unit_w * columns, 3), np.uint8)
    image[:] = _tint(brand.palette[0], 0.35)
    for i in range(columns):
        cv2.copyTo(rgb, alpha, image[:, i * unit_w : (i + 1) * unit_w])
    image = _resized(image, width, height)
    film = _noise(dice, height, width, 0.25)
    out = image * dice.between(0.75, 1.0) + (dice.between(10, 50) + 90 * np.clip(film - 0.9, 0, 1))[:, :, None]
    image = cast(Pixels, np.clip(out, 0, 255).astype(np.uint8))
    if dice.chance(0.7):
        y0, y1 = int(height * dice.between(0.3, 0.5)), int(height * dice.between(0.7, 1.0))
        band = _artwork(brand, variant, width, max(4, y1 - y0), textures)
        image[y0 : y0 + band.shape[0]] = band[: height - y0]
    return image, np.full((height, width), 255, np.uint8)


def _poly(width: int, height: int, *parts: Sequence[tuple[float, float]]) -> Pixels:
    mask = np.zeros((height, width), np.uint8)
    for part in parts:
        cv2.fillPoly(mask, [np.array([(x * width, y * height) for x, y in part], np.int32)], 255)
    return mask


def _pack(brand: _Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """Draw one package: RGB and alpha of `height` x `width`."""
    kind = brand.kind
    if kind in _PROFILES:
        return _round_body(brand, variant, width, height, textures)
    if kind in {"bag", "pillow"}:
        return _soft_pack(brand, variant, width, height, textures)
    if kind == "blister":
        return _blister(brand, variant, width, height, textures)
    if kind == "multipack":
        return _multipack(brand, variant, width, height, textures)
    dice = _Dice((brand.seed, 8))
    full = np.full((height, width), 255, np.uint8)
    if kind == "produce":
        colour = _hsv(
            dice.pick((0.0, 0.04, 0.08, 0.12, 0.22, 0.3, 0.85)), dice.between(0.5, 0.95), dice.between(0.4, 0.95)
        )
        image = _picture(dice, height, width, (colour, _tint(colour, 0.8), _tint(colour, 1.2)))
        yy, xx = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
        shade = np.sqrt(np.clip(1.1 - 0.7 * (xx * xx + yy * yy), 0.05, 2)) - 0.15 * yy
        alpha = ((np.abs(xx) ** 2.3 + np.abs(yy) ** 2.3) <= 1).astype(np.uint8) * 255
        return _shaded(image, shade.astype(np.float32)), cast(Pixels, alpha)
    image = _artwork(brand, variant, width, height, textures)
    if kind == "carton":
        roof = int(height * dice.between(0.1, 0.2))
        alpha = _poly(
            width,
            height,
            ((0, roof / height), (0.12, 0.05), (0.12, 0), (0.88, 0), (0.88, 0.05), (1, roof / height), (1, 1), (0, 1)),
        )
        image[:roof] = (image[:roof] * 0.8).astype(np.uint8)
        image[roof : roof + 1] = (image[roof : roof + 1] * 0.6).astype(np.uint8)
        if dice.chance(0.6):
            colour = dice.pick((brand.palette[2], (245, 245, 245)))
            cv2.circle(image, (width // 2, max(2, int(roof * 0.55))), max(1, int(width * 0.17)), colour, -1)
        return image, alpha
    if kind in {"trigger", "pump", "jug"}:
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        if kind == "jug":
            alpha = _poly(
                width,
                height,
                ((0.3, 0), (0.6, 0), (0.62, 0.12), (0.95, 0.25), (1, 0.4), (1, 1), (0, 1), (0, 0.35), (0.28, 0.14)),
            )
            hole = ((int(width * 0.82), int(height * 0.42)), (max(1, int(width * 0.07)), max(1, int(height * 0.13))))
            image[:] = np.where(
                np.linspace(0, 1, height)[:, None, None] < 0.3, np.array(brand.palette[0], np.uint8), image
            )
            cv2.ellipse(image, hole[0], hole[1], 0, 0, 360, _tint(brand.palette[0], 0.3), -1)
            image[: int(height * 0.12)] = brand.palette[2]
        elif kind == "trigger":
            alpha = _poly(
                width,
                height,
                (
                    (0.1, 0.02),
                    (0.75, 0.0),
                    (0.8, 0.1),
                    (0.62, 0.12),
                    (0.62, 0.24),
                    (0.4, 0.24),
                    (0.4, 0.12),
                    (0.25, 0.1),
                    (0.18, 0.2),
                    (0.1, 0.2),
                ),
                ((0.4, 0.22), (0.62, 0.22), (0.97, 0.4), (1, 1), (0, 1), (0.03, 0.4)),
            )
            image[: int(height * 0.24)] = brand.palette[2]
        else:
            alpha = _poly(
                width,
                height,
                (
                    (0.15, 0.0),
                    (0.62, 0.0),
                    (0.62, 0.06),
                    (0.56, 0.06),
                    (0.56, 0.14),
                    (0.68, 0.14),
                    (0.68, 0.2),
                    (0.32, 0.2),
                    (0.32, 0.14),
                    (0.44, 0.14),
                    (0.44, 0.06),
                    (0.15, 0.05),
                ),
                ((0.3, 0.2), (0.7, 0.2), (0.96, 0.27), (1, 0.33), (1, 1), (0, 1), (0, 0.33), (0.04, 0.27)),
            )
            image[: int(height * 0.2)] = dice.pick(((245, 245, 245), (30, 30, 30), brand.palette[2]))
        shade = np.repeat(1.1 - 0.4 * x * x + 0.3 * np.exp(-((x - dice.between(-0.6, 0.6)) ** 2) / 0.01), height, 0)
        return _shaded(image, shade.astype(np.float32)), alpha
    # boxes: a lit face with worn edges
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    shade = dice.between(0.95, 1.08) + dice.between(-0.12, 0.12) * x + dice.between(-0.12, 0.06) * y
    if dice.chance(0.25):  # gloss
        shade = shade + dice.between(0.1, 0.5) * np.exp(-((x - dice.between(-1, 1) + y) ** 2) / 0.05)
    image = _shaded(image, np.broadcast_to(shade, (height, width)).astype(np.float32))
    edge = dice.between(0.45, 0.95)
    image[:, -1:] = (image[:, -1:] * edge).astype(np.uint8)
    image[-1:] = (image[-1:] * edge).astype(np.uint8)
    return image, full


class _Designer:
    """Invents brands and products for one picture and keeps them for repeats."""

    def __init__(self, dice: _Dice, facing_px: float, textures: Textures | None) -> None:
        self.dice = dice
        self.facing_px = facing_px
        self.textures = textures
        self.products: list[_Product] = []
        self.brand: _Brand | None = None
        taste = _Dice(dice.whole(0, 1 << 30))
        # a picture shows a department: a few kinds of packages dominate
        self.kinds = {kind: spec[0] * taste.log_between(0.2, 5) for kind, spec in _KINDS.items()}
        self.block_chance = dice.between(0.5, 0.92)

    def product(self, room_px: float, *, kinds: set[str] | None = None, fresh: bool = False) -> _Product:
        """A product of at most `room_px` height; often a variant of the brand that was last used."""
        dice = self.dice
        if len(self.products) >= MAX_PRODUCTS or (self.products and not fresh and dice.chance(0.06)):
            fitting = [
                p
                for p in self.products
                if self._suits(p.kind, p.height, room_px) and (kinds is None or p.kind in kinds)
            ]
            if fitting:
                return cast(_Product, dice.pick(fitting))
        brand = self.brand
        usable = (
            brand is not None
            and (kinds is None or brand.kind in kinds)
            and self._suits(brand.kind, brand.width * brand.aspect, room_px)
            and dice.chance(self.block_chance)
        )
        if brand is None or not usable or brand.variants > 6:
            brand = self._new_brand(kinds, room_px)
        else:
            brand.variants += 1
        self.brand = brand
        return self._make(brand, room_px)

    @staticmethod
    def _suits(kind: str, height: float, room_px: float) -> bool:
        """Whether it fills the height of the shelf, alone or stacked, more or less."""
        levels = max(1, int(1.03 * room_px / height)) if kind in _STACKABLE else 1
        return 0.66 * room_px <= levels * height <= 1.02 * room_px

    def _new_brand(self, kinds: set[str] | None, room_px: float) -> _Brand:
        dice = self.dice
        weights = {kind: weight for kind, weight in self.kinds.items() if kinds is None or kind in kinds}
        for kind in weights:  # what is far too low for the shelf, and cannot be stacked, stands elsewhere
            _, _, high, narrow, wide = _KINDS[kind]
            tallest = 1.3 * self.facing_px * math.sqrt(narrow * wide) * high
            if tallest < (0.4 if kind in _STACKABLE else 0.7) * room_px:
                weights[kind] *= 0.08
        if self.textures is not None and self.textures.cutouts and (kinds is None or "cutout" in kinds):
            weights["cutout"] = 0.06 * sum(weights.values())
        kind = dice.weighted(weights)
        _, low, high, narrow, wide = _KINDS[kind]
        width = 1.3 * self.facing_px * dice.log_between(narrow, wide)
        aspect = dice.log_between(low, high)
        if dice.chance(0.88):  # shelves are set to the height of what stands on them
            levels = max(1, round(room_px / (width * (0.35 * low + 0.65 * high)))) if kind in _STACKABLE else 1
            aspect = float(np.clip(room_px / levels * dice.between(0.82, 1) / width, low, high))
            if levels == 1 and width * aspect < 0.72 * room_px:
                width = min(width * 1.5, 0.8 * room_px / aspect)
        if width * aspect > room_px:
            aspect = max(low, room_px / width)
            width = max(self.facing_px * 0.4, min(width, room_px / aspect))
        return _Brand(
            seed=dice.whole(0, 1 << 30),
            palette=_palette(dice),
            kind=kind,
            aspect=aspect,
            width=width,
            word=_word(dice, 3, 8),
            sub=tuple(_word(dice, 4, 12) for _ in range(dice.whole(0, 4))),
        )

    def _cutout(self) -> Pixels:
        """A packshot; seldom one of loose goods, whose outline is far from a rectangle."""
        cutouts = cast(Textures, self.textures).cutouts
        for _ in range(6):
            rgba = cast(Pixels, self.dice.pick(cutouts))
            if self.dice.chance(0.06) or (rgba[:, :, 3] > 127).mean() > 0.84:
                break
        return rgba

    def _make(self, brand: _Brand, room_px: float) -> _Product:
        dice = self.dice
        size = dice.between(0.9, 1.1) if brand.variants and dice.chance(0.2) else 1.0
        width = max(5, round(brand.width * size))
        height = max(5, round(min(brand.width * brand.aspect * size, room_px)))
        if brand.kind == "cutout":
            rgba = self._cutout()
            rows, columns = rgba.shape[:2]
            taller = float(np.clip(0.75 * room_px * columns / (width * rows), 1, 1.6))
            height = max(5, round(min(room_px, width * taller * rows / columns)))
            width = max(5, round(height * columns / rows))
            rgb = _recolour(dice, np.ascontiguousarray(rgba[:, :, :3]), 0.5)
            alpha: Pixels = np.ascontiguousarray(rgba[:, :, 3])
        else:
            over = 1.5 if width < 40 else 1.2
            art_w, art_h = max(16, int(width * over)), max(16, int(height * over))
            rgb, alpha = _pack(brand, brand.variants, art_w, art_h, self.textures)
        loose = dice.between(0, 2.2) if dice.chance(0.7) else 0.0
        prints = [_Print()]
        for _ in range(2):
            stretch, gain = dice.between(0.98, 1.02), dice.between(0.86, 1.08)
            prints.append(_Print(stretch=stretch, gain=gain, degrees=loose * dice.between(-1, 1)))
        if dice.chance(0.2):  # one that leans
            prints.append(
                _Print(
                    gain=dice.between(0.8, 1),
                    degrees=dice.between(-9, 9) if dice.chance(0.92) else dice.pick((-90, 90)),
                )
            )
        if brand.kind in _PROFILES and dice.chance(0.3):  # one that shows another side
            prints.append(_Print(gain=dice.between(0.85, 1), turn=dice.between(0.2, 0.8)))
        product = _Product(
            kind=brand.kind,
            width=width,
            height=height,
            colour=brand.palette[0],
            cap=dice.pick((brand.palette[1], (205, 206, 208), (240, 240, 238))),
            rgb=rgb,
            alpha=alpha,
            prints=tuple(prints),
            rear_print=_Print(stretch=0.97, gain=dice.between(0.4, 0.85)),
        )
        self.products.append(product)
        return product


# --- the scene --------------------------------------------------------------------------------------------------------


class _Canvas:
    """The flat scene before the lens: colours, and which facing is seen where."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rgb: Pixels = np.zeros((height, width, 3), np.uint8)
        self.ids: npt.NDArray[np.uint16] = np.zeros((height, width), np.uint16)
        self.areas: list[int] = [0]  # silhouette of each facing, seen or not

    def _clip(self, x: int, y: int, w: int, h: int) -> tuple[int, int, int, int] | None:
        x0, y0, x1, y1 = max(0, x), max(0, y), min(self.width, x + w), min(self.height, y + h)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def stamp(self, sprite: _Sprite, x: int, y: int, *, facing: bool, grows: bool = False) -> None:
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


@dataclass(kw_only=True)
class _Style:
    """What a whole picture shares."""

    wall: Rgb
    rail: Rgb
    tag: Rgb
    tag_chance: float
    board: Rgb
    rise: float  # how far a rear unit shows above its front unit at eye level, per unit height
    drift: float  # and to the side, per unit width
    depth: float  # how much both change from one end of the canvas to the other
    eye: tuple[float, float]  # where the vanishing point lies, as shares of the canvas
    rear_chance: float
    gap_chance: float
    ambient: float  # light at the back of the shelf
    spacing: float  # typical gap between neighbours, per unit width


def _new_style(dice: _Dice, view: _View) -> _Style:
    grey = dice.between(35, 110) if dice.chance(0.22) else dice.between(115, 225)
    rail_kind = dice.weighted({"white": 5, "grey": 2.4, "beige": 0.8, "black": 0.7, "colour": 1.2})
    rail: Rgb = {
        "white": (228, 228, 224),
        "grey": (150, 152, 155),
        "beige": (205, 190, 164),
        "black": (35, 35, 38),
        "colour": _hsv(_hue(dice), dice.between(0.35, 0.8), dice.between(0.35, 0.85)),
    }[rail_kind]
    warm = dice.between(0.92, 1.05)
    return _Style(
        wall=(int(min(255, grey * warm)), int(grey), int(min(255, grey / warm))),
        rail=_tint(rail, dice.between(0.75, 1.05)),
        tag=dice.pick(((248, 248, 245), (248, 248, 245), (250, 225, 60), (240, 240, 250), (230, 60, 50))),
        tag_chance=dice.pick((0.3, 0.7, 0.9, 1.0)),
        board=_tint(rail, dice.between(0.4, 0.9)),
        rise=dice.between(-0.02, 0.06),
        drift=view.yaw * dice.between(0.3, 1.0),
        depth=dice.between(0.05, 0.3),
        eye=(0.5 + view.eye_x * 0.6, dice.between(-0.3, 0.8)),
        rear_chance=dice.pick((0.5, 0.9, 1.0)),
        gap_chance=0.12 if dice.chance(0.15) else dice.pick((0.0, 0.01, 0.03)),
        ambient=dice.between(0.3, 0.6) if dice.chance(0.22) else dice.between(0.6, 1.0),
        spacing=dice.pick((0.0, 0.0, 0.0, 0.01, 0.02, 0.06)),
    )


class _Scene:
    """Fills a canvas with bays of shelves."""

    def __init__(self, dice: _Dice, canvas: _Canvas, facing_px: float, view: _View, textures: Textures | None) -> None:
        self.dice, self.canvas, self.facing_px = dice, canvas, facing_px
        self.style = _new_style(dice, view)
        self.designer = _Designer(dice, facing_px, textures)

    def draw(self, *, whole: bool) -> None:
        dice, canvas = self.dice, self.canvas
        canvas.rgb[:] = self.style.wall
        small = (128 * (1 + 0.12 * _noise(dice, 32, 32, 0.6))).astype(np.uint8)
        shade = cv2.resize(small, (canvas.width, canvas.height))
        canvas.rgb[:] = cv2.multiply(canvas.rgb, cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB), scale=1 / 128)
        top, bottom = 0.0, float(canvas.height)
        if whole or dice.chance(0.12):
            top = canvas.height * (MARGIN * 0.75 + dice.between(0.0, 0.1 if whole else 0.45))
            self._ceiling(int(top))
        if whole or dice.chance(0.14):
            bottom = canvas.height * (1 - MARGIN * 0.75 - dice.between(0.02, 0.12 if whole else 0.32))
            self._floor(int(bottom))
        x = -dice.between(0, 2) * self.facing_px
        ledges = self._ledges(top, bottom)
        while x < canvas.width:
            width = self.facing_px * dice.log_between(9, 30) * (dice.between(0.15, 1) if x < 0 else 1.0)
            if dice.chance(0.35):
                ledges = self._ledges(top, bottom)
            mode = dice.weighted({"shelf": 8.2, "wall": 0.8, "hooks": 0.5, "top": 0.15})
            self._bay(x, x + width, ledges, mode)
            x += width
            if dice.chance(0.45):
                post = self.facing_px * dice.between(0.06, 0.5)
                self._post(x, post, top, bottom)
                x += post
        if dice.chance(0.14):
            self._glass_doors()
        if dice.chance(0.1):
            self._clip_strip()
        self._signs()
        if dice.chance(0.08):
            self._passer_by()

    def _ledges(self, top: float, bottom: float) -> list[tuple[float, float]]:
        """From the floor up: (y of the shelf's surface, room above it)."""
        dice = self.dice
        ledges = []
        y = bottom + (dice.between(0, 2.5) * self.facing_px if bottom >= self.canvas.height else 0)
        typical = self.facing_px * dice.log_between(2.7, 5.8)
        while y > top + 0.5 * self.facing_px:
            room = typical * dice.log_between(0.72, 1.4)
            if y - room < top:
                room = y - top
            rail = max(self.facing_px * 0.1, room * dice.between(0.06, 0.12))
            ledges.append((y, room))
            y -= room + rail
        return ledges

    def _ceiling(self, y: int) -> None:
        dice, canvas = self.dice, self.canvas
        tone = dice.between(40, 230)
        canvas.fill(0, 0, canvas.width, y, _hsv(dice.unit(), dice.between(0, 0.2), tone / 255))
        for _ in range(dice.whole(0, 7)):
            x, v = dice.whole(-50, canvas.width), dice.whole(0, max(1, y))
            w, h = int(dice.between(0.02, 0.4) * canvas.width), max(2, int(dice.between(0.03, 0.15) * y))
            canvas.fill(
                x, v, x + w, min(y, v + h), dice.pick(((255, 255, 250), (250, 250, 255), (120, 120, 120), (60, 60, 70)))
            )
        canvas.rgb[:y] = cv2.GaussianBlur(canvas.rgb[:y], (0, 0), 2 + 0.02 * canvas.width) if y > 4 else canvas.rgb[:y]
        if dice.chance(0.5):  # the header of the bay
            h = min(y, int(self.facing_px * dice.between(0.8, 3)))
            colour = _hsv(dice.unit(), dice.between(0, 0.9), dice.between(0.3, 1))
            canvas.fill(0, y - h, canvas.width, y, colour)
            x = 0
            while x < canvas.width and h > 8:
                w = int(h * dice.between(2, 6))
                ink = (250, 250, 250) if _luma(colour) < 150 else (30, 30, 40)
                _write(canvas.rgb, _word(dice, 4, 9), dice.pick(FONTS), (x, y - h * 0.8, w, h * 0.6), ink, 0.12)
                x += w + int(h * dice.between(1, 8))

    def _floor(self, y: int) -> None:
        dice, canvas = self.dice, self.canvas
        rows = canvas.height - y
        if rows < 3:
            return
        tone = dice.between(70, 220)
        colour = _floats(_hsv(dice.between(0.02, 0.16), dice.between(0, 0.3), tone / 255))
        speckle = 1 + dice.between(0.02, 0.1) * _noise(dice, rows, canvas.width, dice.between(0.03, 0.3))[:, :, None]
        fade = np.linspace(0.55, 1.1, rows, dtype=np.float32)[:, None, None]
        canvas.rgb[y:] = np.clip(colour * speckle * fade, 0, 255).astype(np.uint8)
        plinth = int(self.facing_px * dice.between(0.3, 1.2))
        canvas.fill(0, y, canvas.width, y + plinth, _tint(self.style.rail, dice.between(0.2, 0.9)))
        step = self.facing_px * dice.between(2, 6)
        line = _tint(cast(Rgb, tuple(int(c) for c in colour)), 0.7)
        for k in range(1, 5):
            v = int(y + plinth + step * k * k * 0.4)
            canvas.fill(0, v, canvas.width, v + 1, line)

    def _post(self, x: float, width: float, top: float, bottom: float) -> None:
        colour = _tint(self.style.rail, self.dice.between(0.3, 1.0))
        canvas = self.canvas
        canvas.fill(x, top, x + width, bottom, colour)
        canvas.fill(x, top, x + max(1, width * 0.15), bottom, _tint(colour, 0.6))
        if width > 5:
            step = max(4, int(width * 0.6))
            for y in range(int(top), int(bottom), step):
                canvas.fill(x + width * 0.42, y, x + width * 0.58, y + step // 2, _tint(colour, 0.3))

    def _bay(self, x0: float, x1: float, ledges: list[tuple[float, float]], mode: str) -> None:
        dice, style, canvas = self.dice, self.style, self.canvas
        x1 = min(x1, canvas.width + self.facing_px)
        if mode == "wall":
            self._wall_of_packs(x0, x1, ledges)
            return
        if mode == "top":
            self._trays_from_above(x0, x1, ledges)
            return
        if dice.chance(0.2) or mode == "hooks":
            self._perforated(x0, x1, ledges)
        for i, (y, room) in enumerate(ledges):
            if y - room > canvas.height or y < 0:
                continue
            share = dice.between(0.06, 0.11) if dice.chance(0.75) else dice.between(0.1, 0.2)
            rail = 0.0 if i == 0 and y >= canvas.height else max(self.facing_px * 0.12, room * share)
            # the surface of the shelf, seen from above or below
            lip = max(0.0, self._rise(y)) * room * dice.between(0.5, 1.2)
            canvas.fill(x0, y - lip, x1, y, style.board, covers=False)
            canvas.scale_light(x0, y - room, x1, y, _floats([style.ambient * 0.55, style.ambient, style.ambient * 1.1]))
            if mode == "hooks" or dice.chance(0.035):
                self._hanging(x0, x1, y, room)
            else:
                self._row(x0, x1, y, room)
            reach = room * dice.between(0.1, 0.4)
            canvas.scale_light(x0, y - room, x1, y - room + reach, _floats([dice.between(0.55, 1), 0.95, 1]))
            if dice.chance(0.25):
                canvas.scale_light(x0, y - room, x1, y, _floats([1, dice.between(0.8, 1), dice.between(0.65, 1)]))
            lift = rail * dice.between(0, 0.35) if dice.chance(0.35) else 0.0  # hides the feet of the products
            self._rail(x0, x1, y - lift, rail + lift)

    def _perforated(self, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
        if not ledges:
            return
        top, bottom = ledges[-1][0] - ledges[-1][1], max(0, int(ledges[0][0]))
        canvas = self.canvas
        a, b = max(0, int(x0)), min(canvas.width, int(x1))
        wall = canvas.rgb[max(0, int(top)) : bottom, a:b]
        step = max(4, int(self.facing_px * self.dice.between(0.2, 0.45)))
        dot = max(1, step // 4)
        for k in range(dot * dot):
            wall[k // dot :: step, k % dot :: step] = _tint(self.style.wall, 0.45)

    def _rail(self, x0: float, x1: float, y: float, height: float) -> None:
        dice, style, canvas = self.dice, self.style, self.canvas
        if height < 1:
            return
        canvas.fill(x0, y, x1, y + height, style.rail)
        canvas.scale_light(x0, y, x1, y + height, _floats([1.0, 0.97, 0.75]))
        canvas.fill(x0, y + height, x1, y + height + max(1, height * 0.12), _tint(style.rail, 0.25))
        if dice.chance(0.08):  # a printed strip
            canvas.fill(x0, y + height * 0.15, x1, y + height * 0.85, _hsv(_hue(dice), dice.between(0.4, 0.9), 0.8))
        x = x0 + dice.between(0, 2) * self.facing_px
        h = height * dice.between(0.7, 1.25)
        w = h * dice.between(1.1, 2.4)
        while x < x1:
            if dice.chance(style.tag_chance) and x + w < x1:
                over = dice.between(0, height * 0.5) if dice.chance(0.12) else 0.0
                self._tag(
                    x, y + (height - h) / 2 - over, w, h + over, style.tag if dice.chance(0.85) else (250, 220, 40)
                )
            x += w * dice.between(1.05, 1.4) if dice.chance(0.25) else dice.between(0.6, 2.2) * self.facing_px
        if dice.chance(0.16):  # larger ones, hung before the products
            colour = style.tag if dice.chance(0.4) else dice.pick(((250, 220, 40), (245, 245, 245), (225, 50, 45)))
            w = self.facing_px * dice.between(0.4, 0.95)
            h = w * dice.between(0.45, 1.0)
            x = x0 + dice.between(0, 3) * self.facing_px
            while x + w < x1:
                self._tag(x, y + height * 0.3 - h * dice.between(0, 0.7), w, h, colour)
                x += w + self.facing_px * dice.between(0.5, 5)

    def _tag(self, x: float, y: float, w: float, h: float, colour: Rgb) -> None:
        dice, canvas = self.dice, self.canvas
        canvas.fill(x, y, x + w, y + h, colour)
        if h >= 6:
            ink = (20, 20, 20) if _luma(colour) > 120 else (250, 250, 250)
            price = f"{dice.whole(0, 19)}.{dice.whole(10, 99)}"
            _write(
                canvas.rgb, price, cv2.FONT_HERSHEY_DUPLEX, (x + w * 0.4, y + h * 0.3, w * 0.55, h * 0.45), ink, 0.15
            )
            for k in range(3):
                v = y + h * (0.2 + 0.2 * k)
                canvas.fill(x + w * 0.06, v, x + w * dice.between(0.2, 0.38), v + max(1, h * 0.06), (110, 110, 110))
        elif h >= 3:
            canvas.fill(x + w * 0.4, y + h * 0.35, x + w * 0.9, y + h * 0.7, (70, 70, 70))

    # rows of products

    def _rise(self, y: float) -> float:
        """How far a rear unit shows above its front unit at that height, per unit height: more below the eye."""
        style = self.style
        return float(np.clip(style.rise + style.depth * (y / self.canvas.height - style.eye[1]), -0.04, 0.26))

    def _drift(self, x: float) -> float:
        """How far a rear unit is shifted there, per unit width: towards the vanishing point."""
        style = self.style
        return style.drift + style.depth * (style.eye[0] - x / self.canvas.width)

    def _row(self, x0: float, x1: float, y: float, room: float) -> None:
        """Stand groups of products side by side on a shelf: rear units first, then the facings, then trays and bars."""
        dice, style, canvas = self.dice, self.style, self.canvas
        groups: list[tuple[_Product, float, float, int, int]] = []  # product, from, to, count, levels
        x = x0 + dice.between(0, 0.15) * self.facing_px
        fill = dice.between(0.9, 0.98) if dice.chance(0.85) else dice.between(0.6, 0.9)
        spacing = style.spacing if dice.chance(0.85) else dice.between(0, 0.1)
        self.designer.facing_px = self.facing_px * dice.log_between(0.7, 1.55)
        only = _STACKABLE if dice.chance(0.1) else None
        misses = 0
        while x < x1 and misses <= 3:
            if dice.chance(style.gap_chance):
                x += self.facing_px * dice.between(0.3, 2)
                continue
            product = self.designer.product(room * fill / (2 if only else 1), kinds=only)
            step = product.width * (1 + spacing)
            if x + product.width > x1:
                misses += 1
                continue
            wanted = dice.whole(1, 4) if dice.chance(0.65) else dice.whole(3, 10)
            count = min(wanted, int((x1 - x - product.width) / step) + 1)
            levels = 1
            if product.kind in _STACKABLE and product.height * 2 <= 1.03 * room and dice.chance(0.93):
                levels = min(dice.whole(2, 5) if dice.chance(0.3) else 5, int(room * 1.03 / product.height))
            groups.append((product, x, x + count * step, count, levels))
            x += count * step + product.width * (dice.between(0, 0.03) if dice.chance(0.85) else dice.between(0, 0.3))
        if not groups:
            return
        # the last of what is left over goes between the groups, that the row ends where the shelf does
        slack = max(0.0, x1 - max(groups[-1][2], x))
        part = min(slack / len(groups), 0.4 * self.facing_px)
        placed = [
            (product, start + i * part, end + i * part, count, levels)
            for i, (product, start, end, count, levels) in enumerate(groups)
        ]
        front, rear = self._places(placed, y, room, spacing)
        for _, product, left, base, foremost in rear:
            sprite = product.rear
            canvas.stamp(sprite, round(left), round(base) - sprite.rgb.shape[0], facing=foremost)
        for product, left, base, on_top in front:
            sprite = product.unit(dice)
            h, w = sprite.rgb.shape[:2]
            at = round(left + (product.width - w) / 2), round(base) - h
            canvas.stamp(sprite, *at, facing=True)
            if h > 8 and (product.kind in _SQUARE or product.kind in _LIDDED):
                self._solid(product, sprite, *at, on_top=on_top)
        trays = [group for group in placed if dice.chance(0.09)]
        for product, left, right, _, _ in trays:
            self._tray_lip(left, right, y, dice.between(0.12, 0.4) * product.height, product)
        if dice.chance(0.06):
            self._bars(x0, x1, y, room)
        if dice.chance(0.1):  # clear dividers
            for _, left, right, _, _ in placed:
                canvas.fill(left, y - room * 0.4, left + 1, y, (200, 205, 208), covers=False)
                canvas.fill(right, y - room * 0.4, right + 1, y, (200, 205, 208), covers=False)

    def _places(
        self, groups: list[tuple[_Product, float, float, int, int]], y: float, room: float, spacing: float
    ) -> tuple[list[tuple[_Product, float, float, bool]], list[tuple[int, _Product, float, float, bool]]]:
        """Where the front units (product, left, base, whether on top) and the rear ones (depth, product, left, base,
        whether nothing stands before it) are, in the order to draw them in."""
        dice, style = self.dice, self.style
        rise = self._rise(y)
        front: list[tuple[_Product, float, float, bool]] = []
        rear: list[tuple[int, _Product, float, float, bool]] = []
        for product, start, _, count, levels in groups:
            depth = dice.whole(1, 1 if self.facing_px < 26 else 3) if dice.chance(style.rear_chance) else 0
            if rise < 0.01 and product.kind not in _NECKED:
                depth = min(depth, 1)
            stagger = dice.between(-0.5, 0.5) if product.kind in _NECKED and dice.chance(0.6) else 0.0
            for i in range(count):
                x = start + i * product.width * (1 + spacing)
                here = max(1, levels - (dice.whole(0, 2) if dice.chance(0.2) else 0))
                lost = dice.chance(0.03)
                for level in range(min(levels, here + 1)):
                    for k in range(depth if not lost else max(1, depth), 0, -1):
                        base = y - level * product.height - max(0.0, rise) * product.height * k * 0.8
                        if k > 1 and base - product.height < y - 1.03 * room:
                            continue
                        left = x + (self._drift(x) * k + stagger * (k % 2)) * product.width
                        rear.append((k, product, left, base, lost and k == 1))
                if not lost:
                    wobble = dice.between(-0.02, 0.02) * product.width if spacing else 0.0
                    settle = dice.between(0, 0.04) * product.height if dice.chance(0.3) else 0.0
                    for level in range(here):
                        front.append((product, x + wobble, y - settle - level * product.height, level == here - 1))
        rear.sort(key=lambda unit: -unit[0])
        # from both ends towards the vanishing point: the nearer hides the side of the farther
        left_part = [unit for unit in front if self._drift(unit[1]) > 0]
        return left_part + [unit for unit in reversed(front) if self._drift(unit[1]) <= 0], rear

    def _solid(self, product: _Product, sprite: _Sprite, x: int, y: int, *, on_top: bool) -> None:
        """The top and the side of a unit that are seen at an angle; a neighbour that comes later hides the side."""
        height, width = sprite.rgb.shape[:2]
        drift, rise = self._drift(x), self._rise(y + height)
        top = int(min(0.16 * height, 0.45 * width * rise * 2)) if on_top else 0
        shift = int(drift * width * 0.8)
        if product.kind in _LIDDED:
            if top >= 2:
                lid = np.zeros((2 * top, width, 3), np.uint8)
                lid[:] = _tint(product.cap, 1.05)
                alpha = np.zeros((2 * top, width), np.uint8)
                cv2.ellipse(alpha, (width // 2, top), (max(1, int(width * 0.43)), top - 1), 0, 0, 360, 255, -1)
                cv2.ellipse(lid, (width // 2, top), (max(1, int(width * 0.34)), top - 1), 0, 0, 360, product.cap, -1)
                self.canvas.stamp(_sprite(lid, alpha), x, y - top // 2, facing=True, grows=True)
            return
        if top >= 2:
            reach = abs(shift)
            image: Pixels = np.empty((top, width + reach, 3), np.uint8)
            image[:] = _tint(product.colour, 1.12)
            near = 0 if shift >= 0 else reach
            outline = [(near, top), (near + width - 1, top), (reach - near + width - 1, 0), (reach - near, 0)]
            alpha = np.zeros((top, width + reach), np.uint8)
            cv2.fillConvexPoly(alpha, np.array(outline, np.int32), 255)
            self.canvas.stamp(_sprite(image, alpha), x - near, y - top, facing=True, grows=True)
        if abs(shift) >= 2:
            self._box_side(product, width, height, x, y, shift, top)

    def _box_side(self, product: _Product, width: int, height: int, x: int, y: int, shift: int, top: int) -> None:
        """The side of a box, where nothing stands yet."""
        depth = abs(shift)
        left = x + width if shift > 0 else x - depth
        taken = self.canvas.ids[max(0, y + height // 2) : y + height // 2 + 1, max(0, left) : max(0, left + depth)]
        if not taken.size or taken.any():
            return
        image: Pixels = np.empty((height + top, depth, 3), np.uint8)
        image[:] = _tint(product.colour, 0.68)
        if width > 24:
            band = image[int(height * 0.25) : int(height * 0.55)]
            band[:] = (band * 0.82).astype(np.uint8)
        near, far = (0, depth - 1) if shift > 0 else (depth - 1, 0)
        alpha = np.zeros((height + top, depth), np.uint8)
        outline = [(near, top), (near, height + top - 1), (far, height - 1), (far, 0)]
        cv2.fillConvexPoly(alpha, np.array(outline, np.int32), 255)
        self.canvas.stamp(_sprite(image, alpha), left, y - top, facing=True, grows=True)

    def _tray_lip(self, left: float, right: float, y: float, height: float, product: _Product) -> None:
        """The front of a shelf-ready tray covers the feet of what stands in it."""
        dice, canvas = self.dice, self.canvas
        colour = product.colour if dice.chance(0.5) else dice.pick(((176, 132, 86), (196, 154, 108), (245, 245, 245)))
        canvas.fill(left, y - height, right, y, colour)
        canvas.fill(left, y - height, right, y - height + 1, _tint(colour, 1.25))
        ink = _tint(colour, 0.45 if _luma(colour) > 90 else 3)
        x = left
        while x + height * 2 < right and height > 5:
            w = height * dice.between(1.6, 4)
            _write(
                canvas.rgb,
                _word(dice, 4, 8),
                dice.pick(FONTS),
                (x, y - height * 0.75, w * 0.9, height * 0.5),
                ink,
                0.15,
            )
            x += w * dice.between(1, 1.6)

    def _bars(self, x0: float, x1: float, y: float, room: float) -> None:
        """Thin rods before the products; the products stay whole behind them."""
        dice, canvas = self.dice, self.canvas
        thick = max(1, self.facing_px * dice.between(0.015, 0.05))
        colour = dice.pick(((225, 226, 228), (90, 92, 95), (180, 180, 176)))
        for share in (dice.between(0.1, 0.2), dice.between(0.25, 0.4)):
            canvas.fill(x0, y - room * share, x1, y - room * share + thick, colour, covers=False)
        step = self.facing_px * dice.between(0.5, 3)
        x = x0
        while x < x1:
            canvas.fill(x, y - room * 0.4, x + thick, y, colour, covers=False)
            x += step

    def _hanging(self, x0: float, x1: float, y: float, room: float) -> None:
        """Packs on hooks, in one to three tiers, with the packs behind them peeping out."""
        dice, canvas = self.dice, self.canvas
        tiers = dice.whole(1, max(1, min(3, int(room / (1.4 * self.facing_px)))))
        tier_room = room / tiers
        for tier in range(tiers):
            top = y - room + tier * tier_room
            x = x0 + dice.between(0.05, 0.3) * self.facing_px
            gap = dice.log_between(0.015, 0.3)
            while x < x1:
                product = self.designer.product(tier_room * dice.between(0.75, 0.95), kinds=_HANGING)
                for _ in range(dice.whole(1, 4)):
                    if x + product.width > x1:
                        break
                    drop = top + tier_room * 0.06 + dice.between(0, 0.02) * tier_room
                    if not dice.chance(0.08):
                        for k in range(dice.whole(0, 3), 0, -1):
                            left = x + dice.between(-0.05, 0.05) * product.width
                            canvas.stamp(product.rear, round(left), round(drop - k * 0.015 * tier_room), facing=False)
                        canvas.stamp(product.unit(dice), round(x), round(drop), facing=True)
                    middle = x + product.width / 2
                    canvas.fill(
                        middle - 1, top, middle + 1, drop + product.height * 0.05, (200, 200, 205), covers=False
                    )
                    if dice.chance(0.4):
                        w = product.width * dice.between(0.25, 0.5)
                        self._tag(middle - w / 2, drop - w * 0.2, w, w * 0.5, self.style.tag)
                    x += product.width * (1 + gap * dice.between(0.5, 1.5))
                x += product.width * dice.between(0, 0.25)

    def _wall_of_packs(self, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
        """A promotion: packs or trays piled up without shelves."""
        dice, canvas = self.dice, self.canvas
        if not ledges:
            return
        floor, top = ledges[0][0], ledges[-1][0] - ledges[-1][1] * dice.between(-2, 0.8)
        kinds = {dice.pick(("box", "flatbox", "multipack", "can", "soda", "pillow"))}
        x = x0
        while x < x1:
            product = self.designer.product(self.facing_px * dice.between(1.4, 3.0), kinds=kinds)
            columns = min(dice.whole(1, 6), max(1, int((x1 - x) / product.width)))
            lip = product.height * dice.between(0.1, 0.3) if product.kind in {"can", "soda"} else 0.0
            seam = dice.pick((0, 0, 1, 0.03 * product.height))
            if floor - top < product.height:
                return
            canvas.fill(x, top, x + columns * product.width, floor, _tint(product.colour, 0.25), covers=False)
            y = floor
            mix = dice.chance(0.3)
            while y - product.height >= top:
                for column in range(columns):
                    sprite = product.upright(dice)
                    left = x + column * product.width + (dice.between(-0.03, 0.03) * product.width if seam else 0)
                    canvas.stamp(sprite, round(left), round(y) - sprite.rgb.shape[0], facing=True)
                if lip:
                    self._tray_lip(x, x + columns * product.width, y, lip, product)
                y -= product.height + seam
                if mix and dice.chance(0.25):
                    break
            x += columns * product.width * dice.between(1.0, 1.04)
            if x + product.width > x1:
                break

    def _trays_from_above(self, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
        """Chest freezers, produce: units seen from above, in compartments."""
        dice, canvas = self.dice, self.canvas
        for y, room in ledges:
            x = x0
            while x < x1:
                kinds = {dice.pick(("produce", "box", "pillow", "flatbox", "bag"))}
                product = self.designer.product(min(room, self.facing_px * 1.6), kinds=kinds)
                right = min(x1, x + product.width * dice.between(2, 5))
                canvas.fill(x, y - room, right, y, _tint((60, 62, 66), dice.between(0.4, 3)))
                top = y - room * 0.98
                while top < y - 0.5 * product.height:
                    shift = dice.between(-0.2, 0.2) * product.width if product.kind == "produce" else 0.0
                    left = x + shift
                    while left + product.width * 0.8 < right:
                        jitter = dice.between(-0.08, 0.08) * product.height
                        canvas.stamp(product.unit(dice), round(left), round(top + jitter), facing=True)
                        left += product.width * dice.between(0.92, 1.06)
                    top += product.height * dice.between(0.8, 1.0)
                wall = max(2, self.facing_px * 0.12)
                canvas.fill(right - wall, y - room, right, y, (205, 206, 208))
                x = right
            canvas.fill(x0, y, x1, y + self.facing_px * 0.3, self.style.rail)

    # what stands between the camera and the shelf

    def _glass_doors(self) -> None:
        dice, canvas = self.dice, self.canvas
        colour = dice.pick(((30, 30, 33), (60, 62, 66), (190, 192, 195)))
        x = -dice.between(0, 12) * self.facing_px
        while x < canvas.width:
            w = self.facing_px * dice.between(0.4, 1.3)
            canvas.fill(x, 0, x + w, canvas.height, colour)
            canvas.fill(x + w * 0.45, 0, x + w * 0.55, canvas.height, _tint(colour, 0.4))
            if dice.chance(0.6):
                canvas.fill(x + w, 0, x + w * 1.2, canvas.height, (245, 250, 255))
            if dice.chance(0.4):
                mid = canvas.height * dice.between(0.3, 0.7)
                canvas.fill(x + w * 1.3, mid, x + w * 1.5, mid + self.facing_px * 3, (150, 152, 155))
            x += w + self.facing_px * dice.between(8, 22)
        small = np.zeros((32, 32), np.float32)
        for _ in range(dice.whole(1, 5)):
            a = (dice.whole(0, 31), dice.whole(0, 31))
            cv2.line(
                small,
                a,
                (a[0] + dice.whole(-12, 12), a[1] + dice.whole(-20, 20)),
                dice.between(20, 110),
                dice.whole(1, 3),
            )
        blurred = np.clip(cv2.GaussianBlur(small, (0, 0), 1.2) + dice.between(0, 22), 0, 255).astype(np.uint8)
        glow = cv2.cvtColor(cv2.resize(blurred, (canvas.width, canvas.height)), cv2.COLOR_GRAY2RGB)
        canvas.rgb[:] = cv2.addWeighted(canvas.rgb, dice.between(0.8, 1.0), glow, 1.0, 0)

    def _signs(self) -> None:
        """Promotion signs and wobblers that hide products, and strips hung with small goods."""
        dice, canvas = self.dice, self.canvas
        patches = canvas.width * canvas.height / (self.facing_px * self.facing_px)
        for _ in range(int(patches * 0.0035 * dice.unit() * dice.pick((0, 1, 1, 3)))):
            w = self.facing_px * dice.log_between(0.5, 2.5)
            h = w * dice.log_between(0.5, 1.6)
            x, y = dice.between(0, canvas.width), dice.between(0, canvas.height)
            colour: Rgb = dice.pick(
                ((250, 220, 30), (225, 25, 35), (250, 250, 248), (20, 140, 60), (20, 80, 180), (250, 120, 20))
            )
            ink: Rgb = (20, 20, 25) if _luma(colour) > 140 else (250, 250, 250)
            image: Pixels = np.empty((max(4, int(h)), max(4, int(w)), 3), np.uint8)
            image[:] = colour
            rows, columns = image.shape[:2]
            _write(
                image,
                _word(dice, 3, 6),
                dice.pick(FONTS),
                (columns * 0.1, rows * 0.08, columns * 0.8, rows * 0.28),
                ink,
                0.18,
            )
            price = f"{dice.whole(0, 9)}.{dice.whole(10, 99)}"
            _write(
                image,
                price,
                cv2.FONT_HERSHEY_DUPLEX,
                (columns * 0.08, rows * 0.45, columns * 0.84, rows * 0.42),
                ink,
                0.2,
            )
            alpha = None
            if dice.chance(0.3):
                alpha = np.zeros((rows, columns), np.uint8)
                cv2.ellipse(alpha, (columns // 2, rows // 2), (columns // 2, rows // 2), 0, 0, 360, 255, -1)
            canvas.stamp(_sprite(image, alpha), int(x), int(y), facing=False)

    def _clip_strip(self) -> None:
        """Small goods clipped one above the other on a strip that hangs before the shelf."""
        dice, canvas = self.dice, self.canvas
        product = self.designer.product(self.facing_px * 1.6, kinds={"blister", "bag", "pillow"}, fresh=True)
        x, y = dice.between(0.05, 0.95) * canvas.width, dice.between(-0.1, 0.6) * canvas.height
        step = product.height * dice.between(0.6, 1.05)
        count = dice.whole(3, 9)
        canvas.fill(x - 2, y - step * 0.5, x + 2, y + count * step, (225, 228, 230))
        for k in range(count):
            if dice.chance(0.9):
                lean = dice.between(-0.06, 0.06) * product.width
                canvas.stamp(product.unit(dice), round(x - product.width / 2 + lean), round(y + k * step), facing=True)

    def _passer_by(self) -> None:
        """A person, blurred and dark, or the wires of a cart."""
        dice, canvas = self.dice, self.canvas
        u = self.facing_px * dice.between(3, 7)
        x, y = dice.between(0, canvas.width), dice.between(0.3, 0.9) * canvas.height
        if dice.chance(0.6):
            cloth = _hsv(dice.unit(), dice.between(0, 0.7), dice.between(0.08, 0.6))
            skin = _tint((205, 155, 125), dice.between(0.4, 1.1))
            mask = np.zeros((canvas.height, canvas.width), np.uint8)
            body = np.array(
                [
                    (x - u * 0.5, y + u * 0.3),
                    (x - u * 0.25, y),
                    (x + u * 0.25, y),
                    (x + u * 0.5, y + u * 0.3),
                    (x + u * 0.55, y + 4 * u),
                    (x - u * 0.55, y + 4 * u),
                ],
                np.int32,
            )
            cv2.fillConvexPoly(mask, body, 255)
            canvas.rgb[mask > 0] = cloth
            canvas.ids[mask > 0] = 0
            mask[:] = 0
            cv2.ellipse(mask, (int(x), int(y - u * 0.25)), (int(u * 0.2), int(u * 0.28)), 0, 0, 360, 255, -1)
            canvas.rgb[mask > 0] = skin
            canvas.ids[mask > 0] = 0
        else:
            colour = dice.pick(((190, 192, 195), (220, 40, 40), (70, 72, 75)))
            thick = max(1, int(self.facing_px * 0.04))
            step = max(4, int(self.facing_px * 0.3))
            for k in range(int(u * 2 / step)):
                canvas.fill(x + k * step, y, x + k * step + thick, y + u, colour, covers=False)
            for k in range(int(u / step)):
                canvas.fill(x, y + k * step, x + 2 * u, y + k * step + thick, colour, covers=False)
            canvas.fill(x, y, x + 2 * u, y + thick * 4, colour)


# --- the camera -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _View:
    """How the camera stands to the shelf. Turns are the relative change of distance across half the picture."""

    yaw: float
    pitch: float
    roll: float  # radians
    bend: float  # radial distortion; negative is barrel-shaped
    eye_x: float  # where the horizon and the middle of the aisle lie, in half pictures from the middle
    eye_y: float


def _new_view(dice: _Dice, *, calm: bool) -> _View:
    strength = 0.35 if calm else 1.0
    oblique = dice.weighted({"frontal": 0.5, "turned": 0.3, "along the aisle": 0.2})
    spread = {"frontal": 0.05, "turned": 0.2, "along the aisle": 0.42}[oblique]
    return _View(
        yaw=strength * spread * dice.between(0.3, 1.0) * dice.pick((-1, 1)),
        pitch=dice.rng.normal() * 0.04 * strength,
        roll=math.radians(dice.rng.normal() * 1.2 if dice.chance(0.85) else dice.between(-6, 6) * strength),
        bend=dice.rng.normal() * 0.006 if dice.chance(0.8) else dice.between(-0.03, 0.025) * strength,
        eye_x=dice.between(-0.5, 0.5),
        eye_y=dice.between(-1.2, 1.2) * strength,
    )


def _lens(view: _View, size_wh: tuple[int, int], canvas_wh: tuple[int, int]) -> tuple[Floats, Floats, Floats]:
    """Where each picture pixel looks on the canvas (x, y), and how many canvas pixels it stands for."""
    width, height = size_wh
    columns, rows = max(9, width // 16), max(9, height // 16)
    x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
    radial = 1 + view.bend * (x * x + y * y)
    x, y = x * radial, y * radial
    depth = 1 + view.yaw * x + view.pitch * y
    x, y = (x - view.eye_x) / depth + view.eye_x, (y - view.eye_y) / depth + view.eye_y
    x, y = x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2
    aspect, c, s = height / width, math.cos(view.roll), math.sin(view.roll)
    x, y = x * c - y * aspect * s, x * s / aspect + y * c
    reach = 1 + 2 * MARGIN
    fit = min(1.0, 0.995 * reach / max(float(np.abs(x).max()), float(np.abs(y).max())))
    map_x = ((x * fit / reach + 1) / 2 * canvas_wh[0]).astype(np.float32)
    map_y = ((y * fit / reach + 1) / 2 * canvas_wh[1]).astype(np.float32)
    step_x, step_y = (width - 1) / (columns - 1), (height - 1) / (rows - 1)
    area = np.abs(
        np.gradient(map_x, step_x, axis=1) * np.gradient(map_y, step_y, axis=0)
        - np.gradient(map_x, step_y, axis=0) * np.gradient(map_y, step_x, axis=1)
    ).astype(np.float32)
    full_x, full_y, full_area = (cast(Floats, cv2.resize(m, size_wh)) for m in (map_x, map_y, area))
    return full_x, full_y, full_area


def _tone_curve(dice: _Dice) -> Pixels:
    """Exposure, contrast, white balance and black level as one table per channel."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    balance = _floats([dice.between(0.9, 1.1), 1.0, dice.between(0.87, 1.1)])
    exposure = dice.log_between(0.78, 1.42)
    curve = ramp * balance * exposure
    curve = np.where(curve > 0.8, 0.8 + 0.2 * np.tanh((curve - 0.8) / 0.2), curve)
    curve = curve ** dice.log_between(0.7, 1.2)
    contrast = dice.between(0, 0.45)
    curve = (1 - contrast) * curve + contrast * (curve * curve * (3 - 2 * np.minimum(curve, 1)))
    lift = dice.between(0, 0.08) if dice.chance(0.4) else 0.0
    return cast(Pixels, np.clip(255 * (lift + (1 - lift) * curve), 0, 255).astype(np.uint8).reshape(256, 1, 3))


def _photograph(dice: _Dice, rgb: Pixels) -> Pixels:
    """What a camera does to the scene: light, blur, grain, sharpening, compression."""
    height, width = rgb.shape[:2]
    unit = min(height, width) / 512
    x, y = np.meshgrid(np.linspace(-1, 1, 24, dtype=np.float32), np.linspace(-1, 1, 24, dtype=np.float32))
    light = 1 - dice.between(0, 0.3) * (x * x + y * y) / 2
    light *= 1 + dice.between(-0.2, 0.2) * x + dice.between(-0.25, 0.2) * y
    if dice.chance(0.15):  # a dark corner or side
        light *= 1 - 0.6 * np.clip(x * dice.pick((-1, 1)) + y * dice.between(-1, 1) - dice.between(0, 0.6), 0, 1)
    small = (np.clip(light, 0.15, 1.6) * 128).astype(np.uint8)
    shade = cv2.cvtColor(cv2.resize(small, (width, height)), cv2.COLOR_GRAY2RGB)
    photo = cv2.multiply(rgb, shade, scale=1 / 128)
    photo = cv2.LUT(photo, _tone_curve(dice))
    if dice.chance(0.3):
        grey = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        keep = dice.between(0.6, 1.25)
        photo = cv2.addWeighted(photo, keep, grey, 1 - keep, 0)
    softness = dice.weighted({"sharp": 0.46, "soft": 0.35, "defocus": 0.04, "motion": 0.05, "enlarged": 0.1})
    if softness == "soft":
        photo = cv2.GaussianBlur(photo, (0, 0), dice.between(0.4, 1.0))
    elif softness == "defocus":
        photo = cv2.GaussianBlur(photo, (0, 0), dice.between(0.9, 1.7) * unit**0.5)
    elif softness == "motion":
        reach = dice.whole(1, 3)
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
        angle = dice.between(0, math.pi)
        dx, dy = round(reach * math.cos(angle)), round(reach * math.sin(angle))
        cv2.line(kernel, (reach - dx, reach - dy), (reach + dx, reach + dy), 1.0, 1)
        photo = cv2.filter2D(photo, -1, kernel / kernel.sum())
    elif softness == "enlarged":
        share = dice.between(0.45, 0.85)
        less = cv2.resize(photo, (int(width * share), int(height * share)), interpolation=cv2.INTER_AREA)
        photo = cv2.resize(less, (width, height), interpolation=cv2.INTER_LINEAR)
    if dice.chance(0.75):
        photo = _grain(dice, photo)
    if dice.chance(0.45):
        amount = dice.between(0.2, 1.1)
        photo = cv2.addWeighted(photo, 1 + amount, cv2.GaussianBlur(photo, (0, 0), dice.between(0.7, 1.6)), -amount, 0)
    if dice.chance(0.85):
        quality = dice.whole(45, 96)
        _, data = cv2.imencode(".jpg", photo[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        photo = cast(Pixels, cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
    return cast(Pixels, np.ascontiguousarray(photo))


@functools.cache
def _grain_tile(blurred: bool) -> npt.NDArray[np.int16]:
    tile = np.random.default_rng(21).standard_normal((768, 768, 3)).astype(np.float32)
    if blurred:
        tile = cast(Floats, cv2.GaussianBlur(tile, (0, 0), 0.8)) * 2.6
    return cast("npt.NDArray[np.int16]", np.round(tile * 64).astype(np.int16))


def _grain(dice: _Dice, photo: Any) -> Any:
    height, width = photo.shape[:2]
    tile = _grain_tile(dice.chance(0.5))
    y, x = dice.whole(0, 255), dice.whole(0, 255)
    tiles = (-(-height // 512), -(-width // 512), 1)
    patch = np.tile(tile[y : y + 512, x : x + 512], tiles)[:height, :width]
    return cv2.addWeighted(photo, 1, patch, dice.log_between(0.6, 9) / 64, 0, dtype=cv2.CV_8U)


# --- the picture ------------------------------------------------------------------------------------------------------


def render_shelf(
    seed: int, size_wh: tuple[int, int], *, textures: Textures | None = None, facing_px: float | None = None
) -> Shelf:
    """Render one photo. `facing_px` is the typical width of a facing in pixels.

    When None, small pictures are pieces of a shelf with facings of any usual size; from 900 px on the shorter side they
    are photos of a whole shelf with some 100 to 200 facings. Raises ValueError for sides below 32 px.
    """
    width, height = size_wh
    if width < 32 or height < 32:
        raise ValueError(f"size_wh: expected at least 32 x 32 pixels, got {width} x {height}")
    dice = _Dice(seed)
    whole = facing_px is None and min(size_wh) >= 900
    if whole:
        facing_px = math.sqrt(width * height / dice.between(520, 720))
    elif facing_px is None:
        facing_px = dice.log_between(14, 110) * min(size_wh) / 512
    canvas = _Canvas(round(width * (1 + 2 * MARGIN)), round(height * (1 + 2 * MARGIN)))
    view = _new_view(dice, calm=whole)
    _Scene(dice, canvas, facing_px, view, textures).draw(whole=whole)
    map_x, map_y, area = _lens(view, size_wh, (canvas.width, canvas.height))
    rgb = cast(Pixels, cv2.remap(canvas.rgb, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    ids = cast("npt.NDArray[np.uint16]", cv2.remap(canvas.ids, map_x, map_y, cv2.INTER_NEAREST))
    boxes, instance_ids = _labels(ids, area, np.array(canvas.areas, np.float32))
    return Shelf(photo_rgb=_photograph(dice, rgb), boxes_xyxy=boxes, instance_ids=instance_ids)


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
    """Write a page of twelve samples with their boxes."""
    tiles = []
    for i in range(12):
        shelf = render_shelf(seed + i, (512, 512), textures=textures)
        tile = shelf.photo_rgb.copy()
        if i % 3 != 2:  # every third as the network sees it
            for x0, y0, x1, y1 in shelf.boxes_xyxy.astype(int):
                cv2.rectangle(tile, (int(x0), int(y0)), (int(x1) - 1, int(y1) - 1), (0, 255, 0), 1)
        tiles.append(tile)
    page = np.vstack([np.hstack(tiles[i : i + 4]) for i in range(0, 12, 4)])
    if not cv2.imwrite(str(path), page[:, :, ::-1]):
        raise OSError(f"preview: could not write {str(path)!r}")
