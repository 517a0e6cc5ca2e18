"""Bodies of revolution: bottles, cans, jars, tubs and tubes, with their caps, labels, liquids and reflections.

Knows their profiles and how light falls on them. Does not know which of them a picture shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

from model.renderer.artwork import Brand, artwork
from model.renderer.paint import Floats, Pixels, Rgb, Rng, from_hsv, package_hue, tint
from model.renderer.textures import Textures

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
ROUND = frozenset(_PROFILES)


class _Body(NamedTuple):
    """The shape and the content of one body. Heights are shares from the top.

    y: middles of the rows. profile: the width of each, as a share of the widest. liquid: what is inside, "" where the
    body hides it.
    """

    y: Floats
    profile: Floats
    cap_end: float
    label_top: float
    label_end: float
    colour: Rgb
    liquid: str


def round_body(brand: Brand, variant: int, width: int, height: int, textures: Textures | None) -> tuple[Pixels, Pixels]:
    """One package: RGB `[height, width, 3]` and alpha `[height, width]`. brand.kind: one of ROUND."""
    rng = Rng((brand.seed, 3))
    body = _shape(rng, brand, variant, height)
    image = _surface(rng, brand, variant, body, width, textures)
    shade, light = _light(rng, brand.kind, body, width)
    out = image * (shade * rng.between(0.95, 1.15))[:, :, None] + (light * 150)[:, :, None]
    x = _across(width)
    alpha = (np.abs(x)[None, :] <= body.profile[:, None]).astype(np.uint8) * 255
    if body.liquid in {"clear", "vivid", "green", "amber"}:
        # What stands behind shines through, but for cap and label.
        through = alpha[int(height * body.cap_end) : int(height * body.label_top)]
        np.minimum(through, 205, out=through)
    if brand.kind == "tube" and rng.chance(0.4):
        out, alpha = out[::-1], alpha[::-1]
    return cast(Pixels, np.clip(out, 0, 255).astype(np.uint8)), cast(Pixels, np.ascontiguousarray(alpha))


def _across(width: int) -> Floats:
    """Middles of the columns, from -1 to 1."""
    return cast(Floats, (np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1)


def _shape(rng: Rng, brand: Brand, variant: int, height: int) -> _Body:
    points, cap_end, (label_top, label_end) = _PROFILES[brand.kind]
    y = cast(Floats, (np.arange(height, dtype=np.float32) + 0.5) / height)
    warp = rng.between(0.85, 1.2)
    profile = np.interp(y**warp, [p[0] for p in points], [p[1] for p in points]).astype(np.float32)
    if brand.kind in {"bottle", "flask", "shampoo", "soda"}:
        smooth = cv2.blur(profile[:, None], (1, max(1, height // 24)), borderType=cv2.BORDER_REPLICATE)
        profile = cast(Floats, smooth)[:, 0]
    cap_end, label_top, label_end = (share ** (1 / warp) for share in (cap_end, label_top, label_end))
    colour, liquid = _content(rng, brand, Rng((brand.seed, 4, variant)))
    if liquid and rng.chance(0.35):  # the label sits higher or lower, is narrower or covers all
        label_top = float(np.clip(label_top + rng.between(-0.12, 0.12), cap_end + 0.05, 0.8))
        label_end = float(np.clip(label_top + rng.between(0.14, 0.6), label_top + 0.1, 0.97))
    return _Body(y, profile, cap_end, label_top, label_end, colour, liquid)


def _content(rng: Rng, brand: Brand, own: Rng) -> tuple[Rgb, str]:
    """The colour of a body and the liquid in it, "" where none is seen. own: of the variant."""
    if brand.kind in {"bottle", "soda", "wine", "jar", "flask"} and rng.chance(0.75):
        dark = 2.5 if brand.kind in {"soda", "wine"} else 1.0
        liquid = rng.weighted(
            {"cola": 1.8 * dark, "clear": 1.1, "vivid": 1.1, "green": 0.8, "dark": dark, "amber": 0.7, "milk": 0.3}
        )
        colours: dict[str, Rgb] = {
            "cola": tint((38, 20, 14), own.between(0.4, 1.2)),
            "clear": (176, 186, 190),
            "vivid": from_hsv(package_hue(own), 0.8, own.between(0.4, 0.85)),
            "green": tint((28, 90, 42), own.between(0.5, 1.7)),
            "dark": (22, 24, 30),
            "amber": (150, 84, 24),
            "milk": (236, 232, 222),
        }
        return colours[liquid], liquid
    return (168, 170, 174) if brand.kind in {"can", "tin"} else brand.palette[0], ""


def _surface(rng: Rng, brand: Brand, variant: int, body: _Body, width: int, textures: Textures | None) -> Pixels:
    """Body, label and cap, flat and without light."""
    height = len(body.y)
    ground, second, accent, _ = brand.palette
    image: Pixels = np.empty((height, width, 3), np.uint8)
    image[:] = body.colour
    if brand.kind in {"bottle", "soda", "jar", "flask"} and rng.chance(0.4):
        level = int(height * rng.between(0.12, 0.36))
        image[int(height * body.cap_end) : level] = tint((190, 195, 195), rng.between(0.5, 1.1))
    top = int(height * body.label_top)
    end = max(top + 2, int(height * body.label_end))
    inset = rng.pick((0.0, 0.0, 0.1)) if brand.kind in {"flask", "shampoo", "jar"} else 0.0
    left = int(width * inset)
    face = artwork(brand, variant, max(4, width - 2 * left), end - top, textures)
    image[top:end, left : left + face.shape[1]] = face
    cap = max(0, int(height * body.cap_end))
    cap_colour = rng.pick(((245, 245, 245), (25, 25, 28), accent, second, ground, (190, 160, 80)))
    image[:cap] = cap_colour
    if cap:
        image[cap - 1 : cap] = tint(cap_colour, 0.6)
    return image


def _light(rng: Rng, kind: str, body: _Body, width: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What falls on the body, as a factor, and what it reflects, as a share of white: both `[height, width]`."""
    y = body.y
    across = np.clip(_across(width)[None, :] / np.maximum(body.profile[:, None], 0.05), -1, 1)
    depth = rng.between(0.35, 0.75)
    shade = (1 - depth) + depth * np.sqrt(1.02 - across * across)
    glint, glint_width = rng.between(-0.7, 0.7), rng.between(0.06, 0.25)
    gleam = rng.between(0, 0.5) if kind not in {"can", "soda", "spray"} else rng.between(0.2, 0.9)
    light = gleam * np.exp(-(((across - glint) / glint_width) ** 2))
    if body.liquid and width >= 8:
        light = light + 1.4 * _reflections(rng, across, y)
    if body.liquid in {"vivid", "clear", "amber", "green"} and rng.chance(0.4):  # lit from behind; ribs in the plastic
        glow = rng.between(0.3, 1.2) * (1 - across * across)
        if rng.chance(0.5):
            glow = glow * (1 + rng.between(0.1, 0.4) * np.sin(y * rng.between(40, 90)))[:, None]
        outside = (y < body.label_top) | (y > body.label_end)
        shade = shade * np.where(outside[:, None], 1 + glow, 1.0)
    return shade, light


def _reflections(rng: Rng, across: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The lamps in glass: bright vertical lines that end somewhere, and small spots where a bottle curves most, at its
    shoulder and its foot. `across` the body at heights `y`, both as shares."""
    light = np.zeros_like(across)
    for _ in range(rng.whole(1, 4)):
        middle, width = rng.between(-0.85, 0.85), rng.log_between(0.03, 0.12)
        centre, length = rng.between(0.08, 0.95), rng.log_between(0.05, 0.5)
        ends = np.exp(-(((y - centre) / length) ** 4))[:, None]
        light += rng.between(0.2, 1.4) * ends * np.exp(-(((across - middle) / width) ** 2))
    for _ in range(rng.whole(0, 9)):
        foot = rng.chance(0.5)
        middle, centre = rng.between(-0.8, 0.8), rng.between(0.74, 0.97) if foot else rng.between(0.1, 0.36)
        width, length = rng.log_between(0.05, 0.25), rng.log_between(0.006, 0.03 if foot else 0.08)
        spot = np.exp(-(((y - centre) / length) ** 2))[:, None] * np.exp(-(((across - middle) / width) ** 2))
        light += rng.between(0.4, 1.6) * spot
    return light
