"""The resident engine: photos and prompts in, Detections out.

Knows what answers (model.loading) and the one thread that works; nothing of Label Studio, HTTP or the environment.
Weights load once, in the background, on the one thread that ever touches the device. All public methods may be called
from any thread and block until they have an answer.

What the engine remembers of photos (model.feature_cache) is a cache. Features only make an answer faster. The boxes of
photos that were pre-annotated here make clicks on the same photos better: a click may get another box after
`preannotate` than before, and two replicas may answer the same click differently.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from model.device import Placement, choose_placement
from model.feature_cache import CacheStats
from model.loading import EngineOptions, Loaded, Sources, find_sources, load, tuned_sources
from model.memory import is_out_of_memory, limit_memory
from model.refine import RefineRequest
from model.scheduler import Scheduler
from model.stages import UNOBSERVED, Observer
from model.types import Detections, EngineError, EngineStats, FloatArray, Lane, NotReady, Photo, Prompt, State

log = logging.getLogger(__name__)

MAX_TUNED = 8  # other weights that are loaded at the same time, about 30 MB each


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A request, and whose weights answer it; None: the engine's own."""

    request: RefineRequest
    tuned: Sources | None


class Sam2Engine:
    """One network, resident.

    Returns at once; `wait_ready` waits for the weights. observer: of all work; see model.stages.
    """

    def __init__(self, options: EngineOptions, *, observer: Observer = UNOBSERVED) -> None:
        self._options = options
        self._observer = observer
        self._loading_ended = threading.Event()
        self._sources: Sources | None = None
        self._placement: Placement | None = None
        self._loaded: Loaded | None = None
        self._tuned: LRUCache[str, Loaded] = LRUCache(MAX_TUNED)  # by digest; belongs to the device thread
        self._failure: str | None = None
        self._closed = False
        self._scheduler: Scheduler[_Asked, list[Detections]] = Scheduler(
            start_up=self._start_up, answer=self._answer, observer=observer
        )

    # -- what is known without waiting -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        if self._closed:
            return "closed"
        if not self._loading_ended.is_set():
            return "loading"
        return "failed" if self._failure else "ready"

    @property
    def failure(self) -> str | None:
        """Why the engine will never be ready, in one line, or None."""
        return self._failure

    @property
    def name(self) -> str:
        """Name of the checkpoint; the requested one until it is known."""
        return self._sources.checkpoint.name if self._sources else self._options.checkpoint

    @property
    def version(self) -> str:
        """Changes with whatever may change boxes: the weights' hash, the options that change boxes, and the hash of an
        exported encoder. Never blocks; `<name>-loading` until the weights' file is known."""
        if self._sources is None:
            return f"{self._options.checkpoint}-loading"
        return self._sources.version(self._options)

    @property
    def score_threshold(self) -> float:
        """The default threshold in force: the option, else what the detector head is calibrated to, else 0."""
        if self._options.score_threshold is not None:
            return self._options.score_threshold
        return self._sources.calibrated_threshold if self._sources else 0.0

    def stats(self) -> EngineStats:
        cache = self._loaded.cache.stats() if self._loaded else CacheStats()
        return EngineStats(
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            cache_entries=cache.entries,
            cache_bytes=cache.nbytes,
            queued_interactive=self._scheduler.queued("interactive"),
            queued_bulk=self._scheduler.queued("bulk"),
        )

    # -- work --------------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Blocks until the engine can answer. Raises NotReady, with the reason, on failure or after `timeout_s`."""
        if self._closed:
            raise NotReady("the engine is closed")
        if not self._loading_ended.wait(timeout_s):
            raise NotReady(f"checkpoint {self.name!r} is still loading")
        if self._failure:
            raise NotReady(self._failure)

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Detections:
        """All facings of the photo with a score of at least `score_threshold` (None: the default), best first.

        deadline: a time.monotonic() value. Raises DeadlineExceeded when it passes first, NotReady on failure.
        """
        self._wait_ready_until(deadline)  # the calibrated threshold is known then
        threshold = self.score_threshold if score_threshold is None else score_threshold
        return self.find(photo, None, score_threshold=threshold, lane=lane, deadline=deadline)

    def refine(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        *,
        accepted_xyxy: FloatArray | None = None,
        want_masks: bool = False,
        deadline: float | None = None,
    ) -> list[Detections]:
        """What each prompt names, in order: see model.types.Engine.

        The boxes of a photo that was pre-annotated by this engine help to answer, so that the same prompt may be
        answered differently before and after, and by two replicas of one version. Raises as `preannotate` does.
        """
        self._wait_ready_until(deadline)
        return self.ask(photo, prompts, None, accepted_xyxy=accepted_xyxy, want_masks=want_masks, deadline=deadline)

    def tuned(self, weights: Path | None = None, *, score_threshold: float | None = None) -> TunedEngine:
        """This engine for one of its users, with other weights of `facings-nano`, with another default threshold, or
        both. It works on the same thread and device, and shares the network of SAM 2.

        weights: load at the first request, and again where MAX_TUNED others were used since. None: the engine's own.
        score_threshold: None takes the one that the weights are calibrated to.
        Waits until the engine is ready. Raises NotReady, and CheckpointError for weights that cannot be used.
        """
        self.wait_ready()
        if self._sources is None:
            raise NotReady(f"checkpoint {self.name!r} is still loading")
        sources = None if weights is None else tuned_sources(self._sources, weights)
        options = self._options if score_threshold is None else replace(self._options, score_threshold=score_threshold)
        return TunedEngine(self, sources, version=(sources or self._sources).version(options), options=options)

    def find(
        self,
        photo: Photo,
        tuned: Sources | None,
        *,
        score_threshold: float,
        lane: Lane,
        deadline: float | None,
    ) -> Detections:
        """`preannotate` of an engine that is ready, with other weights; None: its own."""
        return self._scheduler.run(self._find(photo, tuned, score_threshold), lane=lane, deadline=deadline)

    def ask(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        tuned: Sources | None,
        *,
        accepted_xyxy: FloatArray | None,
        want_masks: bool,
        deadline: float | None,
    ) -> list[Detections]:
        """`refine` of an engine that is ready, with other weights; None: its own."""
        request = RefineRequest(
            photo=photo,
            prompts=tuple(prompts),
            want_masks=want_masks,
            accepted_xyxy=np.zeros((0, 4), np.float32) if accepted_xyxy is None else accepted_xyxy,
        )
        return self._scheduler.ask(_Asked(request=request, tuned=tuned), deadline=deadline)

    def close(self) -> None:
        """Stops the device thread; work that waits is refused with NotReady."""
        self._closed = True
        self._scheduler.close()

    def _wait_ready_until(self, deadline: float | None) -> None:
        self.wait_ready(None if deadline is None else max(0.0, deadline - time.monotonic()))

    @property
    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise NotReady(self._failure or f"checkpoint {self.name!r} is still loading")
        return self._loaded

    # -- on the device thread ----------------------------------------------------------------------------------------

    def _find(self, photo: Photo, tuned: Sources | None, score_threshold: float) -> Generator[None, None, Detections]:
        detector = self._loaded_for(tuned).detector
        return (yield from detector.find(photo, score_threshold=score_threshold, limit=self._options.max_detections))

    def _answer(self, asked: Sequence[_Asked]) -> list[list[Detections] | Exception]:
        answers: list[list[Detections] | Exception] = [[] for _ in asked]
        places: dict[str | None, list[int]] = {}
        for place, one in enumerate(asked):
            places.setdefault(one.tuned.head_digest if one.tuned else None, []).append(place)
        for together in places.values():
            try:
                refiner = self._loaded_for(asked[together[0]].tuned).refiner
            except EngineError as error:
                for place in together:
                    answers[place] = error
                continue
            for place, answer in zip(together, refiner.answer([asked[p].request for p in together]), strict=True):
                answers[place] = answer
        return answers

    def _loaded_for(self, tuned: Sources | None) -> Loaded:
        """What answers with these weights; they are loaded where they are not there."""
        if tuned is None or self._placement is None:
            return self._ready
        loaded = self._tuned.get(tuned.head_digest)
        if loaded is None:
            loaded = load(tuned, self._options, self._placement, self._observer, beside=self._ready)
            self._tuned[tuned.head_digest] = loaded
        return loaded

    def _start_up(self) -> None:
        began = time.monotonic()
        try:
            placement = choose_placement(self._options.device)
            if self._options.max_device_mb:
                limit_memory(placement.device, self._options.max_device_mb)
            self._placement = placement
            self._sources = find_sources(self._options, placement)
            self._loaded = load(self._sources, self._options, placement, self._observer)
        except EngineError as error:
            self._failure = str(error)
            log.error("engine failed: %s", error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._failure = f"checkpoint {self.name!r} could not be loaded: {reason}"
            log.error("engine failed: %s", self._failure, exc_info=not is_out_of_memory(error))
        else:
            log.info(
                "engine ready version=%s device=%s (%s) encoder=%s seconds=%.1f",
                self.version,
                placement.device,
                placement.reason,
                self._sources.encoder or "torch",
                time.monotonic() - began,
            )
        finally:
            self._loading_ended.set()


class TunedEngine:
    """A Sam2Engine with other weights or another threshold for one of its users; see `Sam2Engine.tuned`.

    sources: what is loaded instead of the engine's own; None where only the threshold differs.
    """

    def __init__(self, engine: Sam2Engine, sources: Sources | None, *, version: str, options: EngineOptions) -> None:
        self._engine = engine
        self._sources = sources
        self._options = options
        self.version = version

    @property
    def state(self) -> State:
        return self._engine.state

    @property
    def failure(self) -> str | None:
        return self._engine.failure

    @property
    def name(self) -> str:
        return self._sources.checkpoint.name if self._sources else self._engine.name

    @property
    def score_threshold(self) -> float:
        if self._options.score_threshold is not None:
            return self._options.score_threshold
        return self._sources.calibrated_threshold if self._sources else self._engine.score_threshold

    def stats(self) -> EngineStats:
        """Those of the engine, for all its users together."""
        return self._engine.stats()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        self._engine.wait_ready(timeout_s)

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Detections:
        """As Sam2Engine.preannotate."""
        threshold = self.score_threshold if score_threshold is None else score_threshold
        return self._engine.find(photo, self._sources, score_threshold=threshold, lane=lane, deadline=deadline)

    def refine(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        *,
        accepted_xyxy: FloatArray | None = None,
        want_masks: bool = False,
        deadline: float | None = None,
    ) -> list[Detections]:
        """As Sam2Engine.refine."""
        return self._engine.ask(
            photo,
            prompts,
            self._sources,
            accepted_xyxy=accepted_xyxy,
            want_masks=want_masks,
            deadline=deadline,
        )

    def close(self) -> None:
        """Nothing: others use the engine."""
