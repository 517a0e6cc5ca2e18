"""Objects found by their names, and a product's picture laid over them in tiles.

Knows the JSON of such requests, the catalogue of pictures, and how a picture is painted. A text detector finds boxes,
the engine makes their masks. Knows no HTTP.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image

from backend.errors import RequestError, SettingsError
from backend.service import Service
from backend.transports.fields import field, json_type
from backend.transports.messages import FoundBox, PhotoAnswer, PhotoRequest, answer_to_json, read_request
from model import Mask, Photo, Prompt
from model.masks import outline_of, outlined, without_small_holes
from model.text_detector import TextDetector
from model.types import FloatArray, PixelArray

Value = TypeVar("Value")

MAX_LABELS = 20
MAX_LABEL_CHARS = 100
MAX_OBJECTS = 100
SCORE_THRESHOLD = 0.3  # of a text detector, where the request names none
TILE_WIDTH = 0.25  # of a product's picture, as a share of the photo's width, where the catalogue names none
SHADING = (0.6, 1.4)  # how dark and how light the photo may make the picture
TINTS = ((230, 60, 50), (60, 120, 230), (60, 180, 75), (240, 190, 40), (150, 70, 200), (70, 200, 210))  # RGB
JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A product's picture. path: of its file. tile_width: of one tile, as a share of the photo's width."""

    path: Path
    tile_width: float


@dataclass(frozen=True, kw_only=True)
class NamedRequest:
    """photo: the photo, and whether masks are wanted. labels: the names of the objects to find.

    as_polygons: masks are their outlines, filled. picture: laid over the objects; None tints them.
    """

    photo: PhotoRequest
    labels: tuple[str, ...]
    as_polygons: bool
    picture: Picture | None


