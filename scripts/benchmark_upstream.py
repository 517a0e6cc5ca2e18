"""This engine beside upstream sam2, on the same weights and photos in one run: how fast, and how alike.

Knows sam2's predictor and mask generator, and the parts of the engine that stand in for them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from model import Engine, EngineOptions, Photo, Prompt
from model.checkpoints import OFFICIAL, find_checkpoint
from model.device import choose_placement
from model.tiling import Tile
from model.training.shelves import render_shelf
from scripts.benchmark import Timing, clicks_on, random_weights, seconds_of, shelf_photos, shown, timing
from scripts.console import track

if TYPE_CHECKING:
    import torch
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from model.network import Network
    from model.types import BoolArray, FloatArray

WHOLE = Tile(left=0, top=0, side=1024, size=1024, level=0)
PARITY_FACINGS_PX = (16.0, 32.0, 64.0, 128.0, 200.0)  # width of a typical facing, one photo each
PARITY_BOXES = 50  # of a photo
SIZE_BUCKETS_PX = (0, 24, 48, 96, 192, 1024)  # of a box's shorter side, in pixels of the network's input
UPSTREAM_CONFIG = OFFICIAL["sam2.1_hiera_tiny"].config
GENERATOR_MASKS = 150  # let through by the thresholds, as many as a shelf photo has facings
GENERATOR_SIDE_PX = 1024  # of the photo; upstream keeps masks as large as it


@dataclass(frozen=True, kw_only=True)
class UpstreamResult:
    """SAM2ImagePredictor beside this engine: the same weights, photo and click, called in turns.

    The predictor runs as it comes (float32) and under bf16 autocast. new: encode and decode; known: decode only.
    """

    config: str
    upstream_new: Timing
    upstream_known: Timing
    upstream_bf16_new: Timing
    upstream_bf16_known: Timing
    engine_new: Timing
    engine_known: Timing


@dataclass(frozen=True, kw_only=True)
class GeneratorResult:
    """SAM2AutomaticMaskGenerator beside this engine on one square photo and the same weights.

    grid: what upstream asks, of the same single tile, with thresholds that let `masks` masks of each through.
    lent: what a user gets: the bundled checkpoint's proposals, redrawn, on all tiles; `boxes` of them.
    peak_gpu_mb: what each way would take alone, by torch's count: what it holds once it is loaded, and the most that a
    call takes beyond what all of them hold before it. Empty without a GPU.
    """

    config: str
    side_px: int
    masks: int
    boxes: int
    upstream: Timing
    upstream_bf16: Timing
    grid: Timing
    lent: Timing
    peak_gpu_mb: dict[str, float]


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
    """Boxes for box prompts beside those of SAM2ImagePredictor in float32, read off its masks at full resolution.

    full_resolution: this engine's, in float32, read off masks as large as upstream's. fast: read between the pixels of
    low-resolution ones, as the engine does. fast_rounded: the same in whole pixels, as upstream's are.
    precisions: name → the fast reading beside the same in float32. All by size, all sizes together last.
    """

    checkpoint: str
    full_resolution: Sequence[Likeness]
    fast: Sequence[Likeness]
    fast_rounded: Sequence[Likeness]
    precisions: Mapping[str, Sequence[Likeness]]


def compared_config(options: EngineOptions) -> str:
    """Of the network to measure beside upstream: the checkpoint's when it is one of Meta's, else SAM 2.1 tiny's."""
    if options.checkpoint in OFFICIAL:
        return OFFICIAL[options.checkpoint].config
    known = {official.config for official in OFFICIAL.values()}
    return options.checkpoint_config if options.checkpoint_config in known else UPSTREAM_CONFIG


def measure_upstream(device: str, *, repeat: int, config: str) -> UpstreamResult:
    """One click on a photo, new and known, by both. The weights are random: speed does not depend on them."""
    import torch
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with random_weights(config) as weights:
        engine = Engine(EngineOptions(checkpoint=str(weights), checkpoint_config=config, device=device))
        try:
            engine.wait_ready()
            torch_device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
            upstream = SAM2ImagePredictor(build_sam2(config, str(weights), device=str(torch_device)))
            return _in_turns(engine, upstream, torch_device, config=config, repeat=repeat)
        finally:
            engine.close()


