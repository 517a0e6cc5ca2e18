"""What one picture's shop has throughout: its colours and lights, and the eye that looks at it.

Knows how rear units shift against those before them at each place of the canvas. Does not know what is drawn there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.renderer.camera import View
from model.renderer.canvas import Canvas
from model.renderer.paint import Rgb, Rng, from_hsv, package_hue, tint
from model.renderer.products import Designer
from model.renderer.textures import Textures


@dataclass(kw_only=True)
class Style:
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


def _new_style(rng: Rng, view: View) -> Style:
    grey = rng.between(35, 110) if rng.chance(0.22) else rng.between(115, 225)
    rail_kind = rng.weighted({"white": 5, "grey": 2.4, "beige": 0.8, "black": 0.7, "colour": 1.2})
    rail: Rgb = {
        "white": (228, 228, 224),
        "grey": (150, 152, 155),
        "beige": (205, 190, 164),
        "black": (35, 35, 38),
        "colour": from_hsv(package_hue(rng), rng.between(0.35, 0.8), rng.between(0.35, 0.85)),
    }[rail_kind]
    warm = rng.between(0.92, 1.05)
    return Style(
        wall=(int(min(255, grey * warm)), int(grey), int(min(255, grey / warm))),
        rail=tint(rail, rng.between(0.75, 1.05)),
        tag=rng.pick(((248, 248, 245), (248, 248, 245), (250, 225, 60), (240, 240, 250), (230, 60, 50))),
        tag_chance=rng.pick((0.3, 0.7, 0.9, 1.0)),
        board=tint(rail, rng.between(0.4, 0.9)),
        rise=rng.between(-0.02, 0.06),
        drift=math.sin(view.turn) * rng.between(0.6, 1.1),
        depth=rng.between(0.05, 0.3),
        eye=(0.5 + view.eye_x * 0.6, rng.between(-0.3, 0.8)),
        rear_chance=rng.pick((0.5, 0.9, 1.0)),
        gap_chance=0.12 if rng.chance(0.15) else rng.pick((0.0, 0.01, 0.03)),
        ambient=rng.between(0.2, 0.6) if rng.chance(0.3) else rng.between(0.6, 1.0),
        spacing=rng.pick((0.0, 0.0, 0.0, 0.01, 0.02, 0.06)),
    )


class Shop:
    """What everything in a picture is drawn with: chance, the canvas, the style, and who designs the products."""

    def __init__(self, rng: Rng, canvas: Canvas, facing_px: float, view: View, textures: Textures | None) -> None:
        """facing_px: typical width of a facing."""
        self.rng, self.canvas, self.facing_px = rng, canvas, facing_px
        self.style = _new_style(rng, view)
        self.designer = Designer(rng, facing_px, math.cos(view.turn), textures)

    def rise(self, y: float) -> float:
        """How far a rear unit shows above its front unit at that height, per unit height: more below the eye."""
        style = self.style
        return float(np.clip(style.rise + style.depth * (y / self.canvas.height - style.eye[1]), -0.04, 0.26))

    def drift(self, x: float) -> float:
        """How far a rear unit is shifted there, per unit depth: towards the vanishing point."""
        style = self.style
        return style.drift + style.depth * (style.eye[0] - x / self.canvas.width)
