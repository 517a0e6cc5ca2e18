"""Label Studio tasks through the Service: a task's photos, and the regions that answer it.

Knows tasks, label configs, prompts and regions. Knows neither HTTP nor who asks: the Label Studio app and bulk jobs
answer tasks with these functions.

A task may have several photos, one for each image of its label config. One that fails is counted and logged, and the
others keep their boxes; the task fails with the first reason when all of them fail. A deadline that passes, and an
engine that is not ready, end the whole task, so that it is asked for again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from backend.label_studio.label_config import ImageControls, LabelConfig
from backend.label_studio.predictions import photo_address
from backend.label_studio.prompts import AnnotatorPrompt
from backend.label_studio.regions import Region, regions_from_detections
from backend.photos.loader import Access
from backend.reporting import log_event
from backend.service import Answer, Service
from model import DeadlineExceeded, Lane, NotReady, Photo

Value = TypeVar("Value")


def load_photos(
    service: Service,
    data: Any,
    config: LabelConfig,
    *,
    task_id: int | str | None,
    access: Access | None = None,
    deadline: float | None = None,
) -> tuple[Photo | None, ...]:
    """The photos of a task with this `data`, one for each image of the label config, in order; None where one failed.

    Raises RequestError where the data lacks the only one, PhotoError, DeadlineExceeded.
    """

    def load(image: ImageControls) -> Photo:
        return service.photo(photo_address(data, image), access=access, task_id=task_id, deadline=deadline)

    return _for_each_image(service, config.images, load, task_id)


def detect(
    service: Service,
    photo: Photo,
    image: ImageControls,
    *,
    score_threshold: float | None = None,
    lane: Lane = "bulk",
    deadline: float | None = None,
) -> Answer:
    """All facings on the photo of one image of the label config.

    score_threshold: None takes the box control's `model_score_threshold`, then the engine's. Raises EngineError.
    """
    threshold = image.boxes.score_threshold if score_threshold is None else score_threshold
    return service.preannotate(photo, score_threshold=threshold, lane=lane, deadline=deadline)


def preannotate(
    service: Service,
    photos: Sequence[Photo | None],
    config: LabelConfig,
    *,
    score_threshold: float | None = None,
    lane: Lane = "bulk",
    deadline: float | None = None,
    task_id: int | str | None = None,
) -> list[Region]:
    """Regions of all facings on the task's photos, those of each image with its `to_name`.

    photos: from `load_photos`. score_threshold: as in `detect`. task_id: for the log. Raises EngineError.
    """
    photo_of = {
        image.image_name: photo for image, photo in zip(config.images, photos, strict=True) if photo is not None
    }

    def answer(image: ImageControls) -> list[Region]:
        photo = photo_of[image.image_name]
        found = detect(service, photo, image, score_threshold=score_threshold, lane=lane, deadline=deadline)
        return regions_from_detections(found.detections, found.size_wh, image)

    read = [image for image in config.images if image.image_name in photo_of]
    return _joined(_for_each_image(service, read, answer, task_id))


def refine(
    service: Service,
    data: Any,
    config: LabelConfig,
    prompts: Sequence[AnnotatorPrompt],
    *,
    task_id: int | str | None,
    access: Access | None = None,
    deadline: float | None = None,
) -> list[Region]:
    """Regions that answer an annotator's prompts, each on its own photo of the task with this `data`.

    Masks are asked for where the label config has a control that takes them. Raises as load_photos, and EngineError.
    """

    def answer(image: ImageControls) -> list[Region]:
        asked = [prompt for prompt in prompts if prompt.image_name == image.image_name]
        photo = service.photo(photo_address(data, image), access=access, task_id=task_id, deadline=deadline)
        found = service.refine(
            photo,
            [prompt.to_prompt(photo.size_wh) for prompt in asked],
            want_masks=bool(image.polygons or image.brushes),
            deadline=deadline,
        )
        labels, ids = [prompt.label for prompt in asked], [prompt.region_id for prompt in asked]
        return regions_from_detections(found.detections, found.size_wh, image, labels=labels, ids=ids)

    names = {prompt.image_name for prompt in prompts}
    images = [image for image in config.images if image.image_name in names]
    return _joined(_for_each_image(service, images, answer, task_id))


def _for_each_image(
    service: Service,
    images: Sequence[ImageControls],
    work: Callable[[ImageControls], Value],
    task_id: int | str | None,
) -> tuple[Value | None, ...]:
    """`work` of each image, None where it failed. Raises the first failure when nothing succeeded."""
    values: list[Value | None] = []
    failures: list[tuple[ImageControls, Exception]] = []
    for image in images:
        try:
            values.append(work(image))
        except (DeadlineExceeded, NotReady):
            raise
        except Exception as error:
            failures.append((image, error))
            values.append(None)
    if failures and len(failures) == len(images):
        raise failures[0][1]
    for image, failure in failures:
        reason = service.failed(failure)
        log_event(
            logging.WARNING,
            "photo_failed",
            task=None if task_id is None else str(task_id),
            image=image.image_name,
            kind=reason.kind,
            reason=str(reason),
        )
    return tuple(values)


def _joined(regions: Sequence[list[Region] | None]) -> list[Region]:
    return [region for of_image in regions for region in of_image or ()]
