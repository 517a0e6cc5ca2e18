"""The context of an interactive request: what the annotator pointed at, as one prompt for each object to answer.

Knows Label Studio's context items, in percent, and the label config. Knows no photo: prompts stay fractions of the
photo's sides until `AnnotatorPrompt.to_prompt` gets its decoded size.

Label Studio sends every pending prompt of one shape and label again each time, and each answer replaces all earlier
suggestions. So a context is read as a whole. The control that an item was drawn with names the image it belongs to;
items of different images never mix.

- Each rectangle of a prompt control is an object of its own, and all of them are answered.
- A prompt drawn with a control that has no labels of its own comes twice while a label is selected: the second item, of
  the box control, has its id and the label. Other items of a box control that is not smart are finished boxes.
- With a smart box control, the context also holds every accepted box of that label. Only the last one can be new, and
  it is answered unless it carries a score: then it is an answer itself, sent again because some other box was edited or
  deleted.
- A keypoint inside a rectangle that is answered, foreground or background, refines it; of several, the smallest.
- The other keypoints with the same label come together: which of them are on one object is for the engine to find out,
  and background points cut away from what the foreground points ask for. Without a foreground point they correct the
  boxes that stand under them. With auto-accept on, Label Studio sends each keypoint alone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.errors import PromptError
from backend.label_studio.label_config import KEYPOINT_TYPES, ImageControls, LabelConfig
from backend.label_studio.regions import is_rectangle, read_number, rectangle_bounds
from model.types import Prompt


@dataclass(frozen=True, kw_only=True)
class AnnotatorPrompt:
    """What the annotator asks for, in fractions of the photo's width and height; outside 0 to 1 is outside the photo.

    image_name: the image that it stands on, one of the label config's.
    points: (x, y) each; is_foreground: one for each point, False marks what the object must not contain.
    box: x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, or None. A box or a foreground point is always there.
    label: the label of the box that answers, one of the image's box control; None for the label of the box that it
        replaces, or the default one.
    region_id: the id that the answer takes over, or None for a new one.
    """

    image_name: str
    points: tuple[tuple[float, float], ...] = ()
    is_foreground: tuple[bool, ...] = ()
    box: tuple[float, float, float, float] | None = None
    label: str | None = None
    region_id: str | None = None

    def to_prompt(self, size_wh: tuple[int, int]) -> Prompt:
        """The prompt in pixels of a photo of this size.

        A box less than a pixel wide or high is as good as a click at its centre, and becomes one. Points on the
        far edges move to the centre of the last pixel.
        """
        size = np.array(size_wh, np.float64)
        points, is_foreground, box_xyxy = list(self.points), list(self.is_foreground), None
        if self.box is not None:
            corners = np.array(self.box, np.float64).reshape(2, 2) * size
            if (corners[1] - corners[0] >= 1).all():
                box_xyxy = corners.reshape(4).astype(np.float32)
            else:
                x0, y0, x1, y1 = self.box
                points.append(((x0 + x1) / 2, (y0 + y1) / 2))
                is_foreground.append(True)
        points_xy = np.array(points, np.float64).reshape(-1, 2) * size
        points_xy = np.where(points_xy <= size, np.minimum(points_xy, size - 0.5), points_xy)
        return Prompt(
            points_xy=points_xy.astype(np.float32), is_foreground=np.array(is_foreground, np.bool_), box_xyxy=box_xyxy
        )


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Alt-clicks alone, `points` as (x, y) in fractions of an image's sides: they trim or remove what stands there."""

    image_name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class _Point:
    image_name: str
    xy: tuple[float, float]
    is_foreground: bool
    label: str | None


@dataclass(frozen=True, kw_only=True)
class _Rectangle:
    image_name: str
    bounds: tuple[float, float, float, float]
    label: str | None
    region_id: str | None
    is_box: bool  # drawn with the box control itself
    is_answer: bool  # carries the score that an answer gave it

    def holds(self, point: _Point) -> bool:
        x0, y0, x1, y1 = self.bounds
        return point.image_name == self.image_name and x0 <= point.xy[0] <= x1 and y0 <= point.xy[1] <= y1

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.bounds
        return (x1 - x0) * (y1 - y0)


def prompts_from_context(context: Mapping[str, Any], config: LabelConfig) -> tuple[AnnotatorPrompt | Correction, ...]:
    """What is asked: rectangles first, then points, then corrections, each in the context's order.

    () where nothing is asked: an emptied context. A malformed item raises PromptError.
    """
    points, rectangles = _read_items(context, config)
    rectangles = _pending(rectangles)
    refining: list[list[_Point]] = [[] for _ in rectangles]
    clicks: dict[tuple[str, str | None], list[_Point]] = {}
    for point in points:
        around = [i for i, rectangle in enumerate(rectangles) if rectangle.holds(point)]
        if around:
            refining[min(around, key=lambda i: rectangles[i].area)].append(point)
        else:
            clicks.setdefault((point.image_name, point.label), []).append(point)
    boxes = [
        AnnotatorPrompt(
            image_name=rectangle.image_name,
            points=tuple(point.xy for point in inside),
            is_foreground=tuple(point.is_foreground for point in inside),
            box=rectangle.bounds,
            label=rectangle.label,
            region_id=rectangle.region_id if rectangle.is_box else None,
        )
        for rectangle, inside in zip(rectangles, refining, strict=True)
    ]
    objects = [
        AnnotatorPrompt(
            image_name=image_name,
            points=tuple(point.xy for point in group),
            is_foreground=tuple(point.is_foreground for point in group),
            label=label,
        )
        for (image_name, label), group in clicks.items()
        if any(point.is_foreground for point in group)
    ]
    corrections = [
        Correction(image_name=image_name, points=tuple(point.xy for point in group))
        for (image_name, _), group in clicks.items()
        if not any(point.is_foreground for point in group)
    ]
    return (*boxes, *objects, *corrections)


