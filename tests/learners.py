"""What is learned from, and with: small rendered shelves with their boxes, and detectors that differ a little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from projects import SHELF_BOXES

from backend.label_studio.label_config import parse_label_config
from model.checkpoints import BUNDLED_CONFIG, BUNDLED_WEIGHTS, read_weights, write_weights
from model.renderer.shelves import Shelf, render_shelf

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
