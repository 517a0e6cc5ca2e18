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
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from backend.label_studio.corrections import corrected, replaced_by
from backend.label_studio.label_config import ImageControls, LabelConfig
from backend.label_studio.predictions import photo_address
from backend.label_studio.prompts import AnnotatorPrompt, Correction
from backend.label_studio.regions import Region, regions_from_detections
from backend.label_studio.standing import StandingBox, standing_boxes
from backend.photos.loader import Access
from backend.reporting import log_event
from backend.service import Answer, Service
from model import DeadlineExceeded, Lane, NotReady, Photo, Prompt
from model.types import FloatArray

Value = TypeVar("Value")

NO_POINTS = np.zeros((0, 2), np.float32)


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
    """All facings on the photo of one image of the label config, without less sure ones.

    score_threshold: None takes the box control's `model_score_threshold`, then the engine's. Raises EngineError.
    """
    threshold = _threshold(image, score_threshold)
    return service.preannotate(photo, score_threshold=threshold, lane=lane, deadline=deadline)


def preannotate_image(
    service: Service,
    photo: Photo,
    image: ImageControls,
    *,
    score_threshold: float | None = None,
    lane: Lane = "bulk",
    deadline: float | None = None,
) -> list[Region]:
    """Regions of all facings on the photo of one image, less sure ones with their own label where the label config has
    one. score_threshold: of the others, as in `detect`. Raises EngineError."""
    unsure = image.boxes.unsure_label
    if unsure is None:
        found = detect(service, photo, image, score_threshold=score_threshold, lane=lane, deadline=deadline)
        return regions_from_detections(found.detections, found.size_wh, image)
    service.wait_ready(deadline=deadline)  # the engine's threshold is known then
    sure = _threshold(image, score_threshold)
    sure = service.engine.score_threshold if sure is None else sure
    found = service.preannotate(photo, score_threshold=image.boxes.least_score(sure), lane=lane, deadline=deadline)
    labels = [image.boxes.default_label if score >= sure else unsure for score in found.detections.scores]
    return regions_from_detections(found.detections, found.size_wh, image, labels=labels)


def _threshold(image: ImageControls, score_threshold: float | None) -> float | None:
    return image.boxes.score_threshold if score_threshold is None else score_threshold


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
        return preannotate_image(service, photo, image, score_threshold=score_threshold, lane=lane, deadline=deadline)

    read = [image for image in config.images if image.image_name in photo_of]
    return _joined(_for_each_image(service, read, answer, task_id))


def refine(
    service: Service,
    data: Any,
    config: LabelConfig,
    prompts: Sequence[AnnotatorPrompt | Correction],
    *,
    standing: Sequence[Region] = (),
    is_submitted: bool = False,
    task_id: int | str | None,
    access: Access | None = None,
    deadline: float | None = None,
) -> list[Region]:
    """Regions that answer an annotator's prompts, each on its own photo of the task with this `data`.

    standing: the regions that the annotator sees on the task; is_submitted: whether they were submitted before. An
    answer takes the place of a standing box of the same object. Masks are asked for where the label config has a
    control that takes them. Raises as load_photos, and EngineError.
    """

    def answer(image: ImageControls) -> list[Region]:
        return refine_image(
            service,
            lambda: service.photo(photo_address(data, image), access=access, task_id=task_id, deadline=deadline),
            image,
            prompts,
            standing_boxes(standing, image, is_submitted=is_submitted),
            deadline=deadline,
        )

    names = {prompt.image_name for prompt in prompts}
    images = [image for image in config.images if image.image_name in names]
    return _joined(_for_each_image(service, images, answer, task_id))


def refine_image(
    service: Service,
    load: Callable[[], Photo],
    image: ImageControls,
    prompts: Sequence[AnnotatorPrompt | Correction],
    standing: Sequence[StandingBox],
    *,
    deadline: float | None = None,
) -> list[Region]:
    """Regions that answer the prompts on one image of the label config. load: its photo; corrections need none."""
    own = [prompt for prompt in prompts if prompt.image_name == image.image_name]
    regions = [region for one in own if isinstance(one, Correction) for region in corrected(standing, one.points)]
    for region in regions:
        if region.get("value", {}).get("rectanglelabels") == [image.boxes.unsure_label]:
            region["value"] = {**region["value"], "rectanglelabels": [image.boxes.default_label]}
    asked = [one for one in own if isinstance(one, AnnotatorPrompt)]
    return [*regions, *(_answered(service, load(), image, asked, standing, deadline) if asked else ())]


def _answered(
    service: Service,
    photo: Photo,
    image: ImageControls,
    prompts: Sequence[AnnotatorPrompt],
    standing: Sequence[StandingBox],
    deadline: float | None,
) -> list[Region]:
    """The regions of the prompts' objects on one photo."""
    size = np.array(photo.size_wh * 2, np.float32)
    accepted = [box.bounds for box in standing if box.is_accepted]
    asked = [_marked(prompt.to_prompt(photo.size_wh), size, standing) for prompt in prompts]
    answers = service.refine(
        photo,
        asked,
        accepted_xyxy=np.array(accepted, np.float32).reshape(-1, 4) * size,
        want_masks=bool(image.polygons or image.brushes),
        deadline=deadline,
    )
    regions: list[Region] = []
    free = list(standing)
    for drawn, prompt, found in zip(prompts, asked, answers, strict=True):
        ids: list[str | None] = []
        labels: list[str] = []
        for index, box in enumerate(found.detections.boxes_xyxy):
            replaced = replaced_by(box / size, prompt.points_xy[prompt.is_foreground] / size[:2], free)
            own_id = drawn.region_id if index == 0 else None
            ids.append(own_id or (str(replaced[0].region["id"]) if replaced else None))
            regions += [one.removed() for one in (replaced if own_id else replaced[1:])]
            regions += [detail for one in replaced[:1] if not own_id for detail in one.details]
            free = [one for one in free if one not in replaced]
            labels.append(drawn.label or _kept_label(replaced, image) or image.boxes.default_label)
        regions += regions_from_detections(found.detections, found.size_wh, image, labels=labels, ids=ids)
    return regions


def _kept_label(replaced: Sequence[StandingBox], image: ImageControls) -> str | None:
    """The label that the answer takes over: what an annotator points at is no longer unsure."""
    label = replaced[0].label if replaced else None
    return label if label in image.boxes.labels and label != image.boxes.unsure_label else None


def _marked(prompt: Prompt, size: FloatArray, standing: Sequence[StandingBox]) -> Prompt:
    """The prompt, marked as redrawn where its rectangle lies over a standing box."""
    if prompt.box_xyxy is None:
        return prompt
    return replace(prompt, is_redrawn=bool(replaced_by(prompt.box_xyxy / size, NO_POINTS, standing)))


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
