"""What stands between the camera and the shelf: glass doors, signs, strips of small goods, people and carts.

Draws over a finished shelf. Does not know what it hides.
"""

from __future__ import annotations

import cv2
import numpy as np

from model.renderer.canvas import Canvas, Sprite
from model.renderer.paint import FONTS, Pixels, Rgb, Rng, from_hsv, invented_word, luma, tint, write
from model.renderer.products import Designer


def glass_doors(rng: Rng, canvas: Canvas, facing_px: float) -> None:
    """Frames of closed doors, and what their panes reflect."""
    colour = rng.pick(((30, 30, 33), (60, 62, 66), (190, 192, 195)))
    x = -rng.between(0, 12) * facing_px
    while x < canvas.width:
        w = facing_px * rng.between(0.4, 1.3)
        canvas.fill(x, 0, x + w, canvas.height, colour)
        canvas.fill(x + w * 0.45, 0, x + w * 0.55, canvas.height, tint(colour, 0.4))
        if rng.chance(0.6):
            canvas.fill(x + w, 0, x + w * 1.2, canvas.height, (245, 250, 255))
        if rng.chance(0.4):
            mid = canvas.height * rng.between(0.3, 0.7)
            canvas.fill(x + w * 1.3, mid, x + w * 1.5, mid + facing_px * 3, (150, 152, 155))
        x += w + facing_px * rng.between(8, 22)
    small = np.zeros((32, 32), np.float32)
    for _ in range(rng.whole(1, 5)):
        a = (rng.whole(0, 31), rng.whole(0, 31))
        cv2.line(
            small,
            a,
            (a[0] + rng.whole(-12, 12), a[1] + rng.whole(-20, 20)),
            rng.between(20, 110),
            rng.whole(1, 3),
        )
    blurred = np.clip(cv2.GaussianBlur(small, (0, 0), 1.2) + rng.between(0, 22), 0, 255).astype(np.uint8)
    glow = cv2.cvtColor(cv2.resize(blurred, (canvas.width, canvas.height)), cv2.COLOR_GRAY2RGB)
    canvas.rgb[:] = cv2.addWeighted(canvas.rgb, rng.between(0.8, 1.0), glow, 1.0, 0)


def signs(rng: Rng, canvas: Canvas, facing_px: float) -> None:
    """Promotion signs and wobblers that hide products."""
    patches = canvas.width * canvas.height / (facing_px * facing_px)
    for _ in range(int(patches * 0.0035 * rng.unit() * rng.pick((0, 1, 1, 3)))):
        w = facing_px * rng.log_between(0.5, 2.5)
        h = w * rng.log_between(0.5, 1.6)
        x, y = rng.between(0, canvas.width), rng.between(0, canvas.height)
        colour: Rgb = rng.pick(
            ((250, 220, 30), (225, 25, 35), (250, 250, 248), (20, 140, 60), (20, 80, 180), (250, 120, 20))
        )
        ink: Rgb = (20, 20, 25) if luma(colour) > 140 else (250, 250, 250)
        image: Pixels = np.empty((max(4, int(h)), max(4, int(w)), 3), np.uint8)
        image[:] = colour
        rows, columns = image.shape[:2]
        write(
            image,
            invented_word(rng, 3, 6),
            rng.pick(FONTS),
            (columns * 0.1, rows * 0.08, columns * 0.8, rows * 0.28),
            ink,
            0.18,
        )
        price = f"{rng.whole(0, 9)}.{rng.whole(10, 99)}"
        write(
            image,
            price,
            cv2.FONT_HERSHEY_DUPLEX,
            (columns * 0.08, rows * 0.45, columns * 0.84, rows * 0.42),
            ink,
            0.2,
        )
        alpha = None
        if rng.chance(0.3):
            alpha = np.zeros((rows, columns), np.uint8)
            cv2.ellipse(alpha, (columns // 2, rows // 2), (columns // 2, rows // 2), 0, 0, 360, 255, -1)
        canvas.stamp(Sprite(rgb=image, alpha=alpha), int(x), int(y), facing=False)


def clip_strip(rng: Rng, canvas: Canvas, facing_px: float, designer: Designer) -> None:
    """Small goods clipped one above the other on a strip that hangs before the shelf."""
    product = designer.product(facing_px * 1.6, kinds={"blister", "bag", "pillow"}, fresh=True)
    x, y = rng.between(0.05, 0.95) * canvas.width, rng.between(-0.1, 0.6) * canvas.height
    step = product.height * rng.between(0.6, 1.05)
    count = rng.whole(3, 9)
    canvas.fill(x - 2, y - step * 0.5, x + 2, y + count * step, (225, 228, 230))
    for k in range(count):
        if rng.chance(0.9):
            lean = rng.between(-0.06, 0.06) * product.width
            canvas.stamp(product.unit(rng), round(x - product.width / 2 + lean), round(y + k * step), facing=True)


def passer_by(rng: Rng, canvas: Canvas, facing_px: float) -> None:
    """A person, blurred and dark, or the wires of a cart."""
    u = facing_px * rng.between(3, 7)
    x, y = rng.between(0, canvas.width), rng.between(0.3, 0.9) * canvas.height
    if rng.chance(0.6):
        cloth = from_hsv(rng.unit(), rng.between(0, 0.7), rng.between(0.08, 0.6))
        skin = tint((205, 155, 125), rng.between(0.4, 1.1))
        mask = np.zeros((canvas.height, canvas.width), np.uint8)
        body = np.array(
            [
                (x - u * 0.5, y + u * 0.3),
                (x - u * 0.25, y),
                (x + u * 0.25, y),
                (x + u * 0.5, y + u * 0.3),
                (x + u * 0.55, y + 4 * u),
                (x - u * 0.55, y + 4 * u),
            ],
            np.int32,
        )
        cv2.fillConvexPoly(mask, body, 255)
        canvas.rgb[mask > 0] = cloth
        canvas.ids[mask > 0] = 0
        mask[:] = 0
        cv2.ellipse(mask, (int(x), int(y - u * 0.25)), (int(u * 0.2), int(u * 0.28)), 0, 0, 360, 255, -1)
        canvas.rgb[mask > 0] = skin
        canvas.ids[mask > 0] = 0
    else:
        colour = rng.pick(((190, 192, 195), (220, 40, 40), (70, 72, 75)))
        thick = max(1, int(facing_px * 0.04))
        step = max(4, int(facing_px * 0.3))
        for k in range(int(u * 2 / step)):
            canvas.fill(x + k * step, y, x + k * step + thick, y + u, colour, covers=False)
        for k in range(int(u / step)):
            canvas.fill(x, y + k * step, x + 2 * u, y + k * step + thick, colour, covers=False)
        canvas.fill(x, y, x + 2 * u, y + thick * 4, colour)
