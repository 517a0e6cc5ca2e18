"""How alike the boxes of this engine and of upstream sam2 are, on the same weights and photos, and in each precision.

Knows sam2's predictor and the parts of the engine that stand in for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from model import EngineOptions
from model.checkpoints import find_checkpoint
from model.device import choose_placement
from model.renderer.shelves import render_shelf
from model.tiling import Tile
from scripts.console import track

if TYPE_CHECKING:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from model.network import Network
    from model.types import BoolArray, FloatArray, PixelArray

#: Width of a typical facing, one photo each, in pixels of the network's input.
FACINGS_PX = (16.0, 32.0, 64.0, 128.0, 200.0)
BOXES = 50  # of a photo
SIZE_BUCKETS_PX = (0, 24, 48, 96, 192, 1024)  # of a box's shorter side, in pixels of the network's input


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """IoU of this engine's boxes with upstream's, of facings of one size.

    least_px, most_px: of the upstream box's shorter side. p01: all but 1 % are better. share_099: at least 0.99.
    """

    least_px: int
    most_px: int
    count: int
    median: float
    p01: float
    share_099: float


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """Boxes for box prompts, compared with those of SAM2ImagePredictor in float32.

    Those are read off its masks, which are as large as the photo.

    full_resolution: this engine's, in float32 with tiles resized in float, read off masks as large as upstream's.
    fast: as the engine does it, read between the pixels of low-resolution masks, on a CPU with tiles resized in whole
    grey levels. fast_rounded: the same in whole pixels of the photo, as upstream's are.
    precisions: name → the fast reading compared with the same in float32. All by size, all sizes together last.
    """

    checkpoint: str
    megapixels: float
    full_resolution: Sequence[Likeness]
    fast: Sequence[Likeness]
    fast_rounded: Sequence[Likeness]
    precisions: Mapping[str, Sequence[Likeness]]


def measure_parity(options: EngineOptions, *, megapixels: Sequence[float]) -> Iterator[ParityResult]:
    """The same box prompts to both, on square rendered photos of each size with small and large facings: what precision
    and the reading of boxes between a mask's low-resolution pixels change.

    The bundled checkpoint is given each box as a mask prompt too, as the engine does (see model.network), and so is
    upstream. Needs weights that have learned something: masks of random ones have no boxes worth comparing.
    """
    import torch
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from model.checkpoints import read_weights
    from model.network import Network
    from model.sam2_module import build_module, load_weights

    placement = choose_placement(options.device)
    checkpoint = find_checkpoint(
        options.checkpoint, config=options.checkpoint_config, has_gpu=placement.device.type == "cuda"
    )
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(checkpoint.weights), checkpoint.name)
    predictor = SAM2ImagePredictor(module.sam.eval().to(placement.device))
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    networks = {name: Network(checkpoint, replace(placement, autocast=dtype)) for name, dtype in dtypes.items()}
    for size in megapixels:
        yield _parity_at(size, networks, predictor, checkpoint.version)


def _parity_at(
    megapixels: float, networks: Mapping[str, Network], predictor: SAM2ImagePredictor, version: str
) -> ParityResult:
    exact = networks["float32"]
    side = round((megapixels * 1e6) ** 0.5)
    tile = Tile(left=0, top=0, side=side, size=exact.size, level=0)
    wanted: list[FloatArray] = []
    fast: dict[str, list[FloatArray]] = {name: [] for name in networks}
    enlarged: list[FloatArray] = []
    for facing_px in track(FACINGS_PX, total=len(FACINGS_PX), label=f"photos of {megapixels:g} MP"):
        shelf = render_shelf(7, (side, side), facing_px=facing_px / tile.scale)
        boxes = np.random.default_rng(0).permutation(shelf.boxes_xyxy)[:BOXES]
        wanted.append(_upstreams_boxes(predictor, shelf.photo_rgb, tile, boxes, has_prior=exact.has_proposals))
        for name, network in networks.items():
            fast[name].append(_engines_boxes(network, shelf.photo_rgb, tile, boxes))
        enlarged.append(_engines_boxes(exact, shelf.photo_rgb, tile, boxes, at_full_resolution=True))
    upstream, own = np.concatenate(wanted), {name: np.concatenate(boxes) for name, boxes in fast.items()}
    full_resolution, rounded = np.concatenate(enlarged), own["float32"].round()
    return ParityResult(
        checkpoint=version,
        megapixels=megapixels,
        full_resolution=likeness(full_resolution, upstream, tile),
        fast=likeness(own["float32"], upstream, tile),
        fast_rounded=likeness(rounded, upstream, tile),
        precisions={name: likeness(boxes, own["float32"], tile) for name, boxes in own.items() if name != "float32"},
    )


def likeness(boxes_xyxy: FloatArray, wanted_xyxy: FloatArray, tile: Tile) -> list[Likeness]:
    """By the size of the wanted boxes in the tile, those without area left out; sizes that do not occur are missing;
    all sizes, last. Boxes in pixels of the photo."""
    from model.boxes import iou_matrix

    sides = (wanted_xyxy[:, 2:] - wanted_xyxy[:, :2]).min(1) * tile.scale
    overlap = iou_matrix(boxes_xyxy, wanted_xyxy).diagonal()
    answers = []
    ranges = [*itertools.pairwise(SIZE_BUCKETS_PX), (SIZE_BUCKETS_PX[0], SIZE_BUCKETS_PX[-1])]
    for least_px, most_px in ranges:
        own = overlap[(sides > least_px) & (sides <= most_px)]
        if len(own):
            median, p01 = np.percentile(own, [50, 1])
            answers.append(
                Likeness(
                    least_px=least_px,
                    most_px=most_px,
                    count=len(own),
                    median=float(median),
                    p01=float(p01),
                    share_099=float((own >= 0.99).mean()),
                )
            )
    return answers


def _engines_boxes(
    network: Network, pixels: PixelArray, tile: Tile, boxes_xyxy: FloatArray, *, at_full_resolution: bool = False
) -> FloatArray:
    """Boxes for box prompts on a photo that is one tile, read between a mask's low-resolution pixels; at full
    resolution, off the mask enlarged, on a tile resized in float."""
    from model.features import TilePrompt
    from model.masks import read_object
    from model.memory import batches

    (features,) = network.encode(pixels, [tile], in_float=at_full_resolution)
    size_wh = tile.side, tile.side
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
    found = []
    for boxes in batches(tile.to_tile(boxes_xyxy.reshape(-1, 2)).reshape(-1, 4), network.decode_batch):
        prompts = [
            TilePrompt(
                features=features,
                points_xy=nothing[0],
                is_foreground=nothing[1],
                box_xyxy=box,
                prior_xyxy=box if network.has_proposals else None,
            )
            for box in boxes
        ]
        logits, iou = network.decode(prompts, multimask=False)
        for prompt, plane, score in zip(prompts, logits[:, 0].cpu().numpy(), iou[:, 0].tolist(), strict=True):
            answer = read_object(prompt, plane, score, size_wh, want_mask=at_full_resolution)
            box: FloatArray = np.zeros(4, np.float32) if answer is None else answer.box_xyxy
            found.append(_box_of(answer.mask.in_photo(size_wh)) if answer and answer.mask else box)
    return np.stack(found)


def _upstreams_boxes(
    predictor: SAM2ImagePredictor, pixels: PixelArray, tile: Tile, boxes_xyxy: FloatArray, *, has_prior: bool
) -> FloatArray:
    """The box of each prompt's mask at full resolution: of its part with most pixels in the prompt's box."""
    import cv2
    import torch

    from model.boxes import cells_inside
    from model.features import MASK_STRIDE
    from model.sam2_module import PRIOR_LOGIT

    found = []
    with torch.inference_mode():
        predictor.set_image(np.array(pixels))
        for box in boxes_xyxy:
            prior = None
            if has_prior:
                corners = torch.from_numpy(tile.to_tile(box.reshape(2, 2)).reshape(1, 4))
                inside = cells_inside(corners, tile.size // MASK_STRIDE, MASK_STRIDE)
                prior = np.where(inside, PRIOR_LOGIT, -PRIOR_LOGIT).astype(np.float32)
            masks, _, _ = predictor.predict(box=box, mask_input=prior, multimask_output=False)
            count, labels = cv2.connectedComponents(masks[0].astype(np.uint8), connectivity=4)
            x0, y0, x1, y1 = box.round().astype(int)
            sizes = np.bincount(labels[y0:y1, x0:x1].ravel(), minlength=max(2, count))[1:]
            found.append(_box_of((labels == 1 + sizes.argmax()) & bool(sizes.any())))
    return np.stack(found)


def _box_of(mask: BoolArray) -> FloatArray:
    """Around the pixels of a mask; zeros for an empty one."""
    import torch

    from model.boxes import pixel_boxes

    return pixel_boxes(torch.from_numpy(mask)[None], 1.0)[0].numpy()


def print_parity(result: ParityResult) -> None:
    """A line for each way and size."""
    print(f"{result.checkpoint}, square photos of {result.megapixels:g} MP")
    print("  IoU of boxes with those of SAM2ImagePredictor, float32, full resolution")
    print(f"  {'':<34} {'shorter side':>14} {'boxes':>6} {'median':>7} {'1 %':>6} {'>= .99':>7}")
    ways = {
        "float32, full resolution": result.full_resolution,
        "float32, fast reading": result.fast,
        "float32, fast reading, rounded": result.fast_rounded,
        **{f"{name} and float32, both fast": answers for name, answers in result.precisions.items()},
    }
    for way, answers in ways.items():
        for one in answers:
            size, share = f"{one.least_px}-{one.most_px} px", f"{100 * one.share_099:.0f} %"
            print(f"  {way:<34} {size:>14} {one.count:>6} {one.median:>7.3f} {one.p01:>6.3f} {share:>7}")
