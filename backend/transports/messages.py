"""One photo asked about, and its answer: what all transports but Label Studio's have in common, and both as JSON.

Knows the Service and JSON; no network. Each transport parses into a PhotoRequest, calls `answer`, and gives the answer
in its own words.

    {"url": "https://…"} or {"base64": "…"}        the photo; or its bytes, in base64
    {…, "prompts": [{"points": [{"x", "y", "label"}], "box": {"x0", "y0", "x1", "y1"}}]}
                                                    single objects instead of all: label 1 is on the object, 0 is not
    {…, "masks": true, "score_threshold": 0.5}      their masks, too; only boxes with this score and above

The answer has one entry for each box, best first; `prompt` is the number of the prompt that it answers, from 0. A mask
is a PNG of the part of the photo that begins at `left` and `top`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import FacingsError, PromptError, RequestError
from backend.service import Answer, Service
from backend.transports.fields import field, json_type, number
from model import Lane, Mask, Photo, Prompt
from model.types import BoolArray

MAX_PROMPTS = 1000
MAX_POINTS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoRequest:
    """photo: an address, an image file's bytes or path, or the decoded photo.

    prompts: the objects to find, in photo pixels; without any, all facings are asked for.
    score_threshold: of all facings; None takes the engine's.
    """

    photo: str | bytes | Path | Photo
    prompts: tuple[Prompt, ...] = ()
    want_masks: bool = False
    score_threshold: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundBox:
    """box_xyxy: in photo pixels. prompt: the number of the prompt that it answers; None where none was asked.
    label: the name that it was found by; None where none was asked."""

    box_xyxy: tuple[float, float, float, float]
    score: float
    prompt: int | None = None
    label: str | None = None
    mask: Mask | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoAnswer:
    """size_wh: of the photo, in pixels."""

    size_wh: tuple[int, int]
    model_version: str
    boxes: tuple[FoundBox, ...]


def answer(
    service: Service, request: PhotoRequest, *, lane: Lane = "bulk", deadline: float | None = None
) -> PhotoAnswer:
    """What is on the photo. Raises PhotoError, EngineError; `Service.failed` gives them as a client may see them."""
    service.wait_ready(deadline=deadline)
    photo = request.photo
    if not isinstance(photo, Photo):
        photo = service.photo(photo, deadline=deadline)
    if request.prompts:
        found = service.refine(photo, request.prompts, want_masks=request.want_masks, deadline=deadline)
        boxes = [box for place, one in enumerate(found) for box in _boxes(one, prompt=place)]
        return PhotoAnswer(size_wh=photo.size_wh, model_version=service.engine.version, boxes=tuple(boxes))
    dense = service.preannotate(photo, score_threshold=request.score_threshold, lane=lane, deadline=deadline)
    masks = _masks(service, photo, dense, deadline) if request.want_masks else None
    return PhotoAnswer(
        size_wh=photo.size_wh, model_version=dense.model_version, boxes=tuple(_boxes(dense, masks=masks))
    )


def read_request(body: Mapping[str, Any]) -> PhotoRequest:
    """The request that a JSON object makes; see the module's docstring. Raises RequestError, PromptError."""
    given = [name for name in ("url", "base64") if body.get(name) is not None]
    if len(given) != 1:
        raise RequestError(f"expected the photo's url or its bytes in base64, got {' and '.join(given) or 'neither'}")
    text = field(body, given[0], str, "a string")
    threshold = body.get("score_threshold")
    if threshold is not None:
        threshold = number(body, "score_threshold")
        if not 0 <= threshold <= 1:
            raise RequestError(f"score_threshold: expected 0 to 1, got {threshold:g}")
    prompts = field(body, "prompts", list, "a list of prompts", optional=True) or []
    if len(prompts) > MAX_PROMPTS:
        raise PromptError(f"prompts: expected at most {MAX_PROMPTS}, got {len(prompts)}")
    return PhotoRequest(
        photo=text if given[0] == "url" else read_base64(text),
        prompts=tuple(read_prompt(prompt, f"prompts[{place}]") for place, prompt in enumerate(prompts)),
        want_masks=bool(field(body, "masks", bool, "true or false", optional=True)),
        score_threshold=threshold,
    )


