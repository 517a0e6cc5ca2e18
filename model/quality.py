"""How good boxes are, wherever they come from: known boxes and Detections in, figures out.

Two kinds of figures: the COCO protocol with up to 300 detections for each photo, to compare with other work; and the
corrections for each 100 facings, which is what an annotator pays. Knows numpy and pycocotools; neither files nor photos
nor the engine.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.types import Detections

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_DETECTIONS = 300  # COCO's own 100 are fewer than the facings of many a shelf photo
CANDIDATE_SCORE = 0.01  # average precision needs the doubtful boxes too
MATCH_IOU = 0.5  # a detection of this overlap is meant for the facing
GOOD_IOU = 0.75  # below this, an annotator drags an edge
#: Score thresholds among which the best one is looked for.
SWEEP = tuple(round(0.05 * step, 2) for step in range(1, 19))

CHANCE = 0.02  # share of corrections by which thresholds may differ on a few photos without meaning anything

FALSE, IGNORED = -1, -2


def _no_boxes() -> FloatArray:
    return np.zeros((0, 4))


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The known boxes of one photo.

    size_wh: of the photo, in pixels.
    boxes_xyxy: `[T, 4]` in pixels, finite, with x0 < x1 and y0 < y1.
    crowds_xyxy: `[C, 4]`, likewise: areas (COCO's iscrowd) where detections count neither for nor against.
    """

    size_wh: tuple[int, int]
    boxes_xyxy: FloatArray
    crowds_xyxy: FloatArray = field(default_factory=_no_boxes)

    def __post_init__(self) -> None:
        for name in ("boxes_xyxy", "crowds_xyxy"):
            boxes = np.array(getattr(self, name), np.float64).reshape(-1, 4)
            wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1))
            if wrong.any():
                raise ValueError(f"{name}: expected finite x0 < x1 and y0 < y1, got {boxes[wrong][0].tolist()!r}")
            boxes.flags.writeable = False
            object.__setattr__(self, name, boxes)

    def scaled(self, size_wh: tuple[int, int]) -> Truth:
        """The boxes of the same photo in another size."""
        scale = np.tile(np.divide(size_wh, self.size_wh), 2)
        return Truth(size_wh=size_wh, boxes_xyxy=self.boxes_xyxy * scale, crowds_xyxy=self.crowds_xyxy * scale)


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


def pairwise_iou(boxes_xyxy: npt.NDArray[Any], others_xyxy: npt.NDArray[Any], *, crowd: bool = False) -> FloatArray:
    """`[N, M]`. With `crowd`, the part of each box that lies inside each of the others, as COCO has it."""
    from pycocotools import mask

    if not len(boxes_xyxy) or not len(others_xyxy):
        return np.zeros((len(boxes_xyxy), len(others_xyxy)))
    iou: FloatArray = mask.iou(_xywh(boxes_xyxy), _xywh(others_xyxy), [crowd] * len(others_xyxy))
    return iou


def paired_iou(boxes_xyxy: npt.NDArray[Any], others_xyxy: npt.NDArray[Any]) -> FloatArray:
    """`[N]`: each box with the other of its row."""
    return pairwise_iou(boxes_xyxy, others_xyxy).diagonal()


def match(found: Detections, truth: Truth) -> Matching:
    """Each detection, best score first, takes the free known box it overlaps most, from an IoU of 0.5.

    A detection's match depends only on better ones: what lies above a score threshold is matched as if alone.
    """
    truth_index = np.full(len(found), FALSE, np.int64)
    matched_iou = np.zeros(len(found))
    free_iou = pairwise_iou(found.boxes_xyxy, truth.boxes_xyxy)
    able = free_iou.max(axis=1, initial=0) >= MATCH_IOU
    for i in np.argsort(-found.scores, kind="stable"):
        if not able[i]:
            continue
        best = int(free_iou[i].argmax())
        if free_iou[i, best] >= MATCH_IOU:
            truth_index[i], matched_iou[i] = best, free_iou[i, best]
            free_iou[:, best] = 0
    in_crowd = (pairwise_iou(found.boxes_xyxy, truth.crowds_xyxy, crowd=True) >= MATCH_IOU).any(axis=1)
    truth_index[in_crowd & (truth_index == FALSE)] = IGNORED
    return Matching(truth_index=truth_index, iou=matched_iou)


