"""One person's work on one photo: all its boxes first, then one object after another; a bounded number of such works.

Knows the Service, prompts and boxes, and makes the two files that a person takes away. Knows no page and no network.

The object in hand is what the clicks and the rectangle since the last `next_object` name. Its boxes take the place of
those that stood there, so that the boxes that are seen are those that are downloaded.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backend.bulk.formats import BoxedPhoto, BoxedTask, Format, open_writer
from backend.bulk.jobs import default_label_config
from backend.errors import PromptError, RequestError
from backend.service import Service
from backend.transports.messages import MAX_POINTS
from model import Detections, Photo, Prompt
from model.boxes import iou_matrix
from model.types import BoolArray, FloatArray, PixelArray

SAME_OBJECT = 0.5  # IoU from which two boxes are of one object
MAX_WORKS = 64


def _nothing() -> Detections:
    return Detections(boxes_xyxy=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32), masks=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is known of one photo. All in photo pixels.

    name: of the photo's file. model_version: what made the boxes.
    standing: the boxes that stand, some of them under the object in hand. is_kept: bool `[N]`, which of them are those
    of earlier objects.
    points_xy `[P, 2]`, is_foreground `[P]`, drawn_xyxy `[4]` or None: what names the object in hand.
    objects: the object in hand with its masks: no box, one, or several where the points are on several objects.
    """

    name: str
    photo: Photo
    model_version: str
    standing: Detections
    is_kept: BoolArray
    points_xy: FloatArray
    is_foreground: BoolArray
    drawn_xyxy: FloatArray | None = None
    objects: Detections

    def others(self) -> Detections:
        """The standing boxes that are not of the object in hand."""
        return _only(self.standing, self._is_other())

    def boxes(self) -> Detections:
        """All boxes of the photo: those of the object in hand, and the others."""
        return _joined(self.objects, self.others())

    def next_object(self) -> Work:
        """The same boxes, and no object in hand."""
        is_other = self._is_other()
        is_kept = np.concatenate([np.ones(len(self.objects), np.bool_), self.is_kept[is_other]])
        return replace(self._without_prompt(), standing=self.boxes(), is_kept=is_kept)

    def without_object(self) -> Work:
        """Without the boxes of the object in hand, and of those whose place they took."""
        is_other = self._is_other()
        return replace(self._without_prompt(), standing=_only(self.standing, is_other), is_kept=self.is_kept[is_other])

    def _without_prompt(self) -> Work:
        points, is_foreground = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
        return replace(self, points_xy=points, is_foreground=is_foreground, drawn_xyxy=None, objects=_nothing())

    def _is_other(self) -> BoolArray:
        overlaps = iou_matrix(self.standing.boxes_xyxy, self.objects.boxes_xyxy)
        return np.asarray((overlaps < SAME_OBJECT).all(1), np.bool_)


def begin(service: Service, path: Path, *, name: str, deadline: float) -> Work:
    """A new work: the photo in an image file with all its boxes. Raises PhotoError, EngineError."""
    service.wait_ready(deadline=deadline)
    photo = service.photo(path)
    found = service.preannotate(photo, lane="interactive", deadline=deadline)
    return Work(
        name=name,
        photo=photo,
        model_version=found.model_version,
        standing=found.detections,
        is_kept=np.zeros(len(found.detections), np.bool_),
        points_xy=np.zeros((0, 2), np.float32),
        is_foreground=np.zeros(0, np.bool_),
        objects=_nothing(),
    )


def click(service: Service, work: Work, x: float, y: float, *, is_foreground: bool, deadline: float) -> Work:
    """The work with one more point for the object in hand, on it or not on it.

    The same work where nothing is found. Raises PromptError, EngineError.
    """
    if not is_foreground and work.drawn_xyxy is None and not work.is_foreground.any():
        raise PromptError("expected a click on an object first, got one that is not on it")
    if len(work.points_xy) >= MAX_POINTS:
        raise PromptError(f"expected at most {MAX_POINTS} points for one object, got one more")
    points = np.concatenate([work.points_xy, np.array([[x, y]], np.float32)])
    return (
        _found(
            service,
            replace(work, points_xy=points, is_foreground=np.append(work.is_foreground, is_foreground)),
            deadline,
        )
        or work
    )


def draw(service: Service, work: Work, x0: float, y0: float, x1: float, y1: float, *, deadline: float) -> Work:
    """The work with a rough rectangle, by two opposite corners, for the object in hand; in place of an earlier one.

    The same work where nothing is found. Raises PromptError, EngineError.
    """
    box = np.array([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], np.float32)
    return _found(service, replace(work, drawn_xyxy=box), deadline) or work


