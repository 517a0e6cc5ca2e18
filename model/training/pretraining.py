"""Trains the network on a GPU, while many CPU cores render.

Knows tensors, the network's modules and the pictures; not where photos come from. Differs from model.training.loop in
two things: pieces are cut and lit on the device (model.training.pictures), and photos without known boxes can teach,
with those that the engine finds there with another checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.boxes import iou_matrix
from model.checkpoints import (
    BUNDLED_CONFIG,
    BUNDLED_WEIGHTS,
    calibrated_threshold,
    excess_width,
    find_checkpoint,
    read_weights,
    write_weights,
)
from model.engine import Sam2Engine
from model.loading import EngineOptions
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.proposer import boxes_of_cells
from model.quality import Truth
from model.renderer.shelves import MIN_SIDE_PX, MIN_VISIBLE_SHARE
from model.sam2_module import FacingsModule, build_module, load_weights
from model.training.loop import SAM_STRIDE, SECOND_ROUND_SHARE, WEIGHTS_OF_LOSSES, initialise_decoder, prompt_losses
from model.training.losses import box_loss, centre_loss, quality_loss
from model.training.optimizer import descend, optimizer_of, set_rate
from model.training.pictures import (
    MAX_BOXES,
    Pictures,
    Pieces,
    dense_batch,
    prompt_batch,
    relit_batch,
)
from model.training.render_pool import RenderPool
from model.training.targets import UNKNOWN
from model.trunk import EfficientNetLite
from model.types import BoolArray, CheckpointError, Detections, FloatArray, Photo, PixelArray

WARM_UP_SHARE = 0.04
SURE_SCORE, UNSURE_SCORE = 0.88, 0.4  # of the teacher: a facing; perhaps one
MAX_REAL_PIECES = 6000  # on the device, 3 MB each; at least one of each photo
REAL_LONGER_PX = (900.0, 1900.0)  # longer side of the photos that pieces are cut from, as tiles show them

Report = dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class RealPhoto:
    """A photo to learn from.

    pixels: uint8 `[H, W, 3]`. truth: the boxes of all its facings, in pixels; None where the teacher looks for them.
    """

    pixels: PixelArray
    truth: Truth | None = None

    def at_most(self, longer_px: int) -> RealPhoto:
        """The same photo with at most so many pixels on its longer side."""
        height, width = self.pixels.shape[:2]
        scale = min(1.0, longer_px / max(height, width))
        size_wh = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cast(PixelArray, cv2.resize(self.pixels, size_wh, interpolation=cv2.INTER_AREA))
        return RealPhoto(pixels=pixels, truth=None if self.truth is None else self.truth.scaled(size_wh))


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """How a run goes.

    start_from: a checkpoint of facings-nano to begin with. encoder_weights: published weights of the encoder (a `.pth`
    of EfficientNet-Lite) to begin with instead, and all else untrained.
    photos: to learn from. teacher: the checkpoint that labels those without known boxes. real_share: of a batch, cut
    from photos.
    kept_pictures: rendered pictures on the device. waits_for: how many there must be before the first step.
    """

    out: Path
    minutes: float
    start_from: Path = BUNDLED_WEIGHTS
    encoder_weights: Path | None = None
    textures: Path | None = None
    photos: Sequence[RealPhoto] = ()
    teacher: Path = BUNDLED_WEIGHTS
    device: str = "cuda"
    seed: int = 0
    processes: int = 15
    batch_size: int = 64
    prompts_per_piece: int = 3
    piece_px: int = 512
    picture_px: int = 768
    kept_pictures: int = 10000
    waits_for: int = 256
    pieces_per_photo: int = 16
    real_share: float = 0.25
    learning_rate: float = 1.2e-3
    average: float = 0.998
    report_every: int = 100
    save_every_s: float = 60.0


def load_encoder(encoder: EfficientNetLite, tensors: dict[str, torch.Tensor]) -> None:
    """Published weights of EfficientNet-Lite into the encoder, by their order, since names differ among publishers.

    They expect pixels as (x - 127) / 128; the difference to our normalisation goes into the stem. Raises
    CheckpointError where shapes do not fit.
    """
    own = encoder.state_dict()
    values = list(tensors.values())[: len(own)]
    misfits = [name for (name, mine), value in zip(own.items(), values, strict=False) if mine.shape != value.shape]
    if misfits or len(values) < len(own):
        found = f"another shape of {misfits[0]!r}" if misfits else f"{len(values)} tensors"
        raise CheckpointError(f"trunk weights: expected the {len(own)} tensors of EfficientNet-Lite1, got {found}")
    encoder.load_state_dict({name: value.float() for name, value in zip(own, values, strict=True)})
    stem, norm = cast(nn.Conv2d, encoder.stem[0]), cast(Any, encoder.stem[1])
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_DEVIATION))
    with torch.no_grad():
        norm.running_mean -= (stem.weight * (255 * mean - 127) / 128).sum((1, 2, 3))
        stem.weight *= 255 * deviation / 128


class Learner:
    """A network that learns, its moving average and its optimizer.

    excess_width: by how much of their width the boxes that rendered shelves teach are too wide on photos. The engine
    narrows all boxes by it, so boxes on photos are made as much wider before they teach.
    """

    def __init__(self, module: FacingsModule, options: PretrainOptions, *, excess_width: float = 0.0) -> None:
        self.options = options
        self.module = module
        self.excess_width = excess_width
        self.optimizer = optimizer_of(module, options.learning_rate, fused=options.device != "cpu")
        module.train()
        moving_average = get_ema_multi_avg_fn(options.average)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(module, multi_avg_fn=moving_average, use_buffers=True)
        self.step = 0

    def learn(
        self, pieces: Pieces, has_masks: torch.Tensor, is_exact: torch.Tensor, done: float, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """One step at `done` of the run; returns its losses, on the device.

        has_masks, is_exact: bool `[B]`, of the pieces: whether they are rendered, so that their masks are known, and
        whether their boxes are known and not those of a teacher.
        """
        rate = self.options.learning_rate * min(1.0, 0.01 + done / WARM_UP_SHARE)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        set_rate(self.optimizer, rate)
        with torch.autocast(torch.device(self.options.device).type, torch.bfloat16):
            losses = self._losses(pieces, has_masks, is_exact, rng)
        total = torch.stack([WEIGHTS_OF_LOSSES[name] * loss for name, loss in losses.items()]).sum()
        descend(total, self.module, self.optimizer, self.average)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def _losses(
        self, pieces: Pieces, has_masks: torch.Tensor, is_exact: torch.Tensor, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        maps = self.module.features(normalised(pieces.images))
        centre, distances, quality = self.module.proposal_head.answers(maps.finest)
        with torch.autocast(centre.device.type, enabled=False):
            dense = dense_batch(widened(pieces, ~has_masks, self.excess_width))
            boxes = boxes_of_cells(distances)
            losses = {
                "centre": centre_loss(centre, dense.centre, dense.is_known),
                "box": box_loss(boxes, dense.boxes_xyxy, dense.weight),
            }
            if quality is not None:
                weight = dense.weight * is_exact[:, None, None]
                losses["quality"] = quality_loss(quality, boxes.detach(), dense.boxes_xyxy, weight)
            rows, prompts = prompt_batch(pieces, self.options.prompts_per_piece, has_masks)
        cells = (self.module.sam.image_size - self.options.piece_px) // SAM_STRIDE
        offset = (int(rng.integers(cells + 1)), int(rng.integers(cells + 1)))
        second_round = rng.random() < SECOND_ROUND_SHARE
        return losses | prompt_losses(self.module, maps, rows, prompts, canvas_offset=offset, second_round=second_round)

    def export(self, path: Path, facts: dict[str, str]) -> None:
        """The averaged weights as fp16 safetensors."""
        facts = facts | {"network": BUNDLED_CONFIG, "steps": str(self.step)}
        write_weights(path, self.average.module.state_dict(), facts)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """RGB `[B, 3, S, S]` in [0, 1] as the network takes it."""
    mean, deviation = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_DEVIATION))
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPiece:
    """pixels: uint8 `[S, S, 3]`. ids: int16 `[S, S]`, i + 1 in the box of facing i. boxes_xyxy: `[N, 4]`."""

    pixels: torch.Tensor
    ids: torch.Tensor
    boxes_xyxy: torch.Tensor


def cut_piece(photo: PixelArray, found: Detections, side_px: int, rng: np.random.Generator) -> LabelledPiece:
    """A random square piece of a photo, scaled as tiles show it, with what the boxes found on the photo teach there."""
    height, width = photo.shape[:2]
    low, high = np.log(REAL_LONGER_PX)
    side = round(side_px / (np.exp(rng.uniform(low, high)) / max(height, width)))
    side = min(side, height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    pixels = cv2.resize(photo[top : top + side, left : left + side], (side_px, side_px), interpolation=cv2.INTER_AREA)
    whole = (found.boxes_xyxy - np.array([left, top, left, top])) * (side_px / side)
    seen = whole.clip(0, side_px)
    sides, whole_sides = seen[:, 2:] - seen[:, :2], whole[:, 2:] - whole[:, :2]
    is_seen = (sides >= MIN_SIDE_PX).all(1)
    is_sure = (found.scores >= SURE_SCORE) & (sides.prod(1) >= MIN_VISIBLE_SHARE * whole_sides.prod(1))
    boxes = seen[is_seen].astype(np.float32)
    ids, kept = pseudo_labels(boxes, is_sure[is_seen], side_px)
    return LabelledPiece(pixels=torch.from_numpy(pixels), ids=ids, boxes_xyxy=kept)


def pseudo_labels(boxes: FloatArray, is_sure: BoolArray, side_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a picture teaches in which boxes `[N, 4]` were found, best first: ids int16 `[S, S]`, and the sure boxes
    `[M, 4]`.

    Where it is unsure, nothing is asked for.
    """
    ids = np.zeros((side_px, side_px), np.int16)
    kept = boxes[is_sure][: MAX_BOXES - 1]
    unsure = boxes[~is_sure]
    if len(kept) and len(unsure):
        unsure = unsure[iou_matrix(unsure, kept).max(1) < 0.6]
    for x0, y0, x1, y1 in unsure.round().astype(int):
        ids[y0:y1, x0:x1] = UNKNOWN
    for index in np.argsort(-(kept[:, 2:] - kept[:, :2]).prod(1)):
        x0, y0, x1, y1 = kept[index].round().astype(int)
        ids[y0:y1, x0:x1] = index + 1
    return torch.from_numpy(ids), torch.from_numpy(kept)


