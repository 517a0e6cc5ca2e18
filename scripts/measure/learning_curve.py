"""What a project's first photos bring: the detector learns from some photos and is measured on others.

Goes the way of `backend.learning`: a part of the photos is kept aside, and only a version that is better there serves.
The photos are cut in two halves by chance: learned from are the first of one half, and measured is the other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from backend.learning.forgetting import SHELF_WH, rendered_ap
from backend.learning.learning import LEAST_FOR_THRESHOLD
from backend.learning.store import Figures
from backend.learning.training import LEAST_KEPT_ASIDE, LEAST_LEARNED, figures_of, fine_tune, keys_kept_aside
from backend.photos.files import read_photo
from backend.settings import Settings
from model import Detections, EngineOptions, Sam2Engine
from model.checkpoints import BUNDLED, BUNDLED_WEIGHTS, calibrated_threshold, find_checkpoint
from model.quality import CANDIDATE_SCORE, Truth, average_precision, count_corrections
from model.renderer.shelves import render_shelf
from model.training.samples import LabelledPhoto
from scripts.labels import KnownPhoto

PHOTOS = (0, 5, 10, 20)
RENDERED = 12  # shelves that show whether what they taught is forgotten
FIRST_RENDERED = 10_000_000  # far from the numbers that training draws


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the curve: figures on the photos that were not learned from, at the threshold that would serve.

    photos: submitted. learned: of these, not kept aside. corrections: per 100 facings. is_promoted: whether what was
    learned serves. minutes: of training and measuring. rendered_ap: on rendered shelves.
    """

    seed: int
    photos: int
    learned: int
    ap: float
    ap50: float
    corrections: float
    score_threshold: float
    is_promoted: bool
    minutes: float
    rendered_ap: float


def learning_curve(
    settings: Settings, known: Sequence[KnownPhoto], *, seeds: int, counts: Sequence[int] = PHOTOS
) -> Iterator[Point]:
    """The points of each seed, in order."""
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(known))
        half = len(known) // 2
        first, others = ([known[place] for place in places] for places in (order[:half], order[half:]))
        for count in counts:
            if count <= half:
                yield _point(settings, first[:count], others, seed)


def _point(settings: Settings, submitted: Sequence[KnownPhoto], others: Sequence[KnownPhoto], seed: int) -> Point:
    keys = {entry.path.name: entry for entry in submitted}
    aside = keys_kept_aside(list(keys))
    learned = [entry for key, entry in keys.items() if key not in aside]
    measure = partial(_figures, settings, [keys[key] for key in sorted(aside)])
    with tempfile.TemporaryDirectory() as folder:
        weights, threshold, is_promoted, minutes = BUNDLED_WEIGHTS, None, False, 0.0
        if len(aside) >= LEAST_KEPT_ASIDE and len(learned) >= LEAST_LEARNED:
            trained = fine_tune(
                Path(folder),
                [LabelledPhoto.known(entry.path, entry.truth) for entry in learned],
                BUNDLED_WEIGHTS,
                measure,
                origin=BUNDLED_WEIGHTS,
                max_pixels=settings.max_photo_pixels,
                minutes=settings.learn_minutes,
                device=settings.device,
                seed=seed,
                show=lambda line: print(f"  {line}", flush=True),
                report=lambda _: None,
            )
            is_promoted, minutes = trained.is_better, trained.minutes
            if is_promoted:
                weights, threshold = trained.weights, trained.after.score_threshold
        if threshold is None and len(submitted) >= LEAST_FOR_THRESHOLD:
            threshold = _figures(settings, submitted, weights).score_threshold
        truths, found, default = _boxes(settings, others, weights)
        shelves = [render_shelf(FIRST_RENDERED + number, SHELF_WH) for number in range(RENDERED)]
        on_rendered = rendered_ap(weights, shelves, device=settings.device)
    (corrections,) = count_corrections(truths, found, [default if threshold is None else threshold])
    precision = average_precision(truths, found)
    return Point(
        seed=seed,
        photos=len(submitted),
        learned=len(learned) if is_promoted else 0,
        ap=precision.ap,
        ap50=precision.ap50,
        corrections=corrections.per_100(),
        score_threshold=corrections.score_threshold,
        is_promoted=is_promoted,
        minutes=minutes,
        rendered_ap=on_rendered,
    )


def _figures(settings: Settings, known: Sequence[KnownPhoto], weights: Path) -> Figures:
    truths, found, _ = _boxes(settings, known, weights)
    start = find_checkpoint(BUNDLED, config=None, has_gpu=False)
    return figures_of(truths, found, calibrated_threshold(start) or 0.0)


def _boxes(
    settings: Settings, known: Sequence[KnownPhoto], weights: Path
) -> tuple[list[Truth], list[Detections], float]:
    """Known and found boxes, and the default threshold of the weights."""
    engine = Sam2Engine(EngineOptions(checkpoint=str(weights), device=settings.device, cache_bytes=0))
    try:
        engine.wait_ready()
        read = partial(read_photo, max_pixels=settings.max_photo_pixels)
        found = [engine.preannotate(read(entry.path), score_threshold=CANDIDATE_SCORE) for entry in known]
        threshold = engine.score_threshold
    finally:
        engine.close()
    return [entry.truth for entry in known], found, threshold


def print_curve(points: Iterator[Point]) -> None:
    """Each point as a line when it is there, then the mean and the spread of all seeds, and a line of JSON."""
    kept: list[Point] = []
    print("seed  photos  learned     AP   AP50  corrections  threshold  minutes  rendered AP", flush=True)
    for point in points:
        kept.append(point)
        print(
            f"{point.seed:4}  {point.photos:6}  {point.learned:7}  {point.ap:.3f}  {point.ap50:.3f}  "
            f"{point.corrections:11.1f}  {point.score_threshold:9.2f}  {point.minutes:7.1f}  {point.rendered_ap:11.3f}",
            flush=True,
        )
    for photos in sorted({point.photos for point in kept}):
        same = [point for point in kept if point.photos == photos]
        corrections = np.array([point.corrections for point in same])
        print(
            f"{photos} photos: {corrections.mean():.1f} ± {corrections.std():.1f} corrections per 100 facings, "
            f"AP {np.mean([point.ap for point in same]):.3f}, {np.mean([point.minutes for point in same]):.1f} min"
        )
    print(json.dumps([asdict(point) for point in kept]))
