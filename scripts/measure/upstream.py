"""How fast this engine is compared with upstream sam2, on the same weights and photos in one run.

Knows sam2's predictor and mask generator, and the parts of the engine that stand in for them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from model import Engine, EngineOptions, Photo, Prompt, Sam2Engine
from model.checkpoints import OFFICIAL, find_checkpoint
from model.device import choose_placement
from model.renderer.shelves import render_shelf
from model.tiling import Tile
from scripts.measure.timing import (
    Timing,
    clicks_on,
    format_timing,
    random_weights,
    seconds_of,
    shelf_photos,
    timing,
)

if TYPE_CHECKING:
    import torch
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    from model.detect import PointGrid
    from model.network import Network
    from model.types import FloatArray

UPSTREAM_CONFIG = OFFICIAL["sam2.1_hiera_tiny"].config
RESET_PEAK = Path("/proc/self/clear_refs")
GENERATOR_MASKS = 150  # let through by the thresholds, as many as a shelf photo has facings


@dataclass(frozen=True, kw_only=True)
class UpstreamResult:
    """SAM2ImagePredictor and this engine: the same weights, photo and click, called in turns.

    The predictor runs as it comes (float32) and under bf16 autocast. new: encode and decode; known: decode only.
    """

    config: str
    megapixels: float
    upstream_new: Timing
    upstream_known: Timing
    upstream_bf16_new: Timing
    upstream_bf16_known: Timing
    engine_new: Timing
    engine_known: Timing


@dataclass(frozen=True, kw_only=True)
class GeneratorResult:
    """SAM2AutomaticMaskGenerator and this engine on square photos of one size and the same weights.

    grid: what upstream asks, of the same single tile, with thresholds that let `masks` masks of each through.
    detector: what a user gets: SAM 2 prompted with the boxes of the bundled checkpoint, on all tiles; `boxes` of them.
    peak_mb: of a GPU what each way would take alone, by torch's count: what it holds once it is loaded, and the most
    that a call takes beyond what all of them hold before it. On a CPU the latter alone, by the kernel's count; empty
    where that is not Linux.
    """

    config: str
    megapixels: float
    masks: int
    boxes: int
    upstream: Timing
    upstream_bf16: Timing
    grid: Timing
    detector: Timing
    peak_mb: dict[str, float]


def compared_config(options: EngineOptions) -> str:
    """Of the network to compare with upstream: the checkpoint's when it is one of Meta's, else SAM 2.1 tiny's."""
    if options.checkpoint in OFFICIAL:
        return OFFICIAL[options.checkpoint].config
    known = {official.config for official in OFFICIAL.values()}
    return options.checkpoint_config if options.checkpoint_config in known else UPSTREAM_CONFIG


def measure_upstream(device: str, *, repeat: int, config: str, megapixels: Sequence[float]) -> Iterator[UpstreamResult]:
    """One click on a photo of each size, new and known, by both. The weights are random: speed is the same."""
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with random_weights(config) as weights:
        engine = Sam2Engine(EngineOptions(checkpoint=str(weights), checkpoint_config=config, device=device))
        try:
            engine.wait_ready()
            torch_device = choose_placement(device).device
            upstream = SAM2ImagePredictor(build_sam2(config, str(weights), device=str(torch_device)))
            for size in megapixels:
                yield _in_turns(engine, upstream, torch_device, config=config, repeat=repeat, megapixels=size)
        finally:
            engine.close()


def _in_turns(
    engine: Engine, upstream: Any, device: torch.device, *, config: str, repeat: int, megapixels: float
) -> UpstreamResult:
    def upstream_click(photo: Photo, prompt: Prompt, *, encode: bool, bf16: bool) -> None:
        with _upstreams_precision(device, bf16=bf16):
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
    photos = shelf_photos(megapixels, seed=3)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, repeat):
        photo = next(photos)
        click = next(clicks_on(photo, seed=round_ + 1))  # one for all: another may lie in another tile of the engine
        for name, call in calls.items():
            elapsed_s = seconds_of(call, photo, click)
            if round_ >= 0:
                seconds[name].append(elapsed_s)
    return UpstreamResult(
        config=config, megapixels=megapixels, **{name: timing(values) for name, values in seconds.items()}
    )


