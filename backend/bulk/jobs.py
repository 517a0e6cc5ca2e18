"""Boxes for many photos: a folder's or a Label Studio project's, into files or back into the project.

Knows which photos need boxes, what is made of their detections, and what is told at the end. The same run (`bulk`)
serves all: a folder and a project are sources, files (`formats`) and the project (`uploads`) are sinks.
"""

from __future__ import annotations

import heapq
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from backend.bulk.formats import Boxed, Writer
from backend.bulk.pipeline import Busy, Job, Outcome, Run, Tally
from backend.settings import Settings
from scripts.console import duration, tally_shown

if TYPE_CHECKING:
    from backend.bulk.uploads import Uploads
    from backend.label_studio.label_config import LabelConfig
    from backend.label_studio.project import Project, Selection, Task
    from backend.photos.loader import PhotoLoader
    from model import Engine, Photo

LOCAL_FILES = "/data/local-files/?d="
# A batch goes up when so many predictions are there, or the first has waited so long: little is lost when the machine
# dies, and a Label Studio that takes seconds for a request, as it does with 100,000 tasks, gets larger ones.
BATCH, BATCH_LIMIT, BATCH_PATIENCE_S = 32, 256, 5.0
LOAD_ATTEMPTS = 4  # Label Studio answers 500 for an upload whose file is gone
LOAD_PAUSE_S = 1.0
FAILURES_SHOWN = 20
BROKEN_PHOTOS_STATUS, INTERRUPTED_STATUS = 3, 130
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which tasks of a project get boxes. again: also those that hold a prediction of the version; limit: at most."""

    selection: Selection
    again: bool = False
    only_unlabeled: bool = False
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did. failures: photo, task (None in a folder) and reason. stopped: why it ended early, or None.

    engine_busy: share of the seconds since the engine was ready in which it had a photo.
    """

    photos: int
    boxes: int
    needed_nothing: int
    failures: Sequence[Mapping[str, Any]]
    seconds: float
    photos_per_s: float
    engine_busy: float
    model_version: str
    retries: int = 0
    duplicates_deleted: int = 0
    stopped: str | None = None

    def as_json(self) -> str:
        rounded = {name: round(value, 3) for name, value in vars(self).items() if isinstance(value, float)}
        return json.dumps({**vars(self), **rounded}, indent=1) + "\n"


@dataclass(kw_only=True)
class Ending:
    """How a run ended. stopped: why it ended early, or None."""

    tally: Tally
    stopped: str | None = None


def run_to_end(
    jobs: Iterable[Job],
    work: Callable[[Job, Photo, Busy], tuple[Any, int]],
    sink: Any,
    *,
    tally: Tally,
    stopping: threading.Event,
    label: str = "preannotate",
) -> Ending:
    """The run with its progress shown. What stops it early is told by the ending, if it can be continued."""
    from backend.label_studio.project import Unavailable
    from model import NotReady

    run = Run(jobs, work, sink, tally, fatal=(NotReady,), stopping=stopping)
    ending = Ending(tally=tally)
    try:
        with tally_shown(label) as show:
            run.finish(show)
    except Unavailable as error:
        ending.stopped = str(error)
    except KeyboardInterrupt:
        ending.stopped = INTERRUPTED
    return ending


# -- a folder --------------------------------------------------------------------------------------------------------


def default_label_config() -> LabelConfig:
    """What Label Studio import JSON is made for where there is no project to ask: label_config/shelf_boxes.xml."""
    from backend.label_studio.label_config import parse_label_config

    path = Path(__file__).parents[2] / "label_config" / "shelf_boxes.xml"
    return parse_label_config(path.read_text())


def photos_to_do(photos_dir: Path, out: Path) -> list[Path]:
    """The photos under a folder, in order. Raises CommandError when there is none, or no place for their boxes."""
    from backend.bulk.formats import require_place
    from backend.photos.files import find_photos

    require_place(out, "--out")
    return [photo.path for photo in find_photos([photos_dir]).photos]


