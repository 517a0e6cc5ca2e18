"""`facings train`: what to learn from, where to measure, and what is told meanwhile.

Knows files of labels and the evaluation; the training itself is model.training.loop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import CommandError
from backend.photos.files import read_ahead, read_photo, read_pixels
from backend.settings import Settings
from scripts.console import track
from scripts.labels import Truth

if TYPE_CHECKING:
    from model.training.loop import TrainOptions
    from model.training.samples import LabelledPhotos


def labelled_photos(truths: Sequence[Truth], photos_dir: Path) -> LabelledPhotos:
    """Photos with known boxes, as training takes them. Each is read once before: what cannot serve is told on standard
    error and left out. Raises CommandError when nothing is left."""
    from model.training.samples import LabelledPhoto, LabelledPhotos

    usable = []
    max_pixels = Settings.from_env(os.environ).max_photo_pixels
    paths = (photos_dir / truth.file_name for truth in truths)
    outcomes = zip(truths, read_ahead(paths, partial(read_photo, max_pixels=max_pixels)), strict=True)
    for truth, (path, photo) in track(outcomes, total=len(truths), label="labels"):
        if isinstance(photo, Exception):
            print(f"left out {str(path)!r}: {photo}", file=sys.stderr)
        elif photo.size_wh != truth.size_wh:
            print(f"left out {str(path)!r}: labelled at {truth.size_wh}, but it is {photo.size_wh}", file=sys.stderr)
        elif len(truth.boxes_xyxy):
            usable.append(LabelledPhoto(path=path, boxes_xyxy=truth.boxes_xyxy.astype("float32")))
    if not usable:
        raise CommandError(f"{str(photos_dir)!r}: expected photos with boxes to learn from, found none that can serve")
    return LabelledPhotos(photos=tuple(usable), read=partial(read_pixels, max_pixels=max_pixels))


def scorer(truths: Sequence[Truth], photos_dir: Path, device: str) -> Callable[[Path], dict[str, float]]:
    """Measures a checkpoint on photos with known boxes; the threshold with the fewest corrections becomes its own."""

    def score(checkpoint: Path) -> dict[str, float]:
        from model import EngineOptions, Sam2Engine
        from scripts.measure.evaluate import evaluate

        engine = Sam2Engine(EngineOptions(checkpoint=str(checkpoint), device=device))
        try:
            engine.wait_ready()
            evaluation = evaluate(engine, photos_dir, truths, sweep=True)
        finally:
            engine.close()
        best = min(evaluation.sweep, key=lambda row: row.per_100())
        precision = evaluation.precision
        return {
            "dev_ap": precision.ap,
            "dev_ap50": precision.ap50,
            "dev_ar300": precision.ar300,
            "dev_corrections_per_100": best.per_100(),
            "score_threshold": best.score_threshold,
        }

    return score


def train(options: TrainOptions, score: Callable[[Path], dict[str, float]] | None) -> Path:
    """Trains, with a line on what is going on every now and then; returns the checkpoint's path."""
    from model.training.loop import train as train_network

    return train_network(options, lambda line: print(_line(line), flush=True), score=score)


def _line(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