def measure_generator(
    device: str, *, repeat: int, config: str, megapixels: Sequence[float], points_per_side: int = 32
) -> Iterator[GeneratorResult]:
    """All objects of a square photo of each size by both, each warmed up before. The weights are random, so stability
    is not asked for."""
    from sam2.build_sam import build_sam2

    from model.network import Network

    placement = choose_placement(device)
    held_mb = []
    with contextlib.ExitStack() as stack:
        with random_weights(config) as weights:
            held_mb.append(_held_mb(placement.device))
            network = Network(find_checkpoint(str(weights), config=config, has_gpu=False), placement)
            held_mb.append(_held_mb(placement.device))
            engine = Sam2Engine(EngineOptions(checkpoint=str(weights), checkpoint_config=config, device=device))
            stack.callback(engine.close)
            engine.wait_ready()  # the file is gone after this
            held_mb.append(_held_mb(placement.device))
            sam = build_sam2(config, str(weights), device=str(placement.device))
            held_mb.append(_held_mb(placement.device))
        of_grid, of_engine, of_upstream = (after - before for before, after in itertools.pairwise(held_mb))
        own_mb = {"upstream": of_upstream, "upstream_bf16": of_upstream, "grid": of_grid, "detector": of_engine}
        comparison = _Comparison(
            device=placement.device,
            network=network,
            engine=engine,
            sam=sam,
            own_mb=own_mb if placement.device.type == "cuda" else dict.fromkeys(own_mb, 0.0),
            points_per_side=points_per_side,
        )
        for size in megapixels:
            yield comparison.at(size, repeat=repeat, config=config)


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Everything that is compared, loaded. own_mb: memory of a GPU that each holds since."""

    device: torch.device
    network: Network
    engine: Engine
    sam: Any
    own_mb: Mapping[str, float]
    points_per_side: int

    def at(self, megapixels: float, *, repeat: int, config: str) -> GeneratorResult:
        from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        from model.detect import PointGrid

        side = round((megapixels * 1e6) ** 0.5)
        shelf = render_shelf(4, (side, side)).photo_rgb
        photos = (Photo(pixels=np.roll(shelf, shift, axis=1)) for shift in itertools.count())
        every_mask = PointGrid(points_per_side=self.points_per_side, min_score=-1.0, min_stability=0.0)
        _, scores = self.ask(next(photos), every_mask)
        masks = min(GENERATOR_MASKS, len(scores) // 2)
        grid = replace(every_mask, min_score=float(np.sort(scores)[-masks - 1]))
        generator = SAM2AutomaticMaskGenerator(
            self.sam,
            points_per_side=self.points_per_side,
            pred_iou_thresh=grid.min_score,
            stability_score_thresh=0.0,
        )
        calls: dict[str, Callable[[Photo], object]] = {
            "upstream": lambda photo: self.generate(generator, photo, bf16=False),
            "upstream_bf16": lambda photo: self.generate(generator, photo, bf16=True),
            "grid": lambda photo: self.ask(photo, grid),
            "detector": self.engine.preannotate,
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        beyond_mb: dict[str, list[float]] = {name: [] for name in calls}
        boxes = len(self.engine.preannotate(next(photos)))
        for bf16 in (False, True):
            self.warm_up(generator, next(photos), bf16=bf16)
        for _ in range(repeat):
            photo = next(photos)
            for name, call in calls.items():
                with _peak_beyond_mb(self.device) as peaks:
                    seconds[name].append(seconds_of(call, photo))
                beyond_mb[name] += peaks
        return GeneratorResult(
            config=config,
            megapixels=megapixels,
            masks=masks,
            boxes=boxes,
            peak_mb={name: self.own_mb[name] + max(peaks) for name, peaks in beyond_mb.items() if peaks},
            **{name: timing(values) for name, values in seconds.items()},
        )

    def ask(self, photo: Photo, grid: PointGrid) -> tuple[FloatArray, FloatArray]:
        """The grid by this engine, of the whole photo as one tile."""
        from model.detect import ask_grid, result_of

        tile = Tile(left=0, top=0, side=photo.size_wh[0], size=self.network.size, level=0)
        (features,) = self.network.encode(photo.pixels, [tile])
        return result_of(ask_grid(self.network, features, grid))

    def generate(self, generator: SAM2AutomaticMaskGenerator, photo: Photo, *, bf16: bool) -> None:
        """The grid by upstream."""
        with _upstreams_precision(self.device, bf16=bf16):
            generator.generate(np.array(photo.pixels))

    def warm_up(self, generator: SAM2AutomaticMaskGenerator, photo: Photo, *, bf16: bool) -> None:
        """One point by upstream: a whole grid takes minutes on a CPU."""
        predictor, middle = generator.predictor, np.array([photo.size_wh], np.float32) / 2
        with _upstreams_precision(self.device, bf16=bf16):
            predictor.set_image(np.array(photo.pixels))
            predictor.predict(point_coords=middle, point_labels=np.ones(1, np.int32))
            predictor.reset_predictor()


@contextlib.contextmanager
def _upstreams_precision(device: torch.device, *, bf16: bool) -> Iterator[None]:
    import torch

    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        yield


def _held_mb(device: torch.device) -> float:
    """Memory in use: of a GPU by torch's count, of this process on a CPU."""
    import torch

    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 2**20