def count_corrections(
    truths: Sequence[Truth], detections: Sequence[Detections], score_thresholds: Sequence[float]
) -> tuple[Corrections, ...]:
    """Over all photos, for each threshold: known boxes missed, boxes to delete, boxes that fit worse than IoU 0.75.

    Raises ValueError when there are not as many detections as truths.
    """
    thresholds = np.asarray(score_thresholds, np.float32).reshape(-1, 1)  # [S, 1], rounded as the scores are
    missed, false, to_drag = (np.zeros(len(thresholds), np.int64) for _ in range(3))
    for truth, found in zip(truths, detections, strict=True):
        matching = match(found, truth)
        is_above = found.scores >= thresholds  # [S, D]
        matched = is_above & (matching.truth_index >= 0)
        missed += len(truth.boxes_xyxy) - matched.sum(axis=1)
        false += (is_above & (matching.truth_index == FALSE)).sum(axis=1)
        to_drag += (matched & (matching.iou < GOOD_IOU)).sum(axis=1)
    facings = sum(len(truth.boxes_xyxy) for truth in truths)
    return tuple(
        Corrections(score_threshold=float(s), facings=facings, missed=int(m), false=int(f), to_drag=int(d))
        for s, m, f, d in zip(score_thresholds, missed, false, to_drag, strict=True)
    )


def fewest(sweep: Sequence[Corrections]) -> Corrections:
    """The threshold with the fewest corrections; the lowest among equals, and where no facing is known."""
    return min(sweep, key=lambda row: row.per_100())


def nearest_good(sweep: Sequence[Corrections], score_threshold: float) -> Corrections:
    """Of the thresholds that need hardly more corrections than the best (CHANCE), the nearest to this one.

    On a few photos the best threshold is partly chance, and every change of it changes what an annotator sees.
    """
    most = (1 + CHANCE) * fewest(sweep).per_100()
    good = [row for row in sweep if row.per_100() <= most] or list(sweep)
    return min(good, key=lambda row: abs(row.score_threshold - score_threshold))


def average_precision(truths: Sequence[Truth], detections: Sequence[Detections]) -> AveragePrecision:
    """COCO's AP over IoU 0.50:0.95, at 0.50 and 0.75, and the average recall, all at 300 detections and all sizes.

    Raises ValueError when there are not as many detections as truths.
    """
    from pycocotools.cocoeval import COCOeval

    known, found = [], []
    for image_id, (truth, of_photo) in enumerate(zip(truths, detections, strict=True)):
        known += _rows(image_id, truth.boxes_xyxy) + _rows(image_id, truth.crowds_xyxy, iscrowd=1)
        rows = _rows(image_id, of_photo.boxes_xyxy)
        found += [{**row, "score": float(score)} for row, score in zip(rows, of_photo.scores, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each of its steps
        evaluation = COCOeval(_coco_of(known, len(truths)), _coco_of(found, len(truths)), "bbox")
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # COCOeval.summarize() looks for 100 detections whatever maxDets is, so its tables are read here.
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]  # [IoU thresholds, recall thresholds]
    recall = evaluation.eval["recall"][:, 0, 0, -1]  # [IoU thresholds]
    if (recall < 0).all():  # COCO's word for "no known boxes"
        return AveragePrecision(ap=float("nan"), ap50=float("nan"), ap75=float("nan"), ar300=float("nan"))
    ious = evaluation.params.iouThrs
    at = [int(np.argmin(np.abs(ious - iou))) for iou in (0.5, 0.75)]
    ap50, ap75 = (float(precision[i].mean()) for i in at)
    return AveragePrecision(ap=float(precision.mean()), ap50=ap50, ap75=ap75, ar300=float(recall.mean()))


def _coco_of(rows: Sequence[dict[str, Any]], images: int) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    # COCOeval takes an id of 0 for "unmatched", so ids start at 1.
    annotations = [{"iscrowd": 0, **row, "id": i, "category_id": 1} for i, row in enumerate(rows, 1)]
    coco.dataset = {
        "images": [{"id": image_id} for image_id in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    coco.createIndex()
    return coco


def _rows(image_id: int, boxes_xyxy: npt.NDArray[Any], **columns: Any) -> list[dict[str, Any]]:
    boxes = _xywh(boxes_xyxy)
    return [{"image_id": image_id, "bbox": list(box), "area": box[2] * box[3], **columns} for box in boxes]


def _xywh(boxes_xyxy: npt.NDArray[Any]) -> FloatArray:
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
