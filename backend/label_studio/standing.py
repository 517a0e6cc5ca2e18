"""The boxes that stand on a photo while an annotator works on it, and how an answer replaces or removes one.

Knows Label Studio's tasks and regions. What was measured with Label Studio 1.23.2: a request for an answer to prompts
carries the task's drafts, annotations and predictions. A draft is up to five seconds old. A region of the answer whose
`id` is that of a standing region takes its place when it is accepted. One that is marked `dynamic`, as pending prompts
are, is removed with them, and so is the standing region with its id: nothing of it is left in what is submitted.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache

from backend.label_studio.label_config import ImageControls
from backend.label_studio.regions import Region, is_rectangle, read_number, rectangle_bounds

DRAFT_AGE_S = 8.0  # Label Studio saves a draft five seconds after a change, and sends what it has saved
MAX_TASKS = 1000  # whose latest answers are remembered

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class StandingBox:
    """An upright box on the photo.

    region: as Label Studio has it. details: other results of that region, such as a choice.
    bounds: x0, y0, x1, y1 in fractions of the photo's sides.
    is_accepted: whether the annotator drew, changed or submitted it; otherwise it is pre-annotated and may be wrong.
    """

    region: Region
    details: tuple[Region, ...]
    bounds: Bounds
    is_accepted: bool

    @property
    def label(self) -> str | None:
        """Its label, where it has one."""
        labels = self.region["value"].get("rectanglelabels")
        return labels[0] if isinstance(labels, list) and labels and isinstance(labels[0], str) else None

    def moved(self, bounds: Bounds) -> list[Region]:
        """Regions that take its place, at other bounds."""
        x0, y0, x1, y1 = (round(100 * fraction, 4) for fraction in bounds)
        value = {**self.region["value"], "x": x0, "y": y0, "width": round(x1 - x0, 4), "height": round(y1 - y0, 4)}
        return [{**self._scored(), "value": value}, *self.details]

    def removed(self) -> Region:
        """A region that takes its place and vanishes with the prompts."""
        return {**self._scored(), "dynamic": True}

    def _scored(self) -> Region:
        return {"score": 0.0, **{key: value for key, value in self.region.items() if key != "origin"}}


def standing_regions(task: Mapping[str, Any]) -> tuple[Sequence[Region], bool]:
    """What the annotator sees on a task as far as Label Studio tells, and whether it was submitted: the newest draft or
    annotation, else the newest prediction."""
    drafts, annotations = _dated(task.get("drafts")), _dated(task.get("annotations"))
    if drafts or annotations:
        newest = max([*drafts, *annotations], key=lambda entry: str(entry.get("updated_at") or ""))
        is_submitted = newest in annotations or newest.get("annotation") is not None
        return _regions(newest), is_submitted
    predictions = _dated(task.get("predictions"))
    return (_regions(predictions[-1]) if predictions else []), False


def standing_boxes(regions: Sequence[Region], image: ImageControls, *, is_submitted: bool) -> list[StandingBox]:
    """The upright boxes among the regions that the box control of this image has."""
    found: list[StandingBox] = []
    controls = set(image.prompts.names) - {image.boxes.from_name}
    pending = {region.get("id") for region in regions if region.get("from_name") in controls}
    for region in regions:
        if region.get("id") in pending:  # the label of a prompt that waits for its answer
            continue
        value = region.get("value")
        is_box = is_rectangle(region) and region.get("from_name") == image.boxes.from_name and region.get("id")
        if not is_box or not isinstance(value, Mapping):
            continue
        try:
            if read_number(value, "rotation", default=0.0):
                continue
            x0, y0, x1, y1 = rectangle_bounds(value, (1.0, 1.0))
        except ValueError:  # what somebody's script wrote there is not for us to judge
            continue
        found.append(
            StandingBox(
                region=region,
                details=tuple(one for one in regions if one is not region and one.get("id") == region["id"]),
                bounds=(x0, y0, x1, y1),
                is_accepted=is_submitted or region.get("origin", "prediction") != "prediction",
            )
        )
    return found


class RecentAnswers:
    """What was answered to prompts in the last seconds, which no draft has yet. Bounded; thread-safe.

    Only in this process: another replica sees boxes when the draft has them. An answer that the annotator rejected is
    believed to stand until it is forgotten.
    """

    def __init__(self) -> None:
        self._answers: TTLCache[Hashable, tuple[Region, ...]] = TTLCache(MAX_TASKS, DRAFT_AGE_S)
        self._lock = threading.Lock()

    def applied(self, task: Hashable, regions: Sequence[Region]) -> list[Region]:
        """The regions of a task with what was answered lately in the place of regions of the same ids."""
        with self._lock:
            answers = self._answers.get(task, ())
        ids = {region.get("id") for region in answers}
        kept = [region for region in regions if region.get("id") not in ids]
        return [*kept, *(region for region in answers if not region.get("dynamic"))]

    def remember(self, task: Hashable, answer: Iterable[Region]) -> None:
        """Remembers an answer with those before it; the newest of an id counts."""
        answer = list(answer)
        ids = {region.get("id") for region in answer if is_rectangle(region)}  # masks are large, and stand for nothing
        answer = [{**region, "origin": "manual"} for region in answer if region.get("id") in ids]
        with self._lock:
            earlier = [region for region in self._answers.get(task, ()) if region.get("id") not in ids]
            self._answers[task] = (*earlier, *answer)


def _dated(entries: Any) -> list[Mapping[str, Any]]:
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, Mapping) and not entry.get("was_cancelled")]


def _regions(entry: Mapping[str, Any]) -> list[Region]:
    result = entry.get("result")
    return [dict(region) for region in result if isinstance(region, Mapping)] if isinstance(result, list) else []
