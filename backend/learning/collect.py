"""Photos with known boxes from a project: what annotators submitted, read through Label Studio's API.

Knows annotations and their rectangles, and what a photo's file in the project's folder is called. A photo counts when
its annotation was submitted; of several the latest that was not cancelled counts. Whatever else stands in an
annotation is passed over, and a photo that cannot be used costs the others nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from backend.errors import FacingsError
from backend.label_studio.label_config import ImageControls
from backend.label_studio.predictions import photo_address
from backend.label_studio.project import Project, Task
from backend.label_studio.regions import Region, boxes_from_regions, is_rectangle
from backend.learning.store import KnownPhoto, ProjectStore
from backend.photos.loader import Access, PhotoLoader
from backend.reporting import log_event, to_client_error
from model import Detections, Photo
from model.boxes import clip_boxes
from model.quality import Truth, count_corrections
from model.types import FloatArray

MAX_PHOTOS = 400  # of a project; the latest count
MAX_BYTES = 2 << 30  # of their files
TASKS_AT_A_TIME = 10  # their regions come in one answer: 100 kB a task
LEAST_SIDE_PX = 2.0  # of a box: smaller ones are slips of the hand
JPEG_QUALITY = 95


def collect(project: Project, loader: PhotoLoader, store: ProjectStore) -> list[KnownPhoto]:
    """Brings the project's folder to what is submitted now, and returns its photos: the latest MAX_PHOTOS, or as many
    of them as MAX_BYTES hold.

    Photos whose annotation did not change are not read again. Raises ProjectError where Label Studio cannot be asked,
    OSError where the disk cannot be written.
    """
    found: dict[str, KnownPhoto] = {}
    size = 0
    for photo in _latest(project, loader, store):
        size += store.photo_path(photo.file).stat().st_size
        if size <= MAX_BYTES:
            found[photo.key] = photo
        if len(found) == MAX_PHOTOS or size > MAX_BYTES:
            log_event(logging.INFO, "photos_limit_reached", project=project.id, kept=len(found))
            break
    photos = sorted(found.values(), key=lambda photo: (photo.submitted_at, photo.key))
    store.write_photos(photos)
    return photos


def _latest(project: Project, loader: PhotoLoader, store: ProjectStore) -> Iterator[KnownPhoto]:
    """The photos of the tasks that were annotated last, the latest first."""
    known = {photo.key: photo for photo in store.photos()}
    tasks = (task for page in project.latest_annotated() for task in page)
    while chunk := list(islice(tasks, TASKS_AT_A_TIME)):
        regions = project.regions_of_all([task.id for task in chunk])
        for task in chunk:
            predictions, annotations = regions.get(task.id, ([], []))
            annotation = _submitted(annotations)
            if annotation is None:
                continue
            for image in project.label_config.images:
                photo = _known_photo(project, loader, store, task, image, annotation, predictions, known)
                if photo is not None:
                    yield photo


def _known_photo(
    project: Project,
    loader: PhotoLoader,
    store: ProjectStore,
    task: Task,
    image: ImageControls,
    annotation: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    known: Mapping[str, KnownPhoto],
) -> KnownPhoto | None:
    """The photo of one image of a task; None where it cannot be used, with a line in the log."""
    key = f"{task.id}.{image.image_name}"
    name = f"{annotation['id']} {annotation.get('updated_at')}"
    before = known.get(key)
    if before is not None and before.annotation == name and store.photo_path(before.file).is_file():
        return before
    try:
        access = Access(label_studio_url=project.url)  # the settings' token belongs to it
        photo = loader.load(photo_address(task.data, image), task_id=task.id, access=access)
        boxes = facings_of(annotation["result"], image, photo.size_wh)
        if not len(boxes):
            log_event(logging.INFO, "photo_not_learned", project=project.id, task=task.id, reason="no boxes on it")
            return None
        shown = _shown(predictions, annotation)
        corrections = _corrections(shown, boxes, image, photo)
        return KnownPhoto(
            key=key,
            annotation=name,
            file=_write(store, key, photo),
            size_wh=photo.size_wh,
            boxes_xyxy=boxes,
            submitted_at=str(annotation.get("created_at") or ""),
            **corrections,
        )
    except (FacingsError, ValueError, KeyError, TypeError) as error:
        reason = to_client_error(error) if isinstance(error, FacingsError) else error
        log_event(logging.WARNING, "photo_not_learned", project=project.id, task=task.id, reason=str(reason))
        return None


def facings_of(regions: Sequence[Any], image: ImageControls, size_wh: tuple[int, int]) -> FloatArray:
    """The rectangles of the box control, `[N, 4]` in photo pixels, cut to the photo. A rotated one counts with its
    bounds; what has no area, or no position, does not count."""
    boxes = []
    for region in regions:
        if not isinstance(region, dict) or not is_rectangle(region):
            continue
        if (region.get("from_name"), region.get("to_name")) != (image.boxes.from_name, image.image_name):
            continue
        try:
            boxes.append(boxes_from_regions([region], size_wh)[0])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    cut = clip_boxes(np.array(boxes, np.float32).reshape(-1, 4), size_wh)
    return cut[((cut[:, 2:] - cut[:, :2]) >= LEAST_SIDE_PX).all(1)]


def _submitted(annotations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    valid = [one for one in annotations if not one.get("was_cancelled") and isinstance(one.get("result"), list)]
    return max(valid, key=lambda one: str(one.get("updated_at", "")), default=None)


def _shown(predictions: Sequence[Mapping[str, Any]], annotation: Mapping[str, Any]) -> list[Region] | None:
    """The regions that the annotator began with: of the prediction that the annotation names, else of the latest one
    that was there before."""
    named = annotation.get("parent_prediction")
    earlier = [one for one in predictions if str(one.get("created_at", "")) <= str(annotation.get("created_at", ""))]
    chosen = [one for one in predictions if one.get("id") == named] or earlier[-1:]
    result = chosen[0].get("result") if chosen else None
    return result if isinstance(result, list) else None


def _corrections(shown: list[Region] | None, boxes: FloatArray, image: ImageControls, photo: Photo) -> dict[str, int]:
    """What the annotator corrected: boxes that were missed, false and to drag, as `facings evaluate` counts them."""
    if shown is None:
        return {}
    before = facings_of(shown, image, photo.size_wh)
    truth = Truth(size_wh=photo.size_wh, boxes_xyxy=boxes.astype(np.float64))
    found = Detections(boxes_xyxy=before, scores=np.ones(len(before), np.float32))
    (count,) = count_corrections([truth], [found], [0.0])
    return {"missed": count.missed, "false": count.false, "to_drag": count.to_drag}


def _write(store: ProjectStore, key: str, photo: Photo) -> str:
    """Keeps the photo as a JPEG; its name tells its pixels, so that a changed photo is another file."""
    from PIL import Image

    name = f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{photo.digest[:12]}.jpg"
    path = store.photo_path(name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            Image.fromarray(photo.pixels).save(partial, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return name