@contextlib.contextmanager
def _peak_beyond_mb(device: torch.device) -> Iterator[list[float]]:
    """Appends, at its end, the most memory that was in use meanwhile, beyond what was in use before.

    On a CPU the kernel counts, where it is Linux; elsewhere nothing is appended.
    """
    import torch

    peaks = list[float]()
    if device.type == "cuda":
        before = _held_mb(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peaks
        peaks.append(torch.cuda.max_memory_allocated(device) / 2**20 - before)
        return
    if not RESET_PEAK.exists():
        yield peaks
        return
    RESET_PEAK.write_text("5")  # the peak of resident memory, see proc(5)
    before = _held_mb(device)
    yield peaks
    status = Path("/proc/self/status").read_text()
    peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024 - before)


def print_upstream(result: UpstreamResult) -> None:
    """Upstream in both precisions, and the engine."""
    rows = (
        ("SAM2ImagePredictor, float32", result.upstream_new, result.upstream_known),
        ("SAM2ImagePredictor, bf16", result.upstream_bf16_new, result.upstream_bf16_known),
        ("this engine", result.engine_new, result.engine_known),
    )
    print(f"{result.config}, random weights, one click on a photo of {result.megapixels:g} MP: median / p95")
    for name, new, known in rows:
        print(f"  {name:<28} new photo {format_timing(new):>18}   known photo {format_timing(known):>18}")


def print_generator(result: GeneratorResult) -> None:
    """Upstream's generator in both precisions, and the engine's two ways."""
    rows = (
        ("SAM2AutomaticMaskGenerator, float32", "upstream", result.upstream),
        ("SAM2AutomaticMaskGenerator, bf16", "upstream_bf16", result.upstream_bf16),
        ("this engine, the same grid", "grid", result.grid),
        (f"this engine, {result.boxes} detector boxes, all tiles", "detector", result.detector),
    )
    print(f"{result.config}, random weights, a photo of {result.megapixels:g} MP, {result.masks} masks: median / p95")
    for title, name, measured in rows:
        faster = result.upstream.median_s / measured.median_s
        peak = f"at most {result.peak_mb[name]:.0f} MB" if name in result.peak_mb else ""
        print(f"  {title:<48} {format_timing(measured):>18}   {faster:.1f} times as fast   {peak}")
