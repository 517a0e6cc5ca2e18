"""All facings of a photo, from a checkpoint without a detector head too: prompted with a detector's boxes, or with the
grid of SAM 2's generator. And all facings of a panorama."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fakes import first_boxes

from model import Engine, EngineOptions, Photo, Prompt, Sam2Engine
from model.boxes import iou_matrix
from model.checkpoints import Checkpoint, find_checkpoint
from model.detect import PointGrid, ask_grid, result_of
from model.device import Placement
from model.network import Network
from model.proposer import point_grid
from model.renderer.shelves import Shelf, render_shelf
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
def prompted(headless: Checkpoint) -> Iterator[Engine]:
    engine = engine_of(headless)
    engine.wait_ready(120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def bundled() -> Iterator[Engine]:
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    engine.wait_ready(120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return render_shelf(21, (1600, 1200))


def test_a_checkpoint_without_a_head_is_prompted_with_the_boxes_of_the_bundled_one(
    bundled: Engine, prompted: Engine, shelf: Shelf
) -> None:
    photo = Photo(pixels=shelf.photo_rgb)
    detected, refined = bundled.preannotate(photo), prompted.preannotate(photo)
    overlap = iou_matrix(refined.boxes_xyxy, detected.boxes_xyxy)
    assert 0.9 * len(detected) <= len(refined) <= len(detected)
    assert overlap.max(1).min() >= 0.5
    assert not np.isclose(overlap.max(1), 1).all(), "no box was changed"
    assert refined.scores == pytest.approx(detected.scores[overlap.argmax(1)])
    assert (iou_matrix(refined.boxes_xyxy, shelf.boxes_xyxy).max(0) > 0.5).mean() > 0.6


def test_the_threshold_is_that_of_the_detector(bundled: Engine, prompted: Engine) -> None:
    assert prompted.score_threshold == bundled.score_threshold > 0


def test_clicks_are_answered_by_the_checkpoint_itself_without_the_detectors_boxes(
    prompted: Engine, shelf: Shelf
) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 23, axis=1))
    middles = (shelf.boxes_xyxy[:8, :2] + shelf.boxes_xyxy[:8, 2:]) / 2
    clicks = [Prompt(points_xy=middle[None], is_foreground=np.ones(1)) for middle in middles]
    before = first_boxes(prompted.refine(photo, clicks))
    prompted.preannotate(photo)
    assert first_boxes(prompted.refine(photo, clicks)) == pytest.approx(before, abs=1)


def test_versions_tell_where_the_boxes_came_from(headless: Checkpoint, prompted: Engine) -> None:
    versions = {prompted.version}
    for proposals in ("grid", "learned"):
        engine = engine_of(headless, proposals=proposals)
        engine.wait_ready(120)
        versions.add(engine.version)
        engine.close()
    assert len(versions) == 3
    assert all(version.startswith(headless.version) for version in versions)


@pytest.mark.parametrize(("proposals", "is_asked"), [("auto", True), ("grid", True), ("learned", False)])
def test_where_nothing_is_detected_the_grid_is_asked(
    headless: Checkpoint, monkeypatch: pytest.MonkeyPatch, proposals: str, is_asked: bool
) -> None:
    asked = []
    monkeypatch.setattr("model.detect.point_grid", lambda _, size: point_grid(2, size))
    monkeypatch.setattr("model.detect.ask_grid", lambda *given, **named: asked.append(1) or ask_grid(*given, **named))
    engine = engine_of(headless, proposals=proposals)
    engine.preannotate(GREY)
    engine.close()
    assert bool(asked) is is_asked


def test_the_grid_asks_each_of_its_points_once_in_batches_that_the_device_holds(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(find_checkpoint("facings-nano", config=None, has_gpu=False), CPU)
    (features,) = network.encode(shelf.photo_rgb, [Tile(left=0, top=0, side=600, size=1024, level=1)])
    decode, asked = network.decode, []
    monkeypatch.setattr(
        network, "decode", lambda prompts, multimask: asked.append(prompts) or decode(prompts, multimask=multimask)
    )
    grid = PointGrid(points_per_side=6, min_score=0.6, min_stability=0.7)
    boxes, scores = result_of(ask_grid(network, features, grid))
    points = [prompt.points_xy[0].tolist() for batch in asked for prompt in batch]
    assert sorted(points) == sorted(point_grid(6, 1024).tolist())
    assert max(map(len, asked)) == CPU.decode_batch
    assert len(boxes) == len(scores) > 0
    assert (scores > 0.6).all()


@pytest.fixture(scope="module")
def panorama() -> list[Shelf]:
    """Photos of shelves, to be joined side by side."""
    return [render_shelf(seed, (900, 900), facing_px=60) for seed in range(40, 45)]


def joined(shelves: list[Shelf], axis: int) -> tuple[Photo, np.ndarray]:
    """One photo of all shelves with their boxes: side by side (axis 1), or one above the other (axis 0)."""
    step = np.float32([0, 900, 0, 900] if axis == 0 else [900, 0, 900, 0])
    boxes = np.concatenate([shelf.boxes_xyxy + i * step for i, shelf in enumerate(shelves)])
    return Photo(pixels=np.concatenate([shelf.photo_rgb for shelf in shelves], axis=axis)), boxes


def found_share(found: np.ndarray, truth: np.ndarray) -> float:
    return float((iou_matrix(found, truth).max(0) > 0.5).mean())


@pytest.mark.parametrize("axis", [1, 0], ids=["landscape", "portrait"])
def test_a_panorama_has_about_as_many_facings_as_its_parts(bundled: Engine, panorama: list[Shelf], axis: int) -> None:
    photo, truth = joined(panorama, axis)
    alone = [bundled.preannotate(Photo(pixels=shelf.photo_rgb)) for shelf in panorama]
    found = bundled.preannotate(photo)
    assert sum(map(len, alone)) > 100
    assert 0.8 <= len(found) / sum(map(len, alone)) <= 1.25
    shares = [found_share(one.boxes_xyxy, shelf.boxes_xyxy) for one, shelf in zip(alone, panorama, strict=True)]
    assert found_share(found.boxes_xyxy, truth) > 0.9 * np.mean(shares)


def test_a_checkpoint_without_a_head_finds_the_facings_of_a_panorama_too(
    bundled: Engine, prompted: Engine, panorama: list[Shelf]
) -> None:
    photo, _ = joined(panorama, axis=1)
    assert len(prompted.preannotate(photo)) > 0.8 * len(bundled.preannotate(photo))


def test_clicks_on_a_panorama_give_the_boxes_of_their_objects(bundled: Engine, panorama: list[Shelf]) -> None:
    photo, truth = joined(panorama, axis=1)
    boxes = truth[::9]
    clicks = [Prompt(points_xy=box.reshape(1, 2, 2).mean(1), is_foreground=np.ones(1)) for box in boxes]
    found = bundled.refine(photo, clicks)
    assert np.median(iou_matrix(first_boxes(found), boxes).diagonal()) > 0.5


def test_boxes_beyond_the_limit_are_left_out_with_a_warning(
    headless: Checkpoint, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(headless, max_detections=7)
    assert len(engine.preannotate(Photo(pixels=shelf.photo_rgb))) <= 7
    engine.close()
    assert "only the best 7 kept: max_detections" in caplog.text
