"""Many photos through one engine: read ahead in parallel, their boxes handed on in batches while the engine works.

Knows threads, bounded queues and counting. Knows neither files nor Label Studio: a source gives jobs, a sink takes
what was made of them. Reading, the engine and the sink work at the same time; when one of them is slow, the others
wait, so that memory does not grow with the number of photos.

    source ─► jobs ─► readers (threads) ─► photos ─► engine (two callers) ─► outcomes ─► sink
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from backend.errors import FacingsError
from model import EngineError

READERS = 4
LOADED_AHEAD = 4  # decoded, waiting for the engine
ENGINE_CALLERS = 2  # one is answered while the other's answer becomes a prediction
POLL_S = 0.2

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Made = TypeVar("Made")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Item]):
    """One piece of work. key: identifies it in the source, no two jobs share one. label: its name in messages."""

    key: str | int
    label: str
    item: Item


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job that came to nothing, and why, in one line."""

    key: str | int
    label: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Made]):
    """What a job's work made for the sink. boxes: how many it holds. partial_failures: why parts of the job failed."""

    made: Made
    boxes: int
    partial_failures: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[Made]):
    """What became of a job. number: of the job in the source's order, from 0.

    result: None when the job failed or there was nothing to do. failure: why there is nothing, and skipped: why nothing
    had to be done; both None when there is a result.
    """

    number: int
    key: str | int
    label: str
    result: Result[Made] | None = None
    failure: str | None = None
    skipped: str | None = None


class NothingToDo(Exception):
    """A job needs no boxes. Its message is the reason, as it reads after a count: "without rectangles"."""


class Sink(Protocol[Made]):
    """Takes outcomes, also those of failed and skipped jobs; called from one thread.

    batch: how many at once are worth waiting for; batch_limit: the most it can take; batch_wait_s: how long to wait.
    """

    batch: int
    batch_limit: int
    batch_wait_s: float

    def put(self, outcomes: Sequence[Outcome[Made]]) -> Mapping[str | int, str]:
        """Stores what was made; the reasons of what could not be stored, by the key of the job."""
        ...

    def close(self) -> None:
        """Called once behind the last outcome, and not when the run failed."""
        ...


