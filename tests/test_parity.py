"""The grid finds what sam2's own mask generator finds, and prompts give the boxes of sam2's own predictor, on the same
weights: the bundled ones without what this project adds to SAM 2, and random ones of an official config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import pytest
import torch
from official import NETWORKS, with_random_weights

from model import EngineOptions, Photo, Prompt, Sam2Engine, tiling
from model.boxes import cells_inside, iou_matrix
from model.checkpoints import BUNDLED, Checkpoint, find_checkpoint, read_weights
from model.detect import PointGrid, ask_grid, result_of
from model.device import Placement
from model.masks import choose_masks
from model.network import Network
from model.proposer import prior_box
from model.renderer.shelves import Shelf, render_shelf
from model.sam2_module import build_module, load_weights
from model.tiling import Tile

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in sam2

CPU = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
POINTS_PER_SIDE = 6
ROUNDING = 0.01  # of scores: a tile is resized to whole grey levels, upstream's picture to fractions of them


@pytest.fixture(scope="module", params=["headless", *NETWORKS])
def checkpoint(
    request: pytest.FixtureRequest, headless: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    if request.param == "headless":
        return headless
    return with_random_weights(request.param, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def sam(checkpoint: Checkpoint) -> torch.nn.Module:
    return upstream_of(checkpoint)


@pytest.fixture(scope="module")
def thresholds(headless: Checkpoint, checkpoint: Checkpoint) -> tuple[float, float]:
    """Of predicted IoU and stability, such that some masks pass."""
    return (0.12, 0.3) if checkpoint is headless else (0.43, 0.0)


@pytest.fixture(scope="module")
def generated(sam: torch.nn.Module, thresholds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, boxes (half-open) and predicted IoU of SAM2AutomaticMaskGenerator."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    photo = render_shelf(3, (768, 768), facing_px=90).photo_rgb
    generator = SAM2AutomaticMaskGenerator(
        sam,
        points_per_side=POINTS_PER_SIDE,
        pred_iou_thresh=thresholds[0],
        stability_score_thresh=thresholds[1],
        box_nms_thresh=1.0,  # all of them
    )
    answers = generator.generate(photo)
    x, y, width, height = np.array([answer["bbox"] for answer in answers], np.float32).T
    boxes = np.stack([x, y, x + width + 1, y + height + 1], 1)  # its corners are the outermost pixels
    return photo, boxes, np.array([answer["predicted_iou"] for answer in answers], np.float32)


@pytest.mark.parametrize("at_full_resolution", [True, False], ids=["full resolution", "fast reading"])
def test_the_grid_gives_what_sam2s_own_generator_gives(
    checkpoint: Checkpoint, generated, thresholds: tuple[float, float], at_full_resolution: bool
) -> None:
    network = Network(checkpoint, CPU)
    photo, wanted_boxes, wanted_scores = generated
    grid = PointGrid(points_per_side=POINTS_PER_SIDE, min_score=thresholds[0], min_stability=thresholds[1])
    tile = Tile(left=0, top=0, side=768, size=1024, level=0)
    (features,) = network.encode(photo, [tile], in_float=at_full_resolution)
    boxes, scores = result_of(ask_grid(network, features, grid, at_full_resolution=at_full_resolution))
    boxes = tile.to_photo(boxes)
    assert len(wanted_boxes) >= POINTS_PER_SIDE**2
    overlap = iou_matrix(wanted_boxes, boxes).max(1)
    if at_full_resolution:
        assert len(boxes) == len(wanted_boxes)
        assert np.sort(scores) == pytest.approx(np.sort(wanted_scores), abs=1e-3)
        assert (overlap >= 0.99).mean() >= 0.99
    else:
        assert np.median(overlap) >= 0.98


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.choose_placement", lambda _: CPU)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt with the tile that the engine answers it from, and the prior that the bundled checkpoint gives it."""

    prompt: Prompt
    tile: Tile
    prior_xyxy: np.ndarray | None


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", ["box", "click"])
def test_the_bundled_checkpoint_refines_as_sam2s_own_predictor(shelf: Shelf, kind: str) -> None:
    """Upstream is given the engine's tile as a picture, and what the engine knows beforehand as a mask prompt."""
    photo, bundled = Photo(pixels=shelf.photo_rgb), find_checkpoint(BUNDLED, config=None, has_gpu=False)
    asked = questions(shelf, photo, Network(bundled, CPU), kind)
    engine = Sam2Engine(EngineOptions(checkpoint=BUNDLED, device="cpu"))
    answers = engine.refine(photo, [one.prompt for one in asked], want_masks=True)
    engine.close()
    assert [len(answer) for answer in answers] == [1] * len(asked)
    boxes = np.concatenate([answer.boxes_xyxy for answer in answers])
    masks, scores = zip(*upstreams_masks(upstream_of(bundled), photo, asked), strict=True)
    wanted = np.stack([box_of(part_asked_for(mask, one.prompt)) for mask, one in zip(masks, asked, strict=True)])
    enlarged = np.stack([box_of(mask.in_photo(photo.size_wh)) for answer in answers for mask in answer.masks or ()])
    assert np.concatenate([answer.scores for answer in answers]) == pytest.approx(scores, abs=ROUNDING)
    assert (iou_matrix(enlarged, wanted).diagonal() >= 0.99).mean() >= 0.95  # a thin part is there or not by rounding
    assert np.median(iou_matrix(boxes, wanted).diagonal()) >= 0.98


