"""The photos of a project's tasks, and the boxes on them; a task may have several, one for each image of its config.

Knows that one failed photo costs no other its boxes. Knows neither uploads nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from backend import tasks
from backend.bulk.service import BulkService
from backend.errors import Interrupted, PhotoMissing, PhotoUnreachable, RequestError
from backend.label_studio.label_config import ImageControls, LabelConfig
from backend.label_studio.predictions import photo_address
from backend.label_studio.project import Project, Task
from backend.label_studio.regions import Region
from backend.label_studio.retry import ProjectError
from backend.service import Answer
from model import NotReady, Photo

FATAL = (NotReady, ProjectError, Interrupted)  # not one photo's fault: they end a run
LOAD_ATTEMPTS = 4  # Label Studio answers 500 for an upload whose file is gone
LOAD_PAUSE_S = 1.0

Value = TypeVar("Value")
Images = Mapping[str, Value | Exception]  # by the image's name in the label config: a value, or why there is none


def for_each_image(config: LabelConfig, work: Callable[[ImageControls], Value]) -> Images[Value]:
    """`work` of each image of a task: one failed photo costs no other its boxes.

    Raises the first failure when all of them failed, and at once what ends the run.
    """
    results: dict[str, Value | Exception] = {}
    for image in config.images:
        try:
            results[image.image_name] = work(image)
        except FATAL:
            raise
        except Exception as error:
            results[image.image_name] = error
    failures = failures_in(results)
    if len(failures) == len(results):
        raise failures[0]
    return results


def failures_in(images: Images[Value]) -> list[Exception]:
    """Why some of the images failed."""
    return [result for result in images.values() if isinstance(result, Exception)]


def load_task_photos(task: Task, *, service: BulkService, project: Project) -> Images[Photo]:
    """The task's photos.

    While Label Studio is away or busy, photos are waited for; a fault of the photo itself is reported soon.
    """
    if task.data is None:
        raise RequestError(f"expected a task of project {project.id}, got none")

    def load(image: ImageControls) -> Photo:
        address = photo_address(task.data, image)
        for attempt in range(LOAD_ATTEMPTS):
            try:
                return service.photo(address, task_id=task.id)
            except PhotoMissing:
                raise
            except PhotoUnreachable:
                if attempt + 1 == LOAD_ATTEMPTS:
                    raise
                project.wait_until_up()
                project.stopping.wait(LOAD_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    return for_each_image(project.label_config, load)


def detect(
    service: BulkService, config: LabelConfig, photos: Images[Photo], score_threshold: float | None
) -> Images[Answer]:
    """All facings on the photos of a task, where there is one."""
    return for_each_image(
        config,
        lambda image: tasks.detect(service, _read(photos[image.image_name]), image, score_threshold=score_threshold),
    )


def preannotate(
    service: BulkService, config: LabelConfig, photos: Images[Photo], score_threshold: float | None
) -> Images[list[Region]]:
    """Regions of all facings on a task's photos; less sure ones too, where the label config has a label for them."""

    def regions(image: ImageControls) -> list[Region]:
        photo = _read(photos[image.image_name])
        return tasks.preannotate_image(service, photo, image, score_threshold=score_threshold)

    return for_each_image(config, regions)


def _read(photo: Photo | Exception) -> Photo:
    if isinstance(photo, Exception):
        raise photo
    return photo


def answered(config: LabelConfig, answers: Images[Answer]) -> list[tuple[ImageControls, Answer]]:
    """The images that have an answer, with it."""
    found = [(image, answers[image.image_name]) for image in config.images]
    return [(image, answer) for image, answer in found if not isinstance(answer, Exception)]
