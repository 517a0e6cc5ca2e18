"""What looks like goods and is none: posters with products printed on them, banners with large letters, tiles.

Draws each where it is asked to, over what is there. Does not know where the goods stand.
"""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np

from model.renderer.artwork import printed_photo
from model.renderer.canvas import Sprite
from model.renderer.paint import (
    FONTS,
    Pixels,
    Rgb,
    Rng,
    floats,
    from_hsv,
    invented_word,
    luma,
    package_hue,
    resized,
    smooth_noise,
    tint,
    write,
)
from model.renderer.shop import Shop

GROUT = 0.06  # of a tile's side


def draw_poster(shop: Shop, x: float, y: float) -> None:
    """A board with products printed on it, words and a price; often in a frame."""
    rng = shop.rng
    width = max(8, round(shop.facing_px * rng.log_between(1.5, 7)))
    height = max(8, round(width * rng.log_between(0.55, 1.7)))
    ground = from_hsv(package_hue(rng), rng.between(0, 0.95), rng.between(0.3, 1))
    image: Pixels = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    if rng.chance(0.4):
        image[:] = printed_photo(rng, height, width, (ground, tint(ground, 0.6), (250, 248, 240)))
    _print_products(shop, image)
    ink = _ink_on(ground)
    for _ in range(rng.whole(0, 3)):
        h = height * rng.between(0.06, 0.3)
        top = rng.between(0, height - h)
        write(image, _words(rng), rng.pick(FONTS), (width * 0.06, top, width * 0.88, h), ink, rng.between(0.1, 0.25))
    if rng.chance(0.5):
        edge = max(1, round(width * rng.between(0.01, 0.05)))
        frame = rng.pick(((30, 30, 32), (200, 202, 205), (250, 250, 250)))
        cv2.rectangle(image, (0, 0), (width - 1, height - 1), frame, 2 * edge)
    shop.canvas.stamp(Sprite(rgb=image, alpha=None), round(x), round(y), facing=False)


def _print_products(shop: Shop, image: Pixels) -> None:
    """A row of packs, smaller or larger than those on the shelf, as flat as paper."""
    rng = shop.rng
    height, width = image.shape[:2]
    product = shop.designer.product(shop.facing_px * rng.between(1.5, 4))
    scale = height * rng.between(0.35, 0.85) / product.rgb.shape[0]
    w, h = max(4, round(product.rgb.shape[1] * scale)), max(4, round(product.rgb.shape[0] * scale))
    pack, alpha = resized(product.rgb, w, h), resized(product.alpha, w, h)[:, :, None] / np.float32(255)
    if rng.chance(0.5):  # ink has less contrast than the thing
        pack = cast(Pixels, cv2.convertScaleAbs(pack, alpha=0.75, beta=rng.between(10, 60)))
    x, y = round(rng.between(0, 0.25) * width), round(rng.between(0, 1) * max(0, height - h))
    for _ in range(rng.whole(1, 6)):
        right, bottom = min(width, x + w), min(height, y + h)
        if right - x < 0.4 * w:
            break
        part = alpha[: bottom - y, : right - x]
        under = image[y:bottom, x:right]
        under[:] = (pack[: bottom - y, : right - x] * part + under * (1 - part)).astype(np.uint8)
        x += round(w * rng.between(0.6, 1.3))


def draw_banner(shop: Shop, x0: float, x1: float, y: float) -> None:
    """A strip of one colour whose letters are as large as goods, such as the name of a department."""
    rng = shop.rng
    height = max(4, round(shop.facing_px * rng.log_between(0.8, 4)))
    colour = from_hsv(package_hue(rng), rng.between(0, 0.95), rng.between(0.2, 1))
    strip: Pixels = np.empty((height, max(4, round(x1 - x0)), 3), np.uint8)
    strip[:] = colour
    ink, font = _ink_on(colour), rng.pick(FONTS)
    x = height * rng.between(0.1, 2)
    while x < strip.shape[1]:
        words = _words(rng)
        w = height * 0.55 * len(words)
        write(strip, words, font, (x, height * 0.2, w, height * 0.6), ink, rng.between(0.12, 0.3))
        x += w + height * rng.between(0.3, 4)
    shop.canvas.stamp(Sprite(rgb=strip, alpha=None), round(x0), round(y), facing=False)