@pytest.mark.usefixtures("in_float32")
def test_a_checkpoint_of_sam2_scores_prompts_as_its_own_predictor(
    checkpoint: Checkpoint, sam: torch.nn.Module, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of random weights fall into thousands of parts, so that boxes say little; test_network compares them.

    What the network saw is compared, before it is judged whether that holds its prompt.
    """
    monkeypatch.setattr("model.refine.answer_to", lambda _prompt, found, *_: found)
    photo = Photo(pixels=shelf.photo_rgb)
    asked = questions(shelf, photo, None, "box")[:1] + questions(shelf, photo, None, "click")[:1]
    options = EngineOptions(checkpoint=str(checkpoint.weights), checkpoint_config=checkpoint.config, device="cpu")
    engine = Sam2Engine(options)
    answers = engine.refine(photo, [one.prompt for one in asked])
    engine.close()
    wanted = [score for _, score in upstreams_masks(sam, photo, asked)]
    assert np.concatenate([answer.scores for answer in answers]) == pytest.approx(wanted, abs=ROUNDING)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return render_shelf(5, (1400, 1400), facing_px=130)


def upstream_of(checkpoint: Checkpoint) -> torch.nn.Module:
    """What sam2 itself makes of a checkpoint's weights."""
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(checkpoint.weights), checkpoint.name)
    return cast(torch.nn.Module, module.sam.eval())


def questions(shelf: Shelf, photo: Photo, bundled: Network | None, kind: str) -> list[Asked]:
    """Prompts on facings that the engine answers from a tile within the photo."""
    asked, encoded = [], {}
    for box in shelf.boxes_xyxy:
        middle = (box[:2] + box[2:])[None] / 2
        if kind == "box":
            prompt, tile = Prompt(box_xyxy=box), tiling.tile_for_box(box, photo.size_wh, 1024)
        else:
            prompt = Prompt(points_xy=middle, is_foreground=np.ones(1, np.bool_))
            tile = tiling.tile_for_points(middle, photo.size_wh, 1024)
        if max(tile.left, tile.top) + tile.side > min(photo.size_wh):
            continue
        prior = None
        if bundled is not None:
            encoded[tile] = encoded.get(tile) or bundled.encode(photo.pixels, [tile])[0]
            proposals = encoded[tile].proposals
            assert proposals is not None
            if prompt.box_xyxy is not None:
                prior = tile.to_tile(box.reshape(2, 2)).reshape(4)
            else:
                prior = prior_box(proposals.boxes_xyxy, proposals.scores, tile.to_tile(prompt.points_xy))
        asked.append(Asked(prompt=prompt, tile=tile, prior_xyxy=prior))
    assert len(asked) >= 20
    return sorted(asked, key=lambda one: repr(one.tile))


def upstreams_masks(sam: torch.nn.Module, photo: Photo, asked: list[Asked]) -> list[tuple[np.ndarray, float]]:
    """For each prompt the mask in the photo, bool `[H, W]`, and its predicted IoU."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor, answers, seen = SAM2ImagePredictor(sam), [], None
    for one in asked:
        tile, prompt = one.tile, one.prompt
        window = (slice(tile.top, tile.top + tile.side), slice(tile.left, tile.left + tile.side))
        if tile != seen:
            seen = tile
            predictor.set_image(photo.pixels[window].copy())
        origin = np.array([tile.left, tile.top], np.float32)
        prior = None
        if one.prior_xyxy is not None:
            prior = np.where(cells_inside(torch.from_numpy(one.prior_xyxy)[None], 256, 4), 8.0, -8.0)
        planes, scores, _ = predictor.predict(
            point_coords=prompt.points_xy - origin if len(prompt.points_xy) else None,
            point_labels=prompt.is_foreground.astype(np.int32) if len(prompt.points_xy) else None,
            box=None if prompt.box_xyxy is None else (prompt.box_xyxy.reshape(2, 2) - origin).reshape(4),
            mask_input=prior,
            multimask_output=prompt.box_xyxy is None and prior is None,
        )
        boxes = np.stack([box_of(plane > 0) for plane in planes])
        best = int(choose_masks(torch.from_numpy(boxes)[None], torch.from_numpy(scores)[None], tile.side)[0])
        mask = np.zeros(photo.pixels.shape[:2], np.bool_)
        mask[window] = planes[best] > 0
        answers.append((mask, float(scores[best].clip(0, 1))))
    return answers


def part_asked_for(mask: np.ndarray, prompt: Prompt) -> np.ndarray:
    """The connected part under the click, or the one with most pixels in the box; else the largest."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 2:
        return mask
    if prompt.box_xyxy is None:
        x, y = prompt.points_xy[0].astype(int)
        label = labels[y, x]
    else:
        x0, y0, x1, y1 = prompt.box_xyxy.round().astype(int)
        inside = np.bincount(labels[y0:y1, x0:x1].ravel(), minlength=count)[1:]
        label = 1 + inside.argmax() if inside.any() else 0
    return labels == (label or 1 + stats[1:, cv2.CC_STAT_AREA].argmax())


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
