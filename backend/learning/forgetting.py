"""How much of what a detector knew is forgotten while it learns from a few photos, and how that stays little.

Measured on rendered shelves, which taught it first: what it still finds there stands for products and shelves that are
not among the photos. Knows weights and rendered shelves; nothing of projects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model import EngineOptions, Photo, Sam2Engine
from model.checkpoints import blended, read_facts, read_weights, write_weights
from model.quality import CANDIDATE_SCORE, Truth, average_precision
from model.renderer.shelves import Shelf, render_shelf

MOST_FORGOTTEN = 0.02  # AP on rendered shelves
SHARES_BACK = (0.15, 0.3, 0.45, 0.6, 0.75)  # of the way back to the weights at the start
SHELVES = 8
SHELF_WH = (1600, 1200)
FIRST_SHELF = 20_000_000  # far from the numbers that training and `facings evaluate` draw


def forget_less(learned: Path, start: Path, *, origin: Path, device: str) -> float:
    """Moves the weights in the file `learned` back towards those at the start of their training until they find
    rendered shelves nearly as well as the project's first ones, `origin`, do (WiSE-FT, Wortsman et al. 2022).

    Returns by which share of the way: 0 where they do so already, the last of SHARES_BACK where nothing less is enough.
    """
    shelves = [render_shelf(FIRST_SHELF + number, SHELF_WH) for number in range(SHELVES)]
    least = rendered_ap(origin, shelves, device=device) - MOST_FORGOTTEN
    if rendered_ap(learned, shelves, device=device) >= least:
        return 0.0
    own, first = read_weights(learned), read_weights(start)
    facts = read_facts(learned)
    for share in SHARES_BACK:
        write_weights(learned, blended(own, first, share), facts)
        if rendered_ap(learned, shelves, device=device) >= least:
            break
    return share


def rendered_ap(weights: Path, shelves: Sequence[Shelf], *, device: str) -> float:
    """AP of a detector on rendered shelves."""
    engine = Sam2Engine(EngineOptions(checkpoint=str(weights), device=device, cache_bytes=0))
    try:
        engine.wait_ready()
        found = [engine.preannotate(Photo(pixels=one.photo_rgb), score_threshold=CANDIDATE_SCORE) for one in shelves]
    finally:
        engine.close()
    truths = [Truth(size_wh=SHELF_WH, boxes_xyxy=one.boxes_xyxy.astype(np.float64)) for one in shelves]
    return average_precision(truths, found).ap
