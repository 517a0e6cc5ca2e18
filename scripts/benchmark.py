"""How fast the engine answers, what else it costs, and how it stands beside upstream sam2.

Knows the engine, the shelf renderer and sam2's own predictor. Measuring returns values; printing is apart. Figures
through HTTP are made in `benchmark_http`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model import Engine, EngineOptions, Photo, Prompt
from model.checkpoints import OFFICIAL
from model.training.shelves import render_shelf
from scripts.console import track

if TYPE_CHECKING:
    import torch

MEGAPIXELS = (2, 8, 16)
BULK_PHOTOS = 40
IDLE_CLICKS = 40
SECONDS_BETWEEN_CLICKS = 0.1
UPSTREAM_CONFIG = OFFICIAL["sam2.1_hiera_tiny"].config
GENERATOR_MASKS = 150  # let through by the thresholds, as many as a shelf photo has facings


class Section(StrEnum):
    """What there is to measure."""

    sizes = "sizes"
    lanes = "lanes"
    http = "http"
    memory = "memory"
    upstream = "upstream"
    generator = "generator"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of repeated calls, without the warm-up."""

    median_s: float
    p95_s: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """One size of photo. click_new: on a photo never seen; click_known: on one seen before.

    stages_s: median seconds of the engine's own stages in one pre-annotation.
    """

    megapixels: float
    facings: int
    preannotate: Timing
    stages_s: dict[str, float]
    click_new: Timing
    click_known: Timing


@dataclass(frozen=True, kw_only=True)
class LanesResult:
    """Clicks alone, and while a bulk request runs."""

    idle: Timing
    busy: Timing
    bulk_photos: int
    bulk_s: float

    @property
    def p95_ratio(self) -> float:
        """How many times slower the slow clicks are while bulk work runs."""
        return self.busy.p95_s / self.idle.p95_s


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
    peak_gpu_mb: of each, where there is a GPU.
    """

    config: str
    masks: int
    boxes: int
    upstream: Timing
    upstream_bf16: Timing
    grid: Timing
    lent: Timing
    peak_gpu_mb: dict[str, float]


def timing(seconds: Sequence[float]) -> Timing:
    """Median and p95 of measured seconds, at least one."""
    median_s, p95_s = np.percentile(seconds, [50, 95])
    return Timing(median_s=float(median_s), p95_s=float(p95_s), calls=len(seconds))


def seconds_of(call: Callable[..., object], *arguments: object) -> float:
    """Wall-clock seconds of one call. The engine's calls return after the device has finished."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def shelf_photos(megapixels: float, *, seed: int) -> Iterator[Photo]:
    """Endless photos of one rendered shelf, 4:3, each shifted a little further, so that no cache knows it."""
    import cv2

    size_wh = round((megapixels * 1e6 * 4 / 3) ** 0.5), round((megapixels * 1e6 * 3 / 4) ** 0.5)
    rendered = render_shelf(seed, (1632, 1224)).photo_rgb
    pixels = cv2.resize(rendered, size_wh, interpolation=cv2.INTER_AREA if megapixels < 2 else cv2.INTER_CUBIC)
    shift = 0
    while True:
        shift += 1
        yield Photo(pixels=np.roll(pixels, shift, axis=1))


def clicks_on(photo: Photo, *, seed: int) -> Iterator[Prompt]:
    """Endless single clicks all over a photo."""
    generator = np.random.default_rng(seed)
    while True:
        point_xy = generator.uniform(0.1, 0.9, (1, 2)) * photo.size_wh
        yield Prompt(points_xy=point_xy.astype(np.float32), is_foreground=np.ones(1, bool))


