"""The resident engine: photos and prompts in, Detections out.

Knows the other modules of this package and wires them together; nothing of Label Studio, HTTP or the environment.
Weights load once, in the background, on the one thread that ever touches the device. All public methods may be called
from any thread and block until they have an answer.

What the engine remembers of photos (model.feature_cache) is a cache. Features only make an answer faster. The boxes of
photos that were pre-annotated here make clicks on the same photos better: a click may get another box after
`preannotate` than before, and two replicas may answer the same click differently.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from model.boxes import nms
from model.checkpoints import BUNDLED, Checkpoint, calibrated_threshold, excess_width, find_checkpoint
from model.detect import Detector, FallbackDetector, GridDetector, HeadDetector, PromptedDetector
from model.device import Placement, choose_placement
from model.exported_encoders import EncoderFile, find_encoder, open_encoder
from model.feature_cache import CacheStats, KnownBoxes, TileFeatures
from model.memory import is_out_of_memory, limit_memory
from model.network import Network
from model.refine import Refiner, RefineRequest
from model.sam2_module import has_proposal_head
from model.scheduler import Scheduler
from model.stages import UNOBSERVED, Observer
from model.triton_encoder import TritonModel
from model.types import Detections, EngineError, EngineStats, FloatArray, Lane, NotReady, Photo, Prompt, State

log = logging.getLogger(__name__)

KNOWN_PHOTOS = 500  # pre-annotated photos whose boxes clicks may use; 20 kB each at most

ProposalSource = Literal["auto", "grid", "learned"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """checkpoint: `auto`, a name of model.checkpoints, or the path of a `.pt` or `.safetensors` file.
    checkpoint_config: network config of a path, when it does not follow from the file's name.
    device: `auto`, `cpu`, `cuda` or `cuda:N`.
    encoder: what `facings export` made of this checkpoint, to encode instead of torch: an `.onnx` file on a CPU, an
        `.engine` file on a GPU, or the folder of either; or the address of a model on a Triton server,
        `triton://host:port/model`, `tritons://` with TLS.
    proposals: how `preannotate` finds boxes. `learned`: with a learned detector head. That is the checkpoint's own; a
        checkpoint without one is prompted with the boxes of the `facings-nano` detector. `grid`: with a grid of points,
        as SAM2AutomaticMaskGenerator does. `auto`: `learned`, and the grid on photos where the `facings-nano` detector
        finds nothing for a checkpoint without a head.
    cache_bytes: the most that the feature cache holds.
    max_device_mb: the most MiB of a GPU's memory, for weights, cache and work together; the cache then gets a quarter
        of it at most. 0: no limit. Work that does not fit is done in smaller batches.
    score_threshold: default of `preannotate`; None takes the checkpoint's calibrated one.
    max_detections: the most boxes of one photo.
    """

    checkpoint: str = "auto"
    checkpoint_config: str | None = None
    device: str = "auto"
    encoder: str | None = None
    proposals: ProposalSource = "auto"
    cache_bytes: int = 1 << 30
    max_device_mb: int = 0
    score_threshold: float | None = None
    max_detections: int = 1000

    def __post_init__(self) -> None:
        if self.proposals not in get_args(ProposalSource):
            raise ValueError(f"proposals: expected auto, grid or learned, got {self.proposals!r}")
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold: expected a number in [0, 1], got {self.score_threshold!r}")
        if self.max_detections < 1:
            raise ValueError(f"max_detections: expected at least 1, got {self.max_detections!r}")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes: expected at least 0, got {self.cache_bytes!r}")
        if self.max_device_mb < 0:
            raise ValueError(f"max_device_mb: expected at least 0, got {self.max_device_mb!r}")

    @property
    def feature_bytes(self) -> int:
        """The most that the feature cache holds on a device with this limit."""
        if not self.max_device_mb:
            return self.cache_bytes
        return min(self.cache_bytes, self.max_device_mb * 2**20 // 4)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """What is loaded. head: the checkpoint whose detector head finds boxes; None where the grid does.

    calibrated_threshold: the head's, or 0.
    """

    checkpoint: Checkpoint
    head: Checkpoint | None
    encoder: EncoderFile | TritonModel | None
    calibrated_threshold: float

    def version(self, options: EngineOptions) -> str:
        changed = [
            f"{name}={value}"
            for name in ("score_threshold", "max_detections", "proposals")
            if (value := getattr(options, name)) != getattr(EngineOptions, name)
        ]
        if self.head and self.head != self.checkpoint:
            changed.append(self.head.version)
        if self.encoder:
            changed.append(self.encoder.digest)
        suffix = "-" + hashlib.sha256(",".join(changed).encode()).hexdigest()[:4] if changed else ""
        return self.checkpoint.version + suffix


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What answers."""

    features: TileFeatures
    detector: Detector
    refiner: Refiner


