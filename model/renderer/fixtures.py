"""What the goods stand on, hang from or lie behind: ceiling and floor, posts, rails with price tags, tray fronts, bars.

Draws each where it is asked to. Does not know which goods are there.
"""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np

from model.renderer.paint import (
    FONTS,
    Rgb,
    floats,
    from_hsv,
    invented_word,
    luma,
    package_hue,
    smooth_noise,
    tint,
    write,
)
from model.renderer.products import Product
from model.renderer.shop import Shop
from model.renderer.surroundings import tiled_floor


def draw_ceiling(shop: Shop, y: int) -> None:
    rng, canvas = shop.rng, shop.canvas
    tone = rng.between(40, 230)
    canvas.fill(0, 0, canvas.width, y, from_hsv(rng.unit(), rng.between(0, 0.2), tone / 255))
    for _ in range(rng.whole(0, 7)):
        x, v = rng.whole(-50, canvas.width), rng.whole(0, max(1, y))
        w, h = int(rng.between(0.02, 0.4) * canvas.width), max(2, int(rng.between(0.03, 0.15) * y))
        canvas.fill(
            x, v, x + w, min(y, v + h), rng.pick(((255, 255, 250), (250, 250, 255), (120, 120, 120), (60, 60, 70)))
        )
    canvas.rgb[:y] = cv2.GaussianBlur(canvas.rgb[:y], (0, 0), 2 + 0.02 * canvas.width) if y > 4 else canvas.rgb[:y]
    if rng.chance(0.5):  # the header of the bay
        h = min(y, int(shop.facing_px * rng.between(0.8, 3)))
        colour = from_hsv(rng.unit(), rng.between(0, 0.9), rng.between(0.3, 1))
        canvas.fill(0, y - h, canvas.width, y, colour)
        x = 0
        while x < canvas.width and h > 8:
            w = int(h * rng.between(2, 6))
            ink = (250, 250, 250) if luma(colour) < 150 else (30, 30, 40)
            write(canvas.rgb, invented_word(rng, 4, 9), rng.pick(FONTS), (x, y - h * 0.8, w, h * 0.6), ink, 0.12)
            x += w + int(h * rng.between(1, 8))


def draw_floor(shop: Shop, y: int, *, tiled: bool) -> None:
    rng, canvas = shop.rng, shop.canvas
    rows = canvas.height - y
    if rows < 3:
        return
    tone = rng.between(70, 220)
    colour = floats(from_hsv(rng.between(0.02, 0.16), rng.between(0, 0.3), tone / 255))
    speckle = 1 + rng.between(0.02, 0.1) * smooth_noise(rng, rows, canvas.width, rng.between(0.03, 0.3))[:, :, None]
    fade = np.linspace(0.55, 1.1, rows, dtype=np.float32)[:, None, None]
    ground = colour * speckle
    if tiled:
        ground = tiled_floor(rng, rows, canvas.width, shop.facing_px * rng.log_between(0.6, 5)) * speckle
    canvas.rgb[y:] = np.clip(ground * fade, 0, 255).astype(np.uint8)
    plinth = int(shop.facing_px * rng.between(0.3, 1.2))
    canvas.fill(0, y, canvas.width, y + plinth, tint(shop.style.rail, rng.between(0.2, 0.9)))
    step = shop.facing_px * rng.between(2, 6)
    line = tint(cast(Rgb, tuple(int(c) for c in colour)), 0.7)
    for k in range(1, 5):
        v = int(y + plinth + step * k * k * 0.4)
        canvas.fill(0, v, canvas.width, v + 1, line)