def cut_out(work: Work) -> bytes:
    """The object in hand as a PNG: the part of the photo that its boxes cover, transparent outside its masks.

    A rectangle in which nothing was seen is cut out whole. Raises RequestError where there is no object in hand.
    """
    from PIL import Image

    if not len(work.objects):
        raise RequestError("expected an object to cut out, got none: click on one first")
    boxes = work.objects.boxes_xyxy
    width, height = work.photo.size_wh
    left, top = np.floor(boxes[:, :2].min(0)).astype(int).clip(0)
    right, bottom = np.ceil(boxes[:, 2:].max(0)).astype(int).clip(None, (width, height))
    window = np.s_[top:bottom, left:right]
    alpha: PixelArray = np.zeros((height, width), np.uint8)
    for box, mask in zip(boxes, work.objects.masks or (), strict=True):
        if mask.bitmap.any():
            alpha[mask.in_photo((width, height))] = 255
        else:
            x0, y0, x1, y1 = box.round().astype(int)
            alpha[y0:y1, x0:x1] = 255
    content = io.BytesIO()
    Image.fromarray(np.dstack([work.photo.pixels[window], alpha[window]])).save(content, "PNG")
    return content.getvalue()


def coco(work: Work) -> bytes:
    """All boxes of the photo as a COCO file."""
    config = default_label_config()
    photo = BoxedPhoto(image=config.images[0], name=work.name, size_wh=work.photo.size_wh, detections=work.boxes())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coco.json"
        with open_writer(out, Format.coco, config=config, model_version=work.model_version) as writer:
            writer.add(BoxedTask(id=1, data={}, photos=[photo]))
            writer.finish()
        return out.read_bytes()


class _Place:
    """One person's work, changed by one thread at a time."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.lock = threading.Lock()


class Workbench:
    """The works of many people, by a key for each. Thread-safe.

    At most MAX_WORKS, and at most `max_bytes` of pixels unless one photo alone is larger; those that lay untouched for
    longest go first.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def put(self, key: str, work: Work) -> None:
        """Begins this person's work anew."""
        with self._lock:
            self._places[key] = _Place(work)
            self._places.move_to_end(key)
            while len(self._places) > 1 and (len(self._places) > MAX_WORKS or self._bytes() > self._max_bytes):
                self._places.popitem(last=False)

    def get(self, key: str) -> Work:
        """This person's work. Raises RequestError where there is none."""
        return self._place(key).work

    def change(self, key: str, step: Callable[[Work], Work]) -> tuple[Work, Work]:
        """This person's work before and after `step`. Raises RequestError where there is none, and what `step` raises;
        then the work stays as it was."""
        place = self._place(key)
        with place.lock:
            before = place.work
            place.work = step(before)
            return before, place.work

    def release(self, key: str) -> None:
        """Forgets this person's work."""
        with self._lock:
            self._places.pop(key, None)

    def _place(self, key: str) -> _Place:
        with self._lock:
            place = self._places.get(key)
            if place is None:
                raise RequestError("expected a photo, got none, or one that is no longer kept here: drop it again")
            self._places.move_to_end(key)
            return place

    def _bytes(self) -> int:
        return sum(place.work.photo.pixels.nbytes for place in self._places.values())


def _found(service: Service, asked: Work, deadline: float) -> Work | None:
    """The work with what its prompt names; None where that is nothing."""
    try:
        prompt = Prompt(points_xy=asked.points_xy, is_foreground=asked.is_foreground, box_xyxy=asked.drawn_xyxy)
    except ValueError as error:
        raise PromptError(str(error)) from error
    (answer,) = service.refine(
        asked.photo,
        [prompt],
        accepted_xyxy=asked.standing.boxes_xyxy[asked.is_kept],
        want_masks=True,
        deadline=deadline,
    )
    return replace(asked, objects=answer.detections) if len(answer.detections) else None


def _only(detections: Detections, keep: BoolArray) -> Detections:
    return Detections(boxes_xyxy=detections.boxes_xyxy[keep], scores=detections.scores[keep])


def _joined(one: Detections, other: Detections) -> Detections:
    return Detections(
        boxes_xyxy=np.concatenate([one.boxes_xyxy, other.boxes_xyxy]),
        scores=np.concatenate([one.scores, other.scores]),
    )
