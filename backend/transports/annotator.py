"""The model class that label-studio-ml knows: tasks in, predictions out.

Knows tasks, contexts and predictions. Holds no weights: it is built for each request and borrows the process's Service.

Its base class is that of label-studio-ml 1.0.9, the version on PyPI, whose constructor takes (label_config,
train_output, hostname, access_token). The class was also run by hand, once and unchanged, inside the server of
label-studio-ml 2.x (commit d02cedf), whose constructor takes (project_id, label_config) and calls `setup`; no test does
so.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, TypeVar

from label_studio_ml.model import LabelStudioMLBase  # type: ignore[import-untyped]

from backend import tasks as task_answers
from backend.errors import EngineDeadline, FacingsError, LabelConfigError
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.predictions import Prediction, prediction_of
from backend.label_studio.prompts import AnnotatorPrompt, Correction, prompts_from_context
from backend.label_studio.regions import Region
from backend.label_studio.standing import RecentAnswers, standing_regions
from backend.photos.loader import Access
from backend.reporting import log_event
from backend.service import Service
from model import DeadlineExceeded, Lane, Photo

Task = Mapping[str, Any]
Item = TypeVar("Item")
Value = TypeVar("Value")

# Tasks of a request whose photos are read, or kept until their turn, while the engine works on an earlier one. With
# four, decoding them all at once delayed /setup by 0.1 s on two cores.
READ_AHEAD = 2


class FacingsAnnotator(LabelStudioMLBase):  # type: ignore[misc]  # the base class has no types
    """Predictions for the tasks of one project. `service` and `recent` are set on a subclass; see `annotator_class`."""

    service: ClassVar[Service]
    recent: ClassVar[RecentAnswers]

    def __init__(self, *args: Any, access: Access | None = None, deadline: float | None = None, **kwargs: Any) -> None:
        """args, kwargs: what label-studio-ml passes to its models.

        access: the Label Studio that has the photos; None takes the base class's hostname and access_token.
        deadline: `time.monotonic()` value after which `predict` returns what is done; None waits.
        """
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:  # the base class reads the label config in its own way, and catches nothing
            raise LabelConfigError(f"label config: label-studio-ml cannot read it: {error!a}") from error
        self._access = access or Access(
            label_studio_url=getattr(self, "hostname", None) or "", token=getattr(self, "access_token", None) or ""
        )
        self._deadline = deadline
        self._project = str(kwargs.get("project_id") or "")

    def setup(self) -> None:
        """The hook of label-studio-ml 2.x, which stores the version of its models itself."""
        self.set("model_version", self._version)

    def predict(self, tasks: Sequence[Task], context: Mapping[str, Any] | None = None, **_: Any) -> list[Prediction]:
        """One prediction for each task, in order.

        context: None (or empty) asks for all facings of each photo; else for what the annotator pointed at, and then an
        emptied list of prompts gives an empty result.
        A task that fails, or whose turn does not come before the deadline, gets a prediction without `result`, which
        Label Studio drops. Raises LabelConfigError, PromptError; NotReady when no task could be done.
        """
        config = parse_label_config(self.label_config)
        prompts = prompts_from_context(context, config) if context else None
        if tasks and prompts != ():
            self.service.wait_ready(deadline=self._deadline)
        if prompts is not None:
            return [self._prediction(task, partial(self._refine, task, prompts, config)) for task in tasks]
        # A task alone is one that an annotator has just opened and waits for.
        lane: Lane = "interactive" if len(tasks) == 1 else "bulk"
        photos = _read_ahead(partial(self._load_photos, config=config), tasks)
        return [
            self._prediction(task, partial(self._preannotate, task, photos_of_task, config, lane))
            for task, photos_of_task in zip(tasks, photos, strict=True)
        ]

    def _refine(self, task: Task, prompts: Sequence[AnnotatorPrompt | Correction], config: LabelConfig) -> list[Region]:
        key = self._project, str(task.get("id"))
        standing, is_submitted = standing_regions(task)
        answer = task_answers.refine(
            self.service,
            task.get("data"),
            config,
            prompts,
            standing=self.recent.applied(key, standing),
            is_submitted=is_submitted,
            task_id=task.get("id"),
            access=self._access,
            deadline=self._deadline,
        )
        self.recent.remember(key, answer)
        return answer

    def _preannotate(
        self, task: Task, reading: Future[tuple[Photo | None, ...]], config: LabelConfig, lane: Lane
    ) -> list[Region]:
        photos = self._wait_for(reading)
        return task_answers.preannotate(
            self.service,
            photos,
            config,
            lane=lane,
            deadline=self._deadline,
            task_id=task.get("id"),
        )

    def _load_photos(self, task: Task, *, config: LabelConfig) -> tuple[Photo | None, ...]:
        return task_answers.load_photos(
            self.service,
            task.get("data"),
            config,
            task_id=task.get("id"),
            access=self._access,
            deadline=self._deadline,
        )

    def _prediction(self, task: Task, regions_of_task: Callable[[], list[Region]]) -> Prediction:
        """The task's prediction, or one without `result` and with the reason. A failure ends here: the others go on."""
        version = self._version
        try:
            self._remaining_s()
            return prediction_of(regions_of_task(), version)
        except Exception as error:
            reason = self.service.failed(error)
            self._log(task, reason)
            return {"error": str(reason), "kind": reason.kind, "model_version": version}

    @property
    def _version(self) -> str:
        version = self.service.engine.version
        # label-studio-ml 2.x also builds models for which it has no label config yet.
        return parse_label_config(self.label_config).model_version(version) if self.label_config else version

    def _log(self, task: Task, reason: FacingsError) -> None:
        # Tasks that the deadline leaves undone are many, and nothing is wrong with them.
        level = logging.DEBUG if isinstance(reason, EngineDeadline) else logging.WARNING
        task_id = str(task.get("id"))
        log_event(level, "task_failed", project=self._project, task=task_id, kind=reason.kind, reason=str(reason))

    def _wait_for(self, future: Future[Value]) -> Value:
        try:
            return future.result(self._remaining_s())
        except TimeoutError as error:
            if future.done():
                raise  # the work's own, not this wait's
            raise DeadlineExceeded("the deadline passed before the photo was read") from error

    def _remaining_s(self) -> float | None:
        """Seconds until the deadline, more than 0; None without a deadline. Raises DeadlineExceeded."""
        if self._deadline is None:
            return None
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline passed before this task's turn; ask for it again")
        return remaining_s


def annotator_class(service: Service, recent: RecentAnswers | None = None) -> type[FacingsAnnotator]:
    """The class to hand to label-studio-ml: its instances borrow `service`. recent: that of another class which answers
    the same annotators; None: its own."""
    return type("FacingsAnnotator", (FacingsAnnotator,), {"service": service, "recent": recent or RecentAnswers()})


def _read_ahead(read: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Future[Value]]:
    """`read` of each item, in order; the next READ_AHEAD run or wait while the caller works on one."""
    pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read-ahead")
    waiting: deque[Future[Value]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
