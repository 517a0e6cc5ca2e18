"""Which tasks of a project a run works on.

Knows tasks and what they hold. Knows neither photos nor predictions' contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from backend.bulk.names import NO_PHOTO, photo_name
from backend.bulk.pipeline import Job, Tally
from backend.errors import RequestError
from backend.label_studio.label_config import LabelConfig
from backend.label_studio.predictions import photo_address
from backend.label_studio.project import Project, Selection, Task

ANNOTATED, UP_TO_DATE = "annotated", "already up to date"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of `count` parts of a project that do not overlap, by the tasks' ids. number: from 1 to `count`."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"shard: expected a number from 1 to {self.count}, got {self.number}")

    def holds(self, task_id: int) -> bool:
        """Whether the task belongs to this part."""
        return task_id % self.count == self.number - 1


ALL_SHARDS = Shard(number=1, count=1)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which tasks of a project get boxes. again: also those that hold a prediction of the version; limit: at most."""

    selection: Selection = field(default_factory=Selection)
    shard: Shard = ALL_SHARDS
    again: bool = False
    only_unlabeled: bool = False
    limit: int | None = None


def tasks_to_do(
    project: Project, version: str, wanted: Wanted, tally: Tally, *, on_held: Callable[[Task], None] = lambda _: None
) -> Iterator[Task]:
    """The tasks that need boxes. The others of the shard are counted as skipped; a limit does not count them.

    on_held: called with those that hold the version already.
    """
    count = 0

    def skip(reason: str) -> None:
        tally.skipped[reason] += 1
        if wanted.limit is not None and tally.total is not None:
            tally.total += 1

    for page in project.pages(wanted.selection):
        for task in page:
            if wanted.limit is not None and count >= wanted.limit:
                return
            if not wanted.shard.holds(task.id):
                continue
            if wanted.only_unlabeled and task.is_labelled:
                skip(ANNOTATED)
            elif task.holds(version) and not wanted.again:
                on_held(task)
                skip(UP_TO_DATE)
            else:
                count += 1
                yield task


def count_of(project: Project, wanted: Wanted) -> int:
    """About how many tasks a run will look at or do."""
    count = -(-project.count(wanted.selection) // wanted.shard.count)
    return count if wanted.limit is None else min(count, wanted.limit)


def jobs_of(tasks: Iterable[Task], config: LabelConfig) -> Iterator[Job[Task]]:
    """A job for each task, labelled with the name of its first photo."""
    for task in tasks:
        try:
            label = photo_name(photo_address(task.data, config.images[0]))
        except RequestError:  # loading the photo reports what is wrong
            label = NO_PHOTO
        yield Job(key=task.id, label=label, item=task)
