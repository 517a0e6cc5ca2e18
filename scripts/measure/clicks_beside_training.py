"""How much slower clicks are while a project's detector is trained on the same machine.

Knows the engine and the training that `backend.learning` starts, as a process of its own with the lowest priority.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from pathlib import Path

from backend.errors import CommandError
from backend.learning.store import Figures
from backend.learning.training import fine_tune, lowest_priority
from model import Engine
from model.checkpoints import BUNDLED_WEIGHTS
from model.training.heap import keep_freed_memory
from model.training.samples import LabelledPhoto
from scripts.measure.engine import LanesResult, measure_lanes
from scripts.measure.timing import clicks_on, shelf_photos

MEGAPIXELS = 8.0
MINUTES = 2.0
SHELVES, SHELF_WH = 4, (1600, 1200)


def measure_clicks_beside_training(engine: Engine, device: str, *, minutes: float = MINUTES) -> LanesResult:
    """Clicks on one known photo at an annotator's pace, alone and beside a training on `device`, its start included.
    Raises CommandError for a training that fails."""
    photo = next(shelf_photos(MEGAPIXELS, seed=3))
    engine.preannotate(photo)
    clicks = clicks_on(photo, seed=0)
    with tempfile.TemporaryDirectory() as folder:

        def training() -> None:
            process = multiprocessing.get_context("spawn").Process(target=_train, args=(Path(folder), device, minutes))
            process.start()
            process.join()
            if process.exitcode:
                raise CommandError(f"training: expected exit status 0, got {process.exitcode}")

        return measure_lanes(lambda: engine.refine(photo, [next(clicks)]), training, name="a training")


def _train(folder: Path, device: str, minutes: float) -> None:
    """A training as `backend.learning` does it, on rendered shelves in the place of photos."""
    import cv2

    from model.renderer.shelves import render_shelf

    lowest_priority()
    keep_freed_memory()
    photos = []
    for number in range(SHELVES):
        shelf = render_shelf(number, SHELF_WH)
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), shelf.photo_rgb[..., ::-1])
        photos.append(LabelledPhoto(path=path, boxes_xyxy=shelf.boxes_xyxy))
    better = itertools.count()  # each measurement is better than the one before, so that it goes on to its end
    fine_tune(
        folder / "run",
        photos,
        BUNDLED_WEIGHTS,
        lambda _: Figures(corrections=-float(next(better)), ap=0.0, ap50=0.0, score_threshold=0.5),
        origin=BUNDLED_WEIGHTS,
        max_pixels=SHELF_WH[0] * SHELF_WH[1],
        minutes=minutes,
        device=device,
        show=lambda _: None,
        report=lambda _: None,
    )
