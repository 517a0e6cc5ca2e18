"""The network whose trunk starts from published weights, and its training on pieces cut on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model import CheckpointError, Detections
from model.boxes import with_width
from model.checkpoints import BUNDLED_CONFIG, calibrated_threshold, excess_width, find_checkpoint, read_weights
from model.network import PIXEL_DEVIATION, PIXEL_MEAN
from model.proposer import ProposalHead
from model.quality import Truth
from model.renderer.shelves import render_shelf
from model.sam2_module import build_module, load_module, load_weights
from model.training.losses import centre_loss, quality_loss
from model.training.pictures import Pictures, Pieces, dense_batch, prompt_batch, relit_batch
from model.training.pretraining import (
    Learner,
    PretrainOptions,
    RealPhoto,
    _Run,
    cut_piece,
    joined,
    known_of,
    load_encoder,
    pretrain,
    pseudo_labels,
    widened,
)
from model.training.render_pool import RenderPool
from model.training.targets import UNKNOWN, dense_targets
from model.trunk import AdaptedTrunk, EfficientNetLite

DEPTHS, WIDTHS = [1, 1, 1, 1, 1, 1, 1], [8, 8, 8, 8, 8, 8, 8]
CPU = torch.device("cpu")


def lite1() -> EfficientNetLite:
    encoder: EfficientNetLite = build_module(BUNDLED_CONFIG).sam.image_encoder.trunk.encoder
    return encoder


def kept_pictures(count: int = 2, side_px: int = 192) -> Pictures:
    pictures = Pictures(count, side_px, CPU)
    seed = 0
    while len(pictures) < count:
        shelf = render_shelf(seed, (side_px, side_px), facing_px=30)
        ids = torch.from_numpy(shelf.instance_ids.astype(np.int16))
        pictures.add(torch.from_numpy(shelf.photo_rgb), ids, torch.from_numpy(shelf.boxes_xyxy))
        seed += 1
    return pictures


def test_the_trunk_has_four_maps_at_the_strides_that_sam2_expects() -> None:
    trunk = AdaptedTrunk(depths=DEPTHS, widths=WIDTHS, channels=[8, 12, 16, 20], blocks=[0, 1, 1, 1]).eval()
    maps = trunk(torch.zeros(1, 3, 64, 64))
    assert [tuple(level.shape[1:]) for level in maps] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    assert trunk.channel_list == [20, 16, 12, 8]


def test_a_trunk_refuses_a_wrong_number_of_levels() -> None:
    with pytest.raises(ValueError, match="expected 4 channels"):
        AdaptedTrunk(depths=DEPTHS, widths=WIDTHS, channels=[8, 8], blocks=[1, 1])
    with pytest.raises(ValueError, match="expected 7 depths"):
        EfficientNetLite([1, 1], [8, 8])


def test_published_weights_are_taken_by_their_order_and_expect_their_own_normalisation() -> None:
    torch.manual_seed(0)
    published, own = EfficientNetLite(DEPTHS, WIDTHS).eval(), EfficientNetLite(DEPTHS, WIDTHS).eval()
    tensors = {f"other.name.{index}": value for index, value in enumerate(published.state_dict().values())}
    load_encoder(own, {**tensors, "head.weight": torch.zeros(1000)})
    pixels = torch.randint(0, 256, (1, 3, 64, 64)).float()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_DEVIATION))
    with torch.no_grad():
        wanted = published.stem((pixels - 127) / 128)
        got = own.stem((pixels / 255 - mean) / deviation)
    # Only the first row and column see the padding, which is grey there and the mean colour here.
    assert torch.allclose(wanted[..., 1:, 1:], got[..., 1:, 1:], atol=1e-4)


def test_weights_of_another_encoder_are_refused() -> None:
    other = EfficientNetLite(DEPTHS, [16, *WIDTHS[1:]])
    with pytest.raises(CheckpointError, match="trunk weights: expected the"):
        load_encoder(EfficientNetLite(DEPTHS, WIDTHS), other.state_dict())


def test_the_network_answers_alike_with_its_batch_norms_folded(tmp_path: Path) -> None:
    module = build_module(BUNDLED_CONFIG)
    options = PretrainOptions(out=tmp_path, encoder_weights=tmp_path, minutes=1, device="cpu")
    Learner(module, options).export(tmp_path / "some.safetensors", {})
    checkpoint = find_checkpoint(str(tmp_path / "some.safetensors"), config=None, has_gpu=False)
    folded = load_module(checkpoint)
    plain = build_module(checkpoint.config)
    load_weights(plain, read_weights(checkpoint.weights), "some")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted, got = plain.eval().encoded(images), folded.encoded(images)
    assert wanted.head is not None
    assert got.head is not None
    assert torch.allclose(wanted.embedding, got.embedding, atol=1e-3)
    assert torch.allclose(wanted.head[0], got.head[0], atol=1e-3)


def test_a_box_that_fits_badly_loses_score_by_the_power_of_its_quality() -> None:
    head = ProposalHead(4, 4, quality_power=0.5).eval()
    features = torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        centre, _, quality = head.answers(features)
        logits, _ = head(features)
    assert quality is not None
    assert torch.allclose(logits.sigmoid(), (centre.sigmoid() * quality.sigmoid()).sqrt(), atol=1e-5)
    assert ProposalHead(4, 4).quality is None


def test_quality_is_learned_from_the_overlap_of_the_boxes() -> None:
    truth = torch.tensor([0.0, 0, 10, 10]).view(1, 1, 1, 4)
    half = torch.tensor([0.0, 0, 10, 5]).view(1, 1, 1, 4)
    weight = torch.ones(1, 1, 1)
    guesses = {
        value: quality_loss(torch.full((1, 1, 1), value), half, truth, weight).item() for value in (-2.0, 0.0, 2.0)
    }
    assert guesses[0.0] < min(guesses[-2.0], guesses[2.0])


def test_what_is_unknown_costs_nothing() -> None:
    logits, target = torch.full((1, 4, 4), 5.0), torch.zeros(1, 4, 4)
    target[0, 0, 0] = 1
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert centre_loss(logits, target, known) < 0.01 < centre_loss(logits, target)


def test_pieces_show_facings_where_their_boxes_are() -> None:
    torch.manual_seed(1)
    pieces = kept_pictures().pieces(6, 128)
    checked = 0
    for row in range(6):
        for box, is_box, number in zip(pieces.boxes_xyxy[row], pieces.is_box[row], pieces.numbers[row], strict=True):
            if is_box:
                ys, xs = (pieces.ids[row] == number).nonzero(as_tuple=True)
                seen = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert (seen - box).abs().max() <= 3
                checked += 1
    assert checked > 10


def test_targets_of_a_batch_are_those_of_single_pictures() -> None:
    torch.manual_seed(2)
    pieces = kept_pictures().pieces(3, 128)
    batch = dense_batch(pieces)
    for row in range(3):
        wanted = dense_targets(pieces.boxes_xyxy[row][pieces.is_box[row]].numpy(), pieces.ids[row].numpy())
        assert (batch.centre[row] == 1).sum() == (wanted.centre == 1).sum()
        assert np.abs(batch.centre[row].numpy() - wanted.centre).mean() < 0.01
        both = (batch.weight[row].numpy() > 0) & (wanted.weight > 0)
        assert both.sum() >= 0.8 * (wanted.weight > 0).sum()
        agree = np.isclose(batch.boxes_xyxy[row].numpy()[both], wanted.boxes_xyxy[both], atol=1e-3).all(-1)
        assert agree.mean() > 0.95
    assert bool(batch.is_known.all())


def test_prompts_of_a_batch_point_at_what_they_name() -> None:
    torch.manual_seed(3)
    pieces = kept_pictures().pieces(4, 128)
    kinds = set()
    for _ in range(6):
        rows, prompts = prompt_batch(pieces, 4, torch.ones(4, dtype=torch.bool))
        for index in range(len(rows)):
            for (x, y), label in zip(prompts["coords"][index], prompts["labels"][index], strict=True):
                kinds.add(int(label))
                if label in (0, 1):
                    share = prompts["masks"][index][int(y) // 4, int(x) // 4]
                    assert share > 0 if label == 1 else share == 0
    assert kinds == {-1, 0, 1, 2, 3}
    assert bool(prompts["is_click"].any())


def test_other_light_gives_valid_pictures() -> None:
    torch.manual_seed(4)
    images = torch.rand(8, 3, 64, 64)
    lit = relit_batch(images)
    assert lit.shape == images.shape
    assert 0 <= lit.min() <= lit.max() <= 1
    assert not torch.allclose(lit, images)


def test_a_picture_without_facings_is_not_kept() -> None:
    pictures = Pictures(2, 64, CPU)
    nothing = torch.zeros(64, 64, dtype=torch.int16)
    assert not pictures.add(torch.zeros(64, 64, 3, dtype=torch.uint8), nothing, torch.zeros(0, 4))
    assert len(pictures) == 0


def test_sure_boxes_teach_and_unsure_ones_are_left_out() -> None:
    boxes = np.array([[0, 0, 20, 20], [40, 0, 60, 20]], np.float32)
    ids, kept = pseudo_labels(boxes, np.array([True, False]), 64)
    assert kept.tolist() == [[0, 0, 20, 20]]
    assert set(ids.unique().tolist()) == {UNKNOWN, 0, 1}
    assert (ids[:20, 40:60] == UNKNOWN).all()


def test_a_piece_of_a_photo_shows_what_was_found_there() -> None:
    photo = np.zeros((600, 800, 3), np.uint8)
    photo[200:300, 300:400] = 255
    found = Detections(boxes_xyxy=np.float32([[300, 200, 400, 300]]), scores=np.float32([0.95]))
    rng, seen = np.random.default_rng(0), 0
    for _ in range(20):
        piece = cut_piece(photo, found, 256, rng)
        for x0, y0, x1, y1 in piece.boxes_xyxy.round().int().tolist():
            assert piece.pixels[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() > 200
            assert (piece.ids[y0:y1, x0:x1] == 1).all()
            seen += 1
    assert seen


def test_known_boxes_are_sure_and_areas_that_nobody_boxed_teach_nothing() -> None:
    photo = np.zeros((300, 400, 3), np.uint8)
    truth = Truth(size_wh=(400, 300), boxes_xyxy=[[100, 50, 150, 150]], crowds_xyxy=[[200, 50, 300, 150]])  # type: ignore[arg-type]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        piece = cut_piece(photo, known_of(truth), 256, rng)
        assert len(piece.boxes_xyxy) <= 1
        seen |= set(piece.ids.unique().tolist())
    assert seen == {UNKNOWN, 0, 1}


def test_a_large_photo_gets_smaller_with_its_boxes() -> None:
    truth = Truth(size_wh=(400, 200), boxes_xyxy=[[100, 50, 200, 150]], crowds_xyxy=[[0, 0, 40, 20]])  # type: ignore[arg-type]
    photo = RealPhoto(pixels=np.zeros((200, 400, 3), np.uint8), truth=truth)
    smaller = photo.at_most(100)
    assert smaller.pixels.shape == (50, 100, 3)
    assert smaller.truth is not None
    assert smaller.truth.size_wh == (100, 50)
    assert smaller.truth.boxes_xyxy.tolist() == [[25, 12.5, 50, 37.5]]
    assert smaller.truth.crowds_xyxy.tolist() == [[0, 0, 10, 5]]
    assert photo.at_most(1000).pixels.shape == photo.pixels.shape


def test_photos_teach_boxes_that_are_as_much_too_wide_as_those_that_are_narrowed_afterwards() -> None:
    torch.manual_seed(6)
    pieces = kept_pictures().pieces(2, 128)
    boxes = widened(pieces, torch.tensor([False, True]), 0.05).boxes_xyxy
    assert torch.equal(boxes[0], pieces.boxes_xyxy[0])
    assert np.allclose(with_width(boxes[1].numpy(), 0.95), pieces.boxes_xyxy[1].numpy(), atol=1e-3)
    assert not torch.allclose(boxes[1], pieces.boxes_xyxy[1])


def test_batches_with_other_numbers_of_boxes_are_joined() -> None:
    torch.manual_seed(5)
    pictures = kept_pictures()
    first, second = pictures.pieces(2, 128), pictures.pieces(1, 64)
    second = type(second)(**{**vars(second), "images": first.images[:1], "ids": first.ids[:1]})
    both = joined(first, second)
    assert both.is_box.sum() == first.is_box.sum() + second.is_box.sum()
    assert len(both.images) == 3


def test_how_well_boxes_fit_is_learned_from_known_ones_and_not_from_a_teachers(tmp_path: Path) -> None:
    torch.manual_seed(8)
    options = PretrainOptions(out=tmp_path, minutes=1, device="cpu", piece_px=96, prompts_per_piece=1)
    learner = Learner(build_module(BUNDLED_CONFIG), options)
    pieces, photos = kept_pictures().pieces(2, 96), torch.zeros(2, dtype=torch.bool)
    rng = np.random.default_rng(0)
    assert learner.learn(pieces, photos, is_exact=~photos, done=0.5, rng=rng)["quality"] > 0
    assert learner.learn(pieces, photos, is_exact=photos, done=0.5, rng=rng)["quality"] == 0


def test_a_run_learns_from_renderers_and_from_photos_and_leaves_the_first_stages_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(7)
    published = lite1().state_dict()
    torch.save(published, tmp_path / "lite1.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    corners = np.mgrid[0:280:12, 0:180:14].reshape(2, -1).T
    truth = Truth(size_wh=(300, 200), boxes_xyxy=np.hstack([corners, corners + 10]).astype(np.float64))
    options = PretrainOptions(
        out=tmp_path / "run",
        encoder_weights=tmp_path / "lite1.pth",
        minutes=0.1,
        photos=[RealPhoto(pixels=pixels), RealPhoto(pixels=pixels, truth=truth)],
        device="cpu",
        processes=1,
        batch_size=5,
        piece_px=96,
        picture_px=128,
        kept_pictures=8,
        waits_for=2,
        pieces_per_photo=2,
        report_every=1,
    )
    lines: list[dict[str, float]] = []
    path = pretrain(options, lines.append)
    assert any(line.get("facings_on_them") for line in lines)
    assert any({"centre", "quality", "mask"} <= line.keys() for line in lines)
    checkpoint = find_checkpoint(str(path), config=None, has_gpu=False)
    assert excess_width(checkpoint) == 0.05, "the bundled teacher's"
    assert calibrated_threshold(checkpoint) is None, "nothing was measured for weights that begin anew"
    module = build_module(checkpoint.config)
    load_weights(module, read_weights(path), "learned")
    start = lite1()
    load_encoder(start, published)
    learned: EfficientNetLite = module.sam.image_encoder.trunk.encoder
    for number in range(3):
        for mine, theirs in zip(
            learned.stages[number].state_dict().values(), start.stages[number].state_dict().values(), strict=True
        ):
            assert torch.allclose(mine.float(), theirs.float(), atol=1e-2)


def test_known_photos_teach_however_few_they_are(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    truth = Truth(size_wh=(64, 64), boxes_xyxy=np.array([[8.0, 8, 40, 40]]))
    photos = [RealPhoto(pixels=pixels, truth=truth), *[RealPhoto(pixels=pixels)] * 60]
    sizes = {"picture_px": 64, "piece_px": 32, "batch_size": 8, "kept_pictures": 8}
    options = PretrainOptions(out=tmp_path, minutes=1, photos=photos, device="cpu", real_share=0.5, **sizes)  # type: ignore[arg-type]
    run = _Run(options, lambda _: None)
    assert run.score_threshold == 0.85, "that of the bundled weights, which it begins with"
    counts: list[tuple[int, int]] = []

    def learn(pieces: Pieces, has_masks: torch.Tensor, is_exact: torch.Tensor, *_: object) -> dict[str, torch.Tensor]:
        counts.append((int(has_masks.sum()), int(is_exact.sum())))
        return {}

    run.learner.learn = learn  # type: ignore[method-assign, assignment]
    for pictures, count in ((run.rendered, 8), (run.known, 1), (run.found, 60)):
        for _ in range(count):
            ids = torch.ones(64, 64, dtype=torch.int16)
            pictures.add(torch.zeros(64, 64, 3, dtype=torch.uint8), ids, torch.tensor([[8.0, 8, 40, 40]]))
    for _ in range(200):
        run.step(0.5)
    assert {rendered for rendered, _ in counts} == {4}
    assert 0 < sum(exact - rendered for rendered, exact in counts) < 40


def test_the_renderers_hand_over_pictures_with_their_labels() -> None:
    with RenderPool(processes=1, side_px=96, seed=0, textures=None) as pool:
        picture = next(pool.ready(None))
        assert picture.pixels.shape == (96, 96, 3)
        assert picture.ids.max() == len(picture.boxes_xyxy)