def known_of(truth: Truth) -> Detections:
    """Known boxes as if a teacher had found them: it is sure of each, and unsure where there may be some that nobody
    boxed."""
    boxes = np.concatenate([truth.boxes_xyxy, truth.crowds_xyxy]).astype(np.float32)
    scores = np.repeat(np.array([1.0, UNSURE_SCORE], np.float32), [len(truth.boxes_xyxy), len(truth.crowds_xyxy)])
    return Detections(boxes_xyxy=boxes, scores=scores)


def found_on(photos: Sequence[PixelArray], checkpoint: Path, device: str) -> list[Detections]:
    """What the engine finds on each photo with a checkpoint, unsure boxes too. Raises EngineError."""
    if not photos:
        return []
    engine = Sam2Engine(EngineOptions(checkpoint=str(checkpoint), device=device))
    try:
        return [engine.preannotate(Photo(pixels=photo), score_threshold=UNSURE_SCORE) for photo in photos]
    finally:
        engine.close()


def widened(pieces: Pieces, rows: torch.Tensor, excess_width: float) -> Pieces:
    """The boxes of some pieces, bool `[B]`, so much wider that narrowing by `excess_width` gives them back."""
    boxes = pieces.boxes_xyxy
    change = (1 / (1 - excess_width) - 1) / 2 * (boxes[..., 2] - boxes[..., 0]) * rows[:, None]
    nothing = torch.zeros_like(change)
    return replace(pieces, boxes_xyxy=boxes + torch.stack([-change, nothing, change, nothing], dim=-1))


