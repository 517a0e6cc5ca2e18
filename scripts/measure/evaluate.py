"""How good the boxes of a checkpoint are, on photos with known boxes.

Runs photos through the Service; what the figures mean stands in model.quality. Measuring returns values; printing is
apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError
from model.quality import (
    CANDIDATE_SCORE,
    SWEEP,
    AveragePrecision,
    Corrections,
    FloatArray,
    Truth,
    average_precision,
    count_corrections,
    fewest,
    paired_iou,
)
from scripts.labels import KnownPhotos, print_left_out, read_photos

if TYPE_CHECKING:
    from backend.service import Service
    from model import Detections, Photo

JITTER = 0.15  # of a box's size, for each of its edges


@dataclass(frozen=True, kw_only=True)
class PromptQuality:
    """Mean IoU with the known box: after one click in its middle; of a rough box, and after its refinement."""

    click_iou: float
    rough_box_iou: float
    refined_box_iou: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """photos: how many were measured. left_out: how many of the truth file were not."""

    checkpoint: str
    version: str
    photos: int
    left_out: int
    precision: AveragePrecision
    corrections: Corrections
    seconds_per_photo: float
    prompts: PromptQuality | None
    sweep: tuple[Corrections, ...]


def evaluate(
    service: Service,
    known: KnownPhotos,
    *,
    score_threshold: float | None = None,
    prompts: bool = False,
    sweep: bool = False,
    leave_out: Callable[[str], None] = print_left_out,
) -> Evaluation:
    """Every photo twice: timed at the threshold in force, as a user gets it; then with the doubtful boxes for AP.

    score_threshold: None takes the engine's. leave_out: gets a line for each photo that cannot be measured.
    Raises CommandError when none can, and EngineError.
    """
    engine = service.engine
    if score_threshold is None:
        score_threshold = engine.score_threshold
    truths: list[Truth] = []
    handed_out: list[Detections] = []
    candidates: list[Detections] = []
    seconds: list[float] = []
    prompt_ious: list[FloatArray] = []
    for entry, photo in read_photos(known.photos, service.photo, label="evaluate", leave_out=leave_out):
        truths.append(entry.truth)
        started = time.perf_counter()
        handed_out.append(service.preannotate(photo, score_threshold=score_threshold).detections)
        seconds.append(time.perf_counter() - started)
        candidates.append(service.preannotate(photo, score_threshold=CANDIDATE_SCORE).detections)
        if prompts:
            prompt_ious.append(measure_prompts(service, photo, entry.truth, seed=entry.number))
    if not truths:
        raise CommandError(f"expected photos to measure on, but none of {len(known.photos)} can be used")
    return Evaluation(
        checkpoint=engine.name,
        version=engine.version,
        photos=len(truths),
        left_out=len(known.left_out) + len(known.photos) - len(truths),
        precision=average_precision(truths, candidates),
        corrections=count_corrections(truths, handed_out, [score_threshold])[0],
        seconds_per_photo=float(np.median(seconds)),
        prompts=_prompt_quality(np.concatenate(prompt_ious)) if prompts else None,
        sweep=count_corrections(truths, candidates, SWEEP) if sweep else (),
    )


def measure_prompts(service: Service, photo: Photo, truth: Truth, *, seed: int) -> FloatArray:
    """`[T, 3]`: IoU with each known box of the answer to one click in its middle, of a rough box, of its refinement."""
    from model import Prompt

    rough_xyxy = jitter_boxes(truth.boxes_xyxy, truth.size_wh, np.random.default_rng((0, seed)))
    centres_xy = ((truth.boxes_xyxy[:, :2] + truth.boxes_xyxy[:, 2:]) / 2).astype(np.float32)
    clicks = [Prompt(points_xy=centre[None], is_foreground=np.ones(1, bool)) for centre in centres_xy]
    rough = [Prompt(box_xyxy=box) for box in rough_xyxy]
    if not clicks:
        return np.zeros((0, 3))
    clicked, refined = (service.refine(photo, asked).detections for asked in (clicks, rough))
    answers = (clicked.boxes_xyxy, rough_xyxy, refined.boxes_xyxy)
    return np.stack([paired_iou(boxes, truth.boxes_xyxy) for boxes in answers], axis=1)


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
        "left_out": evaluation.left_out,
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
        best = fewest(evaluation.sweep)
        figures |= {"best_score_threshold": best.score_threshold, "best_corrections_per_100": best.per_100()}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    return {name: None if value != value else value for name, value in rounded.items()}  # JSON knows no NaN


def print_report(evaluation: Evaluation) -> None:
    """Figures for people, one a line; the last line is JSON."""
    precision, corrections, prompts = evaluation.precision, evaluation.corrections, evaluation.prompts
    without = f" ({evaluation.left_out} photos left out)" if evaluation.left_out else ""
    print(f"{evaluation.version}: {evaluation.photos} photos, {corrections.facings} facings{without}")
    for row in evaluation.sweep:
        print(f"threshold {row.score_threshold:.2f}      {_corrections_line(row)}")
    if evaluation.sweep:
        best = fewest(evaluation.sweep)
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
