"""How good the boxes of a checkpoint are, against photos with known boxes (COCO).

Two kinds of figures: the COCO protocol with up to 300 detections a photo, to compare with other work; and corrections
per 100 facings, which is what an annotator pays. Knows COCO and the engine, nothing of Label Studio. Measuring returns
values; printing is apart.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError
from scripts.console import track
from scripts.labels import Truth

if TYPE_CHECKING:
    from model import Detections, Engine, Photo

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_DETECTIONS = 300  # COCO's own 100 are fewer than the facings of many a shelf photo
CANDIDATE_SCORE = 0.01  # average precision wants the doubtful boxes too
MATCH_IOU = 0.5  # a detection of this overlap is meant for the facing
GOOD_IOU = 0.75  # below this, an annotator drags an edge
JITTER = 0.15  # of a box's size, for each of its edges
SWEEP = np.round(np.arange(0.05, 0.905, 0.05), 2)

FALSE, IGNORED = -1, -2


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """Which detection is meant for which known box.

    truth_index: `[D]`, FALSE where none is, IGNORED for an unmatched one inside a crowd. iou: `[D]`, 0 where unmatched.
    """

    truth_index: IntArray
    iou: FloatArray


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """COCO's figures at 300 detections; NaN when there is no known box."""

    ap: float
    ap50: float
    ap75: float
    ar300: float


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What an annotator would have to do, in boxes, at one score threshold."""

    score_threshold: float
    facings: int
    missed: int
    false: int
    to_drag: int

    def per_100(self, count: int | None = None) -> float:
        """`count` (all three kinds when None) for each 100 facings; NaN without facings."""
        if count is None:
            count = self.missed + self.false + self.to_drag
        return 100 * count / self.facings if self.facings else float("nan")


@dataclass(frozen=True, kw_only=True)
class PromptQuality:
    """Mean IoU with the known box: after one click in its middle; of a rough box, and after its refinement."""

    click_iou: float
    rough_box_iou: float
    refined_box_iou: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    checkpoint: str
    version: str
    photos: int
    precision: AveragePrecision
    corrections: Corrections
    seconds_per_photo: float
    prompts: PromptQuality | None
    sweep: tuple[Corrections, ...]


def _xywh(boxes_xyxy: npt.NDArray[Any]) -> FloatArray:
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def pairwise_iou(boxes_xyxy: npt.NDArray[Any], others_xyxy: npt.NDArray[Any], *, crowd: bool = False) -> FloatArray:
    """`[N, M]`. With `crowd`, the part of each box that lies inside each of the others, as COCO has it."""
    from pycocotools import mask

    if not len(boxes_xyxy) or not len(others_xyxy):
        return np.zeros((len(boxes_xyxy), len(others_xyxy)))
    iou: FloatArray = mask.iou(_xywh(boxes_xyxy), _xywh(others_xyxy), [crowd] * len(others_xyxy))
    return iou


def match(boxes_xyxy: npt.NDArray[Any], scores: npt.NDArray[Any], truth: Truth) -> Matching:
    """Each detection, best score first, takes the free known box it overlaps most, from an IoU of 0.5.

    A detection's match depends only on better ones: what lies above a score threshold is matched as if alone.
    """
    truth_index = np.full(len(boxes_xyxy), FALSE)
    matched_iou = np.zeros(len(boxes_xyxy))
    free_iou = pairwise_iou(boxes_xyxy, truth.boxes_xyxy)
    able = (free_iou >= MATCH_IOU).any(axis=1)
    for i in np.argsort(-scores, kind="stable"):
        if not able[i]:
            continue
        best = int(free_iou[i].argmax())
        if free_iou[i, best] >= MATCH_IOU:
            truth_index[i], matched_iou[i] = best, free_iou[i, best]
            free_iou[:, best] = 0
    in_crowd = (pairwise_iou(boxes_xyxy, truth.crowds_xyxy, crowd=True) >= MATCH_IOU).any(axis=1)
    truth_index[in_crowd & (truth_index == FALSE)] = IGNORED
    return Matching(truth_index=truth_index, iou=matched_iou)


def count_corrections(
    truths: Sequence[Truth], detections: Sequence[Detections], score_thresholds: npt.NDArray[Any] | Sequence[float]
) -> tuple[Corrections, ...]:
    """Over all photos, for each threshold: known boxes missed, boxes to delete, boxes that fit worse than IoU 0.75."""
    thresholds = np.asarray(score_thresholds, np.float32).reshape(-1, 1)  # [S, 1], rounded as the scores are
    missed, false, to_drag = (np.zeros(len(thresholds), np.int64) for _ in range(3))
    for truth, found in zip(truths, detections, strict=True):
        matching = match(found.boxes_xyxy, found.scores, truth)
        shown = found.scores >= thresholds  # [S, D]
        matched = shown & (matching.truth_index >= 0)
        missed += len(truth.boxes_xyxy) - matched.sum(axis=1)
        false += (shown & (matching.truth_index == FALSE)).sum(axis=1)
        to_drag += (matched & (matching.iou < GOOD_IOU)).sum(axis=1)
    facings = sum(len(truth.boxes_xyxy) for truth in truths)
    return tuple(
        Corrections(score_threshold=float(s), facings=facings, missed=int(m), false=int(f), to_drag=int(d))
        for s, m, f, d in zip(score_thresholds, missed, false, to_drag, strict=True)
    )


def average_precision(truths: Sequence[Truth], detections: Sequence[Detections]) -> AveragePrecision:
    """COCO's AP over IoU 0.50:0.95, at 0.50 and 0.75, and the average recall, all at 300 detections and all sizes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def coco_of(boxes: list[dict[str, Any]]) -> Any:
        coco = COCO()
        images = [{"id": truth.image_id} for truth in truths]
        # COCOeval takes an id of 0 for "unmatched", so ids start at 1.
        annotations = [{"iscrowd": 0, **box, "id": i, "category_id": 1} for i, box in enumerate(boxes, 1)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
        coco.createIndex()
        return coco

    def rows(image_id: int, boxes_xyxy: npt.NDArray[Any], **columns: Any) -> list[dict[str, Any]]:
        boxes = _xywh(boxes_xyxy)
        return [{"image_id": image_id, "bbox": list(box), "area": box[2] * box[3], **columns} for box in boxes]

    known, found = [], []
    for truth, photo_detections in zip(truths, detections, strict=True):
        known += rows(truth.image_id, truth.boxes_xyxy) + rows(truth.image_id, truth.crowds_xyxy, iscrowd=1)
        photo_rows = rows(truth.image_id, photo_detections.boxes_xyxy)
        found += [
            {**row, "score": float(score)} for row, score in zip(photo_rows, photo_detections.scores, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each of its steps
        evaluation = COCOeval(coco_of(known), coco_of(found), "bbox")
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # COCOeval.summarize() looks for 100 detections whatever maxDets says, so its tables are read here.
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]  # [IoU thresholds, recall thresholds]
    recall = evaluation.eval["recall"][:, 0, 0, -1]  # [IoU thresholds]
    if (recall < 0).all():  # COCO's word for "no known boxes"
        return AveragePrecision(ap=float("nan"), ap50=float("nan"), ap75=float("nan"), ar300=float("nan"))
    ious = evaluation.params.iouThrs
    at = [int(np.argmin(np.abs(ious - iou))) for iou in (0.5, 0.75)]
    ap50, ap75 = (float(precision[i].mean()) for i in at)
    return AveragePrecision(ap=float(precision.mean()), ap50=ap50, ap75=ap75, ar300=float(recall.mean()))


def jitter_boxes(
    boxes_xyxy: npt.NDArray[Any], size_wh: tuple[int, int], generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Boxes as a hurried hand draws them: each edge off by up to 15 % of the box's size, inside the photo.

    At least one pixel remains, whatever the photo's edge cuts off.
    """
    sizes = np.tile(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], (1, 2))
    jittered = boxes_xyxy + sizes * generator.uniform(-JITTER, JITTER, boxes_xyxy.shape)
    clipped = np.clip(jittered, 0, [*size_wh, *size_wh]).astype(np.float32)
    return np.concatenate([clipped[:, :2], np.maximum(clipped[:, 2:], clipped[:, :2] + 1)], axis=1)


def paired_iou(boxes_xyxy: npt.NDArray[Any], others_xyxy: npt.NDArray[Any]) -> FloatArray:
    """`[N]`: each box with the other of its row."""
    return pairwise_iou(boxes_xyxy, others_xyxy).diagonal()


def measure_prompts(engine: Engine, photo: Photo, truth: Truth, *, seed: int = 0) -> FloatArray:
    """`[T, 3]`: IoU with each known box of the answer to one click in its middle, of a rough box, of its refinement."""
    from model import Prompt

    generator = np.random.default_rng((seed, truth.image_id))
    rough_xyxy = jitter_boxes(truth.boxes_xyxy, truth.size_wh, generator)
    centres_xy = ((truth.boxes_xyxy[:, :2] + truth.boxes_xyxy[:, 2:]) / 2).astype(np.float32)
    clicks = [Prompt(points_xy=centre[None], is_foreground=np.ones(1, bool)) for centre in centres_xy]
    rough = [Prompt(box_xyxy=box) for box in rough_xyxy]
    if not clicks:
        return np.zeros((0, 3))
    clicked, refined = engine.refine(photo, clicks), engine.refine(photo, rough)
    answers = (clicked.boxes_xyxy, rough_xyxy, refined.boxes_xyxy)
    return np.stack([paired_iou(boxes, truth.boxes_xyxy) for boxes in answers], axis=1)


def photos_with(truths: Sequence[Truth], photos_dir: Path) -> Iterator[tuple[Truth, Photo]]:
    """Each with its photo, with a line that shows how far it is. Raises CommandError for a photo that is missing,
    broken or of another size."""
    from backend.photos.files import read_ahead, read_photo
    from backend.settings import Settings

    paths = (photos_dir / truth.file_name for truth in truths)
    read = partial(read_photo, max_pixels=Settings.from_env(os.environ).max_photo_pixels)
    outcomes = zip(truths, read_ahead(paths, read), strict=True)
    for truth, (path, photo) in track(outcomes, total=len(truths), label="evaluate"):
        if isinstance(photo, Exception):
            raise CommandError(f"{str(path)!r}: {photo}") from photo
        if photo.size_wh != truth.size_wh:
            raise CommandError(f"{str(path)!r}: expected {truth.size_wh} as the COCO file says, got {photo.size_wh}")
        yield truth, photo


def evaluate(
    engine: Engine,
    photos_dir: Path,
    truths: Sequence[Truth],
    *,
    score_threshold: float | None = None,
    prompts: bool = False,
    sweep: bool = False,
) -> Evaluation:
    """Every photo twice: timed at the threshold in force, as a user gets it; then with the doubtful boxes for AP.

    score_threshold: None takes the engine's. Raises CommandError as `photos_with` does.
    """
    if score_threshold is None:
        score_threshold = engine.score_threshold
    handed_out, candidates, seconds, prompt_ious = [], [], [], []
    for truth, photo in photos_with(truths, photos_dir):
        started = time.perf_counter()
        handed_out.append(engine.preannotate(photo, score_threshold=score_threshold))
        seconds.append(time.perf_counter() - started)
        candidates.append(engine.preannotate(photo, score_threshold=CANDIDATE_SCORE))
        if prompts:
            prompt_ious.append(measure_prompts(engine, photo, truth))
    return Evaluation(
        checkpoint=engine.name,
        version=engine.version,
        photos=len(truths),
        precision=average_precision(truths, candidates),
        corrections=count_corrections(truths, handed_out, [score_threshold])[0],
        seconds_per_photo=float(np.median(seconds)),
        prompts=_prompt_quality(np.concatenate(prompt_ious)) if prompts else None,
        sweep=count_corrections(truths, candidates, SWEEP) if sweep else (),
    )


def _prompt_quality(ious: FloatArray) -> PromptQuality:
    click, rough, refined = ious.mean(axis=0) if len(ious) else np.full(3, np.nan)
    return PromptQuality(click_iou=float(click), rough_box_iou=float(rough), refined_box_iou=float(refined))


def summary(evaluation: Evaluation) -> Mapping[str, Any]:
    """The figures as one flat JSON object; what could not be measured is null."""
    corrections = evaluation.corrections
    figures = {
        "checkpoint": evaluation.checkpoint,
        "version": evaluation.version,
        "photos": evaluation.photos,
        "facings": corrections.facings,
        **asdict(evaluation.precision),
        "score_threshold": corrections.score_threshold,
        "corrections_per_100": corrections.per_100(),
        "missed_per_100": corrections.per_100(corrections.missed),
        "false_per_100": corrections.per_100(corrections.false),
        "to_drag_per_100": corrections.per_100(corrections.to_drag),
        "seconds_per_photo": evaluation.seconds_per_photo,
    }
    if evaluation.prompts is not None:
        figures |= asdict(evaluation.prompts)
    if evaluation.sweep:
        best = min(evaluation.sweep, key=lambda row: row.per_100())
        figures |= {"best_score_threshold": best.score_threshold, "best_corrections_per_100": best.per_100()}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    return {name: without_nan(value) for name, value in rounded.items()}


def without_nan(value: Any) -> Any:
    """None for NaN, which JSON does not know."""
    return None if value != value else value


def print_report(evaluation: Evaluation) -> None:
    """Figures for people, one a line; the last line is JSON."""
    precision, corrections, prompts = evaluation.precision, evaluation.corrections, evaluation.prompts
    print(f"{evaluation.version}: {evaluation.photos} photos, {corrections.facings} facings")
    for row in evaluation.sweep:
        print(f"threshold {row.score_threshold:.2f}      {_corrections_line(row)}")
    if evaluation.sweep:
        best = min(evaluation.sweep, key=lambda row: row.per_100())
        print(f"best threshold      {best.score_threshold:.2f}")
    print(f"AP                  {precision.ap:.3f}")
    print(f"AP50                {precision.ap50:.3f}")
    print(f"AP75                {precision.ap75:.3f}")
    print(f"AR300               {precision.ar300:.3f}")
    print(f"corrections         {_corrections_line(corrections)}, at score {corrections.score_threshold:.2f} and above")
    print(f"seconds per photo   {evaluation.seconds_per_photo:.3f} (median, engine only)")
    if prompts is not None:
        print(f"one click           mean IoU {prompts.click_iou:.3f}")
        print(f"rough box           mean IoU {prompts.rough_box_iou:.3f} → {prompts.refined_box_iou:.3f}")
    print(json.dumps(summary(evaluation)))


def _corrections_line(row: Corrections) -> str:
    missed, false, to_drag = (row.per_100(count) for count in (row.missed, row.false, row.to_drag))
    return f"{row.per_100():.1f} per 100 facings: {missed:.1f} missed, {false:.1f} false, {to_drag:.1f} to drag"
