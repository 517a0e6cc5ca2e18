"""Training on a tiny setting: targets mean what they say, the loss falls, a killed run goes on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from backend.errors import CommandError
from model.checkpoints import (
    BUNDLED,
    BUNDLED_WEIGHTS,
    calibrated_threshold,
    excess_width,
    find_checkpoint,
    read_weights,
)
from model.device import Placement
from model.network import Network
from model.proposer import STRIDE, boxes_of_cells
from model.quality import Truth
from model.renderer.shelves import render_shelf
from model.sam2_module import build_module, load_module
from model.training.loop import Every, corrections, losses_of, on_canvas, train
from model.training.losses import (
    box_loss,
    centre_loss,
    mask_losses,
    projection_losses,
    window_weights,
)
from model.training.options import TrainOptions, for_few_photos
from model.training.samples import (
    BEYOND_RGB,
    MAX_STRETCH,
    MAX_ZOOM,
    LabelledPhoto,
    LabelledPhotos,
    Samples,
    cropped,
    mirrored,
    relit,
    seen_scale,
)
from model.training.targets import UNKNOWN, dense_targets, prompt_targets
from scripts.labels import KnownPhoto, KnownPhotos
from scripts.train import PRETRAINING_PX, Printer, pretraining_photos

TINY = TrainOptions(out=Path("run"), batch_size=2, prompts_per_picture=1, picture_px=96, workers=0)


def test_no_facings_give_empty_targets() -> None:
    targets = dense_targets(np.zeros((0, 4), np.float32), np.zeros((64, 64), np.int32))
    assert targets.centre.max() == targets.weight.max() == 0


def test_each_facing_has_one_centre_and_cells_that_share_a_weight_of_one() -> None:
    boxes = np.array([[0, 0, 30, 60], [100, 40, 180, 90], [30, 0, 60, 60]], np.float32)
    targets = dense_targets(boxes, np.zeros((128, 256), np.int32))
    rows, columns = np.nonzero(targets.centre == 1)
    assert len(rows) == 3
    assert sorted(map(tuple, targets.boxes_xyxy[rows, columns].tolist())) == sorted(map(tuple, boxes.tolist()))
    assert targets.weight.sum() == pytest.approx(3, abs=1e-3)


def test_perfect_answers_cost_nothing() -> None:
    boxes = np.array([[10, 10, 40, 90], [60, 20, 100, 80]], np.float32)
    targets = dense_targets(boxes, np.zeros((128, 128), np.int32))
    truth, weight = torch.from_numpy(targets.boxes_xyxy)[None], torch.from_numpy(targets.weight)[None]
    assert box_loss(truth, truth, weight).item() == pytest.approx(0, abs=1e-5)
    centre = torch.from_numpy(targets.centre)[None]
    sure = torch.where(centre == 1, 20.0, -20.0)
    assert centre_loss(sure, centre).item() < 0.01 < centre_loss(-sure, centre).item()
    mask = torch.zeros(1, 32, 32)
    mask[0, 4:20, 4:12] = 1
    window = window_weights(torch.tensor([[16.0, 16.0, 48.0, 80.0]]), mask, 4)
    fit, guess = mask_losses((mask * 2 - 1)[:, None] * 20, torch.ones(1, 1), mask, window)
    assert fit.item() == pytest.approx(0, abs=1e-2)
    assert guess.item() == pytest.approx(0, abs=1e-4)


def test_boxes_apart_cost_more_the_farther_apart_they_are() -> None:
    truth, weight = torch.tensor([0.0, 0.0, 10.0, 10.0]).view(1, 1, 1, 4), torch.ones(1, 1, 1)
    near, far = (box_loss(truth + torch.tensor([x, 0.0, x, 0.0]), truth, weight) for x in (20.0, 50.0))
    assert 1 < near < far < 2


def test_distances_of_a_cell_are_edges_around_its_centre() -> None:
    distances = torch.tensor([3.0, 2.0, 5.0, 7.0]).view(1, 4, 1, 1).expand(1, 4, 2, 3)
    assert boxes_of_cells(distances)[0, 1, 2].tolist() == [7, 4, 15, 13]


def test_prompts_point_at_what_they_name() -> None:
    shelf = render_shelf(5, (256, 256), facing_px=40)
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(12):
        targets = prompt_targets(shelf.boxes_xyxy, shelf.instance_ids, 50, rng)
        for coords, labels, box in zip(targets.coords, targets.labels, targets.boxes_xyxy, strict=True):
            number = 1 + int((shelf.boxes_xyxy == box).all(1).argmax())
            for (x, y), label in zip(coords, labels, strict=True):
                kinds.add(int(label))
                if label in (0, 1):
                    assert (shelf.instance_ids[int(y), int(x)] == number) == (label == 1)
    assert kinds == {-1, 0, 1, 2, 3}
    assert targets.masks.max() == 1
    assert targets.is_click.any()
    assert not targets.is_click.all()


def test_a_mirrored_shelf_is_the_same_shelf() -> None:
    shelf = render_shelf(6, (128, 96), facing_px=30)
    assert np.array_equal(mirrored(mirrored(shelf)).boxes_xyxy, shelf.boxes_xyxy)
    there = mirrored(shelf)
    for index, (x0, y0, x1, y1) in enumerate(there.boxes_xyxy.astype(int)):
        ys, xs = np.nonzero(there.instance_ids == index + 1)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


def test_other_light_keeps_what_is_bright_bright() -> None:
    pixels = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (4, 1, 3))
    lit = relit(pixels, np.random.default_rng(3))
    assert (np.diff(lit[0].astype(int), axis=0) >= 0).all()


def test_picture_i_of_a_seed_is_always_the_same() -> None:
    shelves = Samples(seed=0, picture_px=256, prompts_per_picture=1, tile_px=1024)
    once, again = (next(shelves.samples(4)) for _ in range(2))
    assert all(np.array_equal(once[name], again[name]) for name in once)


def test_a_piece_of_a_labelled_photo_shows_the_facings_where_its_boxes_say() -> None:
    shelf = render_shelf(8, (900, 700), facing_px=24)
    marked = np.zeros_like(shelf.photo_rgb)
    for number, (x0, y0, x1, y1) in enumerate(shelf.boxes_xyxy.astype(int), 1):
        marked[y0:y1, x0:x1] = (1 + number % 250, 1 + number % 250, 1 + number % 250)
    photo = LabelledPhoto(path=Path("marked"), boxes_xyxy=shelf.boxes_xyxy)
    rng = np.random.default_rng(2)
    for scale in (0.5, 0.8, 1.2):
        piece = cropped(marked, photo, 256, scale, rng)
        assert piece.photo_rgb.shape == (256, 256, 3)
        assert len(piece.boxes_xyxy) > 3
        assert np.median(piece.boxes_xyxy[:, 2] - piece.boxes_xyxy[:, 0]) == pytest.approx(24 * scale, rel=0.6)
        for number, box in enumerate(piece.boxes_xyxy, 1):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            if piece.instance_ids[y, x] == number:
                assert piece.photo_rgb[y, x].min() > 0
        assert set(np.unique(piece.instance_ids)) - {0} == set(range(1, len(piece.boxes_xyxy) + 1))


def test_areas_with_facings_that_nobody_boxed_teach_nothing(tmp_path: Path) -> None:
    boxes = np.array([[20, 20, 60, 100]], np.float32)
    crowds = np.array([[50, 10, 180, 190]], np.float32)
    photo = LabelledPhoto(path=tmp_path / "photo.npy", boxes_xyxy=boxes, crowds_xyxy=crowds)
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[10:190, 50:180] = 200  # the crowd, in white
    piece = mirrored(cropped(pixels, photo, 256, 1.28, np.random.default_rng(0)))
    is_crowd = cv2.erode((piece.photo_rgb.min(2) > 150).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert is_crowd.any()
    assert (piece.instance_ids[is_crowd] != 0).all()
    targets = dense_targets(piece.boxes_xyxy, piece.instance_ids)
    known = targets.is_known.repeat(STRIDE, 0).repeat(STRIDE, 1)
    assert not known[is_crowd & (piece.instance_ids == UNKNOWN)].any()
    assert targets.is_known[targets.centre == 1].all()
    assert known[(piece.instance_ids == 0) & ~is_crowd].mean() > 0.8
    sure_of_more = torch.full(targets.centre.shape, 9.0)[None]
    centre, is_known = torch.from_numpy(targets.centre)[None], torch.from_numpy(targets.is_known)[None]
    everywhere = torch.ones_like(is_known)
    assert centre_loss(sure_of_more, centre, is_known) < 0.7 * centre_loss(sure_of_more, centre, everywhere)


def test_the_detector_is_not_told_that_nothing_is_there_where_it_is_not_known() -> None:
    shelves = Samples(seed=0, picture_px=96, prompts_per_picture=0, tile_px=1024)
    sample = next(sample for index in range(9) for sample in shelves.samples(index))
    batch = {name: torch.from_numpy(np.asarray(value))[None] for name, value in sample.items()}
    module = load_module(find_checkpoint(BUNDLED, config=None, has_gpu=False)).eval()
    centre: list[float] = []
    for is_known in (True, False):
        batch["dense_is_known"] = torch.full_like(batch["dense_is_known"], is_known)
        with torch.no_grad():
            centre.append(float(losses_of(module, batch, canvas_offset=(0, 0), second_round=False)["centre"]))
    assert centre[1] < centre[0]


def test_pieces_of_photos_are_about_as_large_as_the_tiles_of_pre_annotation_show_them() -> None:
    rng = np.random.default_rng(0)
    scales = [seen_scale((3264, 2448), 1024, rng) for _ in range(50)]
    nearest = [min(abs(np.log(scale * 3264 * level / 1024)) for level in (1.0, 0.58)) for scale in scales]
    assert max(nearest) <= MAX_ZOOM + 0.01
    assert min(scales) < 0.36 < 0.5 < max(scales)


def test_photos_teach_boxes_that_are_as_much_too_wide_as_those_that_are_narrowed_afterwards(tmp_path: Path) -> None:
    shelf = render_shelf(9, (200, 200), facing_px=30)
    np.save(tmp_path / "photo.npy", shelf.photo_rgb)
    labelled = LabelledPhotos(
        photos=(LabelledPhoto(path=tmp_path / "photo.npy", boxes_xyxy=shelf.boxes_xyxy),), read=np.load
    )
    ratios: dict[bool, set[float]] = {True: set(), False: set()}
    for index in range(8):
        exact, wide = (
            Samples(
                seed=0, picture_px=96, prompts_per_picture=1, tile_px=1024, labelled=labelled, excess_width=excess
            ).samples(index)
            for excess in (0.0, 0.2)
        )
        for one, other in zip(exact, wide, strict=True):
            row, column = np.argwhere(one["dense_centre"] == 1)[0]
            widths = [np.ptp(sample["dense_boxes_xyxy"][row, column, ::2]) for sample in (one, other)]
            assert np.array_equal(one["prompt_boxes_xyxy"], other["prompt_boxes_xyxy"])
            ratios[bool(one["has_masks"])].add(round(float(widths[1] / widths[0]), 3))
    assert ratios == {True: {1.0}, False: {1.25}}


def test_a_photo_smaller_than_the_picture_is_filled_up_in_grey() -> None:
    photo = LabelledPhoto(path=Path("small"), boxes_xyxy=np.array([[5, 5, 25, 35]], np.float32))
    piece = cropped(np.zeros((40, 60, 3), np.uint8), photo, 256, 1.5, np.random.default_rng(0))
    scale = 256 / 60  # at which the piece shows all of it
    assert piece.boxes_xyxy.tolist()[0] == pytest.approx(
        [5 * scale, 5 * scale, 25 * scale, 35 * scale], rel=MAX_STRETCH
    )
    assert tuple(piece.photo_rgb[-1, -1]) == BEYOND_RGB


def test_where_only_the_box_is_known_a_mask_has_to_reach_its_sides_and_not_beyond() -> None:
    box = torch.zeros(1, 32, 32)
    box[0, 8:24, 10:20] = 1
    weight = window_weights(torch.tensor([[40.0, 32.0, 80.0, 96.0]]), box, 4)
    cross = torch.full((1, 1, 32, 32), -20.0)
    cross[0, 0, 16, 10:20] = cross[0, 0, 8:24, 15] = 20
    too_far = cross.clone()
    too_far[0, 0, 16, 10:26] = 20
    too_short = cross.clone()
    too_short[0, 0, 8:14, 15] = -20
    fits, reaches, falls_short = (projection_losses(m, box, weight).item() for m in (cross, too_far, too_short))
    assert fits == pytest.approx(0, abs=1e-2)
    assert min(reaches, falls_short) > 0.05


def test_a_second_round_clicks_where_the_first_answer_is_wrong() -> None:
    target = torch.zeros(2, 16, 16)
    target[:, 4:8, 4:8] = 1
    answer = torch.where(target > 0, 5.0, -5.0)
    answer[0, 6:8, 4:8] = -5  # a part is missing
    answer[1, 8:10, 4:8] = 5  # a part of the neighbour
    for _ in range(5):
        points, labels = corrections(answer, target)
        assert labels.tolist() == [1, 0]
        assert 24 <= points[0, 1] < 32 <= points[1, 1] < 40


def test_a_first_answer_lies_on_the_tile_where_its_picture_lies() -> None:
    canvas = on_canvas(torch.full((1, 8, 8), 50.0), 256, (2, 3))
    ys, xs = torch.nonzero(canvas[0, 0] > 0, as_tuple=True)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (8, 12, 15, 19)
    assert canvas.max() == 32


def test_fine_tuning_learns_from_labelled_photos_and_the_measured_threshold_stays_with_the_weights(
    tmp_path: Path,
) -> None:
    shelf = render_shelf(9, (200, 200), facing_px=30)
    np.save(tmp_path / "photo.npy", shelf.photo_rgb)
    labelled = LabelledPhotos(
        photos=(LabelledPhoto(path=tmp_path / "photo.npy", boxes_xyxy=shelf.boxes_xyxy),), read=np.load
    )
    seen: list[bool] = []
    for index in range(8):
        tiny = Samples(seed=0, picture_px=96, prompts_per_picture=1, tile_px=1024, labelled=labelled)
        seen += [bool(sample["has_masks"]) for sample in tiny.samples(index)]
    assert {True, False} == set(seen)
    options = replace(TINY, out=tmp_path / "run", minutes=3 / 60, start_from=BUNDLED_WEIGHTS, labelled=labelled)
    path = train(options, lambda _: None, score=lambda _: {"dev_ap": 0.5, "score_threshold": 0.35}, clock=Clock())
    checkpoint = find_checkpoint(str(path), config=None, has_gpu=False)
    assert calibrated_threshold(checkpoint) == 0.35


def test_from_few_photos_a_detector_learns_without_prompts_and_keeps_width_threshold_and_a_share_of_what_it_was(
    tmp_path: Path,
) -> None:
    options = replace(for_few_photos(TINY), minutes=3 / 60, start_from=BUNDLED_WEIGHTS, learning_rate=1e-2)
    before = read_weights(BUNDLED_WEIGHTS)
    changes: dict[float, dict[str, float]] = {}
    for share in (0.0, 0.5, 1.0):
        path = train(replace(options, out=tmp_path / str(share), start_share=share), lambda _: None, clock=Clock())
        after = read_weights(path)
        weights = [name for name in before if not name.endswith("num_batches_tracked")]
        changes[share] = {name: float((after[name].float() - before[name].float()).norm()) for name in weights}
        made, bundled = (find_checkpoint(name, config=None, has_gpu=False) for name in (str(path), BUNDLED))
        assert excess_width(made) == excess_width(bundled) > 0
        assert calibrated_threshold(made) == calibrated_threshold(bundled) is not None
    head = "proposal_head.centre.weight"
    assert changes[0.5][head] == pytest.approx(changes[0.0][head] / 2, rel=0.05)
    assert changes[0.0][head] > 0
    assert not any(changes[1.0].values())
    assert not any(change for name, change in changes[0.0].items() if "sam_mask_decoder.transformer" in name)


def test_labelled_photos_without_any_box_teach_nothing() -> None:
    with pytest.raises(ValueError, match="at least one box"):
        LabelledPhotos(photos=(LabelledPhoto(path=Path("a"), boxes_xyxy=np.zeros((0, 4), np.float32)),), read=np.load)


class Clock:
    """Time that goes on by a second whenever it is read, so that a run has as many steps as it has seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def test_pretraining_takes_photos_with_and_without_known_boxes_and_names_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, size in (("known", (3200, 1600)), ("unlabelled", (40, 30))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", size).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "b.png").write_bytes(b"no photo")
    truth = Truth(size_wh=(3200, 1600), boxes_xyxy=np.array([[100.0, 200, 300, 400]]))
    entries = [
        KnownPhoto(number=place, path=tmp_path / "known" / name, truth=truth)
        for place, name in enumerate(["a.png", "b.png"])
    ]
    photos = pretraining_photos(tmp_path / "unlabelled", KnownPhotos(photos=tuple(entries)))
    assert [photo.pixels.shape for photo in photos] == [(30, 40, 3), (PRETRAINING_PX // 2, PRETRAINING_PX, 3)]
    assert photos[0].truth is None
    assert photos[1].truth is not None
    assert photos[1].truth.boxes_xyxy.tolist() == [[50, 100, 150, 200]]
    assert capsys.readouterr().err.count("b.png': expected a JPEG") == 2
    with pytest.raises(CommandError, match="none of 1 can be used"):
        pretraining_photos(None, KnownPhotos(photos=(entries[1],)))


def test_the_loss_falls_a_killed_run_goes_on_and_the_weights_load(tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []

    class Killed(Exception):
        pass

    def kill(report: dict[str, float]) -> None:
        reports.append(report)
        if len(reports) == 3:
            raise Killed

    options = replace(TINY, out=tmp_path, minutes=20 / 60, report_every=2, learning_rate=4e-3, save_every_s=0.0)
    with pytest.raises(Killed):
        train(options, kill, clock=Clock())
    path = train(replace(options, resume=True), reports.append, clock=Clock())
    steps = [report["step"] for report in reports]
    # The step whose report killed the run was not saved, the one before was.
    assert steps == [2, 4, 6, *range(6, 21, 2)]
    assert [report["minutes_left"] * 60 for report in reports] == pytest.approx([20 - step for step in steps])
    assert sum(report["loss"] for report in reports[-3:]) < sum(report["loss"] for report in reports[:3])
    checkpoint = find_checkpoint(str(path), config=None, has_gpu=False)
    assert checkpoint.config == "facings-nano"
    cpu = Placement(device=torch.device("cpu"), autocast=None, encode_batch=1, decode_batch=16, reason="test")
    assert Network(checkpoint, cpu).has_proposals


def test_a_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = train(replace(TINY, out=tmp_path, minutes=1 / 60), lambda _: None, clock=Clock())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_is_measured_before_it_begins_every_few_seconds_and_at_the_end(tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []
    options = replace(TINY, out=tmp_path, minutes=5 / 60, report_every=100, score_every_s=1.5)
    train(options, reports.append, score=lambda _: {"dev_ap": 0.5}, clock=Clock())
    assert [report["step"] for report in reports if "dev_ap" in report] == [0, 2, 4, 5]


def test_what_is_due_every_few_seconds_is_due_after_the_first_of_them_and_not_more_often() -> None:
    every = Every(10.0, now_s=100.0)
    assert [now_s for now_s in range(100, 140) if every.is_due(now_s)] == [111, 122, 133]


def test_a_run_prints_step_loss_and_time_left_and_what_it_began_and_ended_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer(clock=Clock())
    score = {"step": 0.0, "dev_ap50": 0.6, "dev_ar300": 0.4, "score_threshold": 0.3}
    progress = {"centre": 0.9, "loss": 2.5, "pictures_per_s": 12.3, "learning_rate": 1e-3}
    printer.report(score | {"dev_ap": 0.31, "dev_corrections_per_100": 80.0})
    for step in range(1, 16):
        printer.report(progress | {"step": step, "minutes_left": (15 - step) / 10})
    printer.report(score | {"step": 15.0, "dev_ap": 0.35, "dev_corrections_per_100": 70.0})
    printer.print_outcome()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 0",
        "step 1",
        "step 11",
        "step 15",
        "step 15",
        "before",
        "after",
    ]
    assert "loss 2.500 (centre 0.900), 12.3 pictures/s, 1 min 24 s left" in lines[1]
    assert "AP 0.310" in lines[-2]
    assert "AP 0.350" in lines[-1]
    assert "70.0 corrections per 100 facings at score 0.30" in lines[-1]


def test_a_small_picture_stands_at_its_place_of_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior box lies where the picture lies: moving both over the tile changes positions, not what is inside."""
    module = build_module("facings-nano").eval()
    seen: list[torch.Tensor] = []
    decoder = module.sam.sam_mask_decoder
    predict = decoder.predict_masks
    monkeypatch.setattr(
        decoder, "predict_masks", lambda **inputs: seen.append(inputs["dense_prompt_embeddings"]) or predict(**inputs)
    )
    with torch.no_grad():
        maps = module.features(torch.zeros(1, 3, 128, 128))
        for x, y in ((0, 0), (3, 5)):
            shift = torch.tensor([16.0 * x, 16.0 * y])
            module.all_masks(
                maps,
                torch.zeros(1, dtype=torch.long),
                torch.tensor([[[50.0, 60.0]]]) + shift,
                torch.ones(1, 1, dtype=torch.int32),
                *module.prior_masks(torch.tensor([[32.0, 32.0, 80.0, 96.0]]) + shift.repeat(2)),
                canvas_offset=(x, y),
            )
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0, :, 3, 3], seen[0][0, :, 0, 0])
