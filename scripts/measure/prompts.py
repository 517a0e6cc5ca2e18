"""What prompts are worth on photos with known boxes: clicks, Alt-clicks, clicks on two products, rough rectangles.

Knows the Service, known boxes, and how an annotator's hand misses. Measuring returns values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.answers import LEAST_DRAWN_IOU
from model.quality import GOOD_IOU, MATCH_IOU, FloatArray, Truth, paired_iou, pairwise_iou

if TYPE_CHECKING:
    from backend.service import Service
    from model import Detections, Photo, Prompt

JITTER = 0.15  # of a box's size, for each of its edges
OUTWARDS = np.array([-1.0, -1.0, 1.0, 1.0])  # of the edges left, top, right, bottom
LEAST_EXCESS = 0.15  # of a facing's side, by which a box sticks out before somebody would Alt-click there
PAIRS = 20  # of facings, clicked together, for each photo: each with the one nearest to it
RANDOM_PROMPTS = 25  # for each photo
HOLDING_TOLERANCE_PX = 0.01  # boxes are float32
ROUNDING_IOU = 1e-3

Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PromptQuality:
    """Mean IoU with the known box, unless said otherwise.

    click_iou: after one click in the middle. rough_box_iou: of a rough rectangle; refined_box_iou: of its answer.
    click_iou_accepted, refined_box_iou_accepted: the same where every second box is known as accepted.
    alt_clicks: how many answers to a click stick out far enough for an Alt-click; trimmed_from_iou, trimmed_iou: before
    and after it. pairs: how many pairs of neighbours were clicked together; pairs_found: the share of which both were
    found, each by a box of its own with an IoU of 0.5.
    prompts: all of these and some at random places; not_held: how many got a box that does not hold them.
    """

    click_iou: float
    rough_box_iou: float
    refined_box_iou: float
    click_iou_accepted: float
    refined_box_iou_accepted: float
    alt_clicks: int
    trimmed_from_iou: float
    trimmed_iou: float
    pairs: int
    pairs_found: float
    prompts: int
    not_held: int


@dataclass(kw_only=True)
class PromptMeasurement:
    """The answers to prompts on the photos so far. `add` a photo at a time; `quality` of all."""

    _ious: dict[str, list[FloatArray]] = field(default_factory=dict)
    _prompts: int = 0
    _not_held: int = 0

    def add(self, service: Service, photo: Photo, truth: Truth, *, seed: int) -> None:
        """Asks for the objects of a photo that was pre-annotated. seed: of the hand's errors there."""
        boxes = truth.boxes_xyxy.astype(np.float32)
        if not len(boxes):
            return
        generator = np.random.default_rng((0, seed))
        rough = jitter_boxes(truth.boxes_xyxy, truth.size_wh, generator)
        clicks = [click_at(centre) for centre in (boxes[:, :2] + boxes[:, 2:]) / 2]
        rectangles = [rectangle(box) for box in rough]
        clicked = self._ask(service, photo, clicks)
        self._note("click", paired_iou(clicked, truth.boxes_xyxy))
        self._note("rough", paired_iou(rough, truth.boxes_xyxy))
        self._note("refined", paired_iou(self._ask(service, photo, rectangles), truth.boxes_xyxy))
        asked, accepted = truth.boxes_xyxy[::2], boxes[1::2]
        self._note("click accepted", paired_iou(self._ask(service, photo, clicks[::2], accepted), asked))
        self._note("refined accepted", paired_iou(self._ask(service, photo, rectangles[::2], accepted), asked))
        self._add_alt_clicks(service, photo, truth, clicks, clicked)
        self._add_pairs(service, photo, truth, generator)
        self._ask(service, photo, random_prompts(truth.size_wh, RANDOM_PROMPTS, generator))

    def quality(self) -> PromptQuality:
        """Of all photos so far; NaN where nothing was asked."""
        return PromptQuality(
            click_iou=self._mean("click"),
            rough_box_iou=self._mean("rough"),
            refined_box_iou=self._mean("refined"),
            click_iou_accepted=self._mean("click accepted"),
            refined_box_iou_accepted=self._mean("refined accepted"),
            alt_clicks=self._count("trimmed"),
            trimmed_from_iou=self._mean("trimmed from"),
            trimmed_iou=self._mean("trimmed"),
            pairs=self._count("pairs"),
            pairs_found=self._mean("pairs"),
            prompts=self._prompts,
            not_held=self._not_held,
        )

    def _add_alt_clicks(
        self, service: Service, photo: Photo, truth: Truth, clicks: Sequence[Prompt], clicked: Boxes
    ) -> None:
        before = paired_iou(clicked, truth.boxes_xyxy)
        cases, prompts = [], []
        for index, (click, box, known) in enumerate(zip(clicks, clicked, truth.boxes_xyxy, strict=True)):
            excess = largest_excess(box, known)
            if before[index] < GOOD_IOU and excess is not None:
                _, strip = excess
                cases.append(index)
                prompts.append(with_alt_click(click, (strip[:2] + strip[2:]) / 2))
        trimmed = self._ask(service, photo, prompts)
        self._note("trimmed from", before[cases])
        self._note("trimmed", paired_iou(trimmed, truth.boxes_xyxy[cases]))

    def _add_pairs(self, service: Service, photo: Photo, truth: Truth, generator: np.random.Generator) -> None:
        if len(truth.boxes_xyxy) < 2:
            return
        centres = ((truth.boxes_xyxy[:, :2] + truth.boxes_xyxy[:, 2:]) / 2).astype(np.float32)
        first = generator.permutation(len(centres))[:PAIRS]
        distance = np.linalg.norm(centres[first, None] - centres[None], axis=2)
        distance[np.arange(len(first)), first] = np.inf
        pairs = np.stack([first, distance.argmin(1)], axis=1)
        found = []
        for pair, detections in zip(
            pairs, self._refine(service, photo, [click_at(*centres[p]) for p in pairs]), strict=True
        ):
            iou = pairwise_iou(detections.boxes_xyxy, truth.boxes_xyxy[pair]) >= MATCH_IOU
            found.append(float(iou.any(0).all() and iou.any(1).sum() >= 2))
        self._note("pairs", np.array(found))

    def _ask(
        self, service: Service, photo: Photo, prompts: Sequence[Prompt], accepted_xyxy: Boxes | None = None
    ) -> Boxes:
        """The box `[4]` of each prompt on one object; an empty one where there is none."""
        answers = self._refine(service, photo, prompts, accepted_xyxy)
        boxes = [found.boxes_xyxy[0] if len(found) else np.zeros(4, np.float32) for found in answers]
        return np.array(boxes, np.float32).reshape(-1, 4)

    def _refine(
        self, service: Service, photo: Photo, prompts: Sequence[Prompt], accepted_xyxy: Boxes | None = None
    ) -> list[Detections]:
        if not prompts:
            return []
        answers = [one.detections for one in service.refine(photo, prompts, accepted_xyxy=accepted_xyxy)]
        self._prompts += len(prompts)
        self._not_held += sum(not holds_prompt(*one, photo.size_wh) for one in zip(answers, prompts, strict=True))
        return answers

    def _note(self, name: str, values: FloatArray) -> None:
        self._ious.setdefault(name, []).append(values)

    def _mean(self, name: str) -> float:
        return float(np.concatenate(self._ious[name]).mean()) if self._count(name) else float("nan")

    def _count(self, name: str) -> int:
        return sum(map(len, self._ious.get(name, ())))


