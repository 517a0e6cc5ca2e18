"""What is learned from, and with: small rendered shelves with their boxes, and detectors that differ a little."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from projects import SHELF_BOXES

from backend.label_studio.label_config import parse_label_config
from backend.label_studio.regions import regions_from_detections
from model import Detections
from model.checkpoints import BUNDLED_CONFIG, BUNDLED_WEIGHTS, read_weights, write_weights
from model.renderer.shelves import Shelf, render_shelf
from scripts.demo.label_studio_client import Client

(IMAGE,) = parse_label_config(SHELF_BOXES).images
SIZE_WH = (640, 480)
THRESHOLD = 0.5  # that the detectors are calibrated to


def shelves(folder: Path, seeds: Sequence[int]) -> list[tuple[Path, Shelf]]:
    made = []
    for seed in seeds:
        shelf = render_shelf(seed, SIZE_WH)
        Image.fromarray(shelf.photo_rgb).save(folder / f"{seed}.jpg", quality=95)
        made.append((folder / f"{seed}.jpg", shelf))
    return made


def write_tuned(path: Path, *, bias: float = 0.0, noise: float = 0.0) -> Path:
    """The bundled weights, with another bias of the detector's confidence, or noise in its weights: the standard
    deviation, as a share of theirs."""
    tensors = read_weights(BUNDLED_WEIGHTS)
    tensors["proposal_head.centre.bias"] += bias
    weights = tensors["proposal_head.centre.weight"].float()
    drawn = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    tensors["proposal_head.centre.weight"] = weights + noise * weights.std() * drawn
    write_weights(path, tensors, {"network": BUNDLED_CONFIG, "score_threshold": f"{THRESHOLD}"})
    return path


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[Path]:
    """A folder that holds no more than so much; the test is skipped where it cannot be had."""
    folder.mkdir()
    options = f"size={kilobytes}k"
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True)


def submit(client: Client, tasks: Sequence[tuple[int, Shelf]]) -> None:
    """Annotations with the boxes that are right, as an annotator submits them."""
    for task, shelf in tasks:
        boxes = Detections(boxes_xyxy=shelf.boxes_xyxy, scores=np.ones(len(shelf.boxes_xyxy), np.float32))
        client.annotate(task, regions_from_detections(boxes, SIZE_WH, IMAGE))


def shelf_project(client: Client, folder: Path, count: int) -> tuple[int, list[tuple[int, Shelf]]]:
    """A project with so many rendered shelves: its number, and each task with its shelf."""
    project = client.create_project("learning", SHELF_BOXES)
    made = shelves(folder, range(700, 700 + count))
    tasks = client.upload(project, {path.name: path for path, _ in made})
    return project, [(task, shelf) for task, (_, shelf) in zip(tasks, made, strict=True)]


def wait_for(value: Callable[[], Any], timeout_s: float = 240.0) -> Any:
    """What `value` gives as soon as it gives something."""
    until = time.monotonic() + timeout_s
    while not (found := value()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return found
