"""What a bulk run did, for the person at the terminal: its report as a file, its summary as text, its exit status.

Knows words. The report is written first: the reader of the text may have gone away.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from backend.bulk.formats import Format
from backend.bulk.outputs import write_whole
from backend.photos.files import format_left_out
from scripts.console import format_duration, print_lines

if TYPE_CHECKING:
    from backend.bulk.choice import Wanted
    from backend.bulk.pipeline import Failure, Tally
    from backend.bulk.report import Report
    from backend.bulk.tighten import Moved
    from backend.label_studio.project import Project
    from backend.photos.files import FoundPhotos

FAILED_PHOTOS_STATUS = 3
FAILURES_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run's boxes go. name: of the project or the file, for messages. kind: of a file, None for a project.

    things: what the run counts: photos, or tasks of a project.
    """

    name: str
    kind: Format | None = None
    things: Literal["photos", "tasks"] = "tasks"


def finish(report: Report, place: Place, file: Path | None, *, moved: Moved | None = None) -> int:
    """Writes the report into a file where one is given, then prints it; the exit status that goes with it.

    Raises CommandError when the file cannot be written, and prints the report all the same.
    """
    try:
        if file is not None:
            write_whole(file, report.as_json())
    finally:
        print_lines([*summary(report, place), *([] if moved is None else [format_moved(moved)])])
        if report.stopped is not None:
            print_lines([f"facings: {line}" for line in how_it_stopped(report, place)], to=sys.stderr)
    if report.stopped is not None:
        return report.stopped.exit_status
    return FAILED_PHOTOS_STATUS if report.failures else 0


def summary(report: Report, place: Place) -> Iterator[str]:
    """What was done, what was not and why, in lines."""
    if report.is_stored:
        yield (
            f"{report.boxes} boxes of {report.photos} {place.things} in {place.name}; "
            f"{format_duration(report.seconds)}, {report.photos_per_s:.2f} photos/s, "
            f"engine busy {report.engine_busy:.0%} of the time"
        )
    if left_out := format_left_out(report.left_out):
        yield left_out
    if report.skipped:
        yield format_skipped(report.skipped)
    if report.retries or report.duplicates_deleted:
        yield f"{report.retries} requests tried again, {report.duplicates_deleted} older or double predictions deleted"
    if report.failed_drawings:
        yield f"failed drawings: {len(report.failed_drawings)}; the boxes of these photos are complete"
        yield from _first(report.failed_drawings, place)
    if report.failures:
        yield f"failed photos: {len(report.failures)}"
        yield from _first(report.failures, place)


def how_it_stopped(report: Report, place: Place) -> Iterator[str]:
    """Why a run ended early, what it has written, and how to go on."""
    yield f"stopped early: {report.stopped}"
    if place.kind is None:
        yield "run the same command again to continue"
    elif report.is_stored:
        yield f"{place.name} holds the boxes of the {report.photos} {place.things} that were done; run again for all"
    elif place.kind is Format.yolo:
        yield f"{place.name} was not completed: it may hold labels, but no lists of photos"
    else:
        yield f"{place.name} was not written"


def format_skipped(skipped: Mapping[str, int]) -> str:
    """Such as "skipped 5 tasks: 3 already up to date, 2 annotated"."""
    return f"skipped {sum(skipped.values())} tasks: " + ", ".join(f"{n} {reason}" for reason, n in skipped.items())


def format_moved(moved: Moved) -> str:
    """How far boxes moved, in a line."""
    median, high = moved.edge_share
    return (
        f"{moved.boxes} boxes redrawn, {moved.unmoved} of them unchanged; mean IoU with the boxes before "
        f"{moved.mean_iou:.3f}; an edge moved by {median:.1%} of the box's size (median), {high:.1%} (95th percentile)"
    )


def print_dry_run_of_files(photos: FoundPhotos, out: Path) -> None:
    """What a run would do."""
    left_out = format_left_out(photos.left_out)
    print_lines([f"would box {len(photos.photos)} photos into {out}", *([left_out] if left_out else [])])


def print_dry_run_of_project(project: Project, version: str, wanted: Wanted, tally: Tally) -> None:
    """What a run would do. tally: the tasks that it would box, as done, and those that it would skip."""
    verb = "add or replace" if wanted.again else "add"
    line = f"would {verb} predictions of {version} on {tally.done} tasks of project {project.id} ({project.title!r})"
    print_lines([line, *([format_skipped(tally.skipped)] if tally.skipped else [])])


def _first(failures: Sequence[Failure], place: Place) -> Iterator[str]:
    for failure in failures[:FAILURES_LISTED]:
        task = f"task {failure.key}, " if place.things == "tasks" else ""
        reason = failure.reason
        for name in (failure.label, PurePosixPath(failure.label).name):  # errors of photos begin with one of them
            reason = reason.removeprefix(f"{name!r}: ")
        yield f"  {task}{failure.label}: {reason}"
    if len(failures) > FAILURES_LISTED:
        yield f"  … and {len(failures) - FAILURES_LISTED} more; --report FILE.json lists all"
