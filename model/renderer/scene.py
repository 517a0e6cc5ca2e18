"""What stands before the camera: bays of shelves between ceiling and floor, and what hides them.

Decides which kind of bay stands where. Knows of the camera only where it stands. Does not know how goods are placed or
drawn, nor what the camera makes of the scene.
"""

from __future__ import annotations

import cv2
import numpy as np

from model.renderer.camera import MARGIN
from model.renderer.displays import hanging_packs, trays_from_above, wall_of_packs
from model.renderer.fixtures import draw_ceiling, draw_floor, draw_perforated_wall, draw_post, draw_rail
from model.renderer.foreground import clip_strip, glass_doors, passer_by, signs
from model.renderer.paint import floats, smooth_noise
from model.renderer.rows import stand_row
from model.renderer.shop import Shop
from model.renderer.surroundings import draw_banner, draw_poster, draw_tiles


def draw_scene(shop: Shop, *, whole: bool, decoys: bool) -> None:
    rng, canvas = shop.rng, shop.canvas
    canvas.rgb[:] = shop.style.wall
    small = (128 * (1 + 0.12 * smooth_noise(rng, 32, 32, 0.6))).astype(np.uint8)
    shade = cv2.resize(small, (canvas.width, canvas.height))
    canvas.rgb[:] = cv2.multiply(canvas.rgb, cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB), scale=1 / 128)
    top, bottom = 0.0, float(canvas.height)
    if whole or rng.chance(0.12):
        top = canvas.height * (MARGIN * 0.75 + rng.between(0.0, 0.1 if whole else 0.45))
        draw_ceiling(shop, int(top))
    if whole or rng.chance(0.14):
        bottom = canvas.height * (1 - MARGIN * 0.75 - rng.between(0.02, 0.12 if whole else 0.32))
        draw_floor(shop, int(bottom), tiled=decoys and rng.chance(0.5))
    x = -rng.between(0, 2) * shop.facing_px
    ledges = _ledges(shop, top, bottom)
    while x < canvas.width:
        width = shop.facing_px * rng.log_between(9, 30) * (rng.between(0.15, 1) if x < 0 else 1.0)
        if rng.chance(0.35):
            ledges = _ledges(shop, top, bottom)
        mode = rng.weighted({"shelf": 8.2, "wall": 1.0, "hooks": 0.5, "top": 0.15, "tiles": 0.25 if decoys else 0.0})
        _bay(shop, x, x + width, ledges, mode)
        x += width
        if rng.chance(0.45):
            post = shop.facing_px * rng.between(0.06, 0.5)
            draw_post(shop, x, post, top, bottom)
            x += post
    if rng.chance(0.14):
        glass_doors(rng, canvas, shop.facing_px)
    if rng.chance(0.1):
        clip_strip(rng, canvas, shop.facing_px, shop.designer)
    if decoys and rng.chance(0.15):
        for _ in range(rng.whole(1, 3)):
            draw_poster(shop, rng.between(-0.1, 1) * canvas.width, rng.between(-0.1, 1) * canvas.height)
    if decoys and rng.chance(0.1):
        left = rng.between(-0.2, 0.6) * canvas.width
        draw_banner(
            shop, left, left + canvas.width * rng.between(0.4, 1.2), top + rng.between(-0.1, 0.7) * (bottom - top)
        )
    signs(rng, canvas, shop.facing_px)
    if rng.chance(0.08):
        passer_by(rng, canvas, shop.facing_px)


def _ledges(shop: Shop, top: float, bottom: float) -> list[tuple[float, float]]:
    """From the floor up: (y of the shelf's surface, room above it)."""
    rng = shop.rng
    ledges = []
    y = bottom + (rng.between(0, 2.5) * shop.facing_px if bottom >= shop.canvas.height else 0)
    typical = shop.facing_px * rng.log_between(2.7, 5.8)
    while y > top + 0.5 * shop.facing_px:
        room = typical * rng.log_between(0.72, 1.4)
        if y - room < top:
            room = y - top
        rail = max(shop.facing_px * 0.1, room * rng.between(0.06, 0.12))
        ledges.append((y, room))
        y -= room + rail
    return ledges


def _bay(shop: Shop, x0: float, x1: float, ledges: list[tuple[float, float]], mode: str) -> None:
    rng, style, canvas = shop.rng, shop.style, shop.canvas
    x1 = min(x1, canvas.width + shop.facing_px)
    if not ledges:  # ceiling and floor leave no room
        return
    if mode == "wall":
        wall_of_packs(shop, x0, x1, ledges)
        return
    if mode == "top":
        trays_from_above(shop, x0, x1, ledges)
        return
    if mode == "tiles":
        draw_tiles(shop, x0, ledges[-1][0] - ledges[-1][1], x1, ledges[0][0])
        if rng.chance(0.6):
            draw_poster(shop, rng.between(x0, x1), rng.between(0, canvas.height))
        return
    if rng.chance(0.2) or mode == "hooks":
        draw_perforated_wall(shop, x0, x1, ledges)
    for i, (y, room) in enumerate(ledges):
        if y - room > canvas.height or y < 0:
            continue
        share = rng.between(0.06, 0.11) if rng.chance(0.75) else rng.between(0.1, 0.2)
        rail = 0.0 if i == 0 and y >= canvas.height else max(shop.facing_px * 0.12, room * share)
        # the surface of the shelf, seen from above or below
        lip = max(0.0, shop.rise(y)) * room * rng.between(0.5, 1.2)
        canvas.fill(x0, y - lip, x1, y, style.board, covers=False)
        canvas.scale_light(x0, y - room, x1, y, floats([style.ambient * 0.55, style.ambient, style.ambient * 1.1]))
        if mode == "hooks" or rng.chance(0.035):
            hanging_packs(shop, x0, x1, y, room)
        else:
            stand_row(shop, x0, x1, y, room)
        reach = room * rng.between(0.1, 0.4)
        canvas.scale_light(x0, y - room, x1, y - room + reach, floats([rng.between(0.55, 1), 0.95, 1]))
        if rng.chance(0.25):
            canvas.scale_light(x0, y - room, x1, y, floats([1, rng.between(0.8, 1), rng.between(0.65, 1)]))
        lift = rail * rng.between(0, 0.35) if rng.chance(0.35) else 0.0  # hides the feet of the products
        draw_rail(shop, x0, x1, y - lift, rail + lift)