def joined(first: Pieces, second: Pieces) -> Pieces:
    """Two batches as one."""
    limit = max(first.is_box.shape[1], second.is_box.shape[1])

    def both(name: str) -> torch.Tensor:
        parts = []
        for pieces in (first, second):
            value: torch.Tensor = getattr(pieces, name)
            missing = limit - value.shape[1]
            parts.append(functional.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)))
        return torch.cat(parts)

    return Pieces(
        images=torch.cat([first.images, second.images]),
        ids=torch.cat([first.ids, second.ids]),
        boxes_xyxy=both("boxes_xyxy"),
        is_box=both("is_box"),
        numbers=both("numbers"),
    )


class _Run:
    """A run: its pictures, its learner, its clock and its log."""

    def __init__(self, options: PretrainOptions, report: Callable[[Report], None]) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self.options, self._report = options, report
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.rng = np.random.default_rng(options.seed)
        module = _first_module(options)
        module = module.to(self.device).to(memory_format=torch.channels_last)
        teacher = find_checkpoint(str(options.teacher), config=BUNDLED_CONFIG, has_gpu=False)
        self.score_threshold = None if options.encoder_weights else calibrated_threshold(teacher)
        self.learner = Learner(module, options, excess_width=excess_width(teacher))
        self.rendered = Pictures(options.kept_pictures, options.picture_px, self.device)
        most = MAX_REAL_PIECES // max(1, len(options.photos))
        self.pieces_per_photo = max(1, min(options.pieces_per_photo, most))
        known = sum(photo.truth is not None for photo in options.photos)
        self.known, self.found = (
            Pictures(count * self.pieces_per_photo, options.picture_px, self.device)
            for count in (known, len(options.photos) - known)
        )
        self.sums: defaultdict[str, list[torch.Tensor]] = defaultdict(list)

    def log(self, line: Report) -> None:
        with (self.options.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        self._report(line)

    def take_rendered(self, pool: RenderPool, timeout_s: float | None = 0.0) -> None:
        for picture in pool.ready(timeout_s):
            ids = torch.from_numpy(picture.ids.view(np.int16))
            self.rendered.add(torch.from_numpy(picture.pixels), ids, torch.from_numpy(picture.boxes_xyxy))

    def take_photos(self) -> None:
        """Pieces of the photos, with their known boxes, or those that the teacher finds there."""
        options = self.options
        facings = 0
        unlabelled = [photo.pixels for photo in options.photos if photo.truth is None]
        found = iter(found_on(unlabelled, options.teacher, options.device))
        for photo in options.photos:
            labels = next(found) if photo.truth is None else known_of(photo.truth)
            for _ in range(self.pieces_per_photo):
                piece = cut_piece(photo.pixels, labels, options.picture_px, self.rng)
                pictures = self.found if photo.truth is None else self.known
                if pictures.add(piece.pixels, piece.ids, piece.boxes_xyxy):
                    facings += len(piece.boxes_xyxy)
        self.log({"pieces_of_photos": float(len(self.known) + len(self.found)), "facings_on_them": float(facings)})

    def step(self, done: float) -> None:
        options = self.options
        photos = len(self.known) + len(self.found)
        real = round(options.batch_size * options.real_share) if photos else 0
        found = int(self.rng.binomial(real, len(self.found) / photos)) if photos else 0
        rendered = options.batch_size - real
        pieces = self.rendered.pieces(rendered, options.piece_px)
        for pictures, count in ((self.known, real - found), (self.found, found)):
            if count:
                pieces = joined(pieces, pictures.pieces(count, options.piece_px))
        pieces = replace(pieces, images=relit_batch(pieces.images))
        place = torch.arange(options.batch_size, device=self.device)
        has_masks, is_exact = place < rendered, place < options.batch_size - found
        for loss, value in self.learner.learn(pieces, has_masks, is_exact, done, self.rng).items():
            self.sums[loss].append(value)

    def export(self) -> Path:
        facts = {name: str(getattr(self.options, name)) for name in ("minutes", "seed", "batch_size", "learning_rate")}
        path = self.options.out / "facings-nano.safetensors"
        facts |= {"pictures": str(self.rendered.added), "excess_width": f"{self.learner.excess_width:g}"}
        if self.score_threshold is not None:
            facts["score_threshold"] = f"{self.score_threshold:g}"
        self.learner.export(path, facts)
        return path


def _first_module(options: PretrainOptions) -> FacingsModule:
    module = build_module(BUNDLED_CONFIG)
    if options.encoder_weights is not None:
        initialise_decoder(module)
        load_encoder(module.sam.image_encoder.trunk.encoder, read_weights(options.encoder_weights))
    else:
        load_weights(module, read_weights(options.start_from), options.start_from.name)
    return module


def pretrain(options: PretrainOptions, report: Callable[[Report], None]) -> Path:
    """Trains for `options.minutes` and returns the checkpoint's path. Every `save_every_s` what is there is written."""
    run = _Run(options, report)
    with RenderPool(
        processes=options.processes, side_px=options.picture_px, seed=options.seed, textures=options.textures
    ) as pool:
        began = time.monotonic()
        if options.photos:
            run.take_photos()
        while run.rendered.added < options.waits_for:
            run.take_rendered(pool, None)
        run.log({"waited_s": time.monotonic() - began})
        began = saved = time.monotonic()
        steps = 0
        while (done := (time.monotonic() - began) / (options.minutes * 60)) < 1:
            run.take_rendered(pool)
            run.step(done)
            steps += 1
            if steps % options.report_every == 0 or steps == 20:
                line = {name: float(torch.stack(values).mean()) for name, values in run.sums.items()}
                run.sums.clear()
                run.log(line | {"steps": steps, "s": time.monotonic() - began, "pictures": run.rendered.added})
            if time.monotonic() - saved > options.save_every_s:
                run.export()
                saved = time.monotonic()
        run.log({"steps": steps, "s": time.monotonic() - began, "pictures": run.rendered.added})
        return run.export()