def read_base64(text: str) -> bytes:
    """The bytes of base64 text, with line breaks or without. Raises RequestError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise RequestError("expected valid base64, got other characters or a part of it") from None


def read_prompt(value: Any, where: str = "prompt") -> Prompt:
    """The prompt of a JSON object with points, a box, or both. Raises PromptError."""
    if not isinstance(value, dict):
        raise PromptError(f"{where}: expected an object with points or a box, got {json_type(value)}")
    points = value.get("points") or []
    if not isinstance(points, list) or len(points) > MAX_POINTS or not all(isinstance(one, dict) for one in points):
        raise PromptError(f"{where}.points: expected a list of at most {MAX_POINTS} objects with x and y")
    box = value.get("box")
    if box is not None and not isinstance(box, dict):
        raise PromptError(f"{where}.box: expected an object with x0, y0, x1, y1, got {json_type(box)}")
    try:
        positions = [[number(point, axis, where=f"{where}.points.") for axis in "xy"] for point in points]
        is_foreground = [_is_foreground(point, where) for point in points]
        corners = None if box is None else [number(box, name, where=f"{where}.box.") for name in _CORNERS]
        return Prompt(
            points_xy=np.array(positions, np.float32).reshape(-1, 2),
            is_foreground=np.array(is_foreground, np.bool_),
            box_xyxy=None if corners is None else np.array(corners, np.float32),
        )
    except (ValueError, RequestError) as error:
        raise PromptError(str(error) if isinstance(error, RequestError) else f"{where}: {error}") from error


def answer_to_json(answer: PhotoAnswer) -> dict[str, Any]:
    """The answer as a JSON object; coordinates are rounded to a hundredth of a pixel."""
    return {
        "width": answer.size_wh[0],
        "height": answer.size_wh[1],
        "model_version": answer.model_version,
        "boxes": [_box_to_json(box) for box in answer.boxes],
    }


def error_to_json(error: FacingsError) -> dict[str, Any]:
    """The error as a JSON object. retryable: whether asking again may help."""
    return {"error": str(error), "kind": error.kind, "retryable": error.retryable}


def png(mask: BoolArray) -> bytes:
    """A mask as a PNG, white on black."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(content, "PNG", compress_level=1)
    return content.getvalue()


_CORNERS = ("x0", "y0", "x1", "y1")


def _is_foreground(point: Mapping[str, Any], where: str) -> bool:
    label = point.get("label", 1)
    if isinstance(label, bool) or label not in (0, 1):
        raise PromptError(f"{where}.points.label: expected 1 (on the object) or 0 (not on it), got {label!r}"[:200])
    return bool(label)


def _boxes(found: Answer, *, prompt: int | None = None, masks: Sequence[Mask | None] | None = None) -> list[FoundBox]:
    detections = found.detections
    if masks is None:
        masks = [None] * len(detections) if detections.masks is None else detections.masks
    rows = zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), masks, strict=True)
    return [FoundBox(box_xyxy=tuple(box), score=score, prompt=prompt, mask=mask) for box, score, mask in rows]


def _masks(service: Service, photo: Photo, dense: Answer, deadline: float | None) -> list[Mask | None]:
    """The mask of the object in each box; None where none is seen there."""
    solid = [place for place, box in enumerate(dense.detections.boxes_xyxy) if box[0] < box[2] and box[1] < box[3]]
    masks: list[Mask | None] = [None] * len(dense.detections)
    if solid:
        prompts = [Prompt(box_xyxy=dense.detections.boxes_xyxy[place]) for place in solid]
        for place, one in zip(solid, service.refine(photo, prompts, want_masks=True, deadline=deadline), strict=True):
            masks[place] = one.detections.masks[0] if one.detections.masks else None
    return masks


def _box_to_json(box: FoundBox) -> dict[str, Any]:
    row: dict[str, Any] = {"box": [round(value, 2) for value in box.box_xyxy], "score": round(box.score, 4)}
    if box.prompt is not None:
        row["prompt"] = box.prompt
    if box.label is not None:
        row["label"] = box.label
    if box.mask is not None:
        content = base64.b64encode(png(box.mask.bitmap)).decode("ascii")
        row["mask"] = {"left": box.mask.left, "top": box.mask.top, "png": content}
    return row
