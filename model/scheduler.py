"""One thread that owns the device, two lanes of work: interactive before bulk.

Knows threads and time, nothing of networks. Work comes in two shapes. A *request* (an annotator's click) is answered
together with all other requests that wait at that moment. A *job* (a photo to pre-annotate) is a generator that yields
between its batches; between two batches waiting requests and interactive jobs overtake it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from model.stages import Observer
from model.types import DeadlineExceeded, Lane, NotReady

Request = TypeVar("Request")
Answer = TypeVar("Answer")
T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class _Work:
    """A request or a job in a queue: what is to be done, until when, and the future of its answer."""

    what: Any
    deadline: float | None
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def give_up(self) -> None:
        self.future.set_exception(DeadlineExceeded("the deadline passed before the engine had an answer"))


class Scheduler(Generic[Request, Answer]):
    """Runs work on its own thread, in which `start_up` is called first.

    answer: given all waiting requests, returns one answer or exception for each.
    observer: is given the time that each piece of work waited.
    """

    def __init__(
        self,
        *,
        start_up: Callable[[], None],
        answer: Callable[[Sequence[Request]], Sequence[Answer | Exception]],
        observer: Observer,
    ) -> None:
        self._start_up = start_up
        self._answer = answer
        self._observer = observer
        self._changed = threading.Condition()
        self._requests: deque[_Work] = deque()
        self._jobs: dict[Lane, deque[_Work]] = {"interactive": deque(), "bulk": deque()}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()

    def ask(self, request: Request, *, deadline: float | None) -> Answer:
        """The answer to `request`; blocks. Raises DeadlineExceeded when `deadline` (time.monotonic) passes first."""
        answer: Answer = self._wait_for(_Work(what=request, deadline=deadline), self._requests)
        return answer

    def run(self, job: Generator[None, None, T], *, lane: Lane, deadline: float | None) -> T:
        """What `job` returns; blocks. Raises DeadlineExceeded when `deadline` passes first; the job is then dropped."""
        answer: T = self._wait_for(_Work(what=job, deadline=deadline), self._jobs[lane])
        return answer

    def queued(self, lane: Lane) -> int:
        """Pieces of work that wait or run in `lane`."""
        return len(self._jobs[lane]) + (len(self._requests) if lane == "interactive" else 0)

    def close(self) -> None:
        """Stops after the batch in hand; everything that waits is refused with NotReady."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait_for(self, work: _Work, queue: deque[_Work]) -> Any:
        with self._changed:
            if self._closed:
                raise NotReady("the engine is closed")
            queue.append(work)
            self._changed.notify()
        remaining = None if work.deadline is None else max(0.0, work.deadline - time.monotonic())
        try:
            return work.future.result(remaining)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the engine had an answer") from None

    def _loop(self) -> None:
        self._start_up()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._requests or any(self._jobs.values()))
                if self._closed:
                    break
                requests = list(self._requests)
                self._requests.clear()
                lane: Lane = "interactive" if self._jobs["interactive"] else "bulk"
            if requests:
                self._answer_together(requests)
            else:
                self._step(lane)
        for work in [*self._requests, *self._jobs["interactive"], *self._jobs["bulk"]]:
            work.future.set_exception(NotReady("the engine was closed while this waited"))

    def _answer_together(self, requests: list[_Work]) -> None:
        for work in requests:
            self._observer.waited("interactive", time.monotonic() - work.since)
            if work.is_late():
                work.give_up()
        waiting = [work for work in requests if not work.future.done()]
        if not waiting:
            return
        for work, answer in zip(waiting, self._answer([work.what for work in waiting]), strict=True):
            if isinstance(answer, Exception):
                work.future.set_exception(answer)
            else:
                work.future.set_result(answer)

    def _step(self, lane: Lane) -> None:
        """Runs the first job of `lane` up to its next yield."""
        work = self._jobs[lane][0]
        if not work.future.running():
            work.future.set_running_or_notify_cancel()
            self._observer.waited(lane, time.monotonic() - work.since)
        try:
            if work.is_late():
                work.what.close()
                work.give_up()
            else:
                next(work.what)
                return
        except StopIteration as stop:
            work.future.set_result(stop.value)
        except Exception as error:
            work.future.set_exception(error)
        self._jobs[lane].popleft()