class Stages:
    """Seconds of the engine's stages since the last `take`, as its observer."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def observe(self, name: str, seconds: float) -> None:
        if not name.startswith("queue"):
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


def measure_size(engine: Engine, megapixels: float, *, repeat: int, stages: Stages) -> SizeResult:
    """Pre-annotation and clicks on `repeat` photos of one size, after one to warm up. stages: observes the engine."""
    photos = shelf_photos(megapixels, seed=1)
    dense, new, known, facings, split = [], [], [], 0, []
    for round_ in range(-1, repeat):
        photo, unseen = next(photos), next(photos)
        clicks = clicks_on(photo, seed=round_ + 1)
        stages.take()
        dense_s = seconds_of(engine.preannotate, photo)
        stages_s = stages.take()
        seconds = [
            dense_s,
            seconds_of(engine.refine, photo, [next(clicks)]),
            seconds_of(engine.refine, unseen, [next(clicks)]),
        ]
        if round_ < 0:
            facings = len(engine.preannotate(photo))
            continue
        split.append(stages_s)
        for bucket, value in zip((dense, known, new), seconds, strict=True):
            bucket.append(value)
    return SizeResult(
        megapixels=megapixels,
        facings=facings,
        preannotate=timing(dense),
        stages_s={name: float(np.median([one.get(name, 0.0) for one in split])) for name in sorted(split[0])},
        click_new=timing(new),
        click_known=timing(known),
    )


def measure_lanes(click: Callable[[], object], bulk: Callable[[], object], *, photos: int) -> LanesResult:
    """Clicks at an annotator's pace, first alone, then for as long as `bulk` runs in a thread of its own."""

    def paced_click() -> float:
        time.sleep(SECONDS_BETWEEN_CLICKS)
        return seconds_of(click)

    for _ in range(3):
        click()
    idle = [paced_click() for _ in range(IDLE_CLICKS)]
    with ThreadPoolExecutor(1, thread_name_prefix="bulk") as pool:
        running = pool.submit(seconds_of, bulk)
        busy = [paced_click()]
        while not running.done():
            busy.append(paced_click())
    return LanesResult(idle=timing(idle), busy=timing(busy), bulk_photos=photos, bulk_s=running.result())


def measure_engine_lanes(engine: Engine, *, photos: int = BULK_PHOTOS) -> LanesResult:
    """`measure_lanes` on the engine itself: clicks on one known photo, bulk over others."""
    shelves = shelf_photos(2, seed=2)
    known = next(shelves)
    engine.preannotate(known)
    clicks = clicks_on(known, seed=0)

    def bulk() -> None:
        for _ in range(photos):
            engine.preannotate(next(shelves))

    return measure_lanes(lambda: engine.refine(known, [next(clicks)]), bulk, photos=photos)


def compared_config(options: EngineOptions) -> str:
    """Of the network to measure beside upstream: the checkpoint's when it is Meta's, else SAM 2.1 tiny's."""
    official = OFFICIAL.get(options.checkpoint)
    return official.config if official else UPSTREAM_CONFIG


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


@contextlib.contextmanager
def random_weights(config: str) -> Iterator[Path]:
    """A file with random weights of one of sam2's configs. What is measured does not depend on them."""
    import torch
    from sam2.build_sam import build_sam2

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        torch.save({"model": build_sam2(config, device="cpu").state_dict()}, path)
        yield path


