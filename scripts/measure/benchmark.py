"""How fast the engine answers, what else it costs, and how it stands beside upstream sam2.

Knows the engine and the shelf renderer. Measuring returns values; printing is apart. Figures through HTTP are made in
`benchmark_http`, those beside sam2's own predictor and generator in `benchmark_upstream`, how alike the boxes of both
are in `benchmark_parity`, what is possible at all in `benchmark_floor`, those of a whole Label Studio project in
`benchmark_project`.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np

from backend.errors import CommandError
from backend.photos.decoding import decode_photo
from model import Engine, EngineOptions, Photo, Prompt, Sam2Engine
from model.checkpoints import OFFICIAL
from model.device import choose_placement
from model.memory import is_out_of_memory
from model.renderer.shelves import render_shelf
from model.stages import Stage
from scripts.console import track

MEGAPIXELS = (2.0, 8.0, 16.0)
STAGES = ("read", *get_args(Stage))
BULK_PHOTOS = 40
IDLE_CLICKS = 40
SECONDS_BETWEEN_CLICKS = 0.1


Result = TypeVar("Result")


class Section(StrEnum):
    """What there is to measure."""

    sizes = "sizes"
    lanes = "lanes"
    http = "http"
    memory = "memory"
    upstream = "upstream"
    generator = "generator"
    parity = "parity"
    floor = "floor"
    project = "project"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of repeated calls, without the warm-up."""

    median_s: float
    p95_s: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """One size of photo. click_new: on a photo never seen; click_known: on one seen before.

    stages_s: median seconds of reading the photo, a JPEG, and of the engine's own stages in one pre-annotation, in the
    order of model.stages; reading is not part of preannotate.
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


def read_as_jpeg(photo: Photo) -> tuple[Photo, float]:
    """The photo after it was a JPEG of quality 90, and the seconds it took the backend's decoder."""
    import cv2

    content = cv2.imencode(".jpg", photo.pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    began = time.perf_counter()
    read = decode_photo(content, max_pixels=photo.pixels.size)
    return read, time.perf_counter() - began


def clicks_on(photo: Photo, *, seed: int) -> Iterator[Prompt]:
    """Endless single clicks all over a photo."""
    generator = np.random.default_rng(seed)
    while True:
        point_xy = generator.uniform(0.1, 0.9, (1, 2)) * photo.size_wh
        yield Prompt(points_xy=point_xy.astype(np.float32), is_foreground=np.ones(1, bool))


class Stages:
    """Seconds of the engine's stages, as its observer."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._finish: Callable[[], None] | None = None

    def observe(self, name: str, seconds: float) -> None:
        """Called at the end of a stage, on the device thread, so that no other begins meanwhile."""
        if not name.startswith("queue"):
            self._seconds[name] += seconds + (seconds_of(self._finish) if self._finish else 0.0)

    def of(
        self, call: Callable[[Photo], object], photo: Photo, *, finish: Callable[[], None] | None = None
    ) -> tuple[float, dict[str, float]]:
        """Seconds of a call, and of its stages. finish: waits, at the end of each stage, for what it queued."""
        self._seconds.clear()
        self._finish = finish
        try:
            return seconds_of(call, photo), dict(self._seconds)
        finally:
            self._finish = None


def measure_size(
    engine: Engine, megapixels: float, *, repeat: int, stages: Stages, finish: Callable[[], None] | None = None
) -> SizeResult:
    """Pre-annotation and clicks on `repeat` photos of one size, after one to warm up. stages: observes the engine.

    finish: waits for a GPU, where a stage ends when its work is queued and the time would fall on a later one. The
    stages are then those of another photo: whoever waits for each is slower than what is timed.
    """
    photos = shelf_photos(megapixels, seed=1)
    dense, new, known, facings, split = [], [], [], 0, []
    for round_ in range(-1, repeat):
        photo, read_s = read_as_jpeg(next(photos))
        unseen = next(photos)
        clicks = clicks_on(photo, seed=round_ + 1)
        dense_s, stages_s = stages.of(engine.preannotate, photo)
        if finish is not None:
            _, stages_s = stages.of(engine.preannotate, next(photos), finish=finish)
        seconds = [
            dense_s,
            seconds_of(engine.refine, photo, [next(clicks)]),
            seconds_of(engine.refine, unseen, [next(clicks)]),
        ]
        if round_ < 0:
            facings = len(engine.preannotate(photo))
            continue
        split.append({"read": read_s, **stages_s})
        for bucket, value in zip((dense, known, new), seconds, strict=True):
            bucket.append(value)
    return SizeResult(
        megapixels=megapixels,
        facings=facings,
        preannotate=timing(dense),
        stages_s={name: float(np.median([one.get(name, 0.0) for one in split])) for name in STAGES},
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


@contextmanager
def random_weights(config: str) -> Iterator[Path]:
    """A file with random weights of one of sam2's configs. What is measured does not depend on them."""
    import torch

    from model.network import build_module

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"random_{Path(config).stem}.pt"
        torch.save({"model": build_module(config).sam.state_dict()}, path)
        yield path


@contextmanager
def without_weights(options: EngineOptions) -> Iterator[EngineOptions]:
    """The options with random weights for those of Meta's checkpoint that they name. Raises CommandError for others."""
    official = OFFICIAL.get(options.checkpoint)
    if official is None:
        raise CommandError(f"--random-weights: expected --checkpoint {', '.join(OFFICIAL)}, got {options.checkpoint!r}")
    with random_weights(official.config) as weights:
        yield replace(options, checkpoint=str(weights), checkpoint_config=official.config)


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held so far, and its GPU if one was used: since the generator section, which
    counts anew, if that ran."""
    import resource

    import torch

    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Darwin" else 1)
    peak = {"process_mb": peak_kb / 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def benchmark(
    options: EngineOptions,
    sections: Sequence[Section],
    *,
    repeat: int,
    requests: int,
    megapixels: Sequence[float],
) -> None:
    """Measures the sections one after another and prints each when it is done; the last line is JSON.

    megapixels: of the photos, in sections that tell sizes apart.

    Raises DeviceError for a device that is not there.
    """
    import torch

    device = choose_placement(options.device).device
    report: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine()}
    if {Section.sizes, Section.lanes} & set(sections):
        stages = Stages()
        engine = Sam2Engine(options, observe=stages.observe)
        try:
            engine.wait_ready()
            report["version"] = engine.version
            print(f"{engine.version} on {os.cpu_count()} cores")
            if Section.sizes in sections:
                sizes = track(megapixels, total=len(megapixels), label="photo sizes")
                finish = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
                results = [measure_size(engine, size, repeat=repeat, stages=stages, finish=finish) for size in sizes]
                print_sizes(results)
                report["sizes"] = [asdict(result) for result in results]
            if Section.lanes in sections:
                lanes = measure_engine_lanes(engine)
                print_lanes("engine", lanes)
                report["lanes"] = asdict(lanes) | {"p95_ratio": lanes.p95_ratio}
        finally:
            engine.close()
    if Section.http in sections:
        from scripts.measure.server import measure_http_lanes

        lanes = measure_http_lanes(options, photos=BULK_PHOTOS)
        print_lanes("HTTP", lanes)
        report["http"] = asdict(lanes) | {"p95_ratio": lanes.p95_ratio}
    if Section.memory in sections:
        from scripts.measure.server import measure_memory, print_memory

        memory = measure_memory(options, count=requests)
        print_memory(memory)
        report["memory"] = asdict(memory) | {"growth": memory.growth}
    if {Section.upstream, Section.generator} & set(sections):
        from scripts.measure import upstream as beside

        shared: dict[str, Any] = {"config": beside.compared_config(options), "megapixels": megapixels}
        if Section.upstream in sections:
            clicks = beside.measure_upstream(options.device, repeat=repeat, **shared)
            report["upstream"] = _told(clicks, beside.print_upstream)
        if Section.generator in sections:
            grids = beside.measure_generator(options.device, repeat=max(1, repeat // 5), **shared)
            report["generator"] = _told(grids, beside.print_generator)
    if Section.parity in sections:
        from scripts.measure.parity import measure_parity, print_parity

        report["parity"] = _told(measure_parity(options, megapixels=megapixels), print_parity)
    if Section.floor in sections:
        from scripts.measure.floor import measure_floor, print_floor

        floor = measure_floor(options, repeat=repeat)
        print_floor(floor)
        report["floor"] = asdict(floor)
    if Section.project in sections:
        from scripts.measure.project import measure_project, print_project

        project = measure_project(options)
        print_project(project)
        report["project"] = asdict(project) | {"share": project.share, "share_apart": project.share_apart}
    report["peak_memory"] = peak_memory_mb()
    print("peak memory: " + ", ".join(f"{name} {value:.0f}" for name, value in report["peak_memory"].items()))
    print(json.dumps(report))


def _told(results: Iterable[Result], tell: Callable[[Result], None]) -> list[dict[str, Any]]:
    """The results for the report; each is printed when it is there. Those that memory has no room for are missing."""
    answers: list[dict[str, Any]] = []
    try:
        for result in results:
            tell(result)
            answers.append(asdict(result))  # type: ignore[call-overload]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"  out of memory after {len(answers)} sizes: {str(error).splitlines()[0]}")
    return answers


def print_sizes(results: Sequence[SizeResult]) -> None:
    """A line for each size of photo."""
    print("median / p95")
    print(f"{'photo':>7} {'facings':>8} {'preannotate':>18} {'click, new photo':>18} {'click, known':>18}")
    for result in results:
        columns = " ".join(
            f"{shown(measured):>18}" for measured in (result.preannotate, result.click_new, result.click_known)
        )
        print(f"{result.megapixels:>4g} MP {result.facings:>8} {columns}")
    for result in results:
        split = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in result.stages_s.items())
        print(f"{result.megapixels:>4g} MP, read and preannotate in ms: {split}")


def print_lanes(where: str, result: LanesResult) -> None:
    """Clicks alone and beside bulk work, in two lines."""
    print(f"{where}: clicks alone {shown(result.idle)} ({result.idle.calls} clicks)")
    print(
        f"{where}: clicks while {result.bulk_photos} photos run ({result.bulk_s:.1f} s) {shown(result.busy)} "
        f"({result.busy.calls} clicks), p95 is {result.p95_ratio:.2f} times its idle value"
    )


def shown(measured: Timing) -> str:
    """Median and p95 in milliseconds, or in seconds from a second on."""
    if measured.median_s >= 1:
        return f"{measured.median_s:.2f} / {measured.p95_s:.2f} s"
    return f"{1000 * measured.median_s:.0f} / {1000 * measured.p95_s:.0f} ms"
