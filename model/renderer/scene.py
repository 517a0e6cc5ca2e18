"""What stands before the camera: bays of shelves, rows of products, hooks, piles, trays, rails and price tags.

Decides where every unit goes and in which order they hide each other. Knows of the camera only where it stands. Does
not know how a package is drawn, nor what the camera makes of the scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np

from model.renderer.camera import MARGIN, View
from model.renderer.canvas import Canvas, Sprite
from model.renderer.foreground import clip_strip, glass_doors, passer_by, signs
from model.renderer.packages import HANGING, LIDDED, NECKED, SQUARE, STACKABLE
from model.renderer.paint import (
    FONTS,
    Dice,
    Pixels,
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
from model.renderer.products import Designer, Product
from model.renderer.textures import Textures


@dataclass(kw_only=True)
class _Style:
    """What a whole picture shares."""

    wall: Rgb
    rail: Rgb
    tag: Rgb
    tag_chance: float
    board: Rgb
    rise: float  # how far a rear unit shows above its front unit at eye level, per unit height
    drift: float  # and to the side, per unit depth
    depth: float  # how much both change from one end of the canvas to the other
    eye: tuple[float, float]  # where the vanishing point lies, as shares of the canvas
    rear_chance: float
    gap_chance: float
    ambient: float  # light at the back of the shelf
    spacing: float  # typical gap between neighbours, per unit width


def _new_style(dice: Dice, view: View) -> _Style:
    grey = dice.between(35, 110) if dice.chance(0.22) else dice.between(115, 225)
    rail_kind = dice.weighted({"white": 5, "grey": 2.4, "beige": 0.8, "black": 0.7, "colour": 1.2})
    rail: Rgb = {
        "white": (228, 228, 224),
        "grey": (150, 152, 155),
        "beige": (205, 190, 164),
        "black": (35, 35, 38),
        "colour": from_hsv(package_hue(dice), dice.between(0.35, 0.8), dice.between(0.35, 0.85)),
    }[rail_kind]
    warm = dice.between(0.92, 1.05)
    return _Style(
        wall=(int(min(255, grey * warm)), int(grey), int(min(255, grey / warm))),
        rail=tint(rail, dice.between(0.75, 1.05)),
        tag=dice.pick(((248, 248, 245), (248, 248, 245), (250, 225, 60), (240, 240, 250), (230, 60, 50))),
        tag_chance=dice.pick((0.3, 0.7, 0.9, 1.0)),
        board=tint(rail, dice.between(0.4, 0.9)),
        rise=dice.between(-0.02, 0.06),
        drift=math.sin(view.turn) * dice.between(0.6, 1.1),
        depth=dice.between(0.05, 0.3),
        eye=(0.5 + view.eye_x * 0.6, dice.between(-0.3, 0.8)),
        rear_chance=dice.pick((0.5, 0.9, 1.0)),
        gap_chance=0.12 if dice.chance(0.15) else dice.pick((0.0, 0.01, 0.03)),
        ambient=dice.between(0.2, 0.6) if dice.chance(0.3) else dice.between(0.6, 1.0),
        spacing=dice.pick((0.0, 0.0, 0.0, 0.01, 0.02, 0.06)),
    )


class Scene:
    """Fills a canvas with bays of shelves."""

    def __init__(self, dice: Dice, canvas: Canvas, facing_px: float, view: View, textures: Textures | None) -> None:
        self.dice, self.canvas, self.facing_px = dice, canvas, facing_px
        self.style = _new_style(dice, view)
        self.designer = Designer(dice, facing_px, math.cos(view.turn), textures)

    def draw(self, *, whole: bool) -> None:
        dice, canvas = self.dice, self.canvas
        canvas.rgb[:] = self.style.wall
        small = (128 * (1 + 0.12 * smooth_noise(dice, 32, 32, 0.6))).astype(np.uint8)
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
            mode = dice.weighted({"shelf": 8.2, "wall": 1.0, "hooks": 0.5, "top": 0.15})
            self._bay(x, x + width, ledges, mode)
            x += width
            if dice.chance(0.45):
                post = self.facing_px * dice.between(0.06, 0.5)
                self._post(x, post, top, bottom)
                x += post
        if dice.chance(0.14):
            glass_doors(dice, canvas, self.facing_px)
        if dice.chance(0.1):
            clip_strip(dice, canvas, self.facing_px, self.designer)
        signs(dice, canvas, self.facing_px)
        if dice.chance(0.08):
            passer_by(dice, canvas, self.facing_px)

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
        canvas.fill(0, 0, canvas.width, y, from_hsv(dice.unit(), dice.between(0, 0.2), tone / 255))
        for _ in range(dice.whole(0, 7)):
            x, v = dice.whole(-50, canvas.width), dice.whole(0, max(1, y))
            w, h = int(dice.between(0.02, 0.4) * canvas.width), max(2, int(dice.between(0.03, 0.15) * y))
            canvas.fill(
                x, v, x + w, min(y, v + h), dice.pick(((255, 255, 250), (250, 250, 255), (120, 120, 120), (60, 60, 70)))
            )
        canvas.rgb[:y] = cv2.GaussianBlur(canvas.rgb[:y], (0, 0), 2 + 0.02 * canvas.width) if y > 4 else canvas.rgb[:y]
        if dice.chance(0.5):  # the header of the bay
            h = min(y, int(self.facing_px * dice.between(0.8, 3)))
            colour = from_hsv(dice.unit(), dice.between(0, 0.9), dice.between(0.3, 1))
            canvas.fill(0, y - h, canvas.width, y, colour)
            x = 0
            while x < canvas.width and h > 8:
                w = int(h * dice.between(2, 6))
                ink = (250, 250, 250) if luma(colour) < 150 else (30, 30, 40)
                write(canvas.rgb, invented_word(dice, 4, 9), dice.pick(FONTS), (x, y - h * 0.8, w, h * 0.6), ink, 0.12)
                x += w + int(h * dice.between(1, 8))

    def _floor(self, y: int) -> None:
        dice, canvas = self.dice, self.canvas
        rows = canvas.height - y
        if rows < 3:
            return
        tone = dice.between(70, 220)
        colour = floats(from_hsv(dice.between(0.02, 0.16), dice.between(0, 0.3), tone / 255))
        speckle = (
            1 + dice.between(0.02, 0.1) * smooth_noise(dice, rows, canvas.width, dice.between(0.03, 0.3))[:, :, None]
        )
        fade = np.linspace(0.55, 1.1, rows, dtype=np.float32)[:, None, None]
        canvas.rgb[y:] = np.clip(colour * speckle * fade, 0, 255).astype(np.uint8)
        plinth = int(self.facing_px * dice.between(0.3, 1.2))
        canvas.fill(0, y, canvas.width, y + plinth, tint(self.style.rail, dice.between(0.2, 0.9)))
        step = self.facing_px * dice.between(2, 6)
        line = tint(cast(Rgb, tuple(int(c) for c in colour)), 0.7)
        for k in range(1, 5):
            v = int(y + plinth + step * k * k * 0.4)
            canvas.fill(0, v, canvas.width, v + 1, line)

    def _post(self, x: float, width: float, top: float, bottom: float) -> None:
        colour = tint(self.style.rail, self.dice.between(0.3, 1.0))
        canvas = self.canvas
        canvas.fill(x, top, x + width, bottom, colour)
        canvas.fill(x, top, x + max(1, width * 0.15), bottom, tint(colour, 0.6))
        if width > 5:
            step = max(4, int(width * 0.6))
            for y in range(int(top), int(bottom), step):
                canvas.fill(x + width * 0.42, y, x + width * 0.58, y + step // 2, tint(colour, 0.3))

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
            canvas.scale_light(x0, y - room, x1, y, floats([style.ambient * 0.55, style.ambient, style.ambient * 1.1]))
            if mode == "hooks" or dice.chance(0.035):
                self._hanging(x0, x1, y, room)
            else:
                self._row(x0, x1, y, room)
            reach = room * dice.between(0.1, 0.4)
            canvas.scale_light(x0, y - room, x1, y - room + reach, floats([dice.between(0.55, 1), 0.95, 1]))
            if dice.chance(0.25):
                canvas.scale_light(x0, y - room, x1, y, floats([1, dice.between(0.8, 1), dice.between(0.65, 1)]))
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
            wall[k // dot :: step, k % dot :: step] = tint(self.style.wall, 0.45)

    def _rail(self, x0: float, x1: float, y: float, height: float) -> None:
        dice, style, canvas = self.dice, self.style, self.canvas
        if height < 1:
            return
        canvas.fill(x0, y, x1, y + height, style.rail)
        canvas.scale_light(x0, y, x1, y + height, floats([1.0, 0.97, 0.75]))
        canvas.fill(x0, y + height, x1, y + height + max(1, height * 0.12), tint(style.rail, 0.25))
        if dice.chance(0.13):  # a printed strip
            colour = from_hsv(package_hue(dice), dice.between(0.4, 0.9), dice.between(0.3, 0.9))
            canvas.fill(x0, y + height * 0.12, x1, y + height * 0.88, colour)
            if height >= 8 and dice.chance(0.7):
                word, ink = invented_word(dice, 3, 8), (245, 245, 245) if luma(colour) < 150 else (20, 20, 40)
                font, w = dice.pick(FONTS), height * dice.between(1.5, 3.5)
                for k in range(int((x1 - x0) / (1.3 * w))):
                    write(canvas.rgb, word, font, (x0 + 1.3 * w * k, y + 0.25 * height, w, 0.5 * height), ink, 0.15)
        x = x0 + dice.between(0, 2) * self.facing_px
        h = height * (dice.between(0.7, 1.25) if dice.chance(0.85) else dice.between(1.2, 2.6))
        w = h * (dice.between(1.1, 2.4) if h < 1.25 * height else dice.between(0.5, 1.1))
        while x < x1:
            if dice.chance(style.tag_chance) and x + w < x1:
                over = dice.between(0, height * 0.5) if dice.chance(0.12) else 0.0
                under = max(0.0, (height - h) / 2) if h > 1.25 * height else (height - h) / 2
                colour = style.tag if dice.chance(0.85) else (250, 220, 40)
                self._tag(x, y + under - over, w, h + over, colour)
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
            ink = (20, 20, 20) if luma(colour) > 120 else (250, 250, 250)
            price = f"{dice.whole(0, 19)}.{dice.whole(10, 99)}"
            write(canvas.rgb, price, cv2.FONT_HERSHEY_DUPLEX, (x + w * 0.4, y + h * 0.3, w * 0.55, h * 0.45), ink, 0.15)
            for k in range(3):
                v = y + h * (0.2 + 0.2 * k)
                canvas.fill(x + w * 0.06, v, x + w * dice.between(0.2, 0.38), v + max(1, h * 0.06), (110, 110, 110))
        elif h >= 3:
            canvas.fill(x + w * 0.4, y + h * 0.35, x + w * 0.9, y + h * 0.7, (70, 70, 70))

    def _rise(self, y: float) -> float:
        """How far a rear unit shows above its front unit at that height, per unit height: more below the eye."""
        style = self.style
        return float(np.clip(style.rise + style.depth * (y / self.canvas.height - style.eye[1]), -0.04, 0.26))

    def _drift(self, x: float) -> float:
        """How far a rear unit is shifted there, per unit depth: towards the vanishing point."""
        style = self.style
        return style.drift + style.depth * (style.eye[0] - x / self.canvas.width)

    def _row(self, x0: float, x1: float, y: float, room: float) -> None:
        """Stand groups of products side by side on a shelf: rear units first, then the facings, then trays and bars."""
        dice, style, canvas = self.dice, self.style, self.canvas
        groups: list[tuple[Product, float, float, int, int]] = []  # product, from, to, count, levels
        x = x0 + dice.between(0, 0.15) * self.facing_px
        fill = dice.between(0.9, 0.98) if dice.chance(0.85) else dice.between(0.6, 0.9)
        spacing = style.spacing if dice.chance(0.85) else dice.between(0, 0.1)
        self.designer.facing_px = self.facing_px * dice.log_between(0.7, 1.55)
        only = STACKABLE if dice.chance(0.1) else None
        misses = 0
        while x < x1 and misses <= 3:
            if dice.chance(style.gap_chance):
                x += self.facing_px * dice.between(0.3, 2)
                continue
            product = self.designer.product(room * fill / (2 if only else 1), kinds=only)
            step = product.pitch * (1 + spacing)
            if x + product.width > x1:
                misses += 1
                continue
            wanted = dice.whole(1, 4) if dice.chance(0.6) else dice.whole(3, 12)
            count = min(wanted, int((x1 - x - product.width) / step) + 1)
            levels = 1
            if product.kind in STACKABLE and product.height * 2 <= 1.03 * room and dice.chance(0.93):
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
            if h > 8 and (product.kind in SQUARE or product.kind in LIDDED):
                self._solid(product, sprite, *at, on_top=on_top)
        trays = [group for group in placed if dice.chance(0.09)]
        for product, left, right, _, _ in trays:
            self._tray_lip(left, right, y, dice.between(0.12, 0.4) * product.height, product)
        if dice.chance(0.2):
            self._bars(x0, x1, y, room)
        if dice.chance(0.1):  # clear dividers
            for _, left, right, _, _ in placed:
                canvas.fill(left, y - room * 0.4, left + 1, y, (200, 205, 208), covers=False)
                canvas.fill(right, y - room * 0.4, right + 1, y, (200, 205, 208), covers=False)

    def _places(
        self, groups: list[tuple[Product, float, float, int, int]], y: float, room: float, spacing: float
    ) -> tuple[list[tuple[Product, float, float, bool]], list[tuple[int, Product, float, float, bool]]]:
        """Where the front units (product, left, base, whether on top) and the rear ones (depth, product, left, base,
        whether nothing stands before it) are, in the order to draw them in."""
        dice, style = self.dice, self.style
        rise = self._rise(y)
        front: list[tuple[Product, float, float, bool]] = []
        rear: list[tuple[int, Product, float, float, bool]] = []
        for product, start, _, count, levels in groups:
            depth = dice.whole(1, 1 if self.facing_px < 26 else 3) if dice.chance(style.rear_chance) else 0
            if rise < 0.01 and product.kind not in NECKED:
                depth = min(depth, 1)
            stagger = dice.between(-0.5, 0.5) if product.kind in NECKED and dice.chance(0.6) else 0.0
            for i in range(count):
                x = start + i * product.pitch * (1 + spacing)
                here = max(1, levels - (dice.whole(0, 2) if dice.chance(0.2) else 0))
                lost = dice.chance(0.03)
                for level in range(min(levels, here + 1)):
                    for k in range(depth if not lost else max(1, depth), 0, -1):
                        base = y - level * product.height - max(0.0, rise) * product.height * k * 0.8
                        if k > 1 and base - product.height < y - 1.03 * room:
                            continue
                        left = x + self._drift(x) * k * product.depth + stagger * (k % 2) * product.pitch
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

    def _solid(self, product: Product, sprite: Sprite, x: int, y: int, *, on_top: bool) -> None:
        """The top and the side of a unit that are seen at an angle; a neighbour that comes later hides the side.

        The lid of a can is a part of its facing; a box's facing is its front alone, as annotators draw it.
        """
        height, width = sprite.rgb.shape[:2]
        drift, rise = self._drift(x), self._rise(y + height)
        top = int(min(0.16 * height, 0.45 * width * rise * 2)) if on_top else 0
        shift = int(drift * product.depth * 0.8)
        if product.kind in LIDDED:
            if top >= 2:
                lid = np.zeros((2 * top, width, 3), np.uint8)
                lid[:] = tint(product.cap, 1.05)
                alpha = np.zeros((2 * top, width), np.uint8)
                cv2.ellipse(alpha, (width // 2, top), (max(1, int(width * 0.43)), top - 1), 0, 0, 360, 255, -1)
                cv2.ellipse(lid, (width // 2, top), (max(1, int(width * 0.34)), top - 1), 0, 0, 360, product.cap, -1)
                self.canvas.stamp(Sprite(rgb=lid, alpha=alpha), x, y - top // 2, facing=True, grows=True)
            return
        if top >= 2:
            reach = abs(shift)
            image: Pixels = np.empty((top, width + reach, 3), np.uint8)
            image[:] = tint(product.colour, 1.12)
            near = 0 if shift >= 0 else reach
            outline = [(near, top), (near + width - 1, top), (reach - near + width - 1, 0), (reach - near, 0)]
            alpha = np.zeros((top, width + reach), np.uint8)
            cv2.fillConvexPoly(alpha, np.array(outline, np.int32), 255)
            self.canvas.stamp(Sprite(rgb=image, alpha=alpha), x - near, y - top, facing=False)
        if abs(shift) >= 2:
            self._box_side(product, width, height, x, y, shift, top)

    def _box_side(self, product: Product, width: int, height: int, x: int, y: int, shift: int, top: int) -> None:
        """The side of a box, where nothing stands yet."""
        depth = abs(shift)
        left = x + width if shift > 0 else x - depth
        taken = self.canvas.ids[max(0, y + height // 2) : y + height // 2 + 1, max(0, left) : max(0, left + depth)]
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
        self.canvas.stamp(Sprite(rgb=image, alpha=alpha), left, y - top, facing=False)

    def _tray_lip(self, left: float, right: float, y: float, height: float, product: Product) -> None:
        """The front of a shelf-ready tray covers the feet of what stands in it."""
        dice, canvas = self.dice, self.canvas
        colour = product.colour if dice.chance(0.5) else dice.pick(((176, 132, 86), (196, 154, 108), (245, 245, 245)))
        canvas.fill(left, y - height, right, y, colour)
        canvas.fill(left, y - height, right, y - height + 1, tint(colour, 1.25))
        ink = tint(colour, 0.45 if luma(colour) > 90 else 3)
        x = left
        while x + height * 2 < right and height > 5:
            w = height * dice.between(1.6, 4)
            write(
                canvas.rgb,
                invented_word(dice, 4, 8),
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
        top = dice.between(0.12, 0.5)
        for share in (top, top * dice.between(0.3, 0.7))[: dice.whole(1, 2)]:
            canvas.fill(x0, y - room * share, x1, y - room * share + thick, colour, covers=False)
        step = self.facing_px * (dice.log_between(0.5, 3) if dice.chance(0.5) else dice.log_between(0.09, 0.5))
        x = x0
        while x < x1:
            canvas.fill(x, y - room * top, x + min(thick, 0.3 * step), y, colour, covers=False)
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
                product = self.designer.product(tier_room * dice.between(0.75, 0.95), kinds=HANGING)
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
                    x += product.pitch * (1 + gap * dice.between(0.5, 1.5))
                x += product.width * dice.between(0, 0.25)

    def _wall_of_packs(self, x0: float, x1: float, ledges: list[tuple[float, float]]) -> None:
        """A promotion: packs or trays piled up without shelves."""
        dice, canvas = self.dice, self.canvas
        if not ledges:
            return
        floor, top = ledges[0][0], ledges[-1][0] - ledges[-1][1] * dice.between(-2, 0.8)
        kinds = {dice.pick(("box", "box", "flatbox", "flatbox", "multipack", "can", "soda", "pillow"))}
        x = x0
        while x < x1:
            product = self.designer.product(self.facing_px * dice.between(1.4, 3.0), kinds=kinds)
            columns = min(dice.whole(1, 6), max(1, int((x1 - x) / product.pitch)))
            lip = product.height * dice.between(0.1, 0.3) if product.kind in {"can", "soda"} else 0.0
            seam = dice.pick((0, 0, 1, 0.03 * product.height))
            top = min(top, floor - product.height * dice.between(2, 5))
            canvas.fill(x, top, x + columns * product.pitch, floor, tint(product.colour, 0.25), covers=False)
            y = floor
            mix = dice.chance(0.3)
            lengthwise = product.lengthwise(dice) if product.kind in SQUARE and dice.chance(0.4) else product
            while y - product.height >= top:
                layer = dice.pick((product, lengthwise))
                order = range(columns * product.pitch // layer.pitch)
                for column in order if self._drift(x) > 0 else reversed(order):
                    sprite = layer.upright(dice)
                    left = x + column * layer.pitch + (dice.between(-0.03, 0.03) * product.width if seam else 0)
                    canvas.stamp(sprite, round(left), round(y) - sprite.rgb.shape[0], facing=True)
                if lip:
                    self._tray_lip(x, x + columns * product.pitch, y, lip, product)
                y -= product.height + seam
                if mix and dice.chance(0.25):
                    break
            x += columns * product.pitch * dice.between(1.0, 1.04)
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
                canvas.fill(x, y - room, right, y, tint((60, 62, 66), dice.between(0.4, 3)))
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
