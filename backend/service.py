"""One thing to call: photos and prompts in, boxes out, for every transport, job and command.

Knows the engine, where photos come from, and what is counted. Knows no JSON, no HTTP and no label config: a transport
parses, calls this, and answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.errors import EngineDeadline, FacingsError
from backend.metrics import Metrics
from backend.photos.loader import Access, PhotoLoader
from backend.reporting import to_client_error
from backend.settings import Settings
from model import Detections, Engine, Lane, NotReady, Photo, Prompt, Sam2Engine
from model.types import FloatArray

# How long a request waits for weights that are still loading. An annotator may be waiting for it.
LOADING_WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Boxes of one photo. size_wh: of the photo, in pixels. model_version: what made the boxes."""

    size_wh: tuple[int, int]
    detections: Detections
    model_version: str


class Service:
    """The engine, the sources of its photos, and the metrics of both. Thread-safe.

    deadline: in every method a `time.monotonic()` value; None waits.
    """

    def __init__(self, *, engine: Engine, photos: PhotoLoader, metrics: Metrics) -> None:
        self.engine = engine
        self.photos = photos
        self.metrics = metrics

    @classmethod
    def open(cls, settings: Settings, *, engine: Engine | None = None) -> Self:
        """A Service with everything that the settings ask for. Returns at once; the weights load in the background.

        engine: one to use instead of a new one with the settings' options. Raises SettingsError.
        """
        metrics, photos = Metrics(), PhotoLoader(settings)
        if engine is None:
            engine = Sam2Engine(settings.engine_options(), observer=metrics)
        metrics.watch(engine, photos)
        return cls(engine=engine, photos=photos, metrics=metrics)

    def with_engine(self, engine: Engine) -> Service:
        """The same with another engine, such as a tuned one: photos and metrics are shared."""
        return Service(engine=engine, photos=self.photos, metrics=self.metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine. Calls that wait for it raise NotReady."""
        self.engine.close()

    def check_alive(self) -> None:
        """Raises NotReady, with the reason, when the engine will never be ready: it failed to load, or is closed."""
        if self.engine.state in ("failed", "closed"):
            raise NotReady(self.engine.failure or f"{self.engine.name} is {self.engine.state}")

    def check_ready(self) -> None:
        """Raises NotReady, with the reason, when the engine cannot answer now. Never waits."""
        self.check_alive()
        if self.engine.state != "ready":
            raise NotReady(f"{self.engine.name} is {self.engine.state}")

    def wait_ready(self, *, deadline: float | None = None) -> None:
        """Waits a moment, LOADING_WAIT_S at most, for weights that are still loading. Raises NotReady after that."""
        remaining_s = LOADING_WAIT_S if deadline is None else deadline - time.monotonic()
        self.engine.wait_ready(max(0.0, min(LOADING_WAIT_S, remaining_s)))

    def photo(
        self,
        source: str | bytes | Path,
        *,
        access: Access | None = None,
        task_id: int | str | None = None,
        deadline: float | None = None,
    ) -> Photo:
        """The decoded photo.

        source: an address as it may stand in a task (see backend.photos.loader), an image file's bytes, or the path of
        an image file. access: the Label Studio that a relative address belongs to, unless the settings name one.
        task_id: of the task that holds the address; needed for stores that Label Studio reads.
        Raises PhotoError, and DeadlineExceeded.
        """
        if isinstance(source, bytes):
            return self.photos.decode(source)
        if isinstance(source, Path):
            return self.photos.read_file(source)
        return self.photos.load(source, task_id=task_id, access=access, deadline=deadline)

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Answer:
        """All facings of the photo, best first. score_threshold: None takes the engine's. Raises EngineError."""
        with self._asking():
            detections = self.engine.preannotate(photo, score_threshold=score_threshold, lane=lane, deadline=deadline)
        self.metrics.count_photo("done")
        self.metrics.count_boxes("dense", len(detections))
        return self._answer(photo, detections)

    def refine(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        *,
        accepted_xyxy: FloatArray | None = None,
        want_masks: bool = False,
        deadline: float | None = None,
    ) -> list[Answer]:
        """What each prompt names, in order: no box, one or several; with `want_masks` their masks too.

        accepted_xyxy: boxes `[N, 4]`, in photo pixels, of other objects that an annotator has accepted on this photo.
        Raises EngineError.
        """
        with self._asking():
            found = self.engine.refine(
                photo, prompts, accepted_xyxy=accepted_xyxy, want_masks=want_masks, deadline=deadline
            )
        self.metrics.count_photo("done")
        self.metrics.count_boxes("prompt", sum(map(len, found)))
        return [self._answer(photo, detections) for detections in found]

    def failed(self, error: Exception) -> FacingsError:
        """Counts the failure of one photo, and gives it as a client may see it."""
        reason = to_client_error(error)
        self.metrics.count_error(reason.kind)
        self.metrics.count_photo("deadline" if isinstance(reason, EngineDeadline) else "failed")
        return reason

    def _asking(self) -> AbstractContextManager[None]:
        """Entered around every call that works with the engine."""
        return nullcontext()

    def _answer(self, photo: Photo, detections: Detections) -> Answer:
        return Answer(size_wh=photo.size_wh, detections=detections, model_version=self.engine.version)
