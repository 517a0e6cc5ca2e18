"""Goods that do not stand in rows: packs on hooks, walls of packs, trays seen from above.

Decides where each unit goes. Does not know how a package is drawn.
"""

from __future__ import annotations

from model.renderer.fixtures import draw_price_tag, draw_tray_lip
from model.renderer.packages import HANGING, SQUARE
from model.renderer.paint import tint
from model.renderer.shop import Shop


def hanging_packs(shop: Shop, x0: float, x1: float, y: float, room: float) -> None:
    """Packs on hooks, in one to three tiers, with the packs behind them peeping out."""
    rng, canvas = shop.rng, shop.canvas
    tiers = rng.whole(1, max(1, min(3, int(room / (1.4 * shop.facing_px)))))
    tier_room = room / tiers
    for tier in range(tiers):
        top = y - room + tier * tier_room
        x = x0 + rng.between(0.05, 0.3) * shop.facing_px
        gap = rng.log_between(0.015, 0.3)
        while x < x1:
            product = shop.designer.product(tier_room * rng.between(0.75, 0.95), kinds=HANGING)
            for _ in range(rng.whole(1, 4)):
                if x + product.width > x1:
                    break
                drop = top + tier_room * 0.06 + rng.between(0, 0.02) * tier_room
                if not rng.chance(0.08):
                    for k in range(rng.whole(0, 3), 0, -1):
                        left = x + rng.between(-0.05, 0.05) * product.width
                        canvas.stamp(product.rear, round(left), round(drop - k * 0.015 * tier_room), facing=False)
                    canvas.stamp(product.unit(rng), round(x), round(drop), facing=True)
                middle = x + product.width / 2
                canvas.fill(middle - 1, top, middle + 1, drop + product.height * 0.05, (200, 200, 205), covers=False)
                if rng.chance(0.4):
                    w = product.width * rng.between(0.25, 0.5)
                    draw_price_tag(shop, middle - w / 2, drop - w * 0.2, w, w * 0.5, shop.style.tag)
                x += product.pitch * (1 + gap * rng.between(0.5, 1.5))
            x += product.width * rng.between(0, 0.25)


def wall_of_packs(shop: Shop, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
    """A promotion: packs or trays piled up without shelves."""
    rng, canvas = shop.rng, shop.canvas
    if not ledges:
        return
    floor, top = ledges[0][0], ledges[-1][0] - ledges[-1][1] * rng.between(-2, 0.8)
    kinds = {rng.pick(("box", "box", "flatbox", "flatbox", "multipack", "can", "soda", "pillow"))}
    x = x0
    while x < x1:
        product = shop.designer.product(shop.facing_px * rng.between(1.4, 3.0), kinds=kinds)
        columns = min(rng.whole(1, 6), max(1, int((x1 - x) / product.pitch)))
        lip = product.height * rng.between(0.1, 0.3) if product.kind in {"can", "soda"} else 0.0
        seam = rng.pick((0, 0, 1, 0.03 * product.height))
        top = min(top, floor - product.height * rng.between(2, 5))
        canvas.fill(x, top, x + columns * product.pitch, floor, tint(product.colour, 0.25), covers=False)
        y = floor
        mix = rng.chance(0.3)
        lengthwise = product.lengthwise(rng) if product.kind in SQUARE and rng.chance(0.4) else product
        while y - product.height >= top:
            layer = rng.pick((product, lengthwise))
            order = range(columns * product.pitch // layer.pitch)
            for column in order if shop.drift(x) > 0 else reversed(order):
                sprite = layer.upright(rng)
                left = x + column * layer.pitch + (rng.between(-0.03, 0.03) * product.width if seam else 0)
                canvas.stamp(sprite, round(left), round(y) - sprite.rgb.shape[0], facing=True)
            if lip:
                draw_tray_lip(shop, x, x + columns * product.pitch, y, lip, product)
            y -= product.height + seam
            if mix and rng.chance(0.25):
                break
        x += columns * product.pitch * rng.between(1.0, 1.04)
        if x + product.width > x1:
            break


def trays_from_above(shop: Shop, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
    """Chest freezers, produce: units seen from above, in compartments."""
    rng, canvas = shop.rng, shop.canvas
    for y, room in ledges:
        x = x0
        while x < x1:
            kinds = {rng.pick(("produce", "box", "pillow", "flatbox", "bag"))}
            product = shop.designer.product(min(room, shop.facing_px * 1.6), kinds=kinds)
            right = min(x1, x + product.width * rng.between(2, 5))
            canvas.fill(x, y - room, right, y, tint((60, 62, 66), rng.between(0.4, 3)))
            top = y - room * 0.98
            while top < y - 0.5 * product.height:
                shift = rng.between(-0.2, 0.2) * product.width if product.kind == "produce" else 0.0
                left = x + shift
                while left + product.width * 0.8 < right:
                    jitter = rng.between(-0.08, 0.08) * product.height
                    canvas.stamp(product.unit(rng), round(left), round(top + jitter), facing=True)
                    left += product.width * rng.between(0.92, 1.06)
                top += product.height * rng.between(0.8, 1.0)
            wall = max(2, shop.facing_px * 0.12)
            canvas.fill(right - wall, y - room, right, y, (205, 206, 208))
            x = right
        canvas.fill(x0, y, x1, y + shop.facing_px * 0.3, shop.style.rail)
