"""Many photos through one engine: read ahead in parallel, their boxes handed on in batches while the engine works.

Knows threads, bounded queues and counting. Knows neither files nor Label Studio: a source gives items, a sink takes
what became of them. Reading, the engine and the sink work at the same time; when one of them is slow, the others wait,
so that memory does not grow with the number of photos.

    source ─► items ─► readers (threads) ─► photos ─► engine (two callers) ─► outcomes ─► sink
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from backend.errors import CommandError

if TYPE_CHECKING:
    from model import Photo

READERS = 4
PHOTOS_AHEAD = 4  # decoded, waiting for the engine
ENGINE_CALLERS = 2  # one is answered while the other's answer becomes a prediction
POLL_S = 0.2

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A photo to box. number: counts from 0 in the source's order. shown: its name in messages; load: may raise."""

    number: int
    key: int
    shown: str
    load: Callable[[], Photo]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: what was made of its photo and how many boxes that has, or why there is nothing.

    Without either, there was nothing to do.
    """

    job: Job
    made: Any = None
    boxes: int = 0
    failure: str | None = None


class NothingToDo(Exception):
    """A job's `load` found that the photo needs nothing."""


class Sink(Protocol):
    """Takes outcomes; called from one thread.

    batch: how many at once are worth waiting for; batch_limit: the most it can take; patience_s: how long to wait.
    """

    batch: int
    batch_limit: int
    patience_s: float

    def put(self, outcomes: Sequence[Outcome]) -> dict[int, str]:
        """Stores them; the reasons of those that could not be, by the key of their job."""
        ...

    def close(self, *, is_complete: bool) -> None:
        """Called once behind the last outcome, and not when the run failed. is_complete: no job was left out."""
        ...


@dataclass(kw_only=True)
class Tally:
    """What was done so far. Changed by the run's threads, read by whoever shows progress.

    skipped: tasks that needed nothing. busy_s: seconds in which the engine had a photo.
    """

    total: int | None = None
    done: int = 0
    skipped: int = 0
    boxes: int = 0
    failures: list[tuple[Job, str]] = field(default_factory=list)
    busy_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

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
        return max(0, self.total - self.skipped - self.done - len(self.failures)) / self.photos_per_s


class Channel(Generic[Item]):
    """A bounded queue between threads that ends when its writers have ended, or at once for everybody."""

    def __init__(self, size: int, *, writers: int) -> None:
        self._size = size
        self._writers = writers
        self._items: deque[tuple[float, Item]] = deque()
        self._changed = threading.Condition()
        self._cut = False

    def put(self, item: Item) -> bool:
        """Waits for room. False when the channel was cut: nobody will read the item."""
        with self._changed:
            self._changed.wait_for(lambda: self._cut or len(self._items) < self._size)
            if not self._cut:
                self._items.append((time.monotonic(), item))
                self._changed.notify_all()
            return not self._cut

    def take(self, at_least: int, at_most: int, patience_s: float) -> list[Item]:
        """Waits until so many are there, the oldest has waited so long, or no more will come; empty at the end."""
        with self._changed:
            while not self._cut and self._writers and len(self._items) < at_least:
                left_s = None
                if self._items:
                    left_s = self._items[0][0] + patience_s - time.monotonic()
                    if left_s <= 0:
                        break
                self._changed.wait(left_s)
            if self._cut:
                return []
            taken = [self._items.popleft()[1] for _ in range(min(at_most, len(self._items)))]
            self._changed.notify_all()
            return taken

    def __iter__(self) -> Iterator[Item]:
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
            self._items.clear()
            self._changed.notify_all()


