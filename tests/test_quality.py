"""How good boxes are: matching, corrections and average precision of known boxes and detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from model import quality
from model.quality import Truth
from model.types import Detections

Boxes = Sequence[Sequence[float]]


def truth_of(boxes: Boxes, *, crowds: Boxes = ()) -> Truth:
    return Truth(
        size_wh=(400, 400),
        boxes_xyxy=np.array(boxes, np.float64).reshape(-1, 4),
        crowds_xyxy=np.array(crowds, np.float64).reshape(-1, 4),
    )


def detected(boxes: Boxes, scores: Sequence[float] | None = None) -> Detections:
    filled = [0.9] * len(boxes) if scores is None else scores
    return Detections(boxes_xyxy=np.array(boxes, np.float32), scores=np.array(filled, np.float32))


def random_scene(generator: np.random.Generator) -> tuple[Truth, Detections]:
    corners, sizes = generator.uniform(0, 300, (60, 2)), generator.uniform(10, 90, (60, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)
    found = boxes[:45] + generator.normal(0, 6, (45, 4))
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    return truth_of(boxes), detected(found, generator.uniform(0, 1, 45))


A, B = [0, 0, 100, 100], [200, 0, 300, 100]
A_LOOSE = [0, 0, 100, 60]  # IoU 0.6 with A
A_HALF = [0, 0, 100, 50]  # IoU 0.5 with A
A_LESS = [0, 0, 100, 49]


@pytest.mark.parametrize(
    ("boxes", "found", "scores", "missed", "false", "to_drag"),
    [
        ([], [], [], 0, 0, 0),
        ([], [A], [0.9], 0, 1, 0),
        ([A], [], [], 1, 0, 0),
        ([A, B], [A, B], [0.9, 0.5], 0, 0, 0),
        ([A], [A_LOOSE], [0.9], 0, 0, 1),
        ([A], [A_HALF], [0.9], 0, 0, 1),
        ([A], [A_LESS], [0.9], 1, 1, 0),
        ([A], [A, A_LOOSE], [0.9, 0.8], 0, 1, 0),
        ([A], [A, A_LOOSE], [0.8, 0.9], 0, 1, 1),  # the better score takes the facing, the better box is in its way
        ([A], [A, B], [0.9, 0.49], 0, 0, 0),  # B lies below the threshold
        ([A, B], [A], [0.5], 1, 0, 0),
    ],
)
def test_corrections_are_missed_false_and_badly_fitting_boxes(
    boxes: Boxes, found: Boxes, scores: Sequence[float], missed: int, false: int, to_drag: int
) -> None:
    (row,) = quality.count_corrections([truth_of(boxes)], [detected(found, scores)], [0.5])
    assert (row.facings, row.missed, row.false, row.to_drag) == (len(boxes), missed, false, to_drag)


def test_corrections_add_up_over_photos_and_are_counted_per_100_facings() -> None:
    truths = [truth_of([A, B]), truth_of([A, B])]
    (row,) = quality.count_corrections(truths, [detected([A_LOOSE]), detected([A, B, [0, 200, 50, 300]])], [0.5])
    assert row.per_100() == pytest.approx(100 * (1 + 1 + 1) / 4)
    assert row.per_100(row.false) == pytest.approx(25)


def test_a_sweep_counts_at_each_threshold_what_that_threshold_alone_would_give() -> None:
    truth, found = random_scene(np.random.default_rng(3))
    thresholds = [0.1, 0.35, 0.6, 0.95]
    alone = [quality.count_corrections([truth], [found.above(t)], [0.0])[0] for t in thresholds]
    swept = quality.count_corrections([truth], [found], thresholds)
    assert [(r.missed, r.false, r.to_drag) for r in swept] == [(r.missed, r.false, r.to_drag) for r in alone]
    assert len({r.missed for r in swept}) > 1


def test_no_known_box_is_matched_twice() -> None:
    truth, found = random_scene(np.random.default_rng(4))
    taken = quality.match(found, truth).truth_index
    taken = taken[taken >= 0]
    assert len(taken) > 5
    assert len(set(taken)) == len(taken)


def test_detections_in_a_crowd_count_neither_for_nor_against() -> None:
    truth = truth_of([A], crowds=[[190, 0, 400, 400]])
    (row,) = quality.count_corrections([truth], [detected([A, B, [0, 300, 100, 400]])], [0.5])
    assert (row.missed, row.false) == (0, 1)
    assert quality.average_precision([truth], [detected([A, B], [0.5, 0.9])]).ap == pytest.approx(1)


@pytest.mark.parametrize(
    ("boxes", "found", "ap", "ar"),
    [
        ([], [], None, None),
        ([A], [], 0, 0),
        ([A, B], [A, B], 1, 1),
        ([A, B], [A], 51 / 101, 0.5),  # precision 1 up to recall 0.5, at COCO's 101 recall levels
        ([A], [A_LOOSE], 0.3, 0.3),  # right at three of ten IoU thresholds
    ],
)
def test_average_precision_of_small_cases(boxes: Boxes, found: Boxes, ap: float | None, ar: float | None) -> None:
    figures = quality.average_precision([truth_of(boxes)], [detected(found)])
    assert figures.ap == pytest.approx(float("nan") if ap is None else ap, nan_ok=True)
    assert figures.ar300 == pytest.approx(float("nan") if ar is None else ar, nan_ok=True)


def test_all_of_150_facings_count_not_only_cocos_usual_100() -> None:
    boxes = [[x, y, x + 8, y + 8] for x in range(0, 300, 20) for y in range(0, 200, 20)]
    assert len(boxes) == 150
    figures = quality.average_precision([truth_of(boxes)], [detected(boxes)])
    assert (figures.ap, figures.ap50, figures.ap75, figures.ar300) == pytest.approx((1, 1, 1, 1))


def test_pycocotools_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quality.average_precision([truth_of([A])], [detected([A])])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [5, 0, 1, 5], [0, 0, float("nan"), 5], [0, 0, float("inf"), 5]])
def test_known_boxes_without_area_or_end_are_refused(box: list[float]) -> None:
    with pytest.raises(ValueError, match="boxes_xyxy: expected finite x0 < x1"):
        truth_of([A, box])


def test_the_best_threshold_has_the_fewest_corrections_and_the_lowest_wins_a_tie() -> None:
    truth, found = truth_of([A]), detected([A, B], [0.9, 0.3])
    assert quality.fewest(quality.count_corrections([truth], [found], [0.1, 0.4, 0.6, 0.95])).score_threshold == 0.4
    nothing_known = quality.count_corrections([truth_of([])], [detected([])], quality.SWEEP)
    assert quality.fewest(nothing_known).score_threshold == quality.SWEEP[0]


def test_as_many_detections_as_known_photos_are_expected() -> None:
    for measure in (quality.average_precision, lambda *given: quality.count_corrections(*given, [0.5])):
        with pytest.raises(ValueError, match="zip"):
            measure([truth_of([A])], [])
