"""Rows of products on a shelf: which stand side by side, how many, and in which order they hide each other.

Knows how the sides and tops of units are seen at an angle. Does not know how a package is drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from model.renderer.canvas import Sprite
from model.renderer.fixtures import draw_bars, draw_tray_lip
from model.renderer.packages import LIDDED, NECKED, SQUARE, STACKABLE
from model.renderer.paint import Pixels, tint
from model.renderer.products import Product
from model.renderer.shop import Shop


class _Group(NamedTuple):
    """Units of one product side by side: from x to x, how many next to and on top of each other."""

    product: Product
    start: float
    end: float
    columns: int
    levels: int


class _Front(NamedTuple):
    """A unit that is seen from the front. base: y of its foot."""

    product: Product
    left: float
    base: float
    on_top: bool


class _Rear(NamedTuple):
    """A unit behind others. depth: how many units stand before its place. foremost: whether nothing stands there."""

    depth: int
    product: Product
    left: float
    base: float
    foremost: bool


def stand_row(shop: Shop, x0: float, x1: float, y: float, room: float) -> None:
    """Stand groups of products side by side on a shelf: rear units first, then the facings, then trays and bars."""
    rng, canvas = shop.rng, shop.canvas
    groups, spacing = _choose_groups(shop, x0, x1, room)
    if not groups:
        return
    front, rear = _places(shop, groups, y, room, spacing)
    for unit in rear:
        sprite = unit.product.rear
        canvas.stamp(sprite, round(unit.left), round(unit.base) - sprite.rgb.shape[0], facing=unit.foremost)
    for product, left, base, on_top in front:
        sprite = product.unit(rng)
        h, w = sprite.rgb.shape[:2]
        at = round(left + (product.width - w) / 2), round(base) - h
        canvas.stamp(sprite, *at, facing=True)
        if h > 8 and (product.kind in SQUARE or product.kind in LIDDED):
            _solid(shop, product, sprite, *at, on_top=on_top)
    for group in [group for group in groups if rng.chance(0.09)]:
        height = rng.between(0.12, 0.4) * group.product.height
        draw_tray_lip(shop, group.start, group.end, y, height, group.product)
    if rng.chance(0.2):
        draw_bars(shop, x0, x1, y, room)
    if rng.chance(0.1):  # clear dividers
        for group in groups:
            for x in (group.start, group.end):
                canvas.fill(x, y - room * 0.4, x + 1, y, (200, 205, 208), covers=False)


def _choose_groups(shop: Shop, x0: float, x1: float, room: float) -> tuple[list[_Group], float]:
    """Groups that fill a shelf from x0 to x1, and the gap between neighbours, per unit width."""
    rng, style = shop.rng, shop.style
    groups: list[_Group] = []
    x = x0 + rng.between(0, 0.15) * shop.facing_px
    fill = rng.between(0.9, 0.98) if rng.chance(0.85) else rng.between(0.6, 0.9)
    spacing = style.spacing if rng.chance(0.85) else rng.between(0, 0.1)
    shop.designer.facing_px = shop.facing_px * rng.log_between(0.7, 1.55)
    only = STACKABLE if rng.chance(0.1) else None
    misses = 0
    while x < x1 and misses <= 3:
        if rng.chance(style.gap_chance):
            x += shop.facing_px * rng.between(0.3, 2)
            continue
        product = shop.designer.product(room * fill / (2 if only else 1), kinds=only)
        step = product.pitch * (1 + spacing)
        if x + product.width > x1:
            misses += 1
            continue
        wanted = rng.whole(1, 4) if rng.chance(0.6) else rng.whole(3, 12)
        count = min(wanted, int((x1 - x - product.width) / step) + 1)
        levels = 1
        if product.kind in STACKABLE and product.height * 2 <= 1.03 * room and rng.chance(0.93):
            levels = min(rng.whole(2, 5) if rng.chance(0.3) else 5, int(room * 1.03 / product.height))
        groups.append(_Group(product, x, x + count * step, count, levels))
        x += count * step + product.width * (rng.between(0, 0.03) if rng.chance(0.85) else rng.between(0, 0.3))
    if not groups:
        return [], spacing
    # Part of what is left over goes between the groups, so that the row ends about where the shelf does.
    slack = max(0.0, x1 - max(groups[-1].end, x))
    part = min(slack / len(groups), 0.4 * shop.facing_px)
    spread = [group._replace(start=group.start + i * part, end=group.end + i * part) for i, group in enumerate(groups)]
    return spread, spacing


def _places(
    shop: Shop, groups: list[_Group], y: float, room: float, spacing: float
) -> tuple[list[_Front], list[_Rear]]:
    """Where the front units and the rear ones are, in the order to draw them in."""
    rng, style = shop.rng, shop.style
    rise = shop.rise(y)
    front: list[_Front] = []
    rear: list[_Rear] = []
    for product, start, _, columns, levels in groups:
        depth = rng.whole(1, 1 if shop.facing_px < 26 else 3) if rng.chance(style.rear_chance) else 0
        if rise < 0.01 and product.kind not in NECKED:
            depth = min(depth, 1)
        stagger = rng.between(-0.5, 0.5) if product.kind in NECKED and rng.chance(0.6) else 0.0
        for i in range(columns):
            x = start + i * product.pitch * (1 + spacing)
            here = max(1, levels - (rng.whole(0, 2) if rng.chance(0.2) else 0))
            lost = rng.chance(0.03)
            for level in range(min(levels, here + 1)):
                for k in range(depth if not lost else max(1, depth), 0, -1):
                    base = y - level * product.height - max(0.0, rise) * product.height * k * 0.8
                    if k > 1 and base - product.height < y - 1.03 * room:
                        continue
                    left = x + shop.drift(x) * k * product.depth + stagger * (k % 2) * product.pitch
                    rear.append(_Rear(k, product, left, base, lost and k == 1))
            if not lost:
                wobble = rng.between(-0.02, 0.02) * product.width if spacing else 0.0
                settle = rng.between(0, 0.04) * product.height if rng.chance(0.3) else 0.0
                for level in range(here):
                    base = y - settle - level * product.height
                    front.append(_Front(product, x + wobble, base, level == here - 1))
    rear.sort(key=lambda unit: -unit.depth)
    # From both ends towards the vanishing point: the nearer hides the side of the farther.
    left_part = [unit for unit in front if shop.drift(unit.left) > 0]
    return left_part + [unit for unit in reversed(front) if shop.drift(unit.left) <= 0], rear


def _solid(shop: Shop, product: Product, sprite: Sprite, x: int, y: int, *, on_top: bool) -> None:
    """The top and the side of a unit that are seen at an angle; a neighbour that comes later hides the side.

    The lid of a can is a part of its facing; a box's facing is its front alone, as annotators draw it.
    """
    height, width = sprite.rgb.shape[:2]
    drift, rise = shop.drift(x), shop.rise(y + height)
    top = int(min(0.16 * height, 0.45 * width * rise * 2)) if on_top else 0
    shift = int(drift * product.depth * 0.8)
    if product.kind in LIDDED:
        if top >= 2:
            lid = np.zeros((2 * top, width, 3), np.uint8)
            lid[:] = tint(product.cap, 1.05)
            alpha = np.zeros((2 * top, width), np.uint8)
            cv2.ellipse(alpha, (width // 2, top), (max(1, int(width * 0.43)), top - 1), 0, 0, 360, 255, -1)
            cv2.ellipse(lid, (width // 2, top), (max(1, int(width * 0.34)), top - 1), 0, 0, 360, product.cap, -1)
            shop.canvas.stamp(Sprite(rgb=lid, alpha=alpha), x, y - top // 2, facing=True, grows=True)
        return
    if top >= 2:
        reach = abs(shift)
        image: Pixels = np.empty((top, width + reach, 3), np.uint8)
        image[:] = tint(product.colour, 1.12)
        near = 0 if shift >= 0 else reach
        outline = [(near, top), (near + width - 1, top), (reach - near + width - 1, 0), (reach - near, 0)]
        alpha = np.zeros((top, width + reach), np.uint8)
        cv2.fillConvexPoly(alpha, np.array(outline, np.int32), 255)
        shop.canvas.stamp(Sprite(rgb=image, alpha=alpha), x - near, y - top, facing=False)
    if abs(shift) >= 2:
        _box_side(shop, product, width, height, x, y, shift, top)


def _box_side(shop: Shop, product: Product, width: int, height: int, x: int, y: int, shift: int, top: int) -> None:
    """The side of a box, where nothing stands yet."""
    depth = abs(shift)
    left = x + width if shift > 0 else x - depth
    taken = shop.canvas.ids[max(0, y + height // 2) : y + height // 2 + 1, max(0, left) : max(0, left + depth)]
    if not taken.size or taken.any():
        return
    image: Pixels = np.empty((height + top, depth, 3), np.uint8)
    image[:] = tint(product.colour, 0.68)
    if width > 24:
        band = image[int(height * 0.25) : int(height * 0.55)]
        band[:] = (band * 0.82).astype(np.uint8)
    near, far = (0, depth - 1) if shift > 0 else (depth - 1, 0)
    alpha = np.zeros((height + top, depth), np.uint8)
    outline = [(near, top), (near, height + top - 1), (far, height - 1), (far, 0)]
    cv2.fillConvexPoly(alpha, np.array(outline, np.int32), 255)
    shop.canvas.stamp(Sprite(rgb=image, alpha=alpha), left, y - top, facing=False)
