"""One thing to call: photos and prompts in, boxes out, for every transport, job and command.

Knows the engine, where photos come from, and what is counted. Knows no JSON, no HTTP and no label config: a transport
parses, calls this, and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.errors import FacingsError
from backend.metrics import Metrics
from backend.photos.loader import Access, PhotoLoader
from backend.reporting import to_client_error
from backend.settings import Settings
from model import Detections, Engine, Lane, Photo, Prompt, Sam2Engine


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Boxes of one photo. size_wh: of the photo, in pixels. model_version: what made the boxes."""

    size_wh: tuple[int, int]
    detections: Detections
    model_version: str


class Service:
    """An engine, the photos that it can be asked about, and what is counted of both. Thread-safe.

    deadline: everywhere a `time.monotonic()` value; None waits.
    """

    def __init__(self, *, engine: Engine, photos: PhotoLoader, metrics: Metrics) -> None:
        self.engine = engine
        self.photos = photos
        self.metrics = metrics

    @classmethod
    def open(cls, settings: Settings, *, engine: Engine | None = None) -> Service:
        """Wires everything that the settings ask for. Returns at once; the weights load in the background.

        engine: one to use instead of the settings' own.
        """
        metrics, photos = Metrics(), PhotoLoader(settings)
        if engine is None:
            engine = Sam2Engine(settings.engine_options(), observer=metrics)
        metrics.watch(engine, photos)
        return cls(engine=engine, photos=photos, metrics=metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine; work that waits is refused."""
        self.engine.close()

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
        task_id: of the task that holds the address; needed for cloud storage.
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
        detections = self.engine.preannotate(photo, score_threshold=score_threshold, lane=lane, deadline=deadline)
        self.metrics.count_boxes("dense", len(detections))
        return self._answer(photo, detections)

    def refine(
        self, photo: Photo, prompts: Sequence[Prompt], *, want_masks: bool = False, deadline: float | None = None
    ) -> Answer:
        """One box for each prompt, in order; with `want_masks` its mask too. Raises EngineError."""
        detections = self.engine.refine(photo, prompts, want_masks=want_masks, deadline=deadline)
        self.metrics.count_boxes("prompt", len(detections))
        return self._answer(photo, detections)

    def failed(self, error: Exception) -> FacingsError:
        """Counts the failure of one photo or request, and gives it as its client may see it."""
        reason = to_client_error(error)
        self.metrics.count_error(reason.kind)
        return reason

    def _answer(self, photo: Photo, detections: Detections) -> Answer:
        return Answer(size_wh=photo.size_wh, detections=detections, model_version=self.engine.version)
