"""`facings train`: what to learn from, where to measure, and what is printed meanwhile.

Knows truth files and the evaluation; the training itself is model.training.loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import CommandError
from backend.photos.files import find_photos, read_ahead, read_photo, read_pixels
from backend.settings import Settings
from model.quality import fewest
from scripts.console import format_duration
from scripts.labels import KnownPhotos, print_left_out, read_photos

if TYPE_CHECKING:
    from model.training.options import TrainOptions
    from model.training.pretraining import PretrainOptions, RealPhoto
    from model.training.samples import LabelledPhotos

SECONDS_BETWEEN_LINES = 10.0
PRETRAINING_PX = 1600  # of a photo's longer side: pretraining keeps all photos in memory


def labelled_photos(known: KnownPhotos) -> LabelledPhotos:
    """Photos with known boxes, as training takes them. Each is read once before: what cannot be used is left out, with
    a line on standard error. Raises CommandError when nothing remains."""
    from model.training.samples import LabelledPhoto, LabelledPhotos

    max_pixels = Settings.from_env(os.environ).max_photo_pixels
    read = partial(read_photo, max_pixels=max_pixels)
    usable = [
        LabelledPhoto.known(entry.path, entry.truth)
        for entry, _ in read_photos(known.photos, read, label="photos to learn from", leave_out=print_left_out)
        if len(entry.truth.boxes_xyxy)
    ]
    if not usable:
        raise CommandError(f"expected photos with boxes to learn from, but none of {len(known.photos)} can be used")
    return LabelledPhotos(photos=tuple(usable), read=partial(read_pixels, max_pixels=max_pixels))


def pretraining_photos(unlabelled: Path | None, known: KnownPhotos | None) -> list[RealPhoto]:
    """The photos of a folder, and those with known boxes, as pretraining takes them: all in memory. What cannot be
    used is left out, with a line on standard error. Raises CommandError when the folder, or the known ones, hold none
    that can be used."""
    from model.training.pretraining import RealPhoto

    max_pixels = Settings.from_env(os.environ).max_photo_pixels
    photos: list[RealPhoto] = []
    if unlabelled is not None:
        paths = [photo.path for photo in find_photos([unlabelled]).photos]
        for _, pixels in read_ahead(paths, partial(read_pixels, max_pixels=max_pixels)):
            if isinstance(pixels, Exception):
                print_left_out(str(pixels))
            else:
                photos.append(RealPhoto(pixels=pixels).at_most(PRETRAINING_PX))
        if not photos:
            raise CommandError(f"{str(unlabelled)!r}: expected photos to learn from, found none that can be used")
    if known is not None:
        read = partial(read_photo, max_pixels=max_pixels)
        usable = [
            RealPhoto(pixels=photo.pixels, truth=entry.truth).at_most(PRETRAINING_PX)
            for entry, photo in read_photos(known.photos, read, label="photos to learn from", leave_out=print_left_out)
        ]
        if not any(len(photo.truth.boxes_xyxy) for photo in usable if photo.truth is not None):
            raise CommandError(f"expected photos with boxes to learn from, but none of {len(known.photos)} can be used")
        photos += usable
    return photos


def scorer(known: KnownPhotos, device: str) -> Callable[[Path], dict[str, float]]:
    """Measures a checkpoint on photos with known boxes; the threshold with the fewest corrections becomes its own."""

    def score(checkpoint: Path) -> dict[str, float]:
        from backend.bulk.service import BulkService
        from scripts.measure.evaluate import evaluate

        settings = replace(Settings.from_env(os.environ), checkpoint=str(checkpoint), device=device)
        with BulkService.open(settings) as service:
            service.engine.wait_ready()
            evaluation = evaluate(service, known, sweep=True)
        best = fewest(evaluation.sweep)
        precision = evaluation.precision
        return {
            "dev_ap": precision.ap,
            "dev_ap50": precision.ap50,
            "dev_ar300": precision.ar300,
            "dev_corrections_per_100": best.per_100(),
            "score_threshold": best.score_threshold,
        }

    return score


class Printer:
    """Prints the reports of a run: its progress at most every few seconds, what was measured always."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._printed_s = float("-inf")
        self._scores: list[Mapping[str, float]] = []

    def report(self, figures: Mapping[str, float]) -> None:
        """One report of model.training.loop."""
        if "dev_ap" in figures:
            self._scores.append(figures)
            print(f"step {figures['step']:.0f}: {format_score(figures)}", flush=True)
        elif self._clock() - self._printed_s >= SECONDS_BETWEEN_LINES or not figures["minutes_left"]:
            self._printed_s = self._clock()
            print(format_progress(figures), flush=True)

    def print_outcome(self) -> None:
        """The scores that the run began and ended with, where they were measured."""
        if self._scores:
            print(f"before: {format_score(self._scores[0])}")
            print(f"after:  {format_score(self._scores[-1])}")


def format_progress(figures: Mapping[str, float]) -> str:
    """Step, loss with its parts, speed and time left, in one line."""
    known = {"step", "loss", "pictures_per_s", "minutes_left", "learning_rate"}
    parts = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name not in known)
    return (
        f"step {figures['step']:.0f}: loss {figures['loss']:.3f} ({parts}), "
        f"{figures['pictures_per_s']:.1f} pictures/s, {format_duration(60 * figures['minutes_left'])} left"
    )


def format_score(figures: Mapping[str, float]) -> str:
    """What was measured on the photos kept aside, in one line."""
    return (
        f"AP {figures['dev_ap']:.3f}, AP50 {figures['dev_ap50']:.3f}, AR300 {figures['dev_ar300']:.3f}, "
        f"{figures['dev_corrections_per_100']:.1f} corrections per 100 facings at score "
        f"{figures['score_threshold']:.2f} and above"
    )


def train(options: TrainOptions, score: Callable[[Path], dict[str, float]] | None) -> Path:
    """Trains and prints how it goes; returns the checkpoint's path."""
    from model.training.loop import train as train_network

    printer = Printer()
    path = train_network(options, printer.report, score=score)
    printer.print_outcome()
    return path


def pretrain(options: PretrainOptions) -> None:
    """Trains the network with a pretrained trunk, printing each report and at the end the checkpoint's path."""
    from model.training.pretraining import pretrain as train_network

    def report(figures: Mapping[str, float]) -> None:
        print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)

    print(f"checkpoint in {train_network(options, report)}")