def click_at(*points_xy: npt.NDArray[Any]) -> Prompt:
    """Clicks that come together."""
    from model import Prompt

    return Prompt(points_xy=np.array(points_xy, np.float32), is_foreground=np.ones(len(points_xy), bool))


def rectangle(box_xyxy: npt.NDArray[Any]) -> Prompt:
    """A drawn rectangle."""
    from model import Prompt

    return Prompt(box_xyxy=np.asarray(box_xyxy, np.float32))


def with_alt_click(prompt: Prompt, place_xy: npt.NDArray[Any]) -> Prompt:
    """The prompt with one more point, which its object must not contain."""
    from model import Prompt

    return Prompt(
        points_xy=np.concatenate([prompt.points_xy, np.asarray(place_xy, np.float32)[None]]),
        is_foreground=np.append(prompt.is_foreground, False),
        box_xyxy=prompt.box_xyxy,
    )


def largest_excess(box_xyxy: npt.NDArray[Any], known_xyxy: npt.NDArray[Any]) -> tuple[int, FloatArray] | None:
    """The edge by which a box sticks out most beyond the known one, and the strip `[4]` between both there; None where
    that is less than LEAST_EXCESS of the known side, or where they do not meet."""
    low, high = np.maximum(box_xyxy[:2], known_xyxy[:2]), np.minimum(box_xyxy[2:], known_xyxy[2:])
    if (low >= high).any():
        return None
    share = (box_xyxy - known_xyxy) * OUTWARDS / np.tile(known_xyxy[2:] - known_xyxy[:2], 2)
    edge = int(share.argmax())
    if share[edge] < LEAST_EXCESS:
        return None
    strip: FloatArray = np.concatenate([low, high])
    strip[edge % 2], strip[edge % 2 + 2] = sorted((box_xyxy[edge], known_xyxy[edge]))
    return edge, strip