class Sam2Engine:
    """One network, resident.

    Returns at once; `wait_ready` waits for the weights. observer: of all work; see model.stages.
    """

    def __init__(self, options: EngineOptions, *, observer: Observer = UNOBSERVED) -> None:
        self._options = options
        self._observer = observer
        self._loading_ended = threading.Event()
        self._sources: _Sources | None = None
        self._loaded: _Loaded | None = None
        self._failure: str | None = None
        self._closed = False
        self._scheduler: Scheduler[RefineRequest, list[Detections]] = Scheduler(
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
        cache = self._loaded.features.stats() if self._loaded else CacheStats()
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
        self._wait_ready_until(deadline)
        work = self._ready.detector.find(
            photo,
            score_threshold=self.score_threshold if score_threshold is None else score_threshold,
            limit=self._options.max_detections,
        )
        return self._scheduler.run(work, lane=lane, deadline=deadline)

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
        request = RefineRequest(
            photo=photo,
            prompts=tuple(prompts),
            want_masks=want_masks,
            accepted_xyxy=np.zeros((0, 4), np.float32) if accepted_xyxy is None else accepted_xyxy,
        )
        return self._scheduler.ask(request, deadline=deadline)

    def close(self) -> None:
        """Stops the device thread; work that waits is refused with NotReady."""
        self._closed = True
        self._scheduler.close()

    def _wait_ready_until(self, deadline: float | None) -> None:
        self.wait_ready(None if deadline is None else max(0.0, deadline - time.monotonic()))

    @property
    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise NotReady(self._failure or f"checkpoint {self.name!r} is still loading")
        return self._loaded

    # -- on the device thread ----------------------------------------------------------------------------------------

    def _answer(self, requests: Sequence[RefineRequest]) -> list[list[Detections] | Exception]:
        return self._ready.refiner.answer(requests)

    def _start_up(self) -> None:
        began = time.monotonic()
        try:
            placement = choose_placement(self._options.device)
            if self._options.max_device_mb:
                limit_memory(placement.device, self._options.max_device_mb)
            self._sources = _find_sources(self._options, placement)
            self._loaded = _load(self._sources, self._options, placement, self._observer)
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


def version_of(options: EngineOptions) -> str:
    """The version of an engine with these options, without building its network.

    Downloads an official checkpoint that is not there yet. Raises EngineError as loading does.
    """
    return _find_sources(options, choose_placement(options.device)).version(options)


def _find_sources(options: EngineOptions, placement: Placement) -> _Sources:
    """Raises EngineError."""
    has_gpu = placement.device.type == "cuda"
    checkpoint = find_checkpoint(options.checkpoint, config=options.checkpoint_config, has_gpu=has_gpu)
    head = None
    if options.proposals != "grid":
        own = has_proposal_head(checkpoint.config)
        head = checkpoint if own else find_checkpoint(BUNDLED, config=None, has_gpu=False)
    return _Sources(
        checkpoint=checkpoint,
        head=head,
        encoder=find_encoder(options.encoder, placement) if options.encoder else None,
        calibrated_threshold=(calibrated_threshold(head) if head else None) or 0.0,
    )


def _load(sources: _Sources, options: EngineOptions, placement: Placement, observer: Observer) -> _Loaded:
    """The network on its device, and what answers with it. Raises EngineError."""
    encoder = open_encoder(sources.encoder, sources.checkpoint, placement) if sources.encoder else None
    network = Network(sources.checkpoint, placement, encoder, observer=observer)
    features = TileFeatures(network, cache_bytes=options.feature_bytes)
    known_boxes = KnownBoxes(max_photos=KNOWN_PHOTOS)
    grid = GridDetector(features=features, observer=observer)
    detector: Detector
    if sources.head is None:
        detector = grid
    elif sources.head == sources.checkpoint:
        detector = HeadDetector(
            features=features, known_boxes=known_boxes, excess_width=excess_width(sources.head), observer=observer
        )
    else:
        detector_network = Network(sources.head, placement, observer=observer)
        detector_network.warm_up(reserved_bytes=options.feature_bytes)
        head = HeadDetector(
            features=TileFeatures(detector_network, cache_bytes=0),
            excess_width=excess_width(sources.head),
            known_boxes=KnownBoxes(max_photos=0),  # clicks are answered by a network that was never given such boxes
            observer=observer,
        )
        detector = PromptedDetector(detector=head, features=features, observer=observer)
        if options.proposals == "auto":
            detector = FallbackDetector(first=detector, fallback=grid)
    network.warm_up(reserved_bytes=options.feature_bytes)
    refiner = Refiner(features=features, known_boxes=known_boxes, observer=observer)
    _warm_up(refiner)
    return _Loaded(features=features, detector=detector, refiner=refiner)


def _warm_up(refiner: Refiner) -> None:
    """The first call of each kind is slow; better now than at an annotator's first click."""
    grey = Photo(pixels=np.full((64, 64, 3), 128, np.uint8))
    click = Prompt(points_xy=np.array([[32, 32]], np.float32), is_foreground=np.ones(1, np.bool_))
    box = Prompt(box_xyxy=np.array([8, 8, 56, 56], np.float32))
    refiner.answer([RefineRequest(photo=grey, prompts=[click, box], want_masks=False)])
    nms(torch.zeros(0, 4), torch.zeros(0), 0.5)  # imports for seconds the first time
