"""Boxes for many photos: of files or of a Label Studio project, into a file or back into the project.

Knows what is made of photos' detections. The same run (`pipeline`) serves all: files and a project are sources, a file
(`formats`) and the project (`uploads`) are sinks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from backend.bulk.choice import Wanted, count_of, jobs_of, tasks_to_do
from backend.bulk.formats import BoxedPhoto, BoxedTask, Writer
from backend.bulk.names import drawing_names, photo_name
from backend.bulk.outputs import draw_boxes
from backend.bulk.pipeline import Failure, Job, Result, Run, Show, Tally, reason_of, show_nothing
from backend.bulk.report import Report
from backend.bulk.service import BulkService
from backend.bulk.sinks import FileSink, ProjectSink
from backend.bulk.task_photos import FATAL, Images, answered, detect, failures_in, load_task_photos, preannotate
from backend.bulk.uploads import Uploads
from backend.errors import CommandError, Interrupted
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.predictions import photo_address, prediction_of, task_data
from backend.label_studio.project import Project, Task
from backend.label_studio.regions import Region
from backend.label_studio.retry import ProjectError
from backend.photos.files import FoundPhoto, FoundPhotos
from model import Photo

LOCAL_FILES = "/data/local-files/?d="

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Made = TypeVar("Made")


# -- files -----------------------------------------------------------------------------------------------------------


def default_label_config() -> LabelConfig:
    """What Label Studio import JSON is made for where there is no project to ask: label_config/shelf_boxes.xml."""
    path = Path(__file__).parents[2] / "label_config" / "shelf_boxes.xml"
    return parse_label_config(path.read_text())


@dataclass(frozen=True, kw_only=True)
class _File:
    """number: of the photo, from 1, failed ones included, so that a second run gives the same ones."""

    number: int
    photo: FoundPhoto
    drawing: Path | None


def preannotate_files(
    service: BulkService,
    photos: FoundPhotos,
    writer: Writer,
    *,
    config: LabelConfig,
    address: str = LOCAL_FILES,
    draw: Path | None = None,
    show: Show = show_nothing,
) -> Report:
    """Boxes of every photo, handed to `writer` in order.

    address: what stands before a photo's name in a task of `config`. draw: folder for copies with their boxes, or None.
    Interrupted, it finishes the file with what is done.
    """
    (image,) = config.images
    names = drawing_names(photo.name for photo in photos.photos)
    failed_drawings: list[Failure] = []

    def work(job: Job[_File], photo: Photo) -> Result[BoxedTask]:
        answer = service.preannotate(photo)
        if job.item.drawing is not None:
            reason = draw_boxes(photo, answer.detections.boxes_xyxy, job.item.drawing)
            if reason is not None:
                failed_drawings.append(Failure(key=job.key, label=job.label, reason=reason))
        boxed = BoxedPhoto(image=image, name=job.label, size_wh=answer.size_wh, detections=answer.detections)
        task = BoxedTask(id=job.item.number, data=task_data(image, address + job.item.photo.quoted), photos=[boxed])
        return Result(made=task, boxes=len(answer.detections))

    jobs = (
        Job(
            key=number,
            label=photo.name,
            item=_File(number=number, photo=photo, drawing=None if draw is None else draw / name),
        )
        for number, (photo, name) in enumerate(zip(photos.photos, names, strict=True), 1)
    )

    def load(file: _File) -> Photo:
        return service.photo(file.photo.path)

    sink, tally = FileSink(writer), Tally(total=len(photos.photos))
    run = Run(jobs, load, work, sink, tally, fatal=FATAL, stopping=threading.Event())
    report = _finish_file(sink, finish_run(run, service, show))
    return replace(report, left_out=photos.left_out, failed_drawings=failed_drawings)


# -- a project -------------------------------------------------------------------------------------------------------


def preannotate_project(
    service: BulkService,
    project: Project,
    wanted: Wanted,
    *,
    score_threshold: float | None = None,
    show: Show = show_nothing,
) -> Report:
    """A prediction of the engine's version on every wanted task. See docs/adr/0011 for what holds when it is killed.

    score_threshold: None takes the label config's, then the engine's.
    """
    config = project.label_config
    version = version_for(service.engine.version, config, score_threshold)

    def work(job: Job[Task], photos: Images[Photo]) -> Result[bytes]:
        answers = preannotate(service, config, photos, score_threshold)
        regions = [region for of_image in answers.values() if isinstance(of_image, list) for region in of_image]
        return prediction(job.item, regions, version, failures_in(answers))

    load = partial(load_task_photos, service=service, project=project)
    return upload_predictions(service, project, wanted, version, load, work, show=show)


def version_for(engine_version: str, config: LabelConfig, score_threshold: float | None) -> str:
    """The version of a project's predictions. score_threshold: what the caller gives instead of the label config's,
    which is in the engine's version then."""
    return config.model_version(engine_version) if score_threshold is None else engine_version