def random_prompts(size_wh: tuple[int, int], count: int, generator: np.random.Generator) -> list[Prompt]:
    """Clicks with Alt-clicks, and every third a rectangle too, anywhere in a photo and a little beyond its edges."""
    from model import Prompt

    size = np.array(size_wh)
    prompts = []
    for number in range(count):
        points = generator.uniform(-0.05, 1.05, (generator.integers(1, 5), 2)) * size
        if number % 2:  # close together, as on one object
            points = points[0] + generator.normal(0, 0.03, points.shape) * size
        is_foreground = generator.random(len(points)) < 0.6
        is_foreground[0] = True
        box = None
        if number % 3 == 0:
            corner = points[0] - generator.uniform(0, 0.1, 2) * size
            box = np.concatenate([corner, corner + generator.uniform(0.01, 0.3, 2) * size]).astype(np.float32)
        prompts.append(Prompt(points_xy=points.astype(np.float32), is_foreground=is_foreground, box_xyxy=box))
    return prompts


def holds_prompt(found: Detections, prompt: Prompt, size_wh: tuple[int, int]) -> bool:
    """Whether an answer keeps what is promised: it is empty, or every foreground point within the photo lies in one of
    its boxes, no background point lies inside one, and one overlaps the rectangle by an IoU of 0.3."""
    if not len(found):
        return True
    boxes = found.boxes_xyxy
    inside = ((prompt.points_xy >= 0) & (prompt.points_xy <= np.array(size_wh))).all(1)
    foreground = prompt.points_xy[prompt.is_foreground & inside]
    background = prompt.points_xy[~prompt.is_foreground & inside]
    slack = HOLDING_TOLERANCE_PX
    near = ((foreground[:, None] >= boxes[:, :2] - slack) & (foreground[:, None] <= boxes[:, 2:] + slack)).all(2)
    within = ((background[:, None] > boxes[:, :2] + slack) & (background[:, None] < boxes[:, 2:] - slack)).all(2)
    drawn = prompt.box_xyxy
    if within.any():
        return False
    if drawn is None:  # points on nothing get no box, and the others get theirs
        return bool(near.any(axis=0).all())
    if not near.any(axis=-1).all():
        return False
    inside_photo = np.clip(drawn, 0, [*size_wh, *size_wh])
    return bool(pairwise_iou(boxes, inside_photo[None]).max() >= LEAST_DRAWN_IOU - ROUNDING_IOU)


def jitter_boxes(
    boxes_xyxy: npt.NDArray[Any], size_wh: tuple[int, int], generator: np.random.Generator, jitter: float = JITTER
) -> Boxes:
    """Boxes as a hand draws them: each edge off by up to `jitter` of the box's size, inside the photo.

    At least one pixel remains, whatever the photo's edge cuts off.
    """
    sizes = np.tile(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], (1, 2))
    jittered = boxes_xyxy + sizes * generator.uniform(-jitter, jitter, boxes_xyxy.shape)
    clipped = np.clip(jittered, 0, [*size_wh, *size_wh]).astype(np.float32)
    return np.concatenate([clipped[:, :2], np.maximum(clipped[:, 2:], clipped[:, :2] + 1)], axis=1)
