"""`facings evaluate`: photos with known boxes through an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine
from PIL import Image

from backend.bulk.service import BulkService
from backend.errors import CommandError
from backend.settings import Settings
from model.quality import SWEEP
from model.types import Detections, Photo, Prompt
from scripts.labels import read_truth
from scripts.measure import evaluate as command
from scripts.measure.prompts import click_at, holds_prompt, jitter_boxes, largest_excess, rectangle, with_alt_click

Boxes = Sequence[Sequence[float]]

A, B = [0, 0, 100, 100], [200, 0, 300, 100]


def detected(boxes: Boxes, scores: Sequence[float] | None = None) -> Detections:
    filled = [0.9] * len(boxes) if scores is None else scores
    return Detections(boxes_xyxy=np.array(boxes, np.float32), scores=np.array(filled, np.float32))


def test_a_jittered_box_moves_each_edge_by_at_most_15_percent_and_stays_in_the_photo() -> None:
    boxes = np.tile([[0.0, 100, 40, 300], [360, 20, 400, 60]], (200, 1))
    jittered = jitter_boxes(boxes, (400, 400), np.random.default_rng(0))
    sizes = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
    moved = np.abs(jittered - boxes) / sizes
    assert 0.14 < moved.max() <= 0.15 + 1e-6
    assert jittered.min() >= 0
    assert jittered.max() <= 400
    assert (jittered[:, 2:] > jittered[:, :2]).all()


class OracleEngine(FakeEngine):
    """Answers with the known boxes, shifted by what `shift_px` says; a doubtful false box comes with low thresholds."""

    name, version, score_threshold = "oracle", "oracle-1", 0.5

    def __init__(self, boxes: Boxes, *, shift_px: float = 0) -> None:
        super().__init__()
        self.boxes = np.array(boxes, np.float32).reshape(-1, 4) + shift_px

    def preannotate(self, photo: Photo, *, score_threshold: float | None = None, **_: Any) -> Detections:
        boxes = np.concatenate([self.boxes, [[350, 350, 399, 399]]])
        found = detected(boxes.tolist(), [0.9] * len(self.boxes) + [0.02])
        return found.above(self.score_threshold if score_threshold is None else score_threshold)

    def refine(self, photo: Photo, prompts: Sequence[Prompt], **_: Any) -> list[Detections]:
        def pointed_at(prompt: Prompt) -> list[np.ndarray]:
            x, y = prompt.points_xy[0] if prompt.box_xyxy is None else prompt.box_xyxy.reshape(2, 2).mean(0)
            return [box for box in self.boxes if box[0] <= x < box[2] and box[1] <= y < box[3]][:1]

        return [detected([box.tolist() for box in pointed_at(prompt)]) for prompt in prompts]


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


def service_of(engine: OracleEngine) -> BulkService:
    return BulkService.open(Settings(), engine=engine)


def evaluated(engine: OracleEngine, shelves: tuple[Path, Path], **options: Any) -> command.Evaluation:
    folder, coco_file = shelves
    return command.evaluate(service_of(engine), read_truth(coco_file, folder), **options)


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
    assert sum(line.startswith("threshold") for line in lines) == len(SWEEP)


def test_figures_that_do_not_exist_are_null_in_json(shelves: tuple[Path, Path]) -> None:
    _, coco_file = shelves
    coco_file.write_text(json.dumps({**json.loads(coco_file.read_text()), "annotations": []}))
    figures = command.summary(evaluated(OracleEngine([]), shelves, prompts=True))
    assert figures["ap"] is figures["corrections_per_100"] is figures["click_iou"] is None


def test_photos_that_cannot_be_measured_are_named_and_counted_and_the_others_are_measured(
    shelves: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, coco_file = shelves
    coco = json.loads(coco_file.read_text())
    names = {11: "damaged.png", 12: "small.png", 13: "missing.png"}
    coco["images"] += [{"id": n, "file_name": name, "width": 400, "height": 400} for n, name in names.items()]
    coco_file.write_text(json.dumps(coco))
    (folder / "damaged.png").write_bytes(b"no photo")
    Image.new("RGB", (400, 300)).save(folder / "small.png")
    known = read_truth(coco_file, folder)
    assert [line.split(":")[0] for line in known.left_out] == ["'missing.png'"]
    evaluation = command.evaluate(service_of(OracleEngine([A, B])), known)
    assert (evaluation.photos, evaluation.left_out, evaluation.corrections.facings) == (2, 3, 4)
    assert evaluation.corrections.per_100() == 0
    damaged, small = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert "damaged.png" in damaged
    assert "small.png': expected 400 x 400 px as in the truth file, got 400 x 300 px" in small
    command.print_report(evaluation)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "3 photos left out" in first
    assert json.loads(last)["left_out"] == 3


def test_an_evaluation_without_any_readable_photo_is_refused(shelves: tuple[Path, Path]) -> None:
    for number in (3, 7):
        (shelves[0] / f"{number}.png").write_bytes(b"no photo")
    with pytest.raises(CommandError, match="none of 2 can be used"):
        evaluated(OracleEngine([A, B]), shelves)


def test_the_played_annotator_needs_no_action_but_the_last_key_where_all_boxes_are_right(
    shelves: tuple[Path, Path],
) -> None:
    actions = evaluated(OracleEngine([A, B]), shelves, annotate=True).actions
    assert actions is not None
    assert (actions.removals, actions.clicks, actions.trims, actions.drags) == (0, 0, 0, 0)
    assert (actions.facings, actions.keys) == (4, 2), "one to submit each photo"
    assert actions.per_100() == 50


def test_the_played_annotator_removes_false_boxes_clicks_missed_facings_and_draws_what_does_not_fit(
    shelves: tuple[Path, Path],
) -> None:
    class Careless(OracleEngine):
        """Misses one facing until it is clicked, and boxes a wall."""

        def preannotate(self, photo: Photo, **_: Any) -> Detections:
            return detected([A, [300, 300, 390, 390]])

    actions = evaluated(Careless([A, B]), shelves, annotate=True).actions
    assert actions is not None
    assert (actions.removals, actions.clicks, actions.trims, actions.drags) == (2, 2, 0, 0)
    assert actions.keys == 2 * (1 + 1), "for each photo the point tool and submit"
    shifted = evaluated(OracleEngine([A, B], shift_px=20), shelves, annotate=True).actions
    assert shifted is not None
    assert shifted.drags > 0


def test_where_a_box_sticks_out_most_is_where_an_alt_click_goes() -> None:
    known = np.array([100.0, 100, 200, 200])
    assert largest_excess(known, known) is None
    excess = largest_excess(np.array([90.0, 100, 240, 190]), known)
    assert excess is not None
    edge, strip = excess
    assert (edge, strip.tolist()) == (2, [200, 100, 240, 190])
    assert largest_excess(np.array([300.0, 300, 400, 400]), known) is None


@pytest.mark.parametrize(
    ("boxes", "prompt", "expected"),
    [
        ([], click_at([5, 5]), True),
        ([[0, 0, 10, 10]], click_at([5, 5]), True),
        ([[20, 20, 30, 30]], click_at([5, 5]), False),
        ([[0, 0, 10, 10]], with_alt_click(click_at([5, 5]), [8, 8]), False),
        ([[0, 0, 10, 10]], rectangle([0, 0, 12, 12]), True),
        ([[0, 0, 10, 10]], rectangle([0, 0, 30, 30]), False),
        ([[0, 0, 10, 10]], click_at([5, 5], [50, 50]), True),
    ],
)
def test_an_answer_holds_its_prompt_or_not(boxes: Boxes, prompt: Prompt, expected: bool) -> None:
    assert holds_prompt(detected(boxes), prompt, (100, 100)) == expected
