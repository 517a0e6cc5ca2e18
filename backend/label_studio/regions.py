"""Detections as Label Studio regions, and rectangle regions as boxes again.

Knows Label Studio's region JSON, percent of the photo's sides, and how it stores polygons and brush masks. Knows no
prompt and no XML. Regions are written for the decoded photo, EXIF orientation applied: `image_rotation` 0.
"""

from __future__ import annotations

import math
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.label_studio.label_config import RECTANGLE_TYPES, ImageControls, MaskControl
from model.masks import outline_of
from model.types import Detections, Mask

Region = dict[str, Any]

# A ten-thousandth of a percent: a hundredth of a pixel in a photo 10,000 pixels wide.
_PERCENT_DIGITS = 4


def regions_from_detections(
    detections: Detections,
    size_wh: tuple[int, int],
    image: ImageControls,
    *,
    labels: Sequence[str] | None = None,
    ids: Sequence[str | None] | None = None,
) -> list[Region]:
    """The detections as regions of the box control, clipped to the photo; those without area are left out.

    With masks, each box is followed by the same object as a polygon and as a brush mask for every such control.
    labels: one for each detection, each a label of the box control; None gives every box the default label.
    ids: one for each detection, the id of the region that this box replaces; None makes a new one.
    """
    count = len(detections)
    labels = [image.boxes.default_label] * count if labels is None else labels
    ids = [None] * count if ids is None else ids
    for name, values in (("labels", labels), ("ids", ids)):
        if len(values) != count:
            raise ValueError(f"{name}: expected {count} values, one for each detection, got {len(values)}")
    for label in labels:
        if label not in image.boxes.labels:
            raise ValueError(f"labels: expected labels of {image.boxes.labels!r}, got {label!r}")
    regions: list[Region] = []
    for i in range(count):
        rectangle = rectangle_value(detections.boxes_xyxy[i].tolist(), size_wh)
        if rectangle is None:
            continue
        label, score, name = labels[i], float(detections.scores[i]), image.boxes.from_name
        regions.append(_region(image, name, "rectanglelabels", label, rectangle, size_wh, score, ids[i]))
        if detections.masks is not None:
            regions.extend(_mask_regions(detections.masks[i], size_wh, image, label, score))
    return regions


def boxes_from_regions(regions: Iterable[Mapping[str, Any]], size_wh: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The boxes of all rectangles among the regions: float32 `[N, 4]`, xyxy in photo pixels, in their order.

    A rotated rectangle gives its bounding box. Other regions are passed over. A malformed value raises ValueError.
    """
    rectangles = [region for region in regions if is_rectangle(region)]
    boxes = [rectangle_bounds(region["value"], size_wh) for region in rectangles]
    return np.array(boxes, np.float32).reshape(-1, 4)


def is_rectangle(region: Mapping[str, Any]) -> bool:
    """Whether a region, or an item of an interactive context, is a rectangle."""
    return region.get("type") in RECTANGLE_TYPES


def rectangle_bounds(value: Mapping[str, Any], size_wh: tuple[float, float]) -> tuple[float, float, float, float]:
    """The upright xyxy bounds, in pixels, of a rectangle's region value; not clipped to the photo.

    Label Studio turns a rectangle clockwise about its top left corner, in pixels and not in percent.
    """
    left, width = (read_number(value, key) * size_wh[0] / 100 for key in ("x", "width"))
    top, height = (read_number(value, key) * size_wh[1] / 100 for key in ("y", "height"))
    angle = math.radians(read_number(value, "rotation", default=0.0))
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [left + across * cos - down * sin for across in (0, width) for down in (0, height)]
    ys = [top + across * sin + down * cos for across in (0, width) for down in (0, height)]
    return min(xs), min(ys), max(xs), max(ys)


def read_number(value: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a region's value; missing (or null), the default; else ValueError with the culprit."""
    number = value.get(key)
    if number is None and default is not None:
        return default
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e9:  # NaN compares false
        raise ValueError(f"{key}: expected a finite number, got {reprlib.repr(number)}")
    return float(number)


def _region(
    image: ImageControls,
    from_name: str,
    kind: str,
    label: str,
    value: Mapping[str, Any],
    size_wh: tuple[int, int],
    score: float,
    region_id: str | None = None,
) -> Region:
    return {
        "id": region_id or secrets.token_urlsafe(7),  # ten characters, as many as Label Studio's own
        "from_name": from_name,
        "to_name": image.image_name,
        "type": kind,
        "original_width": size_wh[0],
        "original_height": size_wh[1],
        "image_rotation": 0,
        "score": round(score, 4),
        "value": {**value, kind: [label]},
    }


def rectangle_value(box_xyxy: Sequence[float], size_wh: tuple[int, int]) -> dict[str, float] | None:
    """The box, in pixels, as a rectangle's region value without labels, clipped to the photo; None without area."""
    left, right = (_percent(x, size_wh[0]) for x in box_xyxy[0::2])
    top, bottom = (_percent(y, size_wh[1]) for y in box_xyxy[1::2])
    width, height = round(right - left, _PERCENT_DIGITS), round(bottom - top, _PERCENT_DIGITS)
    if width <= 0 or height <= 0:
        return None
    return {"x": left, "y": top, "width": width, "height": height, "rotation": 0}


def _percent(pixels: float, side_px: int) -> float:
    return round(min(max(pixels * 100 / side_px, 0.0), 100.0), _PERCENT_DIGITS)


def _mask_regions(
    mask: Mask, size_wh: tuple[int, int], image: ImageControls, label: str, score: float
) -> Iterable[Region]:
    if not mask.bitmap.any():
        return
    shapes: list[tuple[str, tuple[MaskControl, ...], dict[str, Any]]] = []
    if image.polygons:
        shapes.append(("polygonlabels", image.polygons, {"points": _outline(mask, size_wh), "closed": True}))
    if image.brushes:
        shapes.append(("brushlabels", image.brushes, {"format": "rle", "rle": _rle(mask, size_wh)}))
    for kind, controls, value in shapes:
        for control in controls:
            yield _region(image, control.from_name, kind, control.label_for(label), value, size_wh, score)


def _outline(mask: Mask, size_wh: tuple[int, int]) -> list[list[float]]:
    """The outline of the mask, which is not empty, as percent points."""
    return [[_percent(x, size_wh[0]), _percent(y, size_wh[1])] for x, y in outline_of(mask).tolist()]


def _rle(mask: Mask, size_wh: tuple[int, int]) -> list[int]:
    """The mask of the whole photo in Label Studio's run-length encoding."""
    # Here, because the converter's package takes a second to import and few label configs have a brush.
    from label_studio_sdk.converter.brush import mask2rle

    rle: list[int] = mask2rle(mask.in_photo(size_wh).astype(np.uint8) * 255)  # type: ignore[no-untyped-call]
    return rle