def preannotate_folder(
    engine: Engine,
    paths: Sequence[Path],
    writer: Writer,
    *,
    photos_dir: Path,
    config: LabelConfig,
    address: str | None = None,
    draw: Path | None = None,
    max_pixels: int = Settings.max_photo_pixels,
) -> Report:
    """Boxes of every photo, handed to `writer` in the order of the paths, with file names relative to `photos_dir`.

    Image ids count the paths from 1, broken photos included, so that a second run gives the same ids.
    draw: folder for copies of the photos with their boxes, or None. address: what stands before a file name in a task
    of `config`; None takes that of Label Studio's local files.
    """
    from backend.photos.files import draw_boxes, read_photo

    prefix = LOCAL_FILES if address is None else address

    def name(job: Job) -> str:
        return paths[job.number].relative_to(photos_dir).as_posix()

    def work(job: Job, photo: Photo, busy: Busy) -> tuple[Boxed, int]:
        with busy.work():
            found = engine.preannotate(photo, lane="bulk")
        if draw is not None:
            draw_boxes(photo, found.boxes_xyxy, draw / f"{name(job)}.jpg")
        data = {config.images[0].image_key: prefix + quote(name(job))}
        boxed = Boxed(image_id=job.key, name=name(job), size_wh=photo.size_wh, detections=found, data=data)
        return boxed, len(found)

    jobs = (
        Job(
            number=i,
            key=i + 1,
            shown=path.relative_to(photos_dir).as_posix(),
            load=partial(read_photo, path, max_pixels=max_pixels),
        )
        for i, path in enumerate(paths)
    )
    ending = run_to_end(
        jobs, work, FileSink(writer), tally=Tally(total=len(paths)), stopping=threading.Event(), label="preannotate"
    )
    return report_of(ending, engine.version)


# -- a project -------------------------------------------------------------------------------------------------------


def photo_loader(settings: Settings) -> PhotoLoader:
    """Loads photos as the backend does, and keeps none: each is asked for once."""
    from dataclasses import replace

    from backend.photos.loader import PhotoLoader

    return PhotoLoader(replace(settings, photo_cache_mb=0))


def tasks_to_do(
    project: Project, version: str, wanted: Wanted, tally: Tally, *, on_held: Callable[[Task], None] = lambda _: None
) -> Iterator[Task]:
    """The tasks that need boxes; the others are counted, and a limit is on top of them.

    on_held: called with those that hold the version already.
    """
    count = 0

    def skip() -> None:
        tally.skipped += 1
        if wanted.limit is not None and tally.total is not None:
            tally.total += 1

    for page in project.pages(wanted.selection):
        for task in page:
            if wanted.limit is not None and count >= wanted.limit:
                return
            if wanted.only_unlabeled and task.is_labelled:
                skip()
            elif task.holds(version) and not wanted.again:
                on_held(task)
                skip()
            else:
                count += 1
                yield task


