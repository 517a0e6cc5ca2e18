"""Rectangles that a project has already, redrawn around their objects with box prompts, as new predictions.

Knows which rectangles are taken, what becomes of them and how far they moved. The way there and back is that of
`jobs.preannotate_project`. Annotations and other predictions stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.bulk.choice import Wanted
from backend.bulk.jobs import prediction, upload_predictions
from backend.bulk.pipeline import Job, NothingToDo, Result, Show, show_nothing
from backend.bulk.report import Report
from backend.bulk.service import BulkService
from backend.bulk.task_photos import Images, failures_in, load_task_photos
from backend.label_studio.project import Project, Task
from backend.label_studio.regions import Region, boxes_from_regions, rectangle_value
from backend.service import Service
from model import Photo, Prompt
from model.boxes import iou_matrix

FloatArray = npt.NDArray[np.float32]

SUFFIX = "-tight"
RECTANGLES = ("rectanglelabels", "rectangle")
# As precise as Label Studio's percent are written.
UNMOVED_PX = 0.5


class Source(StrEnum):
    """Whose rectangles are redrawn: each task's newest prediction of another kind, or its newest annotation."""

    predictions = "predictions"
    annotations = "annotations"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far boxes moved.

    mean_iou: of a box with what it was. edge_share: by how much of the box's size an edge moved, median and 95th
    percentile. unmoved: boxes in which nothing was found, or which were tight already.
    """

    boxes: int
    unmoved: int
    mean_iou: float
    edge_share: tuple[float, float]


class Movement:
    """Gathers how far boxes moved. Thread-safe; bounded, since it counts in a histogram."""

    BINS = 1000  # thousandths of a box's size

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares = np.zeros(self.BINS + 1, np.int64)
        self._boxes = self._unmoved = 0
        self._iou = 0.0

    def add(self, old_xyxy: FloatArray, new_xyxy: FloatArray) -> None:
        """Boxes as they were and as they are, row by row."""
        if not len(old_xyxy):
            return
        sizes = np.tile(np.maximum(old_xyxy[:, 2:] - old_xyxy[:, :2], 1e-3), (1, 2))
        edges = np.abs(new_xyxy - old_xyxy)
        bins = np.clip(edges / sizes * self.BINS, 0, self.BINS).astype(np.int64).ravel()
        with self._lock:
            self._shares += np.bincount(bins, minlength=self.BINS + 1)
            self._boxes += len(old_xyxy)
            self._unmoved += int((edges.max(axis=1) < UNMOVED_PX).sum())
            self._iou += float(iou_matrix(old_xyxy, new_xyxy).trace())

    def summary(self) -> Moved:
        with self._lock:
            total = self._shares.cumsum()
            median, high = (
                float(np.searchsorted(total, share * total[-1])) / self.BINS if total[-1] else 0.0
                for share in (0.5, 0.95)
            )
            mean_iou = self._iou / self._boxes if self._boxes else 1.0
            return Moved(boxes=self._boxes, unmoved=self._unmoved, mean_iou=mean_iou, edge_share=(median, high))


def version_of(engine_version: str, source: Source) -> str:
    """The version of redrawn predictions: the engine's, and what they were made of."""
    return engine_version + SUFFIX + ("" if source is Source.predictions else f"-{source}")


def tighten(
    service: BulkService, project: Project, wanted: Wanted, *, source: Source, show: Show = show_nothing
) -> tuple[Report, Moved]:
    """A prediction with redrawn rectangles on every wanted task that has any. A killed run can be run again."""
    version, movement = version_of(service.engine.version, source), Movement()

    def load(task: Task) -> tuple[Images[Photo], list[Region]]:
        regions = regions_to_redraw(project, task, source)
        return load_task_photos(task, service=service, project=project), regions

    def work(job: Job[Task], loaded: tuple[Images[Photo], list[Region]]) -> Result[bytes]:
        photos, regions = loaded
        for image_name, photo in photos.items():
            if not isinstance(photo, Exception):
                regions = redraw(service, photo, regions, image_name, movement)
        return prediction(job.item, [_with_score(region) for region in regions], version, failures_in(photos))

    report = upload_predictions(service, project, wanted, version, load, work, show=show)
    return report, movement.summary()


def regions_to_redraw(project: Project, task: Task, source: Source) -> list[Region]:
    """The regions of the task's newest prediction, or annotation, that has rectangles. Raises NothingToDo without any.

    What was redrawn already is not redrawn once more.
    """
    images = {image.image_name for image in project.label_config.images}
    predictions, annotations = project.regions_of(task.id)
    bases = [found for found in predictions if SUFFIX not in str(found.get("model_version"))]
    if source is Source.annotations:
        bases = [found for found in annotations if not found.get("was_cancelled")]
    for base in reversed(bases):
        regions = base.get("result") or []
        if any(_is_rectangle(region, images) for region in regions):
            return list(regions)
    raise NothingToDo("without rectangles")


def redraw(
    service: Service, photo: Photo, regions: Sequence[Mapping[str, Any]], image_name: str, movement: Movement
) -> list[Region]:
    """The regions, each rectangle on the photo tight around its object and upright; others as they are.

    image_name: of the photo, in the label config. A rectangle in which nothing is found stays where it was.
    """
    rectangles = [region for region in regions if _is_rectangle(region, {image_name})]
    old = boxes_from_regions(rectangles, photo.size_wh)
    width, height = photo.size_wh
    old = np.clip(old, 0, [width, height, width, height]).astype(np.float32)
    usable = (old[:, 2:] - old[:, :2] >= 1).all(axis=1)
    new, scores = old.copy(), np.zeros(len(old), np.float32)
    if usable.any():
        answers = service.refine(photo, [Prompt(box_xyxy=box) for box in old[usable]])
        for row, answer in zip(np.flatnonzero(usable), answers, strict=True):
            if len(answer.detections):
                new[row], scores[row] = answer.detections.boxes_xyxy[0], answer.detections.scores[0]
    movement.add(old, new)
    redrawn = iter(zip(new, scores, strict=True))
    return [
        _redrawn(region, *next(redrawn), photo.size_wh) if _is_rectangle(region, {image_name}) else dict(region)
        for region in regions
    ]


def _redrawn(region: Mapping[str, Any], box_xyxy: FloatArray, score: np.float32, size_wh: tuple[int, int]) -> Region:
    return {
        **{key: region[key] for key in ("from_name", "to_name", "type", "id") if key in region},
        "original_width": size_wh[0],
        "original_height": size_wh[1],
        "image_rotation": 0,
        "score": round(float(score), 4),
        "value": {**region["value"], **(rectangle_value(box_xyxy.tolist(), size_wh) or {})},
    }


def _with_score(region: Region) -> Region:
    """Regions of annotations have none."""
    return {**region, "score": float(region.get("score") or 0.0)}


def _is_rectangle(region: Mapping[str, Any], image_names: set[str]) -> bool:
    return region.get("type") in RECTANGLES and region.get("to_name") in image_names
