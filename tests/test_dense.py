"""All facings of a photo from a checkpoint without a proposal head: lent proposals, or the grid of sam2's generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import model.network
from model import Engine, EngineOptions, Photo, Prompt
from model.boxes import iou_matrix
from model.checkpoints import BUNDLED_WEIGHTS, OFFICIAL, Checkpoint, find_checkpoint, read_weights
from model.dense import PointGrid, ask_grid
from model.device import Placement
from model.network import Network, build_module, load_weights
from model.proposer import point_grid
from model.tiling import Tile
from model.training.shelves import Shelf, render_shelf

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
GREY = Photo(pixels=np.full((300, 400, 3), 128, np.uint8))


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The bundled weights without their proposal head: what an official checkpoint is like."""
    folder = tmp_path_factory.mktemp("headless")
    tree = OmegaConf.load(Path(model.network.__file__).with_name("facings_nano.yaml"))
    del tree["proposal_head"]
    OmegaConf.save(tree, folder / "headless.yaml")
    tensors = read_weights(BUNDLED_WEIGHTS)
    sam = {name.removeprefix("sam."): value.clone() for name, value in tensors.items() if name.startswith("sam.")}
    save_file(sam, folder / "headless.safetensors")
    return find_checkpoint(str(folder / "headless.safetensors"), config=str(folder / "headless.yaml"), has_gpu=False)


def engine_of(checkpoint: Checkpoint, **options: object) -> Engine:
    return Engine(
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
    bundled = Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
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
    monkeypatch.setattr("model.dense.point_grid", lambda _, size: point_grid(2, size))
    monkeypatch.setattr("model.dense.ask_grid", lambda *given, **named: asked.append(1) or ask_grid(*given, **named))
    engine = engine_of(headless, proposals=proposals)
    engine.preannotate(GREY)
    engine.close()
    assert bool(asked) is is_asked


@pytest.fixture(scope="module", params=["headless", "sam2.1_hiera_tiny"])
def grids(
    request: pytest.FixtureRequest, headless: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Network, object, float, float]:
    """A network, upstream's on the same weights, and thresholds of predicted IoU and stability that some masks pass."""
    if request.param == "headless":
        checkpoint, thresholds = headless, (0.12, 0.3)
    else:
        torch.manual_seed(1)
        config = OFFICIAL[request.param].config
        path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
        save_file(build_module(config).sam.state_dict(), path)
        checkpoint, thresholds = find_checkpoint(str(path), config=config, has_gpu=False), (0.43, 0.0)
    upstream = build_module(checkpoint.config)
    load_weights(upstream, read_weights(checkpoint.weights), checkpoint.name)
    return Network(checkpoint, CPU), upstream.sam.eval(), *thresholds


POINTS_PER_SIDE = 6


@pytest.fixture(scope="module")
def upstreams_answer(grids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, boxes (half-open) and predicted IoU of SAM2AutomaticMaskGenerator."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    _, sam, min_score, min_stability = grids
    photo = render_shelf(3, (768, 768), facing_px=90).photo_rgb
    generator = SAM2AutomaticMaskGenerator(
        sam,
        points_per_side=POINTS_PER_SIDE,
        pred_iou_thresh=min_score,
        stability_score_thresh=min_stability,
        box_nms_thresh=1.0,  # all of them
    )
    answers = generator.generate(photo)
    x, y, width, height = np.array([answer["bbox"] for answer in answers], np.float32).T
    boxes = np.stack([x, y, x + width + 1, y + height + 1], 1)  # its corners are the outermost pixels
    return photo, boxes, np.array([answer["predicted_iou"] for answer in answers], np.float32)


@pytest.mark.parametrize("at_full_resolution", [True, False], ids=["full resolution", "fast reading"])
def test_the_grid_gives_what_sam2s_own_generator_gives(grids, upstreams_answer, at_full_resolution: bool) -> None:
    network, _, min_score, min_stability = grids
    photo, wanted_boxes, wanted_scores = upstreams_answer
    grid = PointGrid(points_per_side=POINTS_PER_SIDE, min_score=min_score, min_stability=min_stability)
    tile = Tile(left=0, top=0, side=768, size=1024, level=0)
    (features,) = network.encode(photo, [tile])
    job = ask_grid(
        network, features, grid, timed=lambda _: contextlib.nullcontext(), at_full_resolution=at_full_resolution
    )
    while True:
        try:
            next(job)
        except StopIteration as end:
            boxes, scores = end.value
            break
    boxes = tile.to_photo(boxes)
    assert len(wanted_boxes) >= POINTS_PER_SIDE**2
    overlap = iou_matrix(wanted_boxes, boxes).max(1)
    if at_full_resolution:
        assert len(boxes) == len(wanted_boxes)
        assert np.sort(scores) == pytest.approx(np.sort(wanted_scores), abs=1e-3)
        assert (overlap >= 0.99).mean() >= 0.99
    else:
        assert np.median(overlap) >= 0.98