def _in_turns(engine: Engine, upstream: Any, device: torch.device, *, config: str, repeat: int) -> UpstreamResult:
    import torch

    def upstream_click(photo: Photo, prompt: Prompt, *, encode: bool, bf16: bool) -> None:
        precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.inference_mode(), precision:
            if encode:
                upstream.set_image(np.array(photo.pixels))  # a copy: it wants to be able to write
            upstream.predict(point_coords=prompt.points_xy, point_labels=prompt.is_foreground.astype(np.int32))

    calls: dict[str, Callable[[Photo, Prompt], object]] = {
        "upstream_new": lambda photo, click: upstream_click(photo, click, encode=True, bf16=False),
        "upstream_known": lambda photo, click: upstream_click(photo, click, encode=False, bf16=False),
        "upstream_bf16_new": lambda photo, click: upstream_click(photo, click, encode=True, bf16=True),
        "upstream_bf16_known": lambda photo, click: upstream_click(photo, click, encode=False, bf16=True),
        "engine_new": lambda photo, click: engine.refine(photo, [click]),
        "engine_known": lambda photo, click: engine.refine(photo, [click]),
    }
    photos = shelf_photos(2, seed=3)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, repeat):
        photo = next(photos)
        click = next(clicks_on(photo, seed=round_ + 1))  # one for all: another may lie in another tile of the engine
        for name, call in calls.items():
            elapsed_s = seconds_of(call, photo, click)
            if round_ >= 0:
                seconds[name].append(elapsed_s)
    return UpstreamResult(config=config, **{name: timing(values) for name, values in seconds.items()})