class Run:
    """One run of jobs through an engine into a sink.

    work: makes of a job and its photo what the sink gets, and says how many boxes it has; it calls the engine, from
    several threads. fatal: errors of `work` that end the run; any other costs its own photo only.
    stopping: set while the run ends early, so that waits of the source and of the loaders may end too.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        work: Callable[[Job, Photo, Busy], tuple[Any, int]],
        sink: Sink,
        tally: Tally,
        *,
        fatal: tuple[type[Exception], ...],
        stopping: threading.Event,
        readers: int = READERS,
    ) -> None:
        self.tally = tally
        self._stopping = stopping
        self._jobs, self._work, self._sink, self._fatal = jobs, work, sink, fatal
        self._to_read: Channel[Job] = Channel(2 * readers, writers=1)
        self._photos: Channel[tuple[Job, Photo]] = Channel(PHOTOS_AHEAD, writers=readers)
        self._outcomes: Channel[Outcome] = Channel(2 * sink.batch_limit, writers=readers + ENGINE_CALLERS)
        self._busy = Busy()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(target, channel), name=name, daemon=True)
            for target, channel, name, count in (
                (self._list, self._to_read, "list", 1),
                (self._read, self._photos, "read", readers),
                (self._find, self._outcomes, "find", ENGINE_CALLERS),
                (self._store, None, "store", 1),
            )
            for _ in range(count)
        ]

    def finish(self, show: Callable[[Tally], None] = lambda _: None) -> None:
        """Runs to the end; `show` is called several times a second. Raises what ended the run early.

        KeyboardInterrupt begins nothing new, stores what is done and is raised then; a second one does not wait.
        """
        self.tally.started = time.monotonic()
        for thread in self._threads:
            thread.start()
        interrupted = False
        try:
            while any(thread.is_alive() for thread in self._threads):
                try:
                    self._threads[-1].join(POLL_S)
                    self.tally.busy_s = self._busy.seconds
                    show(self.tally)
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    self.drain()
        except BaseException:
            self.abort()
            raise
        finally:
            self.tally.ended = time.monotonic()
            self.tally.busy_s = self._busy.seconds
        if interrupted:
            raise KeyboardInterrupt
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Begins nothing new; what the engine has answered is still stored."""
        self._stopping.set()
        self._to_read.cut()
        self._photos.cut()

    def abort(self) -> None:
        """Ends at once; what is not stored is lost."""
        self.drain()
        self._outcomes.cut()

    def _guarded(self, target: Callable[[], None], channel: Channel[Any] | None) -> None:
        try:
            target()
        except BaseException as error:
            if not self._stopping.is_set() or target == self._store:
                self._error = self._error or error
                self.abort()
        finally:
            if channel is not None:
                channel.writer_ended()
            if target == self._read:
                self._outcomes.writer_ended()

    def _list(self) -> None:
        for job in self._jobs:
            if self._stopping.is_set() or not self._to_read.put(job):
                return

    def _read(self) -> None:
        for job in self._to_read:
            try:
                photo = job.load()
            except NothingToDo:
                self._outcomes.put(Outcome(job=job))
            except CommandError:  # not the photo's fault: of what gives the photos
                raise
            except Exception as error:
                self._outcomes.put(Outcome(job=job, failure=reason(error)))
            else:
                self._photos.put((job, photo))

    def _find(self) -> None:
        for job, photo in self._photos:
            try:
                made, boxes = self._work(job, photo, self._busy)
            except self._fatal:
                raise
            except Exception as error:  # of the photo at hand, whatever it is: the others want their boxes
                self._outcomes.put(Outcome(job=job, failure=reason(error)))
            else:
                self._outcomes.put(Outcome(job=job, made=made, boxes=boxes))

    def _store(self) -> None:
        sink = self._sink
        while outcomes := self._outcomes.take(sink.batch, sink.batch_limit, sink.patience_s):
            refused = sink.put(outcomes)
            for outcome in outcomes:
                failure = outcome.failure or refused.get(outcome.job.key)
                if failure is not None:
                    self.tally.failures.append((outcome.job, failure))
                elif outcome.made is None:
                    self.tally.skipped += 1
                else:
                    self.tally.done += 1
                    self.tally.boxes += outcome.boxes
        if self._error is None:
            sink.close(is_complete=not self._stopping.is_set())


class Busy:
    """How long at least one of several threads was inside. Enter it around what counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        with self._lock:
            return self._seconds + (time.monotonic() - self._since if self._inside else 0.0)

    @contextmanager
    def work(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._since = time.monotonic()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._seconds += time.monotonic() - self._since


def reason(error: Exception) -> str:
    """Why a photo has no boxes, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    from backend.errors import FacingsError
    from model import EngineError

    return text if isinstance(error, FacingsError | EngineError) else f"{type(error).__name__}: {text}"
