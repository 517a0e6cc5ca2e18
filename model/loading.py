"""From options to what answers: which files are used, what version that makes, and the networks on their device.

Knows checkpoints, networks, detectors and caches, and how they belong together; nothing of threads or queues.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from model.boxes import nms
from model.checkpoints import BUNDLED, Checkpoint, calibrated_threshold, excess_width, find_checkpoint
from model.detect import Detector, FallbackDetector, GridDetector, HeadDetector, PromptedDetector
from model.device import Placement, choose_placement
from model.exported_encoders import EncoderFile, find_encoder, open_encoder
from model.feature_cache import FeatureCache, KnownBoxes, TileFeatures
from model.network import Network
from model.refine import Refiner, RefineRequest
from model.sam2_module import has_proposal_head
from model.stages import Observer
from model.triton_encoder import TritonModel
from model.types import CheckpointError, Photo, Prompt

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
    detector: weights of `facings-nano` that find facings in place of the checkpoint's own head, or of the one that
        prompts it; where they take the place of the checkpoint's own, they answer prompts too.
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
    detector: str | None = None
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
class Sources:
    """What is loaded. head: the checkpoint whose detector head finds boxes; None where the grid does.

    calibrated_threshold: the head's, or 0.
    """

    checkpoint: Checkpoint
    head: Checkpoint | None
    encoder: EncoderFile | TritonModel | None
    calibrated_threshold: float

    @property
    def head_digest(self) -> str:
        """Names what is loaded, among sources that differ in their detector's weights."""
        return (self.head or self.checkpoint).digest

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
class Loaded:
    """What answers. cache: of the features of all networks. checkpoint: of the network that answers prompts."""

    checkpoint: Checkpoint
    cache: FeatureCache
    features: TileFeatures
    detector: Detector
    refiner: Refiner


def version_of(options: EngineOptions) -> str:
    """The version of an engine with these options, without building its network.

    Downloads an official checkpoint that is not there yet. Raises EngineError as loading does.
    """
    return find_sources(options, choose_placement(options.device)).version(options)


def find_sources(options: EngineOptions, placement: Placement) -> Sources:
    """Raises EngineError."""
    has_gpu = placement.device.type == "cuda"
    checkpoint = find_checkpoint(options.checkpoint, config=options.checkpoint_config, has_gpu=has_gpu)
    head = None
    if options.proposals != "grid":
        own = has_proposal_head(checkpoint.config)
        head = checkpoint if own else find_checkpoint(BUNDLED, config=None, has_gpu=False)
    sources = Sources(
        checkpoint=checkpoint,
        head=head,
        encoder=find_encoder(options.encoder, placement) if options.encoder else None,
        calibrated_threshold=(calibrated_threshold(head) if head else None) or 0.0,
    )
    return sources if options.detector is None else tuned_sources(sources, Path(options.detector))


def tuned_sources(sources: Sources, weights: Path) -> Sources:
    """The sources with other weights of `facings-nano`: they find the facings, and answer prompts too where those that
    they replace did. Raises CheckpointError."""
    tuned = find_checkpoint(str(weights), config=None, has_gpu=False)
    if sources.head is None:
        raise CheckpointError(f"checkpoint {tuned.name!r}: with proposals from a grid no detector is used")
    if not has_proposal_head(tuned.config):
        raise CheckpointError(f"checkpoint {tuned.name!r}: expected one with a detector, as {BUNDLED} has, got none")
    threshold = calibrated_threshold(tuned) or 0.0
    if sources.head == sources.checkpoint:
        return Sources(checkpoint=tuned, head=tuned, encoder=None, calibrated_threshold=threshold)
    return replace(sources, head=tuned, calibrated_threshold=threshold)


def load(
    sources: Sources,
    options: EngineOptions,
    placement: Placement,
    observer: Observer,
    *,
    beside: Loaded | None = None,
) -> Loaded:
    """The networks on their device, and what answers with them. Raises EngineError.

    beside: what is loaded already; its cache is shared, and its network where it is that of the same checkpoint.
    """
    known_boxes = KnownBoxes(max_photos=KNOWN_PHOTOS)
    if beside is not None and beside.checkpoint == sources.checkpoint:
        cache, features, refiner = beside.cache, beside.features, beside.refiner
    else:
        cache = beside.cache if beside is not None else FeatureCache(options.feature_bytes)
        encoder = open_encoder(sources.encoder, sources.checkpoint, placement) if sources.encoder else None
        network = Network(sources.checkpoint, placement, encoder, observer=observer)
        network.warm_up(reserved_bytes=options.feature_bytes)
        features = TileFeatures(network, cache)
        refiner = Refiner(features=features, known_boxes=known_boxes, observer=observer)
        _warm_up(refiner)
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
            features=TileFeatures(detector_network, FeatureCache(0)),
            excess_width=excess_width(sources.head),
            known_boxes=KnownBoxes(max_photos=0),  # clicks are answered by a network that was never given such boxes
            observer=observer,
        )
        detector = PromptedDetector(detector=head, features=features, observer=observer)
        if options.proposals == "auto":
            detector = FallbackDetector(first=detector, fallback=grid)
    return Loaded(checkpoint=sources.checkpoint, cache=cache, features=features, detector=detector, refiner=refiner)


def _warm_up(refiner: Refiner) -> None:
    """The first call of each kind is slow; better now than at an annotator's first click."""
    grey = Photo(pixels=np.full((64, 64, 3), 128, np.uint8))
    click = Prompt(points_xy=np.array([[32, 32]], np.float32), is_foreground=np.ones(1, np.bool_))
    box = Prompt(box_xyxy=np.array([8, 8, 56, 56], np.float32))
    refiner.answer([RefineRequest(photo=grey, prompts=[click, box], want_masks=False)])
    nms(torch.zeros(0, 4), torch.zeros(0), 0.5)  # imports for seconds the first time