def load_photo(task: Task, loader: PhotoLoader, project: Project) -> Photo:
    """The task's photo. While Label Studio is away or busy, photos are waited for; a photo's own fault is told soon."""
    from backend.errors import PhotoMissing, PhotoUnreachable, RequestError
    from backend.label_studio.predictions import photo_address

    if task.data is None:
        raise RequestError(f"expected a task of project {project.number}, got none")
    address = photo_address(task.data, project.label_config.images[0])
    for attempt in range(LOAD_ATTEMPTS):
        try:
            return loader.load(address, task_id=task.id)
        except PhotoMissing:
            raise
        except PhotoUnreachable:
            if attempt + 1 == LOAD_ATTEMPTS:
                raise
            project.wait_until_up()
            project.stopping.wait(LOAD_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def task_shown(task: Task, config: LabelConfig) -> str:
    """The task's photo as a name: the last part of its address."""
    address = str((task.data or {}).get(config.images[0].image_key, ""))
    if address[:5].lower() == "data:":
        return "data:…"
    try:
        parts = urlsplit(address)
    except ValueError:  # loading it will say what is wrong with it
        return "no photo"
    name = parts.query.partition("d=")[2] if parts.path.rstrip("/").endswith("/local-files") else parts.path
    return name.rpartition("/")[2] or "no photo"


def jobs_of(tasks: Iterable[Task], load: Callable[[Task], Photo], config: LabelConfig) -> Iterator[Job]:
    """A job for each task."""
    for number, task in enumerate(tasks):
        yield Job(number=number, key=task.id, shown=task_shown(task, config), load=partial(load, task))


def preannotate_project(
    engine: Engine, project: Project, wanted: Wanted, settings: Settings, *, score_threshold: float | None = None
) -> Report:
    """A prediction of the engine's version on every wanted task. See docs/adr/0011 for what holds when it is killed.

    score_threshold: None takes the label config's, then the engine's.
    """
    from backend.bulk.uploads import Uploads

    config, version = project.label_config, engine.version
    tally = Tally(total=count_of(project, wanted))
    uploads = Uploads(project, version, again=wanted.again)
    tasks = tasks_to_do(project, version, wanted, tally, on_held=uploads.verify)
    load = partial(load_photo, loader=photo_loader(settings), project=project)
    jobs = jobs_of(tasks, load, config)
    work = partial(predicted, engine=engine, config=config, score_threshold=score_threshold)
    ending = run_to_end(jobs, work, ProjectSink(uploads), tally=tally, stopping=project.stopping)
    return report_of(ending, version, project=project, deleted=uploads.deleted)


def predicted(
    job: Job, photo: Photo, busy: Busy, *, engine: Engine, config: LabelConfig, score_threshold: float | None
) -> tuple[bytes, int]:
    """The prediction of a job's task as Label Studio's import takes it, and how many boxes it has."""
    from backend.label_studio.predictions import prediction_of
    from backend.label_studio.regions import regions_from_detections

    threshold = config.images[0].boxes.score_threshold if score_threshold is None else score_threshold
    with busy.work():
        found = engine.preannotate(photo, score_threshold=threshold, lane="bulk")
    regions = regions_from_detections(found, photo.size_wh, config.images[0])
    # As bytes, which are ten times smaller than what they are made of.
    return json.dumps({"task": job.key, **prediction_of(regions, engine.version)}).encode(), len(regions)


def export_project(
    engine: Engine,
    project: Project,
    wanted: Wanted,
    writer: Writer,
    settings: Settings,
    *,
    score_threshold: float | None = None,
) -> Report:
    """The boxes of every wanted task, handed to `writer`. Nothing in the project changes."""
    config, loader = project.label_config, photo_loader(settings)
    tally = Tally(total=count_of(project, wanted))
    data_of: dict[int, Mapping[str, Any]] = {}  # of photos on their way through the engine

    def load(task: Task) -> Photo:
        photo = load_photo(task, loader, project)
        data_of[task.id] = task.data or {}
        return photo

    def work(job: Job, photo: Photo, busy: Busy) -> tuple[Boxed, int]:
        threshold = config.images[0].boxes.score_threshold if score_threshold is None else score_threshold
        with busy.work():
            found = engine.preannotate(photo, score_threshold=threshold, lane="bulk")
        data = data_of.pop(job.key)
        return Boxed(image_id=job.key, name=job.shown, size_wh=photo.size_wh, detections=found, data=data), len(found)

    jobs = jobs_of(tasks_to_do(project, engine.version, wanted, tally), load, config)
    ending = run_to_end(jobs, work, FileSink(writer), tally=tally, stopping=project.stopping)
    return report_of(ending, engine.version, project=project)


def dry_run(project: Project, version: str, wanted: Wanted) -> str:
    """What a run would do, in words. Changes nothing."""
    tally = Tally(total=count_of(project, wanted))
    with tally_shown("dry run") as show:
        count = 0
        for _ in tasks_to_do(project, version, wanted, tally):
            count += 1
            tally.done = count
            show(tally)
    verb = "replace or add" if wanted.again else "add"
    return (
        f"would {verb} predictions of {version} on {count} tasks of project {project.number} ({project.title!r}); "
        f"{tally.skipped} tasks need nothing"
    )


def count_of(project: Project, wanted: Wanted) -> int:
    """About how many tasks a run will look at or do."""
    count = project.count(wanted.selection)
    return count if wanted.limit is None else min(count, wanted.limit)


# -- sinks -----------------------------------------------------------------------------------------------------------


class ProjectSink:
    """Outcomes of `predicted` go to the project."""

    batch, batch_limit, patience_s = BATCH, BATCH_LIMIT, BATCH_PATIENCE_S

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def put(self, outcomes: Sequence[Outcome]) -> dict[int, str]:
        made = {outcome.job.key: outcome.made for outcome in outcomes if outcome.made is not None}
        return self._uploads.put(made) if made else {}

    def close(self, *, is_complete: bool) -> None:  # noqa: ARG002  what is stored counts in any case
        self._uploads.close()


class FileSink:
    """Boxed photos go to a writer, in the order of their jobs."""

    batch, batch_limit, patience_s = 1, 64, 0.0

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._next = 0
        self._early: list[tuple[int, Boxed | None]] = []

    def put(self, outcomes: Sequence[Outcome]) -> dict[int, str]:
        for outcome in outcomes:
            heapq.heappush(self._early, (outcome.job.number, outcome.made))
        while self._early and self._early[0][0] == self._next:
            boxed = heapq.heappop(self._early)[1]
            self._next += 1
            if boxed is not None:
                self._writer.add(boxed)
        return {}

    def close(self, *, is_complete: bool) -> None:
        if is_complete:
            self._writer.finish()


# -- what is told ----------------------------------------------------------------------------------------------------


def report_of(ending: Ending, version: str, *, project: Project | None = None, deleted: int = 0) -> Report:
    """The ended run as a report."""
    tally = ending.tally
    return Report(
        photos=tally.done,
        boxes=tally.boxes,
        needed_nothing=tally.skipped,
        failures=[
            {"task": job.key if project else None, "photo": job.shown, "reason": why} for job, why in tally.failures
        ],
        seconds=tally.seconds,
        photos_per_s=tally.photos_per_s,
        engine_busy=tally.busy_s / tally.seconds if tally.seconds else 0.0,
        model_version=version,
        retries=project.retries if project else 0,
        duplicates_deleted=deleted,
        stopped=ending.stopped,
    )


def tell(report: Report, out: Path | int, file: Path | None) -> int:
    """Prints the report and writes it into a file where one is given; the exit status that goes with it.

    out: where the boxes are, a file or the number of a project; only the latter holds some when the run stopped early.
    """
    where = f"project {out}" if isinstance(out, int) else str(out)
    if report.stopped is None or isinstance(out, int):
        print_report(report, where)
    if file is not None:
        from backend.bulk.formats import write_whole

        write_whole(file, report.as_json())
    if report.stopped is not None:
        from backend.label_studio.project import Unavailable

        print(f"facings: stopped early: {report.stopped}", file=sys.stderr)
        again = "run the same command again to continue" if isinstance(out, int) else f"{where} was not written"
        print(f"facings: {again}", file=sys.stderr)
        return INTERRUPTED_STATUS if report.stopped == INTERRUPTED else Unavailable.exit_status
    return BROKEN_PHOTOS_STATUS if report.failures else 0


def print_report(report: Report, where: str) -> None:
    """What was done, then the photos that failed, then how to go on."""
    print(
        f"{report.boxes} boxes of {report.photos} photos in {where}; {duration(report.seconds)}, "
        f"{report.photos_per_s:.2f} photos/s, the engine busy for {report.engine_busy:.0%} of it"
    )
    if report.needed_nothing:
        print(f"{report.needed_nothing} tasks needed nothing")
    if report.retries or report.duplicates_deleted:
        print(f"{report.retries} requests tried again, {report.duplicates_deleted} older or double predictions deleted")
    if report.failures:
        print(f"photos that are broken and have no boxes: {len(report.failures)}")
        for failure in report.failures[:FAILURES_SHOWN]:
            task = "" if failure["task"] is None else f"task {failure['task']}, "
            print(f"  {task}{failure['photo']}: {failure['reason']}")
        if len(report.failures) > FAILURES_SHOWN:
            print(f"  … and {len(report.failures) - FAILURES_SHOWN} more; --report FILE.json lists all")
