"""The resident engine: photos and prompts in, Detections out.

Knows the other modules of this package and wires them together; nothing of Label Studio, HTTP or the environment.
Weights load once, in the background, on the one thread that ever touches the device. All public methods may be called
from any thread and block until they have an answer.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from model import boxes as geometry
from model import tiling
from model.checkpoints import BUNDLED, Checkpoint, calibrated_threshold, find_checkpoint
from model.detect import DenseFinder, batches
from model.device import choose_placement
from model.encoder import EncoderFile, find_encoder, open_encoder
from model.feature_cache import FeatureCache
from model.masks import Answer, choose_masks, read_object
from model.memory import is_out_of_memory, limit_memory
from model.network import MASK_STRIDE, Features, Network, Proposals, TilePrompt, has_proposal_head
from model.proposer import prior_box
from model.scheduler import Scheduler
from model.stages import timed_for
from model.tiling import Tile
from model.types import Detections, EngineError, EngineStats, Lane, NotReady, Photo, Prompt, State

log = logging.getLogger(__name__)

MERGED_LIMIT = 1000  # proposals of a photo that clicks know of, however few boxes are handed out
MERGED_CACHE_BYTES = 8 << 20  # some hundreds of photos

ProposalSource = Literal["auto", "grid", "learned"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """checkpoint: `auto`, a name of model.checkpoints, or the path of a `.pt` or `.safetensors` file.
    checkpoint_config: network config of a path, when its name does not tell.
    device: `auto`, `cpu`, `cuda` or `cuda:N`.
    encoder: what `facings export` wrote of this checkpoint, to encode instead of torch: an `.onnx` file on a CPU, an
        `.engine` file on a GPU, or the folder of either.
    proposals: where `preannotate` looks. `learned`: what a learned head proposes, the checkpoint's own, or the bundled
        one's for the checkpoint's decoder to redraw. `grid`: a grid of points, as SAM2AutomaticMaskGenerator asks.
        `auto`: `learned`; the grid on photos where a lent head proposes nothing.
    cache_bytes: bound of the feature cache.
    max_device_mb: most MiB of a GPU's memory, weights, cache and work together; the cache then gets a quarter of it at
        most. 0: all there is. Work that does not fit is done in smaller pieces.
    score_threshold: default of `preannotate`; None takes the checkpoint's calibrated one.
    max_detections: most boxes handed out for one photo.
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
        """What the feature cache gets of what it may have."""
        return min(self.cache_bytes, self.max_device_mb << 18) if self.max_device_mb else self.cache_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Refinement:
    """A request of the interactive lane."""

    photo: Photo
    prompts: Sequence[Prompt]
    want_masks: bool


