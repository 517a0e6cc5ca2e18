"""The engine with the real bundled checkpoint: boxes that fit, one load, clicks from the cache, safe under threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes import first_boxes

import model.sam2_module
from model import DeadlineExceeded, Engine, EngineOptions, Lane, NotReady, Photo, Prompt, Sam2Engine, Stage
from model.boxes import iou_matrix
from model.renderer.shelves import Shelf, render_shelf
from model.tiling import tile_for_box


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    engine.wait_ready(120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return render_shelf(21, (1600, 1200))


@pytest.fixture(scope="module")
def photo(shelf: Shelf) -> Photo:
    return Photo(pixels=shelf.photo_rgb)


class Seen:
    """An observer that keeps what it is given."""

    def __init__(self) -> None:
        self.lanes: dict[Lane, list[float]] = {}
        self.stages: dict[Stage, list[float]] = {}

    def waited(self, lane: Lane, seconds: float) -> None:
        self.lanes.setdefault(lane, []).append(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        self.stages.setdefault(stage, []).append(seconds)


def middle(box: np.ndarray) -> Prompt:
    return Prompt(points_xy=((box[:2] + box[2:]) / 2)[None], is_foreground=np.array([True]))


def paired_iou(found: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return np.diag(iou_matrix(found, boxes))


def large_ones(shelf: Shelf, count: int = 24) -> np.ndarray:
    sides = shelf.boxes_xyxy[:, 2:] - shelf.boxes_xyxy[:, :2]
    return shelf.boxes_xyxy[np.argsort(-sides.min(1))][:count]


def test_most_facings_of_a_rendered_shelf_are_found_once(engine: Engine, photo: Photo, shelf: Shelf) -> None:
    found = engine.preannotate(photo)
    overlap = iou_matrix(found.boxes_xyxy, shelf.boxes_xyxy)
    assert (overlap.max(0) > 0.5).mean() > 0.6
    assert (overlap.max(1) > 0.5).mean() > 0.6
    assert (np.diff(found.scores) <= 0).all()
    among_themselves = iou_matrix(found.boxes_xyxy, found.boxes_xyxy) - np.eye(len(found))
    assert among_themselves.max() <= 0.5 + 1e-3


def test_more_than_300_boxes_are_found_and_no_more_than_asked_for(engine: Engine, photo: Photo) -> None:
    assert len(engine.preannotate(photo, score_threshold=0.0)) > 300
    few = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu", max_detections=7))
    assert len(few.preannotate(photo, score_threshold=0.0)) == 7
    assert few.version != engine.version
    few.close()


def test_a_click_and_a_rough_box_give_the_box_of_the_object(engine: Engine, photo: Photo, shelf: Shelf) -> None:
    boxes = large_ones(shelf)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    rough = boxes + np.random.default_rng(0).uniform(-0.15, 0.15, boxes.shape).astype(np.float32) * sides
    by_click = engine.refine(photo, [middle(box) for box in boxes])
    by_box = engine.refine(photo, [Prompt(box_xyxy=box) for box in rough])
    assert paired_iou(first_boxes(by_click), boxes).mean() > 0.5
    assert paired_iou(first_boxes(by_box), boxes).mean() > paired_iou(rough, boxes).mean()


def test_masks_fill_their_boxes(engine: Engine, photo: Photo, shelf: Shelf) -> None:
    found = engine.refine(photo, [middle(box) for box in large_ones(shelf, 8)], want_masks=True)
    assert [len(answer) for answer in found] == [1] * 8
    for box, mask in [(answer.boxes_xyxy[0], mask) for answer in found for mask in answer.masks or ()]:
        ys, xs = np.nonzero(mask.in_photo(photo.size_wh))
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx(box, abs=3)


def test_a_background_point_cuts_the_answer(engine: Engine, photo: Photo, shelf: Shelf) -> None:
    """Two neighbours asked for as one, then one of them excluded: the answer leaves it, and stays where it was."""
    answered = 0
    for box in large_ones(shelf, 8):
        width = box[2] - box[0]
        both = np.array([box[0], box[1], min(box[2] + width, photo.size_wh[0] - 1), box[3]], np.float32)
        neighbour = np.array([[box[2] + 0.5 * width, (box[1] + box[3]) / 2]], np.float32)
        without = Prompt(box_xyxy=both, points_xy=neighbour, is_foreground=np.array([False]))
        whole, part = engine.refine(photo, [Prompt(box_xyxy=both), without])
        if not len(part):
            continue
        (wide,), (narrow,) = whole.boxes_xyxy, part.boxes_xyxy
        assert (narrow[:2] >= wide[:2]).all()
        assert (narrow[2:] <= wide[2:]).all()
        assert not (narrow[0] < neighbour[0, 0] < narrow[2])
        answered += 1
    assert answered >= 3


def test_a_second_click_on_a_known_photo_encodes_nothing(engine: Engine, shelf: Shelf) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 7, axis=1))
    engine.preannotate(photo)
    misses = engine.stats().cache_misses
    for box in shelf.boxes_xyxy[:5]:
        engine.refine(photo, [middle(box)])
    engine.preannotate(photo)
    assert engine.stats().cache_misses == misses


@pytest.mark.parametrize("kept_tiles", [0, 1], ids=["no cache", "a cache for one tile"])
def test_many_prompts_encode_each_tile_once_however_little_the_cache_holds(
    engine: Engine, shelf: Shelf, kept_tiles: int
) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 29 + kept_tiles, axis=1))
    boxes = shelf.boxes_xyxy[:20]
    tiles = {tile_for_box(box, photo.size_wh, 1024) for box in boxes}
    assert 1 < len(tiles) < len(boxes)
    stats, seen = engine.stats(), Seen()
    tile_bytes = stats.cache_bytes * 3 // (2 * stats.cache_entries)  # some tiles have more proposals than others
    forgetful = Sam2Engine(
        EngineOptions(checkpoint="facings-nano", device="cpu", cache_bytes=kept_tiles * tile_bytes),
        observer=seen,
    )
    try:
        forgetful.wait_ready(120)
        seen.stages.clear()
        answers = forgetful.refine(photo, [Prompt(box_xyxy=box) for box in boxes])
        assert len(seen.stages["encode"]) == len(tiles)
        assert forgetful.stats().cache_entries == kept_tiles
        expected = engine.refine(photo, [Prompt(box_xyxy=box) for box in boxes])
        assert first_boxes(answers) == pytest.approx(first_boxes(expected), abs=1e-3)
        scores, expected_scores = (np.concatenate([one.scores for one in some]) for some in (answers, expected))
        assert scores == pytest.approx(expected_scores, abs=1e-5)
    finally:
        forgetful.close()


def test_clicks_on_a_pre_annotated_photo_know_what_all_of_its_tiles_propose(engine: Engine, shelf: Shelf) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 19, axis=1))
    prompts = [middle(box) for box in shelf.boxes_xyxy[:20]]
    before = first_boxes(engine.refine(photo, prompts))
    found = engine.preannotate(photo, score_threshold=0.0)
    after = first_boxes(engine.refine(photo, prompts))
    assert not np.allclose(before, after, atol=1)
    agreement = iou_matrix(after, found.boxes_xyxy).max(1).mean()
    assert agreement > iou_matrix(before, found.boxes_xyxy).max(1).mean()


def test_two_annotators_on_two_photos_each_get_their_own_boxes(engine: Engine, shelf: Shelf) -> None:
    other = render_shelf(22, (1600, 1200))
    work = []
    for one in (shelf, other):
        photo = Photo(pixels=one.photo_rgb)
        work += [(photo, middle(box)) for box in large_ones(one, 10)]
    alone = [first_boxes(engine.refine(photo, [prompt]))[0] for photo, prompt in work]
    order = np.random.default_rng(1).permutation(len(work))
    with ThreadPoolExecutor(8) as pool:
        answers = {i: pool.submit(engine.refine, work[i][0], [work[i][1]]) for i in order}
        together = [first_boxes(answers[i].result(60))[0] for i in range(len(work))]
    assert np.array(together) == pytest.approx(np.array(alone), abs=2)  # bf16 sums in another order in a larger batch


def test_of_two_requests_answered_together_one_that_fails_costs_the_other_nothing(photo: Photo, shelf: Shelf) -> None:
    is_busy, may_go_on = threading.Event(), threading.Event()

    class Hold(Seen):
        def waited(self, lane: Lane, seconds: float) -> None:
            if lane == "bulk":
                is_busy.set()
                may_go_on.wait(60)

    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"), observer=Hold())
    click = middle(shelf.boxes_xyxy[0])
    with ThreadPoolExecutor(3) as pool:
        pool.submit(engine.preannotate, photo)
        assert is_busy.wait(120)
        failing, other = (pool.submit(engine.refine, one, [click]) for one in (None, photo))  # type: ignore[arg-type]
        while engine.stats().queued_interactive < 2:
            time.sleep(0.001)
        may_go_on.set()
        assert len(other.result(60)) == 1
        assert isinstance(failing.exception(60), AttributeError)
    engine.close()


def test_the_weights_are_loaded_once(monkeypatch: pytest.MonkeyPatch, photo: Photo) -> None:
    loads = []
    monkeypatch.setattr(
        model.sam2_module,
        "read_weights",
        lambda path, read=model.sam2_module.read_weights: loads.append(path) or read(path),
    )
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    for _ in range(3):
        engine.preannotate(photo)
        engine.refine(photo, [middle(np.array([0, 0, 200, 200]))])
    engine.close()
    assert len(loads) == 1


def test_the_start_does_not_wait_for_the_weights_and_the_first_question_does(photo: Photo) -> None:
    began = time.monotonic()
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    assert engine.state == "loading"
    assert engine.version == "facings-nano-loading"
    with pytest.raises(NotReady, match="still loading"):
        engine.wait_ready(0)
    with pytest.raises(NotReady):
        engine.preannotate(photo, deadline=began)
    engine.preannotate(photo)
    assert engine.state == "ready"
    assert engine.version.startswith("facings-nano-")
    engine.close()
    assert engine.state == "closed"
    with pytest.raises(NotReady, match="closed"):
        engine.preannotate(photo)


def test_a_broken_checkpoint_never_becomes_ready_and_says_why() -> None:
    engine = Sam2Engine(EngineOptions(checkpoint="/nowhere/weights.pt"))
    with pytest.raises(NotReady, match="no file at"):
        engine.wait_ready(60)
    assert (engine.state, engine.failure) == ("failed", "checkpoint: no file at '/nowhere/weights.pt'")
    with pytest.raises(NotReady, match="no file"):
        engine.refine(Photo(pixels=np.zeros((9, 9, 3), np.uint8)), [middle(np.array([0, 0, 9, 9]))])
    engine.close()


def test_a_photo_past_its_deadline_is_given_up(engine: Engine, shelf: Shelf) -> None:
    photo = Photo(pixels=np.roll(shelf.photo_rgb, 13, axis=1))
    with pytest.raises(DeadlineExceeded):
        engine.preannotate(photo, deadline=time.monotonic() + 0.001)
    assert len(engine.preannotate(photo)) > 0


def test_times_are_observed(shelf: Shelf, photo: Photo) -> None:
    seen = Seen()
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"), observer=seen)
    engine.preannotate(photo)
    engine.refine(photo, [middle(shelf.boxes_xyxy[0])])
    engine.close()
    assert seen.lanes.keys() == {"bulk", "interactive"}
    assert seen.stages.keys() == {"tile", "encode", "propose", "decode", "merge"}
    assert all(seconds >= 0 for values in [*seen.lanes.values(), *seen.stages.values()] for seconds in values)


@pytest.mark.parametrize("size_wh", [(1, 1), (3, 900), (700, 20), (1025, 1023)])
def test_photos_of_any_shape_are_answered(engine: Engine, size_wh: tuple[int, int]) -> None:
    photo = Photo(pixels=np.full((size_wh[1], size_wh[0], 3), 90, np.uint8))
    found = engine.preannotate(photo, score_threshold=0.0)
    assert (found.boxes_xyxy <= np.array(size_wh * 2)).all()
    outside = Prompt(points_xy=np.array([[5000.0, -3.0]]), is_foreground=np.array([True]))
    answers = engine.refine(photo, [middle(np.array([0, 0, *size_wh])), outside], want_masks=True)
    assert len(answers) == 2
    assert len(answers[1]) == 0, "a prompt outside the photo is no prompt"
    assert (first_boxes(answers) >= 0).all()
    assert (first_boxes(answers) <= np.array(size_wh * 2)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score_threshold": 1.1}, "in \\[0, 1\\]"),
        ({"max_detections": 0}, "at least 1"),
        ({"cache_bytes": -1}, "at least 0"),
        ({"proposals": "gird"}, "auto, grid or learned, got 'gird'"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions(**values)  # type: ignore[arg-type]


def test_what_takes_seconds_the_first_time_is_done_before_the_engine_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("model.loading.nms", lambda *_: calls.append("nms"))  # its first call imports torchvision
    engine = Sam2Engine(EngineOptions(checkpoint="facings-nano", device="cpu"))
    try:
        engine.wait_ready(120)
        assert calls == ["nms"]
    finally:
        engine.close()
