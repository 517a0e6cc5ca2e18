"""An annotator at work, simulated: how many actions it takes until all boxes of photos with known boxes are right.

Knows the Service's answers to tasks and prompts as Label Studio's page sends them, known boxes, and what a hand does.
Boxes are pre-annotated; the annotator removes false ones, clicks on missed facings, and corrects what fits badly. The
page is not there: answers replace and remove regions as Label Studio was seen to do (see
backend.label_studio.standing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backend.bulk.jobs import default_label_config
from backend.label_studio.label_config import LabelConfig
from backend.label_studio.prompts import prompts_from_context
from backend.label_studio.regions import Region, boxes_from_regions
from backend.label_studio.standing import standing_boxes
from backend.tasks import preannotate, refine_image
from model.quality import FALSE, GOOD_IOU, FloatArray, Truth, match, paired_iou
from model.types import Detections
from scripts.measure.prompts import jitter_boxes, largest_excess

if TYPE_CHECKING:
    from backend.service import Service
    from model import Photo

CAREFUL = 0.05  # of its size: how far each edge of a rectangle is off that has to be right
HAND = 0.08  # of the sides of what it is aimed at: standard deviation of where a click lands
KEYS_OF_A_TOOL = 1
ACTIONS_OF_A_DRAG = 2  # press and release
BY_HAND_PER_100 = 100 * ACTIONS_OF_A_DRAG  # drawing every facing


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What an annotator did. removals: of false boxes, an Alt-click in the middle each. clicks: on missed facings.
    trims: Alt-clicks on what sticks out of a box. drags: rectangles. keys: to choose label and tool, and to submit."""

    facings: int = 0
    removals: int = 0
    clicks: int = 0
    trims: int = 0
    drags: int = 0
    keys: int = 0

    def __add__(self, other: Actions) -> Actions:
        return Actions(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    def per_100(self, count: float | None = None) -> float:
        """`count` (all actions when None, a drag for two) for each 100 facings; NaN without facings."""
        if count is None:
            count = self.removals + self.clicks + self.trims + ACTIONS_OF_A_DRAG * self.drags + self.keys
        return 100 * count / self.facings if self.facings else float("nan")


def annotate(
    service: Service, photo: Photo, truth: Truth, *, score_threshold: float | None = None, seed: int
) -> Actions:
    """Plays an annotator on one photo until every known box has one that fits it with an IoU of 0.75.

    With the point tool false boxes are removed and what sticks out is cut off; with the rectangle tool badly fitting
    boxes are drawn anew; then missed facings are clicked, row by row, and what still fits badly is corrected likewise.

    score_threshold: of the pre-annotated boxes; None takes the engine's. seed: of the hand's errors.
    """
    annotator = _Annotator(_Page(service, photo, score_threshold), truth, np.random.default_rng((1, seed)))
    annotator.remove_false_boxes()
    order = reading_order(truth.boxes_xyxy)
    found = [index for index in order if annotator.box_of(index) is not None]
    for index in found:
        annotator.trim(index)
    annotator.draw(found)
    for index in order:
        annotator.click(index)
        annotator.trim(index)
    annotator.draw(order)
    annotator.remove_false_boxes()
    annotator.keys += 1  # submit
    return annotator.actions()


class _Annotator:
    """The hand and the eye. truth: what the eye sees on the photo."""

    def __init__(self, page: _Page, truth: Truth, hand: np.random.Generator) -> None:
        self._page = page
        self._truth = truth
        self._hand = hand
        self.removals = self.clicks = self.trims = self.drags = self.keys = 0

    def actions(self) -> Actions:
        return Actions(
            facings=len(self._truth.boxes_xyxy),
            removals=self.removals,
            clicks=self.clicks,
            trims=self.trims,
            drags=self.drags,
            keys=self.keys + KEYS_OF_A_TOOL * self._page.tools_taken,
        )

    def box_of(self, index: int) -> FloatArray | None:
        """The box that is meant for a known one; None where it is missed."""
        found = np.flatnonzero(match(self._page.detections, self._truth).truth_index == index)
        return self._page.boxes[found[0]].astype(np.float64) if len(found) else None

    def is_right(self, index: int) -> bool:
        """Whether the box that is meant for a known one fits it."""
        box = self.box_of(index)
        return box is not None and _fits(box, self._truth.boxes_xyxy[index])

    def remove_false_boxes(self) -> None:
        """An Alt-click into the middle of each."""
        for box in self._page.boxes[match(self._page.detections, self._truth).truth_index == FALSE]:
            self._page.point((box[:2] + box[2:]) / 2, is_foreground=False)
            self.removals += 1

    def click(self, index: int) -> None:
        """A click on a missed facing."""
        if self.box_of(index) is None:
            self._page.point(self._aimed(self._truth.boxes_xyxy[index]), is_foreground=True)
            self.clicks += 1

    def trim(self, index: int) -> None:
        """An Alt-click where a box sticks out, if that edge alone makes it wrong."""
        box, known = self.box_of(index), self._truth.boxes_xyxy[index]
        strip = None if box is None or _fits(box, known) else largest_excess(box, known)
        if box is None or strip is None:
            return
        edge, place = strip
        corrected = box.copy()
        corrected[edge] = known[edge]
        if _fits(corrected, known):
            self._page.point(self._aimed(place), is_foreground=False)
            self.trims += 1

    def draw(self, indices: Sequence[int]) -> None:
        """A rectangle, drawn with care, around each facing without a box that fits; a second one, drawn exactly, where
        the answer does not fit; and a third by hand."""
        for index in indices:
            known = self._truth.boxes_xyxy[index]
            for jitter in (CAREFUL, 0.0):
                if not self.is_right(index):
                    self._page.draw(jitter_boxes(known[None], self._truth.size_wh, self._hand, jitter)[0])
                    self.drags += 1
            self.drags += not self.is_right(index)

    def _aimed(self, target: FloatArray) -> FloatArray:
        """Where a click lands that is meant for the middle of a box."""
        side = target[2:] - target[:2]
        landed: FloatArray = (target[:2] + target[2:]) / 2 + self._hand.normal(0, HAND, 2) * side
        return landed


class _Page:
    """The photo as the annotator sees it, with auto-accept on: every answer takes effect at once."""

    def __init__(self, service: Service, photo: Photo, score_threshold: float | None) -> None:
        self._service = service
        self._photo = photo
        self._config: LabelConfig = default_label_config()
        (self._image,) = self._config.images
        self._tool = ""
        self.tools_taken = 0
        regions = preannotate(service, (photo,), self._config, score_threshold=score_threshold)
        self._regions: dict[str, Region] = {region["id"]: {**region, "origin": "prediction"} for region in regions}

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """All boxes `[N, 4]` on the photo, in pixels."""
        return boxes_from_regions(self._regions.values(), self._photo.size_wh)

    @property
    def detections(self) -> Detections:
        """The boxes with their scores; those that the annotator asked for count first."""
        scores = [region["score"] if region["origin"] == "prediction" else 1.0 for region in self._regions.values()]
        return Detections(boxes_xyxy=self.boxes, scores=np.array(scores, np.float32))

    def point(self, place_xy: FloatArray, *, is_foreground: bool) -> None:
        """A click, or an Alt-click."""
        x, y = np.clip(place_xy, 0, self._photo.size_wh) / self._photo.size_wh * 100
        value = {"x": float(x), "y": float(y), "width": 0.3}
        self._ask({"type": "keypoint", "from_name": "point", "is_positive": is_foreground, "value": value})

    def draw(self, box_xyxy: npt.NDArray[np.float32]) -> None:
        """A rectangle."""
        x0, y0, x1, y1 = (box_xyxy / np.tile(self._photo.size_wh, 2) * 100).tolist()
        value = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        self._ask({"type": "rectangle", "from_name": "prompt", "value": value})

    def _ask(self, item: dict[str, Any]) -> None:
        self.tools_taken += item["type"] != self._tool
        self._tool = item["type"]
        prompts = prompts_from_context({"result": [{"to_name": "image", **item}]}, self._config)
        standing = standing_boxes(list(self._regions.values()), self._image, is_submitted=False)
        for region in refine_image(self._service, lambda: self._photo, self._image, prompts, standing):
            self._regions.pop(region["id"], None)
            if not region.get("dynamic"):
                self._regions[region["id"]] = {**region, "origin": "manual"}


def reading_order(boxes_xyxy: FloatArray) -> list[int]:
    """Indices of boxes, row by row from the top, each row from the left."""
    if not len(boxes_xyxy):
        return []
    height = np.median(boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    rows = np.round(boxes_xyxy[:, 3] / height)
    return [int(index) for index in np.lexsort((boxes_xyxy[:, 0], rows))]


def _fits(box: FloatArray, known: FloatArray) -> bool:
    return bool(paired_iou(box[None], known[None])[0] >= GOOD_IOU)
