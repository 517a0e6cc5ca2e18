"""Label Studio tasks through the Service: the photos of a task, and the regions that answer it.

Knows tasks, label configs and regions. Knows neither HTTP nor who asks: the Label Studio app and bulk jobs do it with
these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backend.label_studio.label_config import LabelConfig
from backend.label_studio.predictions import photo_address
from backend.label_studio.regions import Region, regions_from_detections
from backend.photos.loader import Access
from backend.service import Answer, Service
from model import Lane, Photo


def load_photos(
    service: Service,
    data: Any,
    config: LabelConfig,
    *,
    task_id: int | str | None,
    access: Access | None = None,
    deadline: float | None = None,
) -> tuple[Photo, ...]:
    """The photos of a task with this `data`, one for each image of the label config, in order.

    Raises RequestError where the data lacks one, PhotoError, DeadlineExceeded.
    """
    return tuple(
        service.photo(photo_address(data, image), access=access, task_id=task_id, deadline=deadline)
        for image in config.images
    )


def detect(
    service: Service,
    photos: Sequence[Photo],
    config: LabelConfig,
    *,
    score_threshold: float | None = None,
    lane: Lane = "bulk",
    deadline: float | None = None,
) -> list[Answer]:
    """All facings on each of the task's photos, in order.

    score_threshold: None takes each box control's `model_score_threshold`, then the engine's. Raises EngineError.
    """
    answers = []
    for photo, image in zip(photos, config.images, strict=True):
        threshold = image.boxes.score_threshold if score_threshold is None else score_threshold
        answers.append(service.preannotate(photo, score_threshold=threshold, lane=lane, deadline=deadline))
    return answers


def preannotate(
    service: Service,
    photos: Sequence[Photo],
    config: LabelConfig,
    *,
    score_threshold: float | None = None,
    lane: Lane = "bulk",
    deadline: float | None = None,
) -> list[Region]:
    """Regions of all facings on the task's photos; the rest as `detect`."""
    answers = detect(service, photos, config, score_threshold=score_threshold, lane=lane, deadline=deadline)
    regions: list[Region] = []
    for answer, image in zip(answers, config.images, strict=True):
        regions += regions_from_detections(answer.detections, answer.size_wh, image)
    return regions