def measure_generator(device: str, *, repeat: int, config: str, points_per_side: int = 32) -> GeneratorResult:
    """All objects of a square photo by both. The weights are random, so stability is not asked for."""
    import torch
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.build_sam import build_sam2

    from model.checkpoints import find_checkpoint
    from model.dense import PointGrid, ask_grid
    from model.device import choose_placement
    from model.network import Network
    from model.tiling import Tile

    placement = choose_placement(device)
    tile = Tile(left=0, top=0, side=1024, size=1024, level=0)
    shelf = render_shelf(4, (1024, 1024)).photo_rgb
    photos = (Photo(pixels=np.roll(shelf, shift, axis=1)) for shift in itertools.count())
    with random_weights(config) as weights:
        network = Network(find_checkpoint(str(weights), config=config, has_gpu=False), placement)
        options = EngineOptions(checkpoint=str(weights), checkpoint_config=config, device=device)
        engine = Engine(options)
        engine.wait_ready()  # the file is gone after this
        model = build_sam2(config, str(weights), device=str(placement.device))

    def ask(photo: Photo, grid: PointGrid) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        (features,) = network.encode(photo.pixels, [tile])
        job = ask_grid(network, features, grid, timed=lambda _: contextlib.nullcontext())
        while True:
            try:
                next(job)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    _, scores = ask(next(photos), PointGrid(points_per_side=points_per_side, min_score=-1.0, min_stability=0.0))
    masks = min(GENERATOR_MASKS, len(scores) // 2)
    grid = PointGrid(points_per_side=points_per_side, min_score=float(np.sort(scores)[-masks - 1]), min_stability=0.0)
    generator = SAM2AutomaticMaskGenerator(
        model, points_per_side=points_per_side, pred_iou_thresh=grid.min_score, stability_score_thresh=0.0
    )

    def generate(photo: Photo, *, bf16: bool) -> None:
        precision = torch.autocast(placement.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.inference_mode(), precision:
            generator.generate(np.array(photo.pixels))

    calls: dict[str, Callable[[Photo], object]] = {
        "upstream": lambda photo: generate(photo, bf16=False),
        "upstream_bf16": lambda photo: generate(photo, bf16=True),
        "grid": lambda photo: ask(photo, grid),
        "lent": engine.preannotate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    try:
        boxes = len(engine.preannotate(next(photos)))
        for _ in range(repeat):
            photo = next(photos)
            for name, call in calls.items():
                if placement.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(placement.device)
                seconds[name].append(seconds_of(call, photo))
                if placement.device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(placement.device) / 2**20
    finally:
        engine.close()
    return GeneratorResult(
        config=config,
        masks=masks,
        boxes=boxes,
        peak_gpu_mb=peaks,
        **{name: timing(values) for name, values in seconds.items()},
    )


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held so far, and its GPU if one was used."""
    import resource

    import torch

    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Darwin" else 1)
    peak = {"process_mb": peak_kb / 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def benchmark(options: EngineOptions, sections: Sequence[Section], *, repeat: int, requests: int) -> None:
    """Measures the sections one after another and prints each when it is done; the last line is JSON."""
    report: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine()}
    if {Section.sizes, Section.lanes} & set(sections):
        stages = Stages()
        engine = Engine(options, observe=stages.observe)
        try:
            engine.wait_ready()
            report["version"] = engine.version
            print(f"{engine.version} on {os.cpu_count()} cores")
            if Section.sizes in sections:
                sizes = track(MEGAPIXELS, total=len(MEGAPIXELS), label="photo sizes")
                results = [measure_size(engine, megapixels, repeat=repeat, stages=stages) for megapixels in sizes]
                print_sizes(results)
                report["sizes"] = [asdict(result) for result in results]
            if Section.lanes in sections:
                lanes = measure_engine_lanes(engine)
                print_lanes("engine", lanes)
                report["lanes"] = asdict(lanes) | {"p95_ratio": lanes.p95_ratio}
        finally:
            engine.close()
    if Section.http in sections:
        from scripts.benchmark_http import measure_http_lanes

        lanes = measure_http_lanes(options, photos=BULK_PHOTOS)
        print_lanes("HTTP", lanes)
        report["http"] = asdict(lanes) | {"p95_ratio": lanes.p95_ratio}
    if Section.memory in sections:
        from scripts.benchmark_http import measure_memory, print_memory

        memory = measure_memory(options, count=requests)
        print_memory(memory)
        report["memory"] = asdict(memory) | {"growth": memory.growth}
    if Section.upstream in sections:
        upstream = measure_upstream(options.device, repeat=repeat, config=compared_config(options))
        print_upstream(upstream)
        report["upstream"] = asdict(upstream)
    if Section.generator in sections:
        generator = measure_generator(options.device, repeat=max(1, repeat // 5), config=compared_config(options))
        print_generator(generator)
        report["generator"] = asdict(generator)
    report["peak_memory"] = peak_memory_mb()
    print("peak memory: " + ", ".join(f"{name} {value:.0f}" for name, value in report["peak_memory"].items()))
    print(json.dumps(report))


def print_sizes(results: Sequence[SizeResult]) -> None:
    """A line for each size of photo."""
    print("median / p95")
    print(f"{'photo':>7} {'facings':>8} {'preannotate':>18} {'click, new photo':>18} {'click, known':>18}")
    for result in results:
        columns = " ".join(
            f"{shown(measured):>18}" for measured in (result.preannotate, result.click_new, result.click_known)
        )
        print(f"{result.megapixels:>4} MP {result.facings:>8} {columns}")
    for result in results:
        split = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in result.stages_s.items())
        print(f"{result.megapixels:>4} MP preannotate in ms: {split}")


def print_lanes(where: str, result: LanesResult) -> None:
    """Clicks alone and beside bulk work, in two lines."""
    print(f"{where}: clicks alone {shown(result.idle)} ({result.idle.calls} clicks)")
    print(
        f"{where}: clicks while {result.bulk_photos} photos run ({result.bulk_s:.1f} s) {shown(result.busy)} "
        f"({result.busy.calls} clicks), p95 is {result.p95_ratio:.2f} times its idle value"
    )


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
        ("SAM2AutomaticMaskGenerator, float32", result.upstream),
        ("SAM2AutomaticMaskGenerator, bf16", result.upstream_bf16),
        ("this engine, the same grid", result.grid),
        (f"this engine, {result.boxes} lent proposals, all tiles", result.lent),
    )
    print(f"{result.config}, random weights, a photo of 1 MP, {result.masks} masks: median / p95")
    for name, measured in rows:
        faster = result.upstream.median_s / measured.median_s
        print(f"  {name:<48} {shown(measured):>18}   {faster:.1f} times as fast")


def shown(measured: Timing) -> str:
    """Median and p95 in milliseconds, or in seconds from a second on."""
    if measured.median_s >= 1:
        return f"{measured.median_s:.2f} / {measured.p95_s:.2f} s"
    return f"{1000 * measured.median_s:.0f} / {1000 * measured.p95_s:.0f} ms"