def _pending(rectangles: Sequence[_Rectangle]) -> list[_Rectangle]:
    """The rectangles that wait for an answer; see the module's docstring."""
    last_box = next((rectangle for rectangle in reversed(rectangles) if rectangle.is_box), None)
    return [r for r in rectangles if not r.is_box or (r is last_box and not r.is_answer)]


def _read_items(context: Mapping[str, Any], config: LabelConfig) -> tuple[list[_Point], list[_Rectangle]]:
    items = context.get("result") or []
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise PromptError(f"context: expected a list of prompts under 'result', got {reprlib.repr(items)}")
    points: list[_Point] = []
    rectangles: list[_Rectangle] = []
    drawn_ids = {_id(item) for item in items if is_rectangle(item) or _is_point(item)}
    prompt_controls = {name for image in config.images for name in image.prompts.names}
    box_controls = {image.boxes.from_name for image in config.images} - prompt_controls
    unlabelled = {_id(item) for item in items if item.get("from_name") in prompt_controls} - {None}
    labels = {_id(item): item for item in items if item.get("from_name") in box_controls and _id(item) in unlabelled}
    for index, item in enumerate(items):
        try:
            if item.get("from_name") in box_controls and is_rectangle(item):
                continue  # the label of a prompt, or a finished box with the same label
            if _is_point(item):
                points.append(_read_point(item, config, labels.get(_id(item), item)))
            elif is_rectangle(item):
                rectangles.append(_read_rectangle(item, config, labels.get(_id(item), item)))
            elif _id(item) is None or _id(item) not in drawn_ids:  # else a choice or text of that very region
                raise ValueError(f"type: expected a keypoint or a rectangle, got {reprlib.repr(item.get('type'))}")
        except ValueError as error:
            raise PromptError(f"prompt {index} (id {reprlib.repr(item.get('id'))}): {error}") from error
    return points, rectangles


def _is_point(item: Mapping[str, Any]) -> bool:
    return item.get("type") in KEYPOINT_TYPES


def _read_point(item: Mapping[str, Any], config: LabelConfig, labelled: Mapping[str, Any]) -> _Point:
    image = _image_of(item, {name: image for image in config.images for name in image.prompts.keypoints})
    value = _read_value(item)
    is_positive = item.get("is_positive")
    if is_positive is None:  # Label Studio forgets it when it restores a draft
        is_positive = True
    if is_positive not in (True, False):
        raise ValueError(f"is_positive: expected true or false, got {reprlib.repr(is_positive)}")
    return _Point(
        image_name=image.image_name,
        xy=(read_number(value, "x") / 100, read_number(value, "y") / 100),
        is_foreground=bool(is_positive),
        label=_read_label(labelled, _read_value(labelled), image),
    )


def _read_rectangle(item: Mapping[str, Any], config: LabelConfig, labelled: Mapping[str, Any]) -> _Rectangle:
    controls = {name: image for image in config.images for name in image.prompts.rectangles}
    image = _image_of(item, controls)
    value = _read_value(item)
    # An upright rectangle is the same in any unit; for a turned one the photo's proportions matter.
    size_wh = (100.0, 100.0)
    if read_number(value, "rotation", default=0.0):
        size_wh = read_number(item, "original_width"), read_number(item, "original_height")
        if min(size_wh) < 1:
            raise ValueError(f"original_width, original_height: expected at least 1, got {size_wh!r}")
    x0, y0, x1, y1 = rectangle_bounds(value, size_wh)
    return _Rectangle(
        image_name=image.image_name,
        bounds=(x0 / size_wh[0], y0 / size_wh[1], x1 / size_wh[0], y1 / size_wh[1]),
        label=_read_label(labelled, _read_value(labelled), image),
        region_id=_id(item),
        is_box=item.get("from_name") == image.boxes.from_name,
        is_answer=item.get("score") is not None,
    )


def _image_of(item: Mapping[str, Any], controls: Mapping[str, ImageControls]) -> ImageControls:
    """The image that the item's control is on. controls: those that may be in `from_name`."""
    name = item.get("from_name")
    image = controls.get(name) if isinstance(name, str) else None
    if image is None:
        known = ", ".join(map(repr, controls)) or "none"
        raise ValueError(f"from_name: expected a prompt control ({known}), got {reprlib.repr(name)}")
    return image


def _read_value(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if item.get("image_rotation") not in (None, 0):
        raise ValueError(f"image_rotation: expected 0, an upright view, got {reprlib.repr(item['image_rotation'])}")
    value = item.get("value")
    if not isinstance(value, Mapping):
        raise ValueError(f"value: expected an object, got {reprlib.repr(value)}")
    return value


def _read_label(item: Mapping[str, Any], value: Mapping[str, Any], image: ImageControls) -> str | None:
    labels = value.get(str(item["type"])) or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{item['type']}: expected a list of labels, got {reprlib.repr(labels)}")
    return image.label_for(labels[0] if labels else None)


def _id(item: Mapping[str, Any]) -> str | None:
    region_id = item.get("id")
    return region_id if isinstance(region_id, str) and region_id else None