@dataclass(kw_only=True)
class Tally:
    """What was done so far. Changed by the run's threads, read by the thread that shows progress.

    total: about how many jobs there will be, None while nobody knows. skipped: jobs that needed no boxes, by reason.
    failures: jobs that came to nothing; partial_failures: of jobs that are done otherwise.
    """

    total: int | None = None
    done: int = 0
    boxes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    partial_failures: list[Failure] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def processed(self) -> int:
        return self.done + self.skipped.total() + len(self.failures)

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    @property
    def photos_per_s(self) -> float:
        return self.done / self.seconds if self.done else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest will take at the present rate; None while nobody can tell."""
        if self.total is None or not self.done:
            return None
        return max(0, self.total - self.processed) / self.photos_per_s


Show = Callable[[Tally], None]


def show_nothing(_: Tally) -> None:
    """For runs without anybody who watches."""


class Channel(Generic[Value]):
    """A bounded queue between threads that ends when its writers have ended, or at once for everybody."""

    def __init__(self, size: int, *, writers: int) -> None:
        self._size = size
        self._writers = writers
        self._values: deque[tuple[float, Value]] = deque()
        self._changed = threading.Condition()
        self._cut = False

    def put(self, value: Value) -> bool:
        """Waits for space. False when the channel was cut: nobody will read the value."""
        with self._changed:
            self._changed.wait_for(lambda: self._cut or len(self._values) < self._size)
            if not self._cut:
                self._values.append((time.monotonic(), value))
                self._changed.notify_all()
            return not self._cut

    def take(self, at_least: int, at_most: int, wait_s: float) -> list[Value]:
        """Waits until so many are there, the oldest has waited so long, or no more will come; empty at the end."""
        with self._changed:
            while not self._cut and self._writers and len(self._values) < at_least:
                left_s = None
                if self._values:
                    left_s = self._values[0][0] + wait_s - time.monotonic()
                    if left_s <= 0:
                        break
                self._changed.wait(left_s)
            if self._cut:
                return []
            taken = [self._values.popleft()[1] for _ in range(min(at_most, len(self._values)))]
            self._changed.notify_all()
            return taken

    def __iter__(self) -> Iterator[Value]:
        while taken := self.take(1, 1, 0.0):
            yield taken[0]

    def writer_ended(self) -> None:
        with self._changed:
            self._writers -= 1
            self._changed.notify_all()

    def cut(self) -> None:
        """Ends it for readers and writers, whatever is in it."""
        with self._changed:
            self._cut = True
            self._values.clear()
            self._changed.notify_all()


class Run(Generic[Item, Loaded, Made]):
    """One run of jobs through an engine into a sink.

    load: reads what a job's item names; raises NothingToDo when it needs no boxes.
    work: makes of a job and what was loaded what the sink stores; calls the engine.
    Both are called from several threads. fatal: errors of either, or of the source, that end the run; any other costs
    its own job only. Errors of the sink always end it.
    stopping: set while the run ends early, so that waits of the source, the loader and the sink may end too.
    """

    def __init__(
        self,
        jobs: Iterable[Job[Item]],
        load: Callable[[Item], Loaded],
        work: Callable[[Job[Item], Loaded], Result[Made]],
        sink: Sink[Made],
        tally: Tally,
        *,
        fatal: tuple[type[Exception], ...],
        stopping: threading.Event,
        readers: int = READERS,
    ) -> None:
        self.tally = tally
        self._jobs, self._load, self._work, self._sink = jobs, load, work, sink
        self._fatal, self._stopping = fatal, stopping
        self._to_load: Channel[tuple[int, Job[Item]]] = Channel(2 * readers, writers=1)
        self._loaded: Channel[tuple[int, Job[Item], Loaded]] = Channel(LOADED_AHEAD, writers=readers)
        self._outcomes: Channel[Outcome[Made]] = Channel(2 * sink.batch_limit, writers=readers + ENGINE_CALLERS)
        self._error: BaseException | None = None
        # Not with Thread.join: interrupted, it takes a running thread for an ended one (Python 3.11).
        self._ended: deque[str] = deque()
        self._all_ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(target, outputs), name=name, daemon=True)
            for target, outputs, name, count in (
                (self._list_jobs, (self._to_load,), "list", 1),
                (self._load_items, (self._loaded, self._outcomes), "load", readers),
                (self._do_work, (self._outcomes,), "work", ENGINE_CALLERS),
                (self._store, (), "store", 1),
            )
            for _ in range(count)
        ]

    def finish(self, show: Show = show_nothing) -> bool:
        """Runs to the end; False when it was interrupted. Raises what ended the run early.

        show: called several times a second. Interrupted (KeyboardInterrupt in this thread), the run begins nothing new
        and stores what is done; a second interrupt ends it at once and is raised.
        """
        self.tally.started = time.monotonic()
        interrupted = all_ended = False
        try:
            for thread in self._threads:
                thread.start()
            while not all_ended:
                try:
                    all_ended = self._all_ended.wait(POLL_S)
                    show(self.tally)
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    self._begin_nothing_new()
        except BaseException:
            self._abort()
            raise
        finally:
            self.tally.ended = time.monotonic()
        if self._error is not None:
            raise self._error
        return not interrupted

    def _begin_nothing_new(self) -> None:
        """What the engine has answered is still stored."""
        self._stopping.set()
        self._to_load.cut()
        self._loaded.cut()

    def _abort(self) -> None:
        """Ends at once; what is not stored is lost."""
        self._begin_nothing_new()
        self._outcomes.cut()

    def _guarded(self, target: Callable[[], None], outputs: Sequence[Channel[Any]]) -> None:
        try:
            target()
        except BaseException as error:
            # While the run ends early, a waiting thread raises because its wait was ended.
            if not self._stopping.is_set() or target == self._store:
                self._error = self._error or error
                self._abort()
        finally:
            for channel in outputs:
                channel.writer_ended()
            self._ended.append(threading.current_thread().name)
            if len(self._ended) == len(self._threads):
                self._all_ended.set()

    def _list_jobs(self) -> None:
        for number, job in enumerate(self._jobs):
            if self._stopping.is_set() or not self._to_load.put((number, job)):
                return

    def _load_items(self) -> None:
        for number, job in self._to_load:
            try:
                loaded = self._load(job.item)
            except self._fatal:
                raise
            except NothingToDo as nothing:
                self._outcomes.put(Outcome(number=number, key=job.key, label=job.label, skipped=str(nothing)))
            except Exception as error:
                self._fail(number, job, error)
            else:
                self._loaded.put((number, job, loaded))

    def _do_work(self) -> None:
        for number, job, loaded in self._loaded:
            try:
                result = self._work(job, loaded)
            except self._fatal:
                raise
            except Exception as error:  # whatever it is: the other photos shall get their boxes
                self._fail(number, job, error)
            else:
                self._outcomes.put(Outcome(number=number, key=job.key, label=job.label, result=result))

    def _fail(self, number: int, job: Job[Item], error: Exception) -> None:
        self._outcomes.put(Outcome(number=number, key=job.key, label=job.label, failure=reason_of(error)))

    def _store(self) -> None:
        sink, tally = self._sink, self.tally
        while outcomes := self._outcomes.take(sink.batch, sink.batch_limit, sink.batch_wait_s):
            refused = sink.put(outcomes)
            for outcome in outcomes:
                reason = outcome.failure or refused.get(outcome.key)
                if reason is not None:
                    tally.failures.append(Failure(key=outcome.key, label=outcome.label, reason=reason))
                elif outcome.skipped is not None:
                    tally.skipped[outcome.skipped] += 1
                elif outcome.result is not None:
                    tally.done += 1
                    tally.boxes += outcome.result.boxes
                    tally.partial_failures += [
                        Failure(key=outcome.key, label=outcome.label, reason=reason)
                        for reason in outcome.result.partial_failures
                    ]
        if self._error is None:
            sink.close()


def reason_of(error: Exception) -> str:
    """Why a job failed, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, FacingsError | EngineError) else f"{type(error).__name__}: {text}"
