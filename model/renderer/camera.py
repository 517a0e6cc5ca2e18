"""The camera: where it stands and how its lens bends the scene, then light, tone, blur, grain and compression.

Knows pixels and pixel coordinates. Does not know what is in the picture.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from model.renderer.paint import Floats, Pixels, Rng, floats

MARGIN = 0.12  # canvas beyond each edge of the picture, as a share of its side


@dataclass(frozen=True, kw_only=True)
class View:
    """How the camera stands to the shelf. Yaw and pitch are the relative change of distance across half the picture."""

    turn: float  # radians between the camera's picture and the shelf's front; positive: the right is nearer
    yaw: float
    pitch: float
    roll: float  # radians
    bend: float  # radial distortion; negative is barrel-shaped
    eye_x: float  # where the horizon and the middle of the aisle lie, in half pictures from the middle
    eye_y: float


def new_view(rng: Rng, *, calm: bool) -> View:
    strength = 0.35 if calm else 1.0
    oblique = rng.weighted({"frontal": 0.42, "turned": 0.33, "along the aisle": 0.25})
    low, high = {"frontal": (0, 10), "turned": (10, 35), "along the aisle": (35, 66)}[oblique]
    turn = strength * math.radians(rng.between(low, high)) * rng.pick((-1, 1))
    seen = rng.between(0.1, 0.45)  # tangent of half the angle that the picture covers
    return View(
        turn=turn,
        yaw=min(0.48, math.tan(abs(turn)) * seen) * (1 if turn > 0 else -1),
        pitch=rng.normal() * 0.04 * strength,
        roll=math.radians(rng.normal() * 1.2 if rng.chance(0.85) else rng.between(-6, 6) * strength),
        bend=rng.normal() * 0.006 if rng.chance(0.8) else rng.between(-0.03, 0.025) * strength,
        eye_x=rng.between(-0.5, 0.5),
        eye_y=rng.between(-1.2, 1.2) * strength,
    )


def lens(view: View, size_wh: tuple[int, int], canvas_wh: tuple[int, int]) -> tuple[Floats, Floats, Floats]:
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


def _tone_curve(rng: Rng) -> Pixels:
    """Exposure, contrast, white balance and black level as one table per channel."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    balance = floats([rng.between(0.9, 1.1), 1.0, rng.between(0.87, 1.1)])
    exposure = rng.log_between(0.78, 1.42)
    curve = ramp * balance * exposure
    curve = np.where(curve > 0.8, 0.8 + 0.2 * np.tanh((curve - 0.8) / 0.2), curve)
    curve = curve ** rng.log_between(0.7, 1.2)
    contrast = rng.between(0, 0.45)
    curve = (1 - contrast) * curve + contrast * (curve * curve * (3 - 2 * np.minimum(curve, 1)))
    lift = rng.between(0, 0.08) if rng.chance(0.4) else 0.0
    return cast(Pixels, np.clip(255 * (lift + (1 - lift) * curve), 0, 255).astype(np.uint8).reshape(256, 1, 3))


def photograph(rng: Rng, rgb: Pixels) -> Pixels:
    """What a camera does to the scene: light, blur, grain, sharpening, compression."""
    height, width = rgb.shape[:2]
    unit = min(height, width) / 512
    x, y = np.meshgrid(np.linspace(-1, 1, 24, dtype=np.float32), np.linspace(-1, 1, 24, dtype=np.float32))
    light = 1 - rng.between(0, 0.3) * (x * x + y * y) / 2
    light *= 1 + rng.between(-0.2, 0.2) * x + rng.between(-0.25, 0.2) * y
    if rng.chance(0.15):  # a dark corner or side
        light *= 1 - 0.6 * np.clip(x * rng.pick((-1, 1)) + y * rng.between(-1, 1) - rng.between(0, 0.6), 0, 1)
    small = (np.clip(light, 0.15, 1.6) * 128).astype(np.uint8)
    shade = cv2.cvtColor(cv2.resize(small, (width, height)), cv2.COLOR_GRAY2RGB)
    photo = cv2.multiply(rgb, shade, scale=1 / 128)
    photo = cv2.LUT(photo, _tone_curve(rng))
    if rng.chance(0.3):
        grey = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        keep = rng.between(0.6, 1.25)
        photo = cv2.addWeighted(photo, keep, grey, 1 - keep, 0)
    softness = rng.weighted(
        {"sharp": 0.4, "soft": 0.31, "defocus": 0.04, "motion": 0.05, "enlarged": 0.1, "smeared": 0.1}
    )
    if softness == "soft":
        photo = cv2.GaussianBlur(photo, (0, 0), rng.between(0.4, 1.0))
    elif softness == "defocus":
        photo = cv2.GaussianBlur(photo, (0, 0), rng.between(0.9, 1.7) * unit**0.5)
    elif softness == "motion":
        reach = rng.whole(1, 3)
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
        angle = rng.between(0, math.pi)
        dx, dy = round(reach * math.cos(angle)), round(reach * math.sin(angle))
        cv2.line(kernel, (reach - dx, reach - dy), (reach + dx, reach + dy), 1.0, 1)
        photo = cv2.filter2D(photo, -1, kernel / kernel.sum())
    elif softness == "enlarged":
        share = rng.between(0.45, 0.85)
        less = cv2.resize(photo, (int(width * share), int(height * share)), interpolation=cv2.INTER_AREA)
        photo = cv2.resize(less, (width, height), interpolation=cv2.INTER_LINEAR)
    elif softness == "smeared":  # grain that a phone has taken away again, and fine print with it
        photo = cv2.medianBlur(_grain(rng, photo), rng.pick((3, 3, 5)))
    if rng.chance(0.35 if softness == "smeared" else 0.75):
        photo = _grain(rng, photo)
    if rng.chance(0.45):
        amount = rng.between(0.2, 1.1)
        photo = cv2.addWeighted(photo, 1 + amount, cv2.GaussianBlur(photo, (0, 0), rng.between(0.7, 1.6)), -amount, 0)
    if rng.chance(0.85):
        quality = rng.whole(45, 96)
        _, data = cv2.imencode(".jpg", photo[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        photo = cast(Pixels, cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
    return cast(Pixels, np.ascontiguousarray(photo))


@functools.cache
def _grain_tile(blurred: bool) -> npt.NDArray[np.int16]:
    tile = np.random.default_rng(21).standard_normal((768, 768, 3)).astype(np.float32)
    if blurred:
        tile = cast(Floats, cv2.GaussianBlur(tile, (0, 0), 0.8)) * 2.6
    return cast("npt.NDArray[np.int16]", np.round(tile * 64).astype(np.int16))


def _grain(rng: Rng, photo: Any) -> Any:
    height, width = photo.shape[:2]
    tile = _grain_tile(rng.chance(0.5))
    y, x = rng.whole(0, 255), rng.whole(0, 255)
    tiles = (-(-height // 512), -(-width // 512), 1)
    patch = np.tile(tile[y : y + 512, x : x + 512], tiles)[:height, :width]
    return cv2.addWeighted(photo, 1, patch, rng.log_between(0.6, 9) / 64, 0, dtype=cv2.CV_8U)
