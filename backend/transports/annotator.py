"""The model class that label-studio-ml knows: tasks in, predictions out, one line for each stage.

Knows tasks, contexts and predictions. Holds no weights: it is built for each request and borrows what is resident.
Works with both generations of label-studio-ml: 1.0.9, whose constructor takes (label_config, train_output, hostname,
access_token), and 2.x, whose constructor takes (project_id, label_config) and calls `setup`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from label_studio_ml.model import LabelStudioMLBase  # type: ignore[import-untyped]

from backend import tasks as task_photos
from backend.errors import DeadlinePassed, FacingsError, LabelConfigError
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.predictions import Prediction, prediction_of
from backend.label_studio.prompts import AnnotatorPrompt, prompts_from_context
from backend.label_studio.regions import Region, regions_from_detections
from backend.photos.loader import Access
from backend.reporting import log_event
from backend.service import Service
from model import Lane, Photo

if TYPE_CHECKING:
    from model import Photo

Task = Mapping[str, Any]
Item = TypeVar("Item")
Value = TypeVar("Value")

# Photos of a request that are fetched or held while the engine works on an earlier one. With four, decoding them all
# at once held up /setup for 0.1 s on two cores.
FETCHED_AHEAD = 2
# How long a request waits for weights that are still loading. An annotator may sit behind it, in front of an overlay.
LOADING_PATIENCE_S = 10.0


class FacingsAnnotator(LabelStudioMLBase):  # type: ignore[misc]
    """Predictions for the tasks of one project. `service` is set on a subclass; see `annotator_class`."""

    service: ClassVar[Service]

    def __init__(self, *args: Any, access: Access | None = None, deadline: float | None = None, **kwargs: Any) -> None:
        """args, kwargs: whatever the generation of label-studio-ml at hand passes to its models.

        access: where photos are; None takes what 1.0.9 gave as hostname and access_token.
        deadline: `time.monotonic()` value after which `predict` returns what is done; None waits.
        """
        try:
            super().__init__(*args, **kwargs)
        except (
            Exception
        ) as error:  # label-studio-ml parses the label config in its own way, and lets everything through
            raise LabelConfigError(f"label config: label-studio-ml cannot read it: {error!a}") from error
        self._access = access or Access(
            label_studio_url=getattr(self, "hostname", None) or "", token=getattr(self, "access_token", None) or ""
        )
        self._deadline = deadline
        self._project = str(kwargs.get("project_id") or "")

    def setup(self) -> None:
        """The hook of 2.x, which keeps the version of its models itself."""
        self.set("model_version", self.service.engine.version)

    def predict(self, tasks: Sequence[Task], context: Mapping[str, Any] | None = None, **_: Any) -> list[Prediction]:
        """One prediction for each task, in order.

        context: None (or empty) asks for all facings of each photo; else for what the annotator pointed at, and then an
        emptied list of prompts gives an empty result.
        A task that fails, or whose turn does not come before the deadline, gets a prediction without `result`, which
        Label Studio drops. Raises LabelConfigError, PromptError, RequestError; NotReady when no task could be done.
        """
        config = parse_label_config(self.label_config)
        prompts = prompts_from_context(context, config.images[0]) if context else None
        if tasks and prompts != ():
            self._wait_for_engine()
        if prompts is not None:
            return [self._prediction(task, partial(self._refine, task, config, prompts)) for task in tasks]
        # One task alone is one that an annotator has just opened and waits for.
        lane: Lane = "interactive" if len(tasks) == 1 else "bulk"
        photos = _fetched_ahead(partial(self._photos, config=config), tasks)
        return [
            self._prediction(task, partial(self._preannotate, photo, config, lane))
            for task, photo in zip(tasks, photos, strict=True)
        ]

    def _preannotate(self, fetched: Future[tuple[Photo, ...]], config: LabelConfig, lane: Lane) -> list[Region]:
        photos = self._in_time(fetched)
        return task_photos.preannotate(self.service, photos, config, lane=lane, deadline=self._deadline)

    def _refine(self, task: Task, config: LabelConfig, prompts: Sequence[AnnotatorPrompt]) -> list[Region]:
        if not prompts:
            return []
        photo, image = self._photos(task, config=config)[0], config.images[0]
        answer = self.service.refine(
            photo,
            [prompt.to_prompt(photo.size_wh) for prompt in prompts],
            want_masks=bool(image.polygons or image.brushes),
            deadline=self._deadline,
        )
        labels, ids = [prompt.label for prompt in prompts], [prompt.region_id for prompt in prompts]
        return regions_from_detections(answer.detections, answer.size_wh, image, labels=labels, ids=ids)

    def _photos(self, task: Task, *, config: LabelConfig) -> tuple[Photo, ...]:
        return task_photos.load_photos(
            self.service,
            task.get("data"),
            config,
            task_id=task.get("id"),
            access=self._access,
            deadline=self._deadline,
        )

    def _prediction(self, task: Task, regions_of_task: Callable[[], list[Region]]) -> Prediction:
        """The task's prediction, or one without `result` that says why. A failure ends here: its neighbours go on."""
        metrics, version = self.service.metrics, self.service.engine.version
        try:
            self._remaining_s()
            regions = regions_of_task()
        except Exception as error:
            reason = self.service.failed(error)
            metrics.count_photo("deadline" if isinstance(reason, DeadlinePassed) else "failed")
            self._log(task, reason)
            return {"error": str(reason), "kind": reason.kind, "model_version": version}
        metrics.count_photo("done")
        return prediction_of(regions, version)

    def _log(self, task: Task, reason: FacingsError) -> None:
        # Tasks that are left are many, and nothing is wrong with them.
        level = logging.DEBUG if isinstance(reason, DeadlinePassed) else logging.WARNING
        task_id = str(task.get("id"))
        log_event(level, "task_failed", project=self._project, task=task_id, kind=reason.kind, reason=str(reason))

    def _in_time(self, future: Future[Value]) -> Value:
        try:
            return future.result(self._remaining_s())
        except TimeoutError as error:
            if future.done():
                raise  # the work's own, not this wait's
            raise DeadlinePassed("the deadline passed before the photo was there") from error

    def _remaining_s(self) -> float | None:
        """Seconds until the deadline, more than none; None without a deadline."""
        if self._deadline is None:
            return None
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlinePassed("the deadline passed before this task's turn; ask for it again")
        return remaining_s

    def _wait_for_engine(self) -> None:
        remaining_s = LOADING_PATIENCE_S if self._deadline is None else self._deadline - time.monotonic()
        self.service.engine.wait_ready(max(0.0, min(LOADING_PATIENCE_S, remaining_s)))


def annotator_class(service: Service) -> type[FacingsAnnotator]:
    """The class to hand to label-studio-ml: its instances borrow `service`."""
    return type("FacingsAnnotator", (FacingsAnnotator,), {"service": service})


def _fetched_ahead(fetch: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Future[Value]]:
    """`fetch` of each item, in order; the next FETCHED_AHEAD run or wait while the caller works on one."""
    pool = ThreadPoolExecutor(FETCHED_AHEAD, thread_name_prefix="fetch")
    waiting: deque[Future[Value]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(fetch, item))
            if len(waiting) > FETCHED_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
