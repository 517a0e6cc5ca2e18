"""Rectangles that a project has already, redrawn around their objects with box prompts, as new predictions.

Knows which rectangles are taken, what becomes of them and how far they moved. The way there and back is that of
`preannotate`: the same run, the same uploads. Annotations and other predictions stay as they are.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backend.bulk.jobs import (
    ProjectSink,
    Report,
    Wanted,
    count_of,
    jobs_of,
    load_photo,
    photo_loader,
    report_of,
    run_to_end,
    tasks_to_do,
)
from backend.bulk.pipeline import Busy, Job, NothingToDo, Tally

if TYPE_CHECKING:
    from backend.label_studio.project import Project, Task
    from backend.label_studio.regions import Region
    from backend.settings import Settings
    from model import Engine, Photo

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
        from model.boxes import iou_matrix

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
    engine: Engine, project: Project, wanted: Wanted, settings: Settings, *, source: Source
) -> tuple[Report, Moved]:
    """A prediction with redrawn rectangles on every wanted task that has any. Killed, it goes on like `preannotate`."""
    from backend.bulk.uploads import Uploads

    config, version = project.label_config, version_of(engine.version, source)
    tally, movement = Tally(total=count_of(project, wanted)), Movement()
    uploads, loader = Uploads(project, version, again=wanted.again), photo_loader(settings)
    regions: dict[int, list[Region]] = {}  # of photos on their way through the engine

    def load(task: Task) -> Photo:
        own = regions_to_redraw(project, task, source)
        photo = load_photo(task, loader, project)
        regions[task.id] = own
        return photo

    def work(job: Job, photo: Photo, busy: Busy) -> tuple[bytes, int]:
        from backend.label_studio.predictions import prediction_of

        redrawn = redraw(engine, photo, regions.pop(job.key), config.images[0].image_name, movement, busy)
        return json.dumps({"task": job.key, **prediction_of(redrawn, version)}).encode(), len(redrawn)

    jobs = jobs_of(tasks_to_do(project, version, wanted, tally, on_held=uploads.verify), load, config)
    ending = run_to_end(jobs, work, ProjectSink(uploads), tally=tally, stopping=project.stopping, label="tighten")
    return report_of(ending, version, project=project, deleted=uploads.deleted), movement.summary()


def regions_to_redraw(project: Project, task: Task, source: Source) -> list[Region]:
    """The regions of the task's newest prediction, or annotation, that has rectangles. Raises NothingToDo without any.

    What was redrawn already is not redrawn once more.
    """
    predictions, annotations = project.regions_of(task.id)
    bases = [found for found in predictions if SUFFIX not in str(found.get("model_version"))]
    if source is Source.annotations:
        bases = [found for found in annotations if not found.get("was_cancelled")]
    for base in reversed(bases):
        regions = base.get("result") or []
        if any(_is_rectangle(region, project.label_config.images[0].image_name) for region in regions):
            return list(regions)
    raise NothingToDo


def redraw(
    engine: Engine, photo: Photo, regions: Sequence[Mapping[str, Any]], image_name: str, movement: Movement, busy: Busy
) -> list[Region]:
    """The regions, each rectangle on the photo tight around its object, upright, with an id of its own; others as they
    are. image_name: of the photo, in the label config.

    A rectangle in which nothing is found stays where it was. All of a photo's are asked for together.
    """
    from backend.label_studio.regions import boxes_from_regions, rectangle_value
    from model import Prompt

    rectangles = [region for region in regions if _is_rectangle(region, image_name)]
    old = boxes_from_regions(rectangles, photo.size_wh)
    width, height = photo.size_wh
    old = np.clip(old, 0, [width, height, width, height]).astype(np.float32)
    usable = (old[:, 2:] - old[:, :2] >= 1).all(axis=1)
    new, scores = old.copy(), np.zeros(len(old), np.float32)
    if usable.any():
        with busy.work():
            found = engine.refine(photo, [Prompt(box_xyxy=box) for box in old[usable]])
        hit = found.scores > 0
        rows = np.flatnonzero(usable)[hit]
        new[rows], scores[rows] = found.boxes_xyxy[hit], found.scores[hit]
    movement.add(old, new)
    redrawn = iter(zip(new, scores, strict=True))
    result: list[Region] = []
    for region in regions:
        if not _is_rectangle(region, image_name):
            result.append({**region, "score": float(region.get("score") or 0.0)})
            continue
        box, score = next(redrawn)
        value = rectangle_value(box.tolist(), photo.size_wh) or {}
        result.append(
            {
                **{key: region[key] for key in ("from_name", "to_name", "type") if key in region},
                "id": region.get("id"),
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(float(score), 4),
                "value": {**region["value"], **value},
            }
        )
    return result


def print_moved(moved: Moved) -> None:
    """How far the boxes moved, in a line."""
    median, high = moved.edge_share
    print(
        f"{moved.boxes} boxes redrawn, {moved.unmoved} of them stayed; mean IoU with what they were "
        f"{moved.mean_iou:.3f}; "
        f"an edge moved by {median:.1%} of the box's size (median), {high:.1%} (95th percentile)"
    )


def _is_rectangle(region: Mapping[str, Any], image_name: str) -> bool:
    return region.get("type") in RECTANGLES and region.get("to_name") == image_name