class Catalogue:
    """Pictures of products by room and category, from a JSON file: {room: {category: {"picture": path, …}}}."""

    def __init__(self, rooms: Mapping[str, Mapping[str, Picture]]) -> None:
        self._rooms = rooms

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """Paths in the file are relative to it. Raises SettingsError for anything that is not as expected."""
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(f"CATALOGUE {str(path)!r}: expected a JSON file, got: {error}") from None
        try:
            rooms = {
                room: {category: _picture(value, path.parent) for category, value in categories.items()}
                for room, categories in content.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise SettingsError(
                f"CATALOGUE {str(path)!r}: expected {{room: {{category: {{picture, tile_width}}}}}}, got: {error}"
            ) from None
        return cls(rooms)

    def picture(self, room: str, category: str) -> Picture:
        """Raises RequestError for a name that it does not have."""
        return _one_of(_one_of(self._rooms, "roomName", room), "categoryname", category)


def read_named_request(body: Mapping[str, Any], catalogue: Catalogue | None) -> NamedRequest:
    """The request that a JSON object with `labels` makes. Raises RequestError."""
    labels = field(body, "labels", list, "a list of names")
    if not 1 <= len(labels) <= MAX_LABELS:
        raise RequestError(f"labels: expected 1 to {MAX_LABELS} names, got {len(labels)}")
    for label in labels:
        if not isinstance(label, str) or not label.strip() or len(label) > MAX_LABEL_CHARS:
            raise RequestError(f"labels: expected names of 1 to {MAX_LABEL_CHARS} characters, got {json_type(label)}")
    if body.get("prompts") is not None:
        raise RequestError("expected labels or prompts, got both")
    names = [field(body, name, str, "a string", optional=True) for name in ("roomName", "categoryname")]
    picture = None
    if names != [None, None]:
        if None in names:
            raise RequestError("expected roomName and categoryname, got one of them")
        if catalogue is None:
            raise RequestError("categoryname: expected CATALOGUE to be set where this server runs, got none")
        picture = catalogue.picture(*names)
    return NamedRequest(
        photo=read_request(body),
        labels=tuple(dict.fromkeys(label.strip() for label in labels)),
        as_polygons=bool(field(body, "polygons", bool, "true or false", optional=True)),
        picture=picture,
    )


def answer_named(
    service: Service, detector: TextDetector, request: NamedRequest, *, deadline: float
) -> tuple[dict[str, Any], bytes]:
    """The objects of the request's names as JSON, and the photo with them painted over, a JPEG.

    Raises PhotoError, EngineError.
    """
    service.wait_ready(deadline=deadline)
    photo = request.photo.photo
    if not isinstance(photo, Photo):
        photo = service.photo(photo, deadline=deadline)
    boxes = _find(service, detector, photo, request, deadline)
    tile = None if request.picture is None else _tile(service, request.picture, photo.size_wh[0])
    painted = _painted(photo, boxes, request.labels, tile)
    shown = boxes if request.photo.want_masks else [replace(box, mask=None) for box in boxes]
    content = answer_to_json(
        PhotoAnswer(size_wh=photo.size_wh, model_version=service.engine.version, boxes=tuple(shown))
    )
    if request.as_polygons:
        for row, box in zip(content["boxes"], boxes, strict=True):
            row["polygon"] = [] if box.mask is None else outline_of(box.mask).round(2).tolist()
    return content, painted


def _find(
    service: Service, detector: TextDetector, photo: Photo, request: NamedRequest, deadline: float
) -> list[FoundBox]:
    threshold = request.photo.score_threshold
    objects = detector.find(
        photo,
        request.labels,
        score_threshold=SCORE_THRESHOLD if threshold is None else threshold,
        most=MAX_OBJECTS,
        deadline=deadline,
    )
    prompts = [Prompt(box_xyxy=one.box_xyxy) for one in objects]
    answers = service.refine(photo, prompts, want_masks=True, deadline=deadline)
    found = []
    for one, answer in zip(objects, answers, strict=True):
        masks = answer.detections.masks
        mask = masks[0] if masks else None
        if mask is not None and mask.bitmap.any():
            mask = outlined(mask) if request.as_polygons else without_small_holes(mask)
            corners = answer.detections.boxes_xyxy[0]
        else:
            mask, corners = None, one.box_xyxy
        found.append(FoundBox(box_xyxy=tuple(corners.tolist()), score=one.score, label=one.label, mask=mask))
    return found


def _painted(photo: Photo, boxes: Sequence[FoundBox], labels: Sequence[str], tile: PixelArray | None) -> bytes:
    """The photo as a JPEG, with the best boxes' masks on top."""
    pixels = photo.pixels.copy()
    for box in reversed(boxes):
        if box.mask is None:
            continue
        window = (
            np.s_[box.mask.top : box.mask.top + box.mask.bitmap.shape[0]],
            np.s_[box.mask.left : box.mask.left + box.mask.bitmap.shape[1]],
        )
        if tile is None:
            tint = np.array(TINTS[labels.index(str(box.label)) % len(TINTS)], np.float32)
            paint = np.asarray((photo.pixels[window] + tint) / 2, np.float32)
        else:
            paint = _shaded(_tiled(tile, box.mask), photo.pixels[window], box.mask)
        opacity = cv2.blur(box.mask.bitmap.astype(np.float32), (3, 3))[..., None]
        pixels[window] = (paint * opacity + pixels[window] * (1 - opacity)).clip(0, 255).round()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def _tiled(tile: PixelArray, mask: Mask) -> PixelArray:
    """The mask's window, filled with tiles that are laid from the photo's corner: neighbours go on seamlessly."""
    height, width = mask.bitmap.shape
    rows = np.arange(mask.top, mask.top + height) % tile.shape[0]
    columns = np.arange(mask.left, mask.left + width) % tile.shape[1]
    return np.asarray(tile[rows[:, None], columns])


def _shaded(paint: PixelArray, window: PixelArray, mask: Mask) -> FloatArray:
    """The paint, darker and lighter where the object is: its folds and shadows stay."""
    light = cv2.cvtColor(window, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shade = (light / max(1.0, float(light[mask.bitmap].mean()))).clip(*SHADING)
    return np.asarray(paint * shade[..., None], np.float32)


def _tile(service: Service, picture: Picture, photo_width: int) -> PixelArray:
    pixels = service.photo(picture.path).pixels
    width = max(1, round(picture.tile_width * photo_width))
    height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
    smaller = width < pixels.shape[1]
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def _picture(value: Mapping[str, Any], folder: Path) -> Picture:
    if not isinstance(value.get("picture"), str):
        raise ValueError("an entry without a picture")
    path = folder / value["picture"]
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    width = float(value.get("tile_width", TILE_WIDTH))
    if not 0.01 <= width <= 1:
        raise ValueError(f"tile_width {width:g}, which is not from 0.01 to 1")
    return Picture(path=path, tile_width=width)


def _one_of(values: Mapping[str, Value], name: str, value: str) -> Value:
    if value not in values:
        known = ", ".join(sorted(values))
        raise RequestError(f"{name}: expected one of the catalogue ({known[:200]}), got {value[:100]!r}")
    return values[value]