class Sam2Engine:
    """One network, resident.

    Returns at once; `wait_ready` waits for the weights. observe(name, value) is called on the device thread with
    "queue_wait_interactive", "queue_wait_bulk" and the names of model.stages, all in seconds.
    """

    def __init__(self, options: EngineOptions, *, observe: Callable[[str, float], None] = lambda *_: None) -> None:
        self._options = options
        self._timed = timed_for(observe)
        self._cache: FeatureCache[Features] = FeatureCache(options.feature_bytes)
        self._merged: FeatureCache[Proposals] = FeatureCache(MERGED_CACHE_BYTES)
        self._loaded = threading.Event()
        self._network: Network | None = None
        self._finder: DenseFinder | None = None
        self._checkpoint: Checkpoint | None = None
        self._encoder_file: EncoderFile | None = None
        self._proposing_checkpoint: Checkpoint | None = None  # whose head proposes; None for the grid
        self._calibrated_threshold: float | None = None
        self._failure: str | None = None
        self._closed = False
        self._scheduler: Scheduler[_Refinement, Detections] = Scheduler(
            start_up=self._load, answer=self._refine_together, observe=observe
        )

    # -- what is known without waiting -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        if self._closed:
            return "closed"
        if not self._loaded.is_set():
            return "loading"
        return "failed" if self._failure else "ready"

    @property
    def failure(self) -> str | None:
        """Why the engine will never be ready, in one line, or None."""
        return self._failure

    @property
    def name(self) -> str:
        """Name of the checkpoint; the requested one until it is known."""
        return self._checkpoint.name if self._checkpoint else self._options.checkpoint

    @property
    def version(self) -> str:
        """Changes exactly when the boxes may: the weights' hash, the options that change boxes, and the hash of an
        exported encoder. Never blocks; `<name>-loading` until the weights' file is known."""
        if self._checkpoint is None:
            return f"{self._options.checkpoint}-loading"
        return _version(self._options, self._checkpoint, self._proposing_checkpoint, self._encoder_file)

    @property
    def score_threshold(self) -> float:
        """The default threshold in force: the option, else what the proposing checkpoint is calibrated to, else 0."""
        if self._options.score_threshold is not None:
            return self._options.score_threshold
        return self._calibrated_threshold or 0.0

    def stats(self) -> EngineStats:
        cache = self._cache.stats()
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
        if not self._loaded.wait(timeout_s):
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
        threshold = self.score_threshold if score_threshold is None else score_threshold
        found = self._scheduler.run(self._find(photo, threshold), lane=lane, deadline=deadline)
        return found.above(threshold)

    def refine(
        self, photo: Photo, prompts: Sequence[Prompt], *, want_masks: bool = False, deadline: float | None = None
    ) -> Detections:
        """One box for each prompt, in order, tight around the object it names; with `want_masks` its mask too.

        A prompt whose object was not found gets its own box back, or an empty box at its point, with score 0.
        Raises as `preannotate` does.
        """
        self._wait_ready_until(deadline)
        request = _Refinement(photo=photo, prompts=tuple(prompts), want_masks=want_masks)
        return self._scheduler.ask(request, deadline=deadline)

    def close(self) -> None:
        """Stops the device thread; whatever waits is refused with NotReady."""
        self._closed = True
        self._scheduler.close()

    def _wait_ready_until(self, deadline: float | None) -> None:
        self.wait_ready(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # -- on the device thread ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        began = time.monotonic()
        try:
            placement = choose_placement(self._options.device)
            if self._options.max_device_mb:
                limit_memory(placement.device, self._options.max_device_mb)
            checkpoint = find_checkpoint(
                self._options.checkpoint,
                config=self._options.checkpoint_config,
                has_gpu=placement.device.type == "cuda",
            )
            proposing = _proposing(self._options, checkpoint)
            file = find_encoder(self._options.encoder, placement) if self._options.encoder else None
            self._encoder_file = file  # before the checkpoint, so that no version lacks it
            self._checkpoint, self._proposing_checkpoint = checkpoint, proposing
            self._calibrated_threshold = calibrated_threshold(proposing) if proposing else None
            encoder = open_encoder(file, checkpoint, placement) if file else None
            self._network = network = Network(checkpoint, placement, encoder, timed=self._timed)
            lent = None
            if proposing and proposing is not checkpoint:
                lent = Network(proposing, placement, timed=self._timed)
            self._finder = DenseFinder(
                network=network,
                proposer=network if proposing is checkpoint else lent,
                falls_back_to_grid=self._options.proposals == "auto",
                features_of=self._features,
                timed=self._timed,
            )
            for one in (lent, network):
                if one is not None:
                    one.warm_up(reserved_bytes=self._options.feature_bytes)
            self._warm_up()
        except EngineError as error:
            self._failure = str(error)
            log.error("engine failed: %s", error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._failure = f"checkpoint {self.name!r} could not be loaded: {reason}"
            log.error("engine failed: %s", self._failure, exc_info=not is_out_of_memory(error))
        else:
            seconds = time.monotonic() - began
            log.info(
                "engine ready version=%s device=%s (%s) encoder=%s seconds=%.1f",
                self.version,
                placement.device,
                placement.reason,
                file.path if file else "torch",
                seconds,
            )
        finally:
            self._loaded.set()

    def _warm_up(self) -> None:
        """The first call of each kind is slow; better now than at an annotator's first click."""
        grey = Photo(pixels=np.full((64, 64, 3), 128, np.uint8))
        self._refine_together([_Refinement(photo=grey, prompts=[_click(32, 32), _box(8, 8, 56, 56)], want_masks=False)])

    @property
    def _net(self) -> Network:
        if self._network is None:
            raise NotReady(self._failure or f"checkpoint {self.name!r} is still loading")
        return self._network

    def _find(self, photo: Photo, score_threshold: float) -> Generator[None, None, Detections]:
        """A job of the scheduler. What the network's own head proposes is kept for the clicks to come."""
        finder = self._finder
        if finder is None:
            raise NotReady(self._failure or f"checkpoint {self.name!r} is still loading")
        limit = self._options.max_detections
        found = yield from finder.find(photo, score_threshold=score_threshold, limit=max(limit, MERGED_LIMIT))
        if finder.proposer is finder.network:
            self._merged.put(photo.digest, Proposals(boxes_xyxy=found.boxes_xyxy, scores=found.scores))
        return found.first(limit)

    def _features(self, photo: Photo, tiles: Sequence[Tile]) -> list[Features]:
        """Features of the tiles, from the cache where they are known, else encoded in one batch."""
        known = {tile: features for tile in tiles if (features := self._cache.get((photo.digest, tile))) is not None}
        missing = [tile for tile in tiles if tile not in known]
        if missing:
            for features in self._net.encode(photo.pixels, missing):
                self._cache.put((photo.digest, features.tile), features)
                known[features.tile] = features
        return [known[tile] for tile in tiles]

    def _refine_together(self, requests: Sequence[_Refinement]) -> list[Detections | Exception]:
        """Answers all waiting requests; their prompts share the decoder's calls. One that fails costs no other.

        Until then the features of every tile that they ask for are held, some MB each, whatever the cache keeps.
        """
        answers: dict[int, list[Answer] | Exception] = {}
        tiled: list[tuple[int, int, TilePrompt]] = []
        for number, request in enumerate(requests):
            try:
                tiled += [(number, place, prompt) for place, prompt in enumerate(self._on_tiles(request))]
            except Exception as error:
                answers[number] = error
        found: dict[tuple[int, int], Answer] = {}
        try:
            for group in _same_tokens(tiled):
                for batch in batches(group, self._net.decode_batch):
                    with self._timed("decode"):
                        found.update(self._decode(batch, requests))
        except Exception as error:
            answers.update({number: error for number, _, _ in tiled})
        result: list[Detections | Exception] = []
        for number, request in enumerate(requests):
            failure = answers.get(number)
            if isinstance(failure, Exception):
                result.append(failure)
            else:
                result.append(_detections([found[number, place] for place in range(len(request.prompts))], request))
        return result

    def _on_tiles(self, request: _Refinement) -> list[TilePrompt]:
        """The prompts of a request on the tiles that suit them. A tile is encoded once, not once for each prompt, also
        where the cache holds fewer tiles than they need."""
        photo, size = request.photo, self._net.size
        tiles = [
            tiling.tile_for_points(prompt.points_xy, photo.size_wh, size)
            if prompt.box_xyxy is None
            else tiling.tile_for_box(prompt.box_xyxy, photo.size_wh, size)
            for prompt in request.prompts
        ]
        features_of = {
            features.tile: features
            for batch in batches(dict.fromkeys(tiles), self._net.encode_batch)
            for features in self._features(photo, batch)
        }
        return [
            self._on_tile(photo, prompt, features_of[tile]) for prompt, tile in zip(request.prompts, tiles, strict=True)
        ]

    def _on_tile(self, photo: Photo, prompt: Prompt, features: Features) -> TilePrompt:
        """The prompt in the pixels of the features' tile, with what is known of the objects there: the proposals of all
        tiles where the photo was pre-annotated, else those of this tile."""
        tile = features.tile
        box = None if prompt.box_xyxy is None else tile.to_tile(prompt.box_xyxy.reshape(2, 2)).reshape(4)
        points, prior = tile.to_tile(prompt.points_xy), None
        merged = self._merged.get(photo.digest)
        proposals = merged.on(tile) if merged else features.proposals
        if proposals is not None:
            prior = prior_box(proposals.boxes_xyxy, proposals.scores, points, prompt.is_foreground, box)
        return TilePrompt(
            features=features,
            points_xy=points,
            is_foreground=prompt.is_foreground,
            box_xyxy=box,
            proposals=proposals,
            prior_xyxy=prior,
        )

    def _decode(
        self, batch: Sequence[tuple[int, int, TilePrompt]], requests: Sequence[_Refinement]
    ) -> Iterator[tuple[tuple[int, int], Answer]]:
        """Decodes prompts with equally many tokens and reads each one's object from the mask that suits a facing."""
        prompts = [prompt for _, _, prompt in batch]
        logits, iou = self._net.decode(prompts, multimask=prompts[0].is_ambiguous)
        chosen = choose_masks(
            geometry.mask_boxes(logits.flatten(0, 1), MASK_STRIDE).view(*iou.shape, 4), iou, self._net.size
        )
        rows = torch.arange(len(prompts), device=iou.device)
        best, scores = logits[rows, chosen].cpu().numpy(), iou[rows, chosen].clamp(0, 1).cpu().numpy()
        for (number, place, prompt), plane, score in zip(batch, best, scores, strict=True):
            request = requests[number]
            yield (
                (number, place),
                read_object(prompt, plane, float(score), request.photo.size_wh, want_mask=request.want_masks),
            )


def _detections(answers: Sequence[Answer], request: _Refinement) -> Detections:
    masks = [answer.mask for answer in answers if answer.mask is not None] if request.want_masks else None
    return Detections(
        boxes_xyxy=np.array([answer.box_xyxy for answer in answers], np.float32).reshape(-1, 4),
        scores=np.array([answer.score for answer in answers], np.float32),
        masks=masks,
    )


def _same_tokens(tiled: Iterable[tuple[int, int, TilePrompt]]) -> list[list[tuple[int, int, TilePrompt]]]:
    """Prompts by kind and number of tokens: only equal ones can share a call without changing each other's answer."""
    groups: dict[tuple[int, bool], list[tuple[int, int, TilePrompt]]] = {}
    for entry in tiled:
        groups.setdefault((len(entry[2].tokens()[1]), entry[2].is_ambiguous), []).append(entry)
    return list(groups.values())


def _click(x: float, y: float) -> Prompt:
    return Prompt(points_xy=np.array([[x, y]], np.float32), is_foreground=np.ones(1, np.bool_))


def _box(x0: float, y0: float, x1: float, y1: float) -> Prompt:
    return Prompt(box_xyxy=np.array([x0, y0, x1, y1], np.float32))


def version_of(options: EngineOptions) -> str:
    """The version of an engine with these options, without building its network.

    Downloads an official checkpoint that is not there yet. Raises EngineError as loading does.
    """
    placement = choose_placement(options.device)
    checkpoint = find_checkpoint(
        options.checkpoint, config=options.checkpoint_config, has_gpu=placement.device.type == "cuda"
    )
    file = find_encoder(options.encoder, placement) if options.encoder else None
    return _version(options, checkpoint, _proposing(options, checkpoint), file)


def _version(
    options: EngineOptions, checkpoint: Checkpoint, proposing: Checkpoint | None, file: EncoderFile | None
) -> str:
    changed = [
        f"{name}={value}"
        for name in ("score_threshold", "max_detections", "proposals")
        if (value := getattr(options, name)) != getattr(EngineOptions, name)
    ]
    if proposing and proposing != checkpoint:
        changed.append(proposing.version)
    if file:
        changed.append(file.digest)
    suffix = "-" + hashlib.sha256(",".join(changed).encode()).hexdigest()[:4] if changed else ""
    return checkpoint.version + suffix


def _proposing(options: EngineOptions, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint whose head proposes: the engine's own, else the bundled one; None for the grid."""
    if options.proposals == "grid":
        return None
    if has_proposal_head(checkpoint.config):
        return checkpoint
    return find_checkpoint(BUNDLED, config=None, has_gpu=False)
