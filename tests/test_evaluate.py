from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend.errors import CommandError
from model.types import Detections, Photo, Prompt
from scripts.labels import Truth, read_truth
from scripts.measure import evaluate as command

Boxes = Sequence[Sequence[float]]


def truth_of(boxes: Boxes, *, crowds: Boxes = (), image_id: int = 1) -> Truth:
    return Truth(
        image_id=image_id,
        file_name=f"{image_id}.png",
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
    (row,) = command.count_corrections([truth_of(boxes)], [detected(found, scores)], [0.5])
    assert (row.facings, row.missed, row.false, row.to_drag) == (len(boxes), missed, false, to_drag)


def test_corrections_add_up_over_photos_and_are_told_per_100_facings() -> None:
    truths = [truth_of([A, B]), truth_of([A, B], image_id=2)]
    (row,) = command.count_corrections(truths, [detected([A_LOOSE]), detected([A, B, [0, 200, 50, 300]])], [0.5])
    assert row.per_100() == pytest.approx(100 * (1 + 1 + 1) / 4)
    assert row.per_100(row.false) == pytest.approx(25)


def test_a_sweep_counts_at_each_threshold_what_that_threshold_alone_would_give() -> None:
    truth, found = random_scene(np.random.default_rng(3))
    thresholds = [0.1, 0.35, 0.6, 0.95]
    alone = [command.count_corrections([truth], [found.above(t)], [0.0])[0] for t in thresholds]
    swept = command.count_corrections([truth], [found], thresholds)
    assert [(r.missed, r.false, r.to_drag) for r in swept] == [(r.missed, r.false, r.to_drag) for r in alone]
    assert len({r.missed for r in swept}) > 1


def test_no_known_box_is_matched_twice() -> None:
    truth, found = random_scene(np.random.default_rng(4))
    taken = command.match(found.boxes_xyxy, found.scores, truth).truth_index
    taken = taken[taken >= 0]
    assert len(taken) > 5
    assert len(set(taken)) == len(taken)


def test_detections_in_a_crowd_count_neither_for_nor_against() -> None:
    truth = truth_of([A], crowds=[[190, 0, 400, 400]])
    (row,) = command.count_corrections([truth], [detected([A, B, [0, 300, 100, 400]])], [0.5])
    assert (row.missed, row.false) == (0, 1)
    assert command.average_precision([truth], [detected([A, B], [0.5, 0.9])]).ap == pytest.approx(1)


def test_a_jittered_box_moves_each_edge_by_at_most_15_percent_and_stays_in_the_photo() -> None:
    boxes = np.tile([[0.0, 100, 40, 300], [360, 20, 400, 60]], (200, 1))
    jittered = command.jitter_boxes(boxes, (400, 400), np.random.default_rng(0))
    sizes = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
    moved = np.abs(jittered - boxes) / sizes
    assert 0.14 < moved.max() <= 0.15 + 1e-6
    assert jittered.min() >= 0
    assert jittered.max() <= 400
    assert (jittered[:, 2:] > jittered[:, :2]).all()


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
    figures = command.average_precision([truth_of(boxes)], [detected(found)])
    assert figures.ap == pytest.approx(float("nan") if ap is None else ap, nan_ok=True)
    assert figures.ar300 == pytest.approx(float("nan") if ar is None else ar, nan_ok=True)


def test_all_of_150_facings_count_not_only_cocos_usual_100() -> None:
    boxes = [[x, y, x + 8, y + 8] for x in range(0, 300, 20) for y in range(0, 200, 20)]
    assert len(boxes) == 150
    figures = command.average_precision([truth_of(boxes)], [detected(boxes)])
    assert (figures.ap, figures.ap50, figures.ap75, figures.ar300) == pytest.approx((1, 1, 1, 1))


def test_pycocotools_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command.average_precision([truth_of([A])], [detected([A])])
    assert capsys.readouterr().out == ""


class OracleEngine:
    """Answers with the known boxes, shifted by what `shift_px` says; a doubtful false box comes with low thresholds."""

    name, version, score_threshold = "oracle", "oracle-1", 0.5

    def __init__(self, boxes: Boxes, *, shift_px: float = 0) -> None:
        self.boxes = np.array(boxes, np.float32).reshape(-1, 4) + shift_px

    def preannotate(self, photo: Photo, *, score_threshold: float | None = None) -> Detections:
        boxes = np.concatenate([self.boxes, [[350, 350, 399, 399]]])
        found = detected(boxes.tolist(), [0.9] * len(self.boxes) + [0.02])
        return found.above(self.score_threshold if score_threshold is None else score_threshold)

    def refine(self, photo: Photo, prompts: Sequence[Prompt]) -> Detections:
        def pointed_at(prompt: Prompt) -> np.ndarray:
            x, y = prompt.points_xy[0] if prompt.box_xyxy is None else prompt.box_xyxy.reshape(2, 2).mean(0)
            return next(box for box in self.boxes if box[0] <= x < box[2] and box[1] <= y < box[3])

        return detected([pointed_at(prompt).tolist() for prompt in prompts])


@pytest.fixture
def shelves(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with two photos and the COCO file that knows A and B in each."""
    boxes = [A, B]
    images, annotations = [], []
    for image_id in (7, 3):
        Image.fromarray(np.full((400, 400, 3), image_id, np.uint8)).save(tmp_path / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 400, "height": 400})
        for x0, y0, x1, y1 in boxes:
            box = {"id": len(annotations), "image_id": image_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 4}
            annotations.append(box)
    coco_file = tmp_path / "coco.json"
    coco_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return tmp_path, coco_file


def evaluated(engine: OracleEngine, shelves: tuple[Path, Path], **options: Any) -> command.Evaluation:
    folder, coco_file = shelves
    return command.evaluate(engine, folder, read_truth(coco_file, folder), **options)  # type: ignore[arg-type]


def test_an_engine_that_knows_all_boxes_needs_no_correction(shelves: tuple[Path, Path]) -> None:
    evaluation = evaluated(OracleEngine([A, B]), shelves, prompts=True, sweep=True)
    figures = command.summary(evaluation)
    assert (figures["photos"], figures["facings"]) == (2, 4)
    assert figures["ap"] == figures["ar300"] == figures["click_iou"] == figures["refined_box_iou"] == 1
    assert figures["corrections_per_100"] == 0
    assert figures["rough_box_iou"] < 1


def test_a_given_threshold_replaces_the_engines(shelves: tuple[Path, Path]) -> None:
    evaluation = evaluated(OracleEngine([A, B]), shelves, score_threshold=0.015)
    assert (evaluation.corrections.score_threshold, evaluation.corrections.false) == (0.015, 2)


def test_the_last_line_is_json_that_repeats_the_figures(
    shelves: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = evaluated(OracleEngine([A, B], shift_px=10), shelves, sweep=True)
    command.print_report(evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == command.summary(evaluation)
    assert any(line.startswith("AP75") for line in lines)
    assert sum(line.startswith("threshold") for line in lines) == len(command.SWEEP)


def test_figures_that_do_not_exist_are_null_in_json(shelves: tuple[Path, Path]) -> None:
    _, coco_file = shelves
    coco_file.write_text(json.dumps({**json.loads(coco_file.read_text()), "annotations": []}))
    figures = command.summary(evaluated(OracleEngine([]), shelves, prompts=True))
    assert figures["ap"] is figures["corrections_per_100"] is figures["click_iou"] is None


def test_a_photo_of_another_size_than_the_coco_file_says_is_refused(shelves: tuple[Path, Path]) -> None:
    folder, _ = shelves
    Image.new("RGB", (400, 300)).save(folder / "3.png")
    with pytest.raises(CommandError, match=r"3\.png.*\(400, 400\).*\(400, 300\)"):
        evaluated(OracleEngine([A, B]), shelves)