def upload_predictions(
    service: BulkService,
    project: Project,
    wanted: Wanted,
    version: str,
    load: Callable[[Task], Loaded],
    work: Callable[[Job[Task], Loaded], Result[bytes]],
    *,
    show: Show = show_nothing,
) -> Report:
    """A prediction of this version on every wanted task: `work` makes it of what `load` gives."""
    tally = Tally(total=count_of(project, wanted))
    uploads = Uploads(project, version, again=wanted.again)
    jobs = jobs_of(tasks_to_do(project, version, wanted, tally, on_held=uploads.verify), project.label_config)
    run = Run(jobs, load, work, ProjectSink(uploads), tally, fatal=FATAL, stopping=project.stopping)
    report = finish_run(run, service, show)
    return replace(report, model_version=version, retries=project.retries, duplicates_deleted=uploads.deleted)


def prediction(task: Task, regions: Sequence[Region], version: str, failures: Sequence[Exception]) -> Result[bytes]:
    """A prediction with its task as Label Studio's import takes it: bytes are ten times smaller than the regions."""
    content = json.dumps({"task": task.id, **prediction_of(regions, version)}).encode()
    return Result(made=content, boxes=len(regions), partial_failures=[reason_of(failure) for failure in failures])


def export_project(
    service: BulkService,
    project: Project,
    wanted: Wanted,
    writer: Writer,
    *,
    score_threshold: float | None = None,
    show: Show = show_nothing,
) -> Report:
    """The boxes of every wanted task, handed to `writer`. Nothing in the project changes.

    Interrupted, or without Label Studio for too long, it finishes the file with what is done.
    """
    config = project.label_config

    def work(job: Job[Task], photos: Images[Photo]) -> Result[BoxedTask]:
        data = job.item.data or {}
        answers = detect(service, config, photos, score_threshold)
        boxed = [
            BoxedPhoto(
                image=image,
                name=photo_name(photo_address(data, image)),
                size_wh=answer.size_wh,
                detections=answer.detections,
            )
            for image, answer in answered(config, answers)
        ]
        return Result(
            made=BoxedTask(id=job.item.id, data=data, photos=boxed),
            boxes=sum(len(photo.detections) for photo in boxed),
            partial_failures=[reason_of(failure) for failure in failures_in(answers)],
        )

    sink, tally = FileSink(writer), Tally(total=count_of(project, wanted))
    todo = tasks_to_do(project, service.engine.version, replace(wanted, again=True), tally)
    load = partial(load_task_photos, service=service, project=project)
    run = Run(jobs_of(todo, config), load, work, sink, tally, fatal=FATAL, stopping=project.stopping)
    return replace(_finish_file(sink, finish_run(run, service, show)), retries=project.retries)


def dry_run(project: Project, version: str, wanted: Wanted, *, show: Show = show_nothing) -> Tally:
    """What a run would do: its tasks as done, the others as skipped. Changes nothing."""
    tally = Tally(total=count_of(project, wanted))
    for _ in tasks_to_do(project, version, wanted, tally):
        tally.done += 1
        show(tally)
    return tally


# -- runs ------------------------------------------------------------------------------------------------------------


def finish_run(run: Run[Item, Loaded, Made], service: BulkService, show: Show) -> Report:
    """The run to its end, and its report. An expected error that ends it early is the report's `stopped`."""
    busy_before = service.busy_s
    stopped: CommandError | None = None
    try:
        if not run.finish(show):
            stopped = Interrupted("interrupted")
    except CommandError as error:
        stopped = error
    tally = run.tally
    return Report(
        photos=tally.done,
        boxes=tally.boxes,
        skipped=dict(tally.skipped),
        failures=[*tally.failures, *tally.partial_failures],
        seconds=tally.seconds,
        photos_per_s=tally.photos_per_s,
        engine_busy=(service.busy_s - busy_before) / tally.seconds if tally.seconds else 0.0,
        model_version=service.engine.version,
        stopped=stopped,
    )


def _finish_file(sink: FileSink, report: Report) -> Report:
    """Completes the file of an ended run, and of one that its source ended early; not after the file's own errors."""
    if report.stopped is not None and not isinstance(report.stopped, Interrupted | ProjectError):
        return replace(report, is_stored=False)
    try:
        return replace(report, is_stored=sink.finish(is_complete=report.stopped is None))
    except CommandError as error:
        return replace(report, is_stored=False, stopped=error)
