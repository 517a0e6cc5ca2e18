"""The kinds of package there are: their usual sizes, silhouettes, materials and how light falls on them.

Draws one package of a brand as RGB and alpha. Does not know which packages a picture shows, nor how units of one
product differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np

from model.renderer.artwork import Brand, artwork, printed_photo
from model.renderer.paint import Floats, Pixels, Rng, from_hsv, resized, smooth_noise, tint
from model.renderer.round_packages import ROUND, round_body
from model.renderer.textures import Textures

# Outlines of the other bottles: polygons of (x, y), both as shares.
_OUTLINES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "jug": (((0.3, 0), (0.6, 0), (0.62, 0.12), (0.95, 0.25), (1, 0.4), (1, 1), (0, 1), (0, 0.35), (0.28, 0.14)),),
    "trigger": (
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
    ),
    "pump": (
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
    ),
}

# kind: (weight, aspect h/w low, high, width relative to the typical facing low, high)
KINDS: dict[str, tuple[float, float, float, float, float]] = {
    "box": (3.8, 1.0, 4.6, 0.55, 1.7),
    "flatbox": (0.5, 0.28, 0.7, 1.3, 3.0),
    "bag": (1.6, 1.2, 2.4, 0.85, 1.9),
    "pillow": (0.2, 0.5, 1.1, 1.0, 2.0),
    "carton": (0.8, 1.9, 3.4, 0.7, 1.1),
    "blister": (0.5, 1.5, 3.4, 0.7, 1.4),
    "multipack": (0.5, 0.5, 1.3, 1.5, 2.6),
    "trigger": (0.35, 2.2, 3.2, 0.8, 1.2),
    "pump": (0.35, 2.3, 3.6, 0.65, 1.0),
    "jug": (0.4, 1.3, 2.0, 1.1, 1.8),
    "produce": (0.1, 0.7, 1.3, 0.8, 1.3),
    "cutout": (0.0, 0.7, 3.0, 0.8, 1.4),
    "bottle": (2.0, 2.6, 4.6, 0.6, 1.0),
    "soda": (2.2, 2.1, 3.9, 0.65, 1.2),
    "wine": (0.8, 3.0, 4.5, 0.65, 0.95),
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
STACKABLE = {"box", "flatbox", "can", "tin", "tub", "multipack", "pillow", "cup", "canister", "jar"}
SQUARE = {"box", "flatbox", "carton", "multipack"}
FLAT = SQUARE | {"blister", "cutout"}  # as narrow, seen at an angle, as their front
SOFT = {"bag", "pillow", "tube"}  # between flat and round
LIDDED = {"can", "tin", "tub", "cup"}
NECKED = {"bottle", "soda", "wine", "flask", "spray", "trigger", "pump"}
HANGING = {"blister", "bag"}


def _shaded(image: Pixels, shade: Floats) -> Pixels:
    return cast(Pixels, np.clip(image * shade[:, :, None], 0, 255).astype(np.uint8))


def _soft_pack(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """Bags and pouches: wrinkled, bulging, with crimped ends."""
    rng = Rng((brand.seed, 5))
    image = artwork(brand, variant, width, height, textures)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    wrinkle = smooth_noise(rng, height, width, rng.between(0.15, 0.5))
    shade = 1.08 - 0.3 * x * x + rng.between(0.06, 0.2) * wrinkle
    shade *= 1 - 0.25 * np.exp(-((y - 0.06) ** 2) / 0.001) - 0.2 * np.exp(-((y - 0.97) ** 2) / 0.001)
    shade += np.clip(wrinkle - 1.0, 0, 1) * rng.between(0, 0.9)
    taper = rng.between(0.0, 0.14)
    top_only = rng.chance(0.5)
    sides = 1 - taper * (1 - y) ** 2 - (0 if top_only else taper * y**2)
    sides = sides - 0.03 * np.abs(smooth_noise(rng, height, 1, 0.3))
    alpha = (np.abs(x) <= sides).astype(np.uint8) * 255
    if rng.chance(0.35):  # rounded or drooping upper edge
        sag = rng.between(0.02, 0.12) * (x * x if rng.chance(0.6) else np.abs(np.sin(3 * x + rng.between(0, 6))))
        alpha[np.broadcast_to(y, alpha.shape) < sag] = 0
    return _shaded(image, shade.astype(np.float32)), alpha


def _blister(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """A card with a hole to hang it by and a clear bubble over an object."""
    rng = Rng((brand.seed, 6))
    image = artwork(brand, variant, width, height, textures)
    alpha = np.full((height, width), 255, np.uint8)
    hole = (width // 2, max(2, int(height * 0.06)))
    cv2.ellipse(alpha, hole, (max(1, int(width * 0.1)), max(1, int(height * 0.015))), 0, 0, 360, 0, -1)
    if rng.chance(0.7):
        x0, x1 = int(width * rng.between(0.08, 0.3)), int(width * rng.between(0.7, 0.92))
        y0, y1 = int(height * rng.between(0.3, 0.5)), int(height * rng.between(0.85, 0.95))
        inner = image[y0:y1, x0:x1]
        if inner.size:
            inner[:] = (inner * 0.45 + 110).astype(np.uint8)
            h, w = inner.shape[:2]
            for _ in range(rng.whole(1, 3)):
                colour = from_hsv(rng.unit(), rng.between(0, 1), rng.between(0.1, 1))
                centre = (int(w * rng.between(0.3, 0.7)), int(h * rng.between(0.3, 0.7)))
                axes = (max(1, int(w * rng.between(0.1, 0.4))), max(1, int(h * rng.between(0.1, 0.45))))
                cv2.ellipse(inner, centre, axes, rng.between(-20, 20), 0, 360, colour, -1)
            cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), (235, 238, 240), 1)
            cv2.line(image, (x0 + w // 5, y0 + 2), (x0 + w // 5, y1 - h // 3), (252, 252, 252), max(1, width // 40))
    return image, alpha


def _multipack(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """Several units in film or in an open carton, sold and labelled as one."""
    rng = Rng((brand.seed, 7))
    columns = rng.whole(2, 4)
    unit_w = max(6, width // columns)
    kind = rng.pick(("can", "soda", "bottle", "cup", "can"))
    inner = Brand(
        seed=brand.seed + 1, palette=brand.palette, kind=kind, aspect=1, width=1, word=brand.word, sub=brand.sub
    )
    rgb, alpha = round_body(inner, variant, unit_w, height, textures)
    image: Pixels = np.empty((height, unit_w * columns, 3), np.uint8)
    image[:] = tint(brand.palette[0], 0.35)
    for i in range(columns):
        cv2.copyTo(rgb, alpha, image[:, i * unit_w : (i + 1) * unit_w])
    image = resized(image, width, height)
    film = smooth_noise(rng, height, width, 0.25)
    out = image * rng.between(0.75, 1.0) + (rng.between(10, 50) + 90 * np.clip(film - 0.9, 0, 1))[:, :, None]
    image = cast(Pixels, np.clip(out, 0, 255).astype(np.uint8))
    if rng.chance(0.7):
        y0, y1 = int(height * rng.between(0.3, 0.5)), int(height * rng.between(0.7, 1.0))
        band = artwork(brand, variant, width, max(4, y1 - y0), textures)
        image[y0 : y0 + band.shape[0]] = band[: height - y0]
    return image, np.full((height, width), 255, np.uint8)


def _poly(width: int, height: int, *parts: Sequence[tuple[float, float]]) -> Pixels:
    mask = np.zeros((height, width), np.uint8)
    for part in parts:
        cv2.fillPoly(mask, [np.array([(x * width, y * height) for x, y in part], np.int32)], 255)
    return mask


def _produce(brand: Brand, width: int, height: int) -> tuple[Pixels, Pixels]:
    """Loose fruit and vegetables, without print."""
    rng = Rng((brand.seed, 8))
    colour = from_hsv(
        rng.pick((0.0, 0.04, 0.08, 0.12, 0.22, 0.3, 0.85)), rng.between(0.5, 0.95), rng.between(0.4, 0.95)
    )
    image = printed_photo(rng, height, width, (colour, tint(colour, 0.8), tint(colour, 1.2)))
    yy, xx = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    shade = np.sqrt(np.clip(1.1 - 0.7 * (xx * xx + yy * yy), 0.05, 2)) - 0.15 * yy
    alpha = ((np.abs(xx) ** 2.3 + np.abs(yy) ** 2.3) <= 1).astype(np.uint8) * 255
    return _shaded(image, shade.astype(np.float32)), cast(Pixels, alpha)


def _carton(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """Drink cartons with a sloping roof and often a screw cap."""
    rng = Rng((brand.seed, 8))
    image = artwork(brand, variant, width, height, textures)
    roof = int(height * rng.between(0.1, 0.2))
    alpha = _poly(
        width,
        height,
        ((0, roof / height), (0.12, 0.05), (0.12, 0), (0.88, 0), (0.88, 0.05), (1, roof / height), (1, 1), (0, 1)),
    )
    image[:roof] = (image[:roof] * 0.8).astype(np.uint8)
    image[roof : roof + 1] = (image[roof : roof + 1] * 0.6).astype(np.uint8)
    if rng.chance(0.6):
        colour = rng.pick((brand.palette[2], (245, 245, 245)))
        cv2.circle(image, (width // 2, max(2, int(roof * 0.55))), max(1, int(width * 0.17)), colour, -1)
    return image, alpha


def _outlined(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """Jugs, trigger sprays and pumps: bodies that no profile describes."""
    rng = Rng((brand.seed, 8))
    image = artwork(brand, variant, width, height, textures)
    alpha = _poly(width, height, *_OUTLINES[brand.kind])
    if brand.kind == "jug":
        image[:] = np.where(np.linspace(0, 1, height)[:, None, None] < 0.3, np.array(brand.palette[0], np.uint8), image)
        hole = int(width * 0.82), int(height * 0.42)
        axes = max(1, int(width * 0.07)), max(1, int(height * 0.13))
        cv2.ellipse(image, hole, axes, 0, 0, 360, tint(brand.palette[0], 0.3), -1)
        image[: int(height * 0.12)] = brand.palette[2]
    elif brand.kind == "trigger":
        image[: int(height * 0.24)] = brand.palette[2]
    else:
        image[: int(height * 0.2)] = rng.pick(((245, 245, 245), (30, 30, 30), brand.palette[2]))
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    shade = np.repeat(1.1 - 0.4 * x * x + 0.3 * np.exp(-((x - rng.between(-0.6, 0.6)) ** 2) / 0.01), height, 0)
    return _shaded(image, shade.astype(np.float32)), alpha


def _box(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """A lit face with worn edges."""
    rng = Rng((brand.seed, 8))
    image = artwork(brand, variant, width, height, textures)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    shade = rng.between(0.95, 1.08) + rng.between(-0.12, 0.12) * x + rng.between(-0.12, 0.06) * y
    if rng.chance(0.25):  # gloss
        shade = shade + rng.between(0.1, 0.5) * np.exp(-((x - rng.between(-1, 1) + y) ** 2) / 0.05)
    image = _shaded(image, np.broadcast_to(shade, (height, width)).astype(np.float32))
    edge = rng.between(0.45, 0.95)
    image[:, -1:] = (image[:, -1:] * edge).astype(np.uint8)
    image[-1:] = (image[-1:] * edge).astype(np.uint8)
    return image, np.full((height, width), 255, np.uint8)


def draw_package(
    brand: Brand, variant: int, width: int, height: int, textures: Textures | None
) -> tuple[Pixels, Pixels]:
    """Draw one package: RGB `[height, width, 3]` and alpha `[height, width]`.

    Equal arguments give equal pixels. Cut-out packshots are not drawn here.
    """
    if brand.kind == "produce":
        return _produce(brand, width, height)
    draw = round_body if brand.kind in ROUND else _FAMILIES.get(brand.kind, _box)
    return draw(brand, variant, width, height, textures)


_FAMILIES = {
    "bag": _soft_pack,
    "pillow": _soft_pack,
    "blister": _blister,
    "multipack": _multipack,
    "carton": _carton,
    "trigger": _outlined,
    "pump": _outlined,
    "jug": _outlined,
}