def draw_tiles(shop: Shop, x0: float, y0: float, x1: float, y1: float) -> None:
    """A tiled wall: plain tiles, or a mosaic of several colours."""
    left, top = max(0, int(x0)), max(0, int(y0))
    right, bottom = min(shop.canvas.width, int(x1)), min(shop.canvas.height, int(y1))
    if right - left < 2 or bottom - top < 2:
        return
    side = shop.facing_px * shop.rng.log_between(0.25, 2)
    wall = tiles(shop.rng, bottom - top, right - left, (side, side * shop.rng.pick((1, 1, 0.5, 2))))
    shop.canvas.stamp(Sprite(rgb=wall, alpha=None), left, top, facing=False)


def tiled_floor(rng: Rng, rows: int, columns: int, side: float) -> Pixels:
    """A floor of tiles that gets smaller towards the far edge, which is its upper one. side: of a near tile."""
    far = rng.between(0.3, 0.8)  # size of a far tile against a near one
    deep = max(4, round(rows / far))
    flat = tiles(rng, deep, round(columns / far), (side, side))
    height, width = flat.shape[:2]
    inset = (width - columns) / 2
    seen = floats([0, 0, columns, 0, columns + inset, rows, -inset, rows]).reshape(4, 2)
    corners = floats([0, 0, width, 0, width, height, 0, height]).reshape(4, 2)
    view = cv2.getPerspectiveTransform(corners, seen)
    return cast(Pixels, cv2.warpPerspective(flat, view, (columns, rows), borderMode=cv2.BORDER_REFLECT))


def tiles(rng: Rng, rows: int, columns: int, side_wh: tuple[float, float]) -> Pixels:
    """`[rows, columns, 3]`, tiles of these sides with grout between them, each a little different, at times in several
    colours."""
    tone = rng.between(0.25, 0.95)
    ground = from_hsv(rng.unit(), rng.pick((0.05, 0.1, 0.4)), tone)
    palette = [ground]
    if rng.chance(0.4):
        palette += [from_hsv(rng.unit(), rng.between(0, 0.7), rng.between(0.1, 1)) for _ in range(rng.whole(1, 4))]
    step = tuple(max(3.0, side) for side in side_wh)
    down, across = int(rows / step[1]) + 2, int(columns / step[0]) + 2
    choice = smooth_noise(rng, down, across, 0.02)
    if rng.chance(0.3):  # a chessboard
        choice = (np.add.outer(np.arange(down), np.arange(across)) % 2).astype(np.float32)
    number = np.abs(np.floor(choice * 7)).astype(int) % len(palette)
    small = floats([channel for colour in palette for channel in colour]).reshape(-1, 3)[number]
    small *= (1 + rng.between(0, 0.15) * smooth_noise(rng, down, across, 0.02))[:, :, None]
    v, u = (np.arange(extent) / side for extent, side in ((rows, step[1]), (columns, step[0])))
    image = np.clip(small[v.astype(int)][:, u.astype(int)], 0, 255).astype(np.uint8)
    grout = tint(ground, rng.pick((0.5, 0.75, 1.3)))
    image[(v % 1) * step[1] < max(1, GROUT * step[1])] = grout
    image[:, (u % 1) * step[0] < max(1, GROUT * step[0])] = grout
    return cast(Pixels, image)


def _words(rng: Rng) -> str:
    if rng.chance(0.2):
        return f"{rng.whole(1, 99)}{rng.pick(('%', '.99', ' x 2', ''))}"
    return " ".join(invented_word(rng, 3, 8) for _ in range(rng.whole(1, 2)))


def _ink_on(colour: Rgb) -> Rgb:
    return (250, 250, 248) if luma(colour) < 140 else (20, 20, 30)
