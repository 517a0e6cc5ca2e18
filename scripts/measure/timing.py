"""What all measurements share: timed calls, photos that no cache knows, clicks on them, networks without weights.

Knows clocks and the shelf renderer; nothing of what is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backend.errors import CommandError
from model import EngineOptions, Photo, Prompt
from model.checkpoints import OFFICIAL
from model.renderer.shelves import render_shelf


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of repeated calls, without the warm-up."""

    median_s: float
    p95_s: float
    calls: int


def timing(seconds: Sequence[float]) -> Timing:
    """Median and p95 of measured seconds, at least one."""
    median_s, p95_s = np.percentile(seconds, [50, 95])
    return Timing(median_s=float(median_s), p95_s=float(p95_s), calls=len(seconds))


def format_timing(measured: Timing) -> str:
    """Median and p95 in milliseconds, or in seconds from a second on."""
    if measured.median_s >= 1:
        return f"{measured.median_s:.2f} / {measured.p95_s:.2f} s"
    return f"{1000 * measured.median_s:.0f} / {1000 * measured.p95_s:.0f} ms"


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


@contextmanager
def random_weights(config: str) -> Iterator[Path]:
    """A file with random weights of one of sam2's configs. What is measured does not depend on them."""
    import torch

    from model.sam2_module import build_module

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