def draw_post(shop: Shop, x: float, width: float, top: float, bottom: float) -> None:
    colour = tint(shop.style.rail, shop.rng.between(0.3, 1.0))
    canvas = shop.canvas
    canvas.fill(x, top, x + width, bottom, colour)
    canvas.fill(x, top, x + max(1, width * 0.15), bottom, tint(colour, 0.6))
    if width > 5:
        step = max(4, int(width * 0.6))
        for y in range(int(top), int(bottom), step):
            canvas.fill(x + width * 0.42, y, x + width * 0.58, y + step // 2, tint(colour, 0.3))


def draw_perforated_wall(shop: Shop, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
    if not ledges:
        return
    top, bottom = ledges[-1][0] - ledges[-1][1], max(0, int(ledges[0][0]))
    canvas = shop.canvas
    a, b = max(0, int(x0)), min(canvas.width, int(x1))
    wall = canvas.rgb[max(0, int(top)) : bottom, a:b]
    step = max(4, int(shop.facing_px * shop.rng.between(0.2, 0.45)))
    dot = max(1, step // 4)
    for k in range(dot * dot):
        wall[k // dot :: step, k % dot :: step] = tint(shop.style.wall, 0.45)


def draw_rail(shop: Shop, x0: float, x1: float, y: float, height: float) -> None:
    rng, style, canvas = shop.rng, shop.style, shop.canvas
    if height < 1:
        return
    canvas.fill(x0, y, x1, y + height, style.rail)
    canvas.scale_light(x0, y, x1, y + height, floats([1.0, 0.97, 0.75]))
    canvas.fill(x0, y + height, x1, y + height + max(1, height * 0.12), tint(style.rail, 0.25))
    if rng.chance(0.13):  # a printed strip
        colour = from_hsv(package_hue(rng), rng.between(0.4, 0.9), rng.between(0.3, 0.9))
        canvas.fill(x0, y + height * 0.12, x1, y + height * 0.88, colour)
        if height >= 8 and rng.chance(0.7):
            word, ink = invented_word(rng, 3, 8), (245, 245, 245) if luma(colour) < 150 else (20, 20, 40)
            font, w = rng.pick(FONTS), height * rng.between(1.5, 3.5)
            for k in range(int((x1 - x0) / (1.3 * w))):
                write(canvas.rgb, word, font, (x0 + 1.3 * w * k, y + 0.25 * height, w, 0.5 * height), ink, 0.15)
    x = x0 + rng.between(0, 2) * shop.facing_px
    h = height * (rng.between(0.7, 1.25) if rng.chance(0.85) else rng.between(1.2, 2.6))
    w = h * (rng.between(1.1, 2.4) if h < 1.25 * height else rng.between(0.5, 1.1))
    while x < x1:
        if rng.chance(style.tag_chance) and x + w < x1:
            over = rng.between(0, height * 0.5) if rng.chance(0.12) else 0.0
            under = max(0.0, (height - h) / 2) if h > 1.25 * height else (height - h) / 2
            colour = style.tag if rng.chance(0.85) else (250, 220, 40)
            draw_price_tag(shop, x, y + under - over, w, h + over, colour)
        x += w * rng.between(1.05, 1.4) if rng.chance(0.25) else rng.between(0.6, 2.2) * shop.facing_px
    if rng.chance(0.16):  # larger ones, hung before the products
        colour = style.tag if rng.chance(0.4) else rng.pick(((250, 220, 40), (245, 245, 245), (225, 50, 45)))
        w = shop.facing_px * rng.between(0.4, 0.95)
        h = w * rng.between(0.45, 1.0)
        x = x0 + rng.between(0, 3) * shop.facing_px
        while x + w < x1:
            draw_price_tag(shop, x, y + height * 0.3 - h * rng.between(0, 0.7), w, h, colour)
            x += w + shop.facing_px * rng.between(0.5, 5)


def draw_price_tag(shop: Shop, x: float, y: float, w: float, h: float, colour: Rgb) -> None:
    rng, canvas = shop.rng, shop.canvas
    canvas.fill(x, y, x + w, y + h, colour)
    if h >= 6:
        ink = (20, 20, 20) if luma(colour) > 120 else (250, 250, 250)
        price = f"{rng.whole(0, 19)}.{rng.whole(10, 99)}"
        write(canvas.rgb, price, cv2.FONT_HERSHEY_DUPLEX, (x + w * 0.4, y + h * 0.3, w * 0.55, h * 0.45), ink, 0.15)
        for k in range(3):
            v = y + h * (0.2 + 0.2 * k)
            canvas.fill(x + w * 0.06, v, x + w * rng.between(0.2, 0.38), v + max(1, h * 0.06), (110, 110, 110))
    elif h >= 3:
        canvas.fill(x + w * 0.4, y + h * 0.35, x + w * 0.9, y + h * 0.7, (70, 70, 70))


def draw_tray_lip(shop: Shop, left: float, right: float, y: float, height: float, product: Product) -> None:
    """The front of a shelf-ready tray covers the feet of what stands in it."""
    rng, canvas = shop.rng, shop.canvas
    colour = product.colour if rng.chance(0.5) else rng.pick(((176, 132, 86), (196, 154, 108), (245, 245, 245)))
    canvas.fill(left, y - height, right, y, colour)
    canvas.fill(left, y - height, right, y - height + 1, tint(colour, 1.25))
    ink = tint(colour, 0.45 if luma(colour) > 90 else 3)
    x = left
    while x + height * 2 < right and height > 5:
        w = height * rng.between(1.6, 4)
        write(
            canvas.rgb,
            invented_word(rng, 4, 8),
            rng.pick(FONTS),
            (x, y - height * 0.75, w * 0.9, height * 0.5),
            ink,
            0.15,
        )
        x += w * rng.between(1, 1.6)


def draw_bars(shop: Shop, x0: float, x1: float, y: float, room: float) -> None:
    """Thin rods before the products; the products stay whole behind them."""
    rng, canvas = shop.rng, shop.canvas
    thick = max(1, shop.facing_px * rng.between(0.015, 0.05))
    colour = rng.pick(((225, 226, 228), (90, 92, 95), (180, 180, 176)))
    top = rng.between(0.12, 0.5)
    for share in (top, top * rng.between(0.3, 0.7))[: rng.whole(1, 2)]:
        canvas.fill(x0, y - room * share, x1, y - room * share + thick, colour, covers=False)
    step = shop.facing_px * (rng.log_between(0.5, 3) if rng.chance(0.5) else rng.log_between(0.09, 0.5))
    x = x0
    while x < x1:
        canvas.fill(x, y - room * top, x + min(thick, 0.3 * step), y, colour, covers=False)
        x += step
