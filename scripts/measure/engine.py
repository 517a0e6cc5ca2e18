"""How fast the engine answers: by the size of a photo, and clicks while bulk work runs.

Knows the engine and its stages. Measuring returns values; printing is apart.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np

from backend.photos.decoding import decode_photo
from model import Engine, EngineOptions, Lane, Photo, Sam2Engine
from model.device import choose_placement
from model.stages import Stage
from scripts.measure.timing import Timing, clicks_on, format_timing, seconds_of, shelf_photos, timing

STAGES = ("read", *get_args(Stage))
BULK_PHOTOS = 40
IDLE_CLICKS = 40
SECONDS_BETWEEN_CLICKS = 0.1


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
    """Clicks alone, and while bulk work runs. bulk: what that is."""

    idle: Timing
    busy: Timing
    bulk: str
    bulk_s: float

    @property
    def p95_ratio(self) -> float:
        """How many times slower the slow clicks are beside the bulk work."""
        return self.busy.p95_s / self.idle.p95_s


class Stages:
    """Seconds of the engine's stages, as its observer."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._finish: Callable[[], None] | None = None

    def waited(self, lane: Lane, seconds: float) -> None:
        """Waiting is no stage."""

    def stage(self, stage: Stage, seconds: float) -> None:
        """Called at the end of a stage, on the device thread, so that no other begins meanwhile."""
        self._seconds[stage] += seconds + (seconds_of(self._finish) if self._finish else 0.0)

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


@dataclass(frozen=True, kw_only=True)
class ObservedEngine:
    """An engine that is ready, and its stages.

    finish: waits for a GPU, where a stage ends when its work is queued and the time would fall on a later one. The
    stages are then those of another photo: waiting for each is slower than what is timed. None on a CPU.
    """

    engine: Engine
    stages: Stages
    finish: Callable[[], None] | None = None


@contextmanager
def observed_engine(options: EngineOptions) -> Iterator[ObservedEngine]:
    """An engine with these options, closed at the end of the block. Raises EngineError."""
    import torch

    device = choose_placement(options.device).device
    stages = Stages()
    engine = Sam2Engine(options, observer=stages)
    try:
        engine.wait_ready()
        print(f"{engine.version} on {os.cpu_count()} cores")
        finish = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        yield ObservedEngine(engine=engine, stages=stages, finish=finish)
    finally:
        engine.close()


def measure_sizes(observed: ObservedEngine, *, megapixels: Sequence[float], repeat: int) -> Iterator[SizeResult]:
    """Pre-annotation and clicks on `repeat` photos of each size, after one to warm up."""
    for size in megapixels:
        yield measure_size(observed, size, repeat=repeat)


def measure_size(observed: ObservedEngine, megapixels: float, *, repeat: int) -> SizeResult:
    """As `measure_sizes`, for one size."""
    engine, stages = observed.engine, observed.stages
    photos = shelf_photos(megapixels, seed=1)
    dense: list[float] = []
    known: list[float] = []
    new: list[float] = []
    split: list[dict[str, float]] = []
    facings = 0
    for round_ in range(-1, repeat):
        photo, read_s = read_as_jpeg(next(photos))
        unseen = next(photos)
        clicks = clicks_on(photo, seed=round_ + 1)
        dense_s, stages_s = stages.of(engine.preannotate, photo)
        if observed.finish is not None:
            _, stages_s = stages.of(engine.preannotate, next(photos), finish=observed.finish)
        known_s = seconds_of(engine.refine, photo, [next(clicks)])
        new_s = seconds_of(engine.refine, unseen, [next(clicks)])
        if round_ < 0:
            facings = len(engine.preannotate(photo))
            continue
        split.append({"read": read_s, **stages_s})
        dense.append(dense_s)
        known.append(known_s)
        new.append(new_s)
    return SizeResult(
        megapixels=megapixels,
        facings=facings,
        preannotate=timing(dense),
        stages_s={name: float(np.median([one.get(name, 0.0) for one in split])) for name in STAGES},
        click_new=timing(new),
        click_known=timing(known),
    )


def read_as_jpeg(photo: Photo) -> tuple[Photo, float]:
    """The photo after it was a JPEG of quality 90, and the seconds it took the backend's decoder."""
    import cv2

    content = cv2.imencode(".jpg", photo.pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    began = time.perf_counter()
    read = decode_photo(content, max_pixels=photo.pixels.size)
    return read, time.perf_counter() - began


def measure_lanes(click: Callable[[], object], bulk: Callable[[], object], *, name: str) -> LanesResult:
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
    return LanesResult(idle=timing(idle), busy=timing(busy), bulk=name, bulk_s=running.result())


def measure_engine_lanes(engine: Engine, *, photos: int = BULK_PHOTOS) -> LanesResult:
    """`measure_lanes` on the engine itself: clicks on one known photo, bulk over others."""
    shelves = shelf_photos(2, seed=2)
    known = next(shelves)
    engine.preannotate(known)
    clicks = clicks_on(known, seed=0)

    def bulk() -> None:
        for _ in range(photos):
            engine.preannotate(next(shelves))

    return measure_lanes(lambda: engine.refine(known, [next(clicks)]), bulk, name=f"{photos} photos")


def print_size(result: SizeResult) -> None:
    """One size of photo: a line for each kind of call, and the stages."""
    print(f"a photo of {result.megapixels:g} MP, {result.facings} facings: median / p95")
    rows = (
        ("preannotate", result.preannotate),
        ("click, new photo", result.click_new),
        ("click, known photo", result.click_known),
    )
    for name, measured in rows:
        print(f"  {name:<20} {format_timing(measured):>18}")
    split = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in result.stages_s.items())
    print(f"  read and preannotate in ms: {split}")


def print_lanes(where: str, result: LanesResult) -> None:
    """Clicks alone and during bulk work, in two lines."""
    print(f"{where}: clicks alone {format_timing(result.idle)} ({result.idle.calls} clicks)")
    print(
        f"{where}: clicks beside {result.bulk} ({result.bulk_s:.1f} s) {format_timing(result.busy)} "
        f"({result.busy.calls} clicks), p95 is {result.p95_ratio:.2f} times its idle value"
    )
