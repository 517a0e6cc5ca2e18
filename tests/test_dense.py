"""All facings of a photo from a checkpoint without a proposal head: lent proposals, or the grid of sam2's generator."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from model import Engine, EngineOptions, Photo, Prompt, Sam2Engine
from model.boxes import iou_matrix
from model.checkpoints import Checkpoint, find_checkpoint
from model.detect import PointGrid, ask_grid, result_of
from model.device import Placement
from model.network import Network
from model.proposer import point_grid
from model.renderer.shelves import Shelf, render_shelf
from model.stages import untimed
from model.tiling import Tile

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
GREY = Photo(pixels=np.full((300, 400, 3), 128, np.uint8))


def engine_of(checkpoint: Checkpoint, **options: object) -> Engine:
    return Sam2Engine(
        EngineOptions(
            checkpoint=str(checkpoint.weights),
            checkpoint_config=checkpoint.config,
            device="cpu",
            **options,  # type: ignore[arg-type]
        )
    )


@pytest.fixture(scope="module")
def lent(headless: Checkpoint) -> Iterator[Engine]:
    engine = engine_of(headless)
    engine.wait_ready(120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return render_shelf(21, (1600, 1200))


def test_a_checkpoint_without_a_head_redraws_what_the_bundled_one_proposes(lent: Engine, shelf: Shelf) -> None:
    photo = Photo(pixels=shelf.photo_rgb)
    bundled = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    proposed, redrawn = bundled.preannotate(photo), lent.preannotate(photo)
    bundled.close()
    overlap = iou_matrix(redrawn.boxes_xyxy, proposed.boxes_xyxy)
    assert 0.9 * len(proposed) <= len(redrawn) <= len(proposed)
    assert overlap.max(1).min() >= 0.5
    assert not np.isclose(overlap.max(1), 1).all(), "nothing was redrawn"
    assert redrawn.scores == pytest.approx(proposed.scores[overlap.argmax(1)])
    assert (iou_matrix(redrawn.boxes_xyxy, shelf.boxes_xyxy).max(0) > 0.5).mean() > 0.6


def test_the_proposers_threshold_holds_for_the_checkpoint_it_is_lent_to(lent: Engine) -> None:
    assert lent.score_threshold == pytest.approx(0.7)


def test_clicks_are_answered_by_the_checkpoint_itself_without_what_was_lent(lent: Engine, shelf: Shelf) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 23, axis=1))
    middles = (shelf.boxes_xyxy[:8, :2] + shelf.boxes_xyxy[:8, 2:]) / 2
    clicks = [Prompt(points_xy=middle[None], is_foreground=np.ones(1)) for middle in middles]
    before = lent.refine(photo, clicks)
    lent.preannotate(photo)
    assert lent.refine(photo, clicks).boxes_xyxy == pytest.approx(before.boxes_xyxy, abs=1)


def test_versions_tell_where_the_boxes_came_from(headless: Checkpoint, lent: Engine) -> None:
    versions = {lent.version}
    for proposals in ("grid", "learned"):
        engine = engine_of(headless, proposals=proposals)
        engine.wait_ready(120)
        versions.add(engine.version)
        engine.close()
    assert len(versions) == 3
    assert all(version.startswith(headless.version) for version in versions)


@pytest.mark.parametrize(("proposals", "is_asked"), [("auto", True), ("grid", True), ("learned", False)])
def test_where_nothing_is_proposed_the_grid_is_asked(
    headless: Checkpoint, monkeypatch: pytest.MonkeyPatch, proposals: str, is_asked: bool
) -> None:
    asked = []
    monkeypatch.setattr("model.detect.PointGrid.rounds", lambda _, size: [point_grid(2, size).numpy()])
    monkeypatch.setattr("model.detect.ask_grid", lambda *given, **named: asked.append(1) or ask_grid(*given, **named))
    engine = engine_of(headless, proposals=proposals)
    engine.preannotate(GREY)
    engine.close()
    assert bool(asked) is is_asked


@pytest.mark.parametrize("points_per_side", [1, 2, 6, 32])
def test_the_rounds_of_a_grid_ask_each_of_its_points_once(points_per_side: int) -> None:
    rounds = PointGrid(points_per_side=points_per_side).rounds(1024)
    assert sorted(np.concatenate(rounds).tolist()) == sorted(point_grid(points_per_side, 1024).tolist())


def test_points_in_objects_that_are_surely_found_are_not_asked_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the bundled checkpoint answers to points, hardly anything is as sure as the engine wants it."""
    network = Network(find_checkpoint("facings-nano", config=None, has_gpu=False), CPU)
    (features,) = network.encode(shelf.photo_rgb, [Tile(left=0, top=0, side=600, size=1024, level=1)])
    decode, asked = network.decode, []
    monkeypatch.setattr(
        network, "decode", lambda prompts, multimask: asked.extend(prompts) or decode(prompts, multimask=multimask)
    )
    boxes = {}
    for sure_score in (math.inf, 0.6):
        grid = PointGrid(points_per_side=8, min_score=0.6, min_stability=0.7, sure_score=sure_score, sure_stability=0.7)
        asked.clear()
        boxes[sure_score], _ = result_of(ask_grid(network, features, grid, timed=untimed))
        assert (len(asked) < 64) is (sure_score == 0.6)
    assert (iou_matrix(boxes[math.inf], boxes[0.6]).max(1) > 0.5).mean() > 0.8