def measure_generator(device: str, *, repeat: int, config: str, points_per_side: int = 32) -> GeneratorResult:
    """All objects of a square photo by both, each warmed up before. The weights are random, so stability is not asked
    for."""
    import torch
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.build_sam import build_sam2

    from model.dense import PointGrid, ask_grid
    from model.network import Network
    from model.stages import untimed

    placement = choose_placement(device)
    tile = replace(WHOLE, side=GENERATOR_SIDE_PX)
    shelf = render_shelf(4, (tile.side, tile.side)).photo_rgb
    photos = (Photo(pixels=np.roll(shelf, shift, axis=1)) for shift in itertools.count())
    held_mb = [_gpu_mb(placement.device)]
    with random_weights(config) as weights:
        network = Network(find_checkpoint(str(weights), config=config, has_gpu=False), placement)
        held_mb.append(_gpu_mb(placement.device))
        options = EngineOptions(checkpoint=str(weights), checkpoint_config=config, device=device)
        engine = Engine(options)
        engine.wait_ready()  # the file is gone after this
        held_mb.append(_gpu_mb(placement.device))
        model = build_sam2(config, str(weights), device=str(placement.device))
        held_mb.append(_gpu_mb(placement.device))

    def ask(photo: Photo, grid: PointGrid) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        (features,) = network.encode(photo.pixels, [tile])
        job = ask_grid(network, features, grid, timed=untimed)
        while True:
            try:
                next(job)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    every_mask = PointGrid(points_per_side=points_per_side, min_score=-1.0, min_stability=0.0, in_rounds=False)
    _, scores = ask(next(photos), every_mask)
    masks = min(GENERATOR_MASKS, len(scores) // 2)
    grid = replace(every_mask, min_score=float(np.sort(scores)[-masks - 1]))
    generator = SAM2AutomaticMaskGenerator(
        model, points_per_side=points_per_side, pred_iou_thresh=grid.min_score, stability_score_thresh=0.0
    )

    @contextlib.contextmanager
    def upstream(*, bf16: bool) -> Iterator[None]:
        precision = torch.autocast(placement.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.inference_mode(), precision:
            yield

    def generate(photo: Photo, *, bf16: bool) -> None:
        with upstream(bf16=bf16):
            generator.generate(np.array(photo.pixels))

    def warm_up(photo: Photo, *, bf16: bool) -> None:
        """One point: a whole grid takes minutes on a CPU."""
        with upstream(bf16=bf16):
            generator.predictor.set_image(np.array(photo.pixels))
            generator.predictor.predict(point_coords=np.full((1, 2), tile.side / 2), point_labels=np.ones(1, np.int32))
            generator.predictor.reset_predictor()

    calls: dict[str, Callable[[Photo], object]] = {
        "upstream": lambda photo: generate(photo, bf16=False),
        "upstream_bf16": lambda photo: generate(photo, bf16=True),
        "grid": lambda photo: ask(photo, grid),
        "lent": engine.preannotate,
    }
    of_grid, of_engine, of_upstream = (after - before for before, after in itertools.pairwise(held_mb))
    own_mb = {"upstream": of_upstream, "upstream_bf16": of_upstream, "grid": of_grid, "lent": of_engine}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    beyond_mb: dict[str, list[float]] = {name: [] for name in calls}
    try:
        boxes = len(engine.preannotate(next(photos)))
        for bf16 in (False, True):
            warm_up(next(photos), bf16=bf16)
        for _ in range(repeat):
            photo = next(photos)
            for name, call in calls.items():
                before_mb = _gpu_mb(placement.device)
                if placement.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(placement.device)
                seconds[name].append(seconds_of(call, photo))
                beyond_mb[name].append(_gpu_mb(placement.device, peak=True) - before_mb)
    finally:
        engine.close()
    return GeneratorResult(
        config=config,
        side_px=tile.side,
        masks=masks,
        boxes=boxes,
        peak_gpu_mb={name: own_mb[name] + max(beyond_mb[name]) for name in calls}
        if placement.device.type == "cuda"
        else {},
        **{name: timing(values) for name, values in seconds.items()},
    )


def _gpu_mb(device: torch.device, *, peak: bool = False) -> float:
    """What torch has allocated on a GPU, now or at most since the count began; 0 on a CPU."""
    import torch

    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20


def measure_parity(options: EngineOptions) -> ParityResult:
    """The same box prompts to both, on rendered photos of small and large facings: what precision and the reading of
    boxes between a mask's low-resolution pixels change.

    The bundled checkpoint is given each box as a mask prompt too, as the engine does (see model.network), and so is
    upstream. Needs weights that have learned something: masks of random ones have no boxes worth comparing.
    """
    import torch
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from model.checkpoints import read_weights
    from model.network import Network, build_module, load_weights

    placement = choose_placement(options.device)
    checkpoint = find_checkpoint(
        options.checkpoint, config=options.checkpoint_config, has_gpu=placement.device.type == "cuda"
    )
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(checkpoint.weights), checkpoint.name)
    predictor = SAM2ImagePredictor(module.sam.eval().to(placement.device))
    dtypes = {"float32": None, "bfloat16": torch.bfloat16}
    if placement.device.type == "cuda":  # a CPU without instructions for it takes minutes a photo
        dtypes["float16"] = torch.float16
    networks = {name: Network(checkpoint, replace(placement, autocast=dtype)) for name, dtype in dtypes.items()}
    wanted: list[FloatArray] = []
    fast: dict[str, list[FloatArray]] = {name: [] for name in networks}
    enlarged: list[FloatArray] = []
    for facing_px in track(PARITY_FACINGS_PX, total=len(PARITY_FACINGS_PX), label="photos"):
        shelf = render_shelf(7, (WHOLE.side, WHOLE.side), facing_px=facing_px)
        boxes = np.random.default_rng(0).permutation(shelf.boxes_xyxy)[:PARITY_BOXES]
        has_prior = networks["float32"].has_proposals
        wanted.append(_upstreams_boxes(predictor, shelf.photo_rgb, boxes, has_prior=has_prior))
        for name, network in networks.items():
            between_pixels, at_full_resolution = _engines_boxes(network, shelf.photo_rgb, boxes)
            fast[name].append(between_pixels)
            if name == "float32":
                enlarged.append(at_full_resolution)
    upstream, own = np.concatenate(wanted), {name: np.concatenate(boxes) for name, boxes in fast.items()}
    return ParityResult(
        checkpoint=checkpoint.version,
        full_resolution=likeness(np.concatenate(enlarged), upstream),
        fast=likeness(own["float32"], upstream),
        fast_rounded=likeness(own["float32"].round(), upstream),
        precisions={name: likeness(boxes, own["float32"]) for name, boxes in own.items() if name != "float32"},
    )


def likeness(boxes_xyxy: FloatArray, wanted_xyxy: FloatArray) -> list[Likeness]:
    """By the size of the wanted boxes, those without area left out; sizes that do not occur are missing; all, last."""
    from model.boxes import iou_matrix

    sides = (wanted_xyxy[:, 2:] - wanted_xyxy[:, :2]).min(1)
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


def _engines_boxes(network: Network, pixels: Any, boxes_xyxy: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Boxes for box prompts on a photo, read between a mask's low-resolution pixels, and off the mask enlarged."""
    from model.dense import batches
    from model.masks import read_object
    from model.network import TilePrompt

    (features,) = network.encode(pixels, [WHOLE])
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.bool_)
    fast, enlarged = [], []
    for boxes in batches(boxes_xyxy, network.decode_batch):
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
            answer = read_object(prompt, plane, score, (WHOLE.side, WHOLE.side), want_mask=True)
            fast.append(answer.box_xyxy)
            if answer.mask is None:
                raise AssertionError("a mask was asked for")
            enlarged.append(_box_of(answer.mask.in_photo((WHOLE.side, WHOLE.side))))
    return np.stack(fast), np.stack(enlarged)


def _upstreams_boxes(
    predictor: SAM2ImagePredictor, pixels: Any, boxes_xyxy: FloatArray, *, has_prior: bool
) -> FloatArray:
    """The box of each prompt's mask at full resolution: of its part with most pixels in the prompt's box."""
    import cv2
    import torch

    from model.boxes import cells_inside
    from model.network import MASK_STRIDE, PRIOR_LOGIT

    found = []
    with torch.inference_mode():
        predictor.set_image(np.array(pixels))
        for box in boxes_xyxy:
            prior = None
            if has_prior:
                inside = cells_inside(torch.from_numpy(box)[None], WHOLE.size // MASK_STRIDE, MASK_STRIDE)
                prior = np.where(inside, PRIOR_LOGIT, -PRIOR_LOGIT).astype(np.float32)
            masks, _, _ = predictor.predict(box=box, mask_input=prior, multimask_output=False)
            count, labels = cv2.connectedComponents(masks[0].astype(np.uint8), connectivity=4)
            x0, y0, x1, y1 = box.round().astype(int)
            inside = np.bincount(labels[y0:y1, x0:x1].ravel(), minlength=max(2, count))[1:]
            found.append(_box_of((labels == 1 + inside.argmax()) & bool(inside.any())))
    return np.stack(found)


def _box_of(mask: BoolArray) -> FloatArray:
    """Around the pixels of a mask; zeros for an empty one."""
    import torch

    from model.boxes import pixel_boxes

    return pixel_boxes(torch.from_numpy(mask)[None], 1.0)[0].numpy()


def print_upstream(result: UpstreamResult) -> None:
    """Upstream in both precisions beside the engine."""
    rows = (
        ("SAM2ImagePredictor, float32", result.upstream_new, result.upstream_known),
        ("SAM2ImagePredictor, bf16", result.upstream_bf16_new, result.upstream_bf16_known),
        ("this engine", result.engine_new, result.engine_known),
    )
    print(f"{result.config}, random weights, one click: median / p95")
    for name, new, known in rows:
        print(f"  {name:<28} new photo {shown(new):>18}   known photo {shown(known):>18}")


def print_generator(result: GeneratorResult) -> None:
    """Upstream's generator in both precisions beside the engine's two ways."""
    rows = (
        ("SAM2AutomaticMaskGenerator, float32", "upstream", result.upstream),
        ("SAM2AutomaticMaskGenerator, bf16", "upstream_bf16", result.upstream_bf16),
        ("this engine, the same grid", "grid", result.grid),
        (f"this engine, {result.boxes} lent proposals, all tiles", "lent", result.lent),
    )
    megapixels = f"{result.side_px**2 / 1e6:.1f} MP"
    print(f"{result.config}, random weights, a photo of {megapixels}, {result.masks} masks: median / p95")
    for title, name, measured in rows:
        faster = result.upstream.median_s / measured.median_s
        peak = f"   at most {result.peak_gpu_mb[name]:.0f} MB of the GPU" if name in result.peak_gpu_mb else ""
        print(f"  {title:<48} {shown(measured):>18}   {faster:.1f} times as fast{peak}")


def print_parity(result: ParityResult) -> None:
    """A line for each way and size."""
    print(f"{result.checkpoint}: IoU of boxes with those of SAM2ImagePredictor, float32, full resolution")
    print(f"  {'':<34} {'shorter side':>14} {'boxes':>6} {'median':>7} {'1 %':>6} {'>= .99':>7}")
    ways = {
        "float32, full resolution": result.full_resolution,
        "float32, fast reading": result.fast,
        "float32, fast reading, rounded": result.fast_rounded,
        **{f"{name} beside float32, both fast": answers for name, answers in result.precisions.items()},
    }
    for way, answers in ways.items():
        for one in answers:
            size, share = f"{one.least_px}-{one.most_px} px", f"{100 * one.share_099:.0f} %"
            print(f"  {way:<34} {size:>14} {one.count:>6} {one.median:>7.3f} {one.p01:>6.3f} {share:>7}")
