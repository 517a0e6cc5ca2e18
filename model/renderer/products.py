"""The products of one picture: which brands and variants it shows, their sizes, and how units of a product differ.

Fits products to the room on a shelf. Does not know where on the shelf they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import cast

import cv2
import numpy as np

from model.renderer.artwork import Brand, new_palette, recolour
from model.renderer.canvas import Sprite
from model.renderer.packages import FLAT, KINDS, SOFT, SQUARE, STACKABLE, draw_package
from model.renderer.paint import Pixels, Rgb, Rng, invented_word, resized
from model.renderer.round_packages import ROUND
from model.renderer.textures import Textures

#: What some departments sell more of than the average shelf does; of all else they have next to nothing.
DEPARTMENTS = {
    "drinks": {"soda": 3.0, "bottle": 2.0, "can": 1.5, "multipack": 1.5, "box": 0.3, "flatbox": 1.0, "flask": 0.6},
    "beer": {"wine": 4.0, "bottle": 3.0, "can": 1.0, "multipack": 0.6, "box": 0.15},
    "cases": {"box": 1.0, "flatbox": 4.0, "multipack": 4.0, "soda": 0.4},
}

MAX_PRODUCTS = 36  # designed for one picture; more groups repeat earlier products


@dataclass(frozen=True, kw_only=True)
class _Print:
    """How one unit differs from its siblings."""

    stretch: float = 1.0
    gain: float = 1.0
    degrees: float = 0.0
    turn: float = 0.0  # about its own axis, as a share of its width


@dataclass(kw_only=True, eq=False)
class Product:
    """A product and its units: prints[0] is the plain one; all are drawn when first used.

    Sizes in pixels, as they are seen at the angle of the camera: width and height of a unit, pitch from one unit of a
    row to the next (round units hide each other), depth of a unit from front to back.
    """

    kind: str
    width: int
    height: int
    pitch: int
    depth: float
    colour: Rgb
    cap: Rgb  # of its lid
    rgb: Pixels  # larger than the units
    alpha: Pixels
    prints: tuple[_Print, ...]
    rear_print: _Print
    _drawn: dict[_Print, Sprite] = field(default_factory=dict)

    def unit(self, rng: Rng) -> Sprite:
        return self._draw(self.prints[0] if rng.chance(0.45) else rng.pick(self.prints))

    def upright(self, rng: Rng) -> Sprite:
        return self._draw(rng.pick(self.prints[:3]))

    def lengthwise(self, rng: Rng) -> Product:
        """The same case turned by a quarter: its long side, with the print of the front on a part of it."""
        width = round(self.width * rng.between(1.4, 2.6))
        rgb: Pixels = np.empty((self.rgb.shape[0], round(self.rgb.shape[1] * width / self.width), 3), np.uint8)
        rgb[:] = self.colour
        at = rng.whole(0, rgb.shape[1] - self.rgb.shape[1])
        rgb[:, at : at + self.rgb.shape[1]] = self.rgb
        return replace(self, width=width, pitch=width, rgb=rgb, alpha=np.full(rgb.shape[:2], 255, np.uint8), _drawn={})

    @property
    def rear(self) -> Sprite:
        return self._draw(self.rear_print)

    def _draw(self, spec: _Print) -> Sprite:
        sprite = self._drawn.get(spec)
        if sprite is None:
            sprite = self._drawn[spec] = self._printed(spec)
        return sprite

    def _printed(self, spec: _Print) -> Sprite:
        width, height = max(4, round(self.width * spec.stretch)), max(4, round(self.height * spec.stretch))
        rgb = np.roll(self.rgb, round(self.rgb.shape[1] * spec.turn), axis=1) if spec.turn else self.rgb
        small = resized(rgb, width, height)
        solid = self.alpha.min() >= 250
        cover: Pixels | None
        if solid and abs(spec.degrees) <= 0.4:
            cover = None
        elif solid:
            cover = np.full((height, width), 255, np.uint8)
        else:
            cover = resized(self.alpha, width, height)
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
        return Sprite(rgb=small, alpha=cover)


class Designer:
    """Invents brands and products for one picture and keeps them for repeats."""

    def __init__(self, rng: Rng, facing_px: float, foreshortening: float, textures: Textures | None) -> None:
        """foreshortening: width of the shelf's front as it is seen, as a share of its width."""
        self.rng = rng
        self.facing_px = facing_px
        self.foreshortening = foreshortening
        self.textures = textures
        self.products: list[Product] = []
        self.brand: Brand | None = None
        taste = Rng(rng.whole(0, 1 << 30))
        # a picture shows a department: a few kinds of packages dominate
        self.kinds = {kind: spec[0] * taste.log_between(0.2, 5) for kind, spec in KINDS.items()}
        if department := taste.weighted({"": 5, "drinks": 3, "beer": 0.8, "cases": 0.8}):
            for kind in self.kinds:
                self.kinds[kind] *= DEPARTMENTS[department].get(kind, 0.04)
        self.block_chance = rng.between(0.5, 0.92)

    def product(self, room_px: float, *, kinds: set[str] | None = None, fresh: bool = False) -> Product:
        """A product of at most `room_px` height; often a variant of the brand that was last used."""
        rng = self.rng
        if len(self.products) >= MAX_PRODUCTS or (self.products and not fresh and rng.chance(0.06)):
            fitting = [
                p
                for p in self.products
                if self._suits(p.kind, p.height, room_px) and (kinds is None or p.kind in kinds)
            ]
            if fitting:
                return cast(Product, rng.pick(fitting))
        brand = self.brand
        usable = (
            brand is not None
            and (kinds is None or brand.kind in kinds)
            and self._suits(brand.kind, brand.width * brand.aspect, room_px)
            and rng.chance(self.block_chance)
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
        levels = max(1, int(1.03 * room_px / height)) if kind in STACKABLE else 1
        return 0.66 * room_px <= levels * height <= 1.02 * room_px

    def _new_brand(self, kinds: set[str] | None, room_px: float) -> Brand:
        rng = self.rng
        weights = {kind: weight for kind, weight in self.kinds.items() if kinds is None or kind in kinds}
        for kind in weights:  # what is far too low for the shelf, and cannot be stacked, stands elsewhere
            _, _, high, narrow, wide = KINDS[kind]
            tallest = 1.3 * self.facing_px * math.sqrt(narrow * wide) * high
            if tallest < (0.4 if kind in STACKABLE else 0.7) * room_px:
                weights[kind] *= 0.08
        if self.textures is not None and self.textures.cutouts and (kinds is None or "cutout" in kinds):
            weights["cutout"] = 0.06 * sum(weights.values())
        kind = rng.weighted(weights)
        _, low, high, narrow, wide = KINDS[kind]
        width = 1.3 * self.facing_px * rng.log_between(narrow, wide)
        aspect = rng.log_between(low, high)
        if rng.chance(0.88):  # shelves are set to the height of what stands on them
            levels = max(1, round(room_px / (width * (0.35 * low + 0.65 * high)))) if kind in STACKABLE else 1
            aspect = float(np.clip(room_px / levels * rng.between(0.82, 1) / width, low, high))
            if levels == 1 and width * aspect < 0.72 * room_px:
                width = min(width * 1.5, 0.8 * room_px / aspect)
        if width * aspect > room_px:
            aspect = max(low, room_px / width)
            width = max(self.facing_px * 0.4, min(width, room_px / aspect))
        return Brand(
            seed=rng.whole(0, 1 << 30),
            palette=new_palette(rng),
            kind=kind,
            aspect=aspect,
            width=width,
            word=invented_word(rng, 3, 8),
            sub=tuple(invented_word(rng, 4, 12) for _ in range(rng.whole(0, 4))),
        )

    def _cutout(self) -> Pixels:
        """A packshot; seldom one of loose goods, whose outline is far from a rectangle."""
        cutouts = cast(Textures, self.textures).cutouts
        for _ in range(6):
            rgba = cast(Pixels, self.rng.pick(cutouts))
            if self.rng.chance(0.06) or (rgba[:, :, 3] > 127).mean() > 0.84:
                break
        return rgba

    def _make(self, brand: Brand, room_px: float) -> Product:
        rng = self.rng
        size = rng.between(0.9, 1.1) if brand.variants and rng.chance(0.2) else 1.0
        width = max(5, round(brand.width * size))
        height = max(5, round(min(brand.width * brand.aspect * size, room_px)))
        depth = width * rng.between(0.5, 1.1) if brand.kind in SQUARE else width
        pitch = max(5, round(width * self.foreshortening))
        if brand.kind in FLAT:
            width = pitch
        elif brand.kind in SOFT:
            width = max(5, round(width * self.foreshortening**0.5))
        if brand.kind == "cutout":
            rgba = self._cutout()
            rows, columns = rgba.shape[:2]
            taller = float(np.clip(0.75 * room_px * columns / (width * rows), 1, 1.6))
            height = max(5, round(min(room_px, width * taller * rows / columns)))
            width = pitch = max(5, round(height * columns / rows * self.foreshortening))
            rgb = recolour(rng, np.ascontiguousarray(rgba[:, :, :3]), 0.5)
            alpha: Pixels = np.ascontiguousarray(rgba[:, :, 3])
        else:
            over = 1.5 if width < 40 else 1.2
            art_w, art_h = max(16, int(width * over)), max(16, int(height * over))
            rgb, alpha = draw_package(brand, brand.variants, art_w, art_h, self.textures)
        loose = rng.between(0, 2.2) if rng.chance(0.7) else 0.0
        prints = [_Print()]
        for _ in range(2):
            stretch, gain = rng.between(0.98, 1.02), rng.between(0.86, 1.08)
            prints.append(_Print(stretch=stretch, gain=gain, degrees=loose * rng.between(-1, 1)))
        if rng.chance(0.2):  # one that leans
            prints.append(
                _Print(
                    gain=rng.between(0.8, 1),
                    degrees=rng.between(-9, 9) if rng.chance(0.92) else rng.pick((-90, 90)),
                )
            )
        if brand.kind in ROUND and rng.chance(0.3):  # one that shows another side
            prints.append(_Print(gain=rng.between(0.85, 1), turn=rng.between(0.2, 0.8)))
        product = Product(
            kind=brand.kind,
            width=width,
            height=height,
            pitch=pitch,
            depth=depth,
            colour=brand.palette[0],
            cap=rng.pick((brand.palette[1], (205, 206, 208), (240, 240, 238))),
            rgb=rgb,
            alpha=alpha,
            prints=tuple(prints),
            rear_print=_Print(stretch=0.97, gain=rng.between(0.4, 0.85)),
        )
        self.products.append(product)
        return product
