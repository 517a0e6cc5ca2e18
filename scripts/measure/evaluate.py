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

from backend.errors import CommandError
from model.quality import (
    CANDIDATE_SCORE,
    SWEEP,
    AveragePrecision,
    Corrections,
    Truth,
    average_precision,
    count_corrections,
    fewest,
)
from scripts.labels import KnownPhotos, print_left_out, read_photos
from scripts.measure.annotate import BY_HAND_PER_100, Actions
from scripts.measure.annotate import annotate as play
from scripts.measure.prompts import PromptMeasurement, PromptQuality

if TYPE_CHECKING:
    from backend.service import Service
    from model import Detections


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
    actions: Actions | None
    sweep: tuple[Corrections, ...]


def evaluate(
    service: Service,
    known: KnownPhotos,
    *,
    score_threshold: float | None = None,
    prompts: bool = False,
    annotate: bool = False,
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
    measured, actions = PromptMeasurement(), Actions()
    for entry, photo in read_photos(known.photos, service.photo, label="evaluate", leave_out=leave_out):
        truths.append(entry.truth)
        started = time.perf_counter()
        handed_out.append(service.preannotate(photo, score_threshold=score_threshold).detections)
        seconds.append(time.perf_counter() - started)
        candidates.append(service.preannotate(photo, score_threshold=CANDIDATE_SCORE).detections)
        if prompts:
            measured.add(service, photo, entry.truth, seed=entry.number)
        if annotate:
            actions += play(service, photo, entry.truth, score_threshold=score_threshold, seed=entry.number)
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
        prompts=measured.quality() if prompts else None,
        actions=actions if annotate else None,
        sweep=count_corrections(truths, candidates, SWEEP) if sweep else (),
    )


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
    if evaluation.actions is not None:
        figures |= {"actions_per_100": evaluation.actions.per_100(), "actions_by_hand_per_100": BY_HAND_PER_100}
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
        print_prompts(prompts)
    if evaluation.actions is not None:
        print(f"actions             {_actions_line(evaluation.actions)}")
    print(json.dumps(summary(evaluation)))


def print_prompts(prompts: PromptQuality) -> None:
    """What prompts are worth, one kind a line."""
    print(
        f"one click           mean IoU {prompts.click_iou:.3f}; {prompts.click_iou_accepted:.3f} with every second box "
        "accepted"
    )
    print(
        f"rough box           mean IoU {prompts.rough_box_iou:.3f} → {prompts.refined_box_iou:.3f}; "
        f"{prompts.refined_box_iou_accepted:.3f} with every second box accepted"
    )
    print(
        f"Alt-click           mean IoU {prompts.trimmed_from_iou:.3f} → {prompts.trimmed_iou:.3f} of "
        f"{prompts.alt_clicks} boxes that stick out"
    )
    print(f"two clicks          both found in {prompts.pairs_found:.1%} of {prompts.pairs} pairs of neighbours")
    print(f"not held            {prompts.not_held} of {prompts.prompts} prompts")


def _actions_line(actions: Actions) -> str:
    kinds = (
        f"{actions.per_100(count):.1f} {name}"
        for name, count in (
            ("removals", actions.removals),
            ("clicks", actions.clicks),
            ("Alt-clicks that trim", actions.trims),
            ("drags, which count twice", actions.drags),
            ("keys", actions.keys),
        )
    )
    return f"{actions.per_100():.1f} per 100 facings ({BY_HAND_PER_100} by hand): {', '.join(kinds)}"


def _corrections_line(row: Corrections) -> str:
    missed, false, to_drag = (row.per_100(count) for count in (row.missed, row.false, row.to_drag))
    return f"{row.per_100():.1f} per 100 facings: {missed:.1f} missed, {false:.1f} false, {to_drag:.1f} to drag"
