"""A photo and the marks over it as a browser shows them: a JPEG, and SVG in photo pixels.

Knows images and SVG. Knows neither the page nor what a click means.
"""

from __future__ import annotations

import base64
import io

from PIL import Image

from backend.transports.workbench import Work
from model import Mask, Photo
from model.masks import outline_of

VIEW_SIDE_PX = 1920  # longest side of the photo as the browser gets it
BOX_COLOUR, OBJECT_COLOUR, OFF_COLOUR = "#00dc3c", "#ff2fa0", "#e02020"
TINT = (255, 47, 160)
TINT_ALPHA = 110
POINTS_ACROSS = 220  # radii of a point's mark along the photo's longer side


def view(photo: Photo) -> str:
    """The photo as an address that holds it, at most VIEW_SIDE_PX long and at least a pixel wide."""
    image = Image.fromarray(photo.pixels)
    scale = min(1.0, VIEW_SIDE_PX / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    content = io.BytesIO()
    image.resize(size, reducing_gap=2).save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def marks(work: Work) -> str:
    """The boxes, the object in hand with its mask, and the points that name it: SVG in photo pixels."""
    parts = [_rect(box, BOX_COLOUR) for box in work.others().boxes_xyxy.tolist()]
    for mask in work.objects.masks or ():
        if mask.bitmap.any():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline_of(mask).tolist())
            parts += [_tint(mask), f'<polygon class="object" points="{points}" stroke="{OBJECT_COLOUR}"/>']
    parts += [_rect(box, OBJECT_COLOUR, kind="object") for box in work.objects.boxes_xyxy.tolist()]
    radius = max(work.photo.size_wh) / POINTS_ACROSS
    for (x, y), is_foreground in zip(work.points_xy.tolist(), work.is_foreground.tolist(), strict=True):
        colour = BOX_COLOUR if is_foreground else OFF_COLOUR
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"/>')
    return "".join(parts)


def _rect(box_xyxy: list[float], colour: str, *, kind: str = "box") -> str:
    x0, y0, x1, y1 = box_xyxy
    place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
    return f'<rect class="{kind}" {place} stroke="{colour}"/>'


def _tint(mask: Mask) -> str:
    height, width = mask.bitmap.shape
    image = Image.fromarray(mask.bitmap.view("uint8"), "P")
    image.putpalette([0, 0, 0, *TINT])
    content = io.BytesIO()
    image.save(content, "PNG", transparency=bytes((0, TINT_ALPHA)))
    address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    place = f'x="{mask.left}" y="{mask.top}" width="{width}" height="{height}"'
    return f'<image class="tint" {place} href="{address}" preserveAspectRatio="none"/>'
