"""Known boxes in a Label Studio export (JSON): the rectangles of facings in each task, by photo.

Knows tasks, annotations and regions; no file.

Of a task its latest annotation that was not cancelled counts. A rectangle is a facing, unless its control (`from_name`)
holds something else, which an export has to be guessed from, since it comes without the label config:

- The controls that the user names (`--control`) hold facings, and no other does.
- If all rectangles are in one control, that control holds facings.
- Else, controls with a rectangle that a model made (it has a score, or such an origin) hold facings: Facings
  writes to the box control only, and what an annotator draws as a prompt has neither.
- Else, all drawn by hand, a control called "prompt", or whose only label is "region", holds prompts, as in the label
  configs of Facings; the other one holds facings. If several others are left, the user has to name them.

Each image that is labelled (`to_name`) is a photo of its own. Its address is the task's data under the image's own
name; else any address of a photo in the data, of which one has to be in the folder.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from backend.label_studio.regions import boxes_from_regions, read_number
from backend.photos.files import SUFFIXES
from model.quality import Truth
from scripts.photo_lookup import LabelledName

PROMPT_CONTROL, PROMPT_LABEL = "prompt", "region"  # in label_config/*.xml
RECTANGLES = ("rectanglelabels", "rectangle")
MAX_DATA_DEPTH = 8
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploaded files

Region = Mapping[str, Any]


@dataclass(kw_only=True)
class _Use:
    """What a control was used for in the whole export."""

    rectangles: int = 0
    is_from_model: bool = False
    labels: set[str] = field(default_factory=set)


def read_export(tasks: Sequence[Any], controls: Sequence[str]) -> tuple[list[LabelledName], list[str]]:
    """The labelled photos of an export, and remarks. controls: of the user.

    Tasks without rectangles of facings are passed over. Raises ValueError, with the place that is wrong.
    """
    of_task = [_rectangles(task, f"[{place}]") for place, task in enumerate(tasks)]
    uses: dict[str, _Use] = {}
    for rectangles in of_task:
        for region in rectangles:
            use = uses.setdefault(_text(region, "from_name"), _Use())
            use.rectangles += 1
            use.is_from_model |= "score" in region or str(region.get("origin")).startswith("prediction")
            use.labels.update(_labels(region))
    chosen = _facing_controls(uses, controls)
    remarks = [
        f"{use.rectangles} rectangles of control {name!r} are not facings; use --control to choose"
        for name, use in uses.items()
        if name not in chosen
    ]
    entries: list[LabelledName] = []
    without_area = 0
    for place, (task, rectangles) in enumerate(zip(tasks, of_task, strict=True)):
        by_image: dict[str, list[Region]] = {}
        for region in rectangles:
            if _text(region, "from_name") in chosen:
                by_image.setdefault(_text(region, "to_name"), []).append(region)
        for image, regions in by_image.items():
            truth = _truth(regions, f"[{place}]")
            without_area += len(regions) - len(truth.boxes_xyxy)
            task_id = task.get("id")
            number = task_id if isinstance(task_id, int) and task_id >= 0 else place
            names = _photo_names(task.get("data"), image, f"[{place}]")
            entries.append(LabelledName(number=number, names=names, truth=truth))
    if without_area:
        remarks.append(f"{without_area} rectangles without area do not count")
    return entries, remarks


def _rectangles(task: Any, where: str) -> list[Region]:
    """The rectangles of a task's latest annotation."""
    annotations = task.get("annotations") if isinstance(task, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(
            f"{where}: expected a task with its annotations, as Label Studio exports in the format JSON, "
            f"got {reprlib.repr(task)}"
        )
    valid = []
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            place = f"{where}.annotations[{number}]"
            raise ValueError(f"{place}: expected an annotation with its result, got {reprlib.repr(annotation)}")
        if not annotation.get("was_cancelled"):
            valid.append(annotation)
    if not valid:
        return []
    latest = max(valid, key=lambda annotation: str(annotation.get("updated_at", "")))
    regions = [region for region in latest["result"] if isinstance(region, dict)]
    return [region for region in regions if region.get("type") in RECTANGLES]


def _facing_controls(uses: Mapping[str, _Use], controls: Sequence[str]) -> set[str]:
    listed = ", ".join(f"{name!r} ({use.rectangles})" for name, use in uses.items())
    if controls:
        for name in controls:
            if name not in uses:
                raise ValueError(
                    f"--control: expected one with rectangles, {listed or 'of which there are none'}, got {name!r}"
                )
        return set(controls)
    if len(uses) < 2:
        return set(uses)
    if from_model := {name for name, use in uses.items() if use.is_from_model}:
        return from_model
    others = {name for name, use in uses.items() if name != PROMPT_CONTROL and use.labels != {PROMPT_LABEL}}
    if len(others) != 1:
        raise ValueError(
            f"rectangles are in several controls, {listed}: name those with facings, such as --control box"
        )
    return others


def _truth(regions: Sequence[Region], where: str) -> Truth:
    """The boxes of one photo's rectangles, those without area left out."""
    width, height = (read_number(regions[0], f"original_{side}") for side in ("width", "height"))
    if not (width >= 1 and height >= 1):
        raise ValueError(f"{where}: expected the photo's size in pixels, got {width:g} x {height:g}")
    size_wh = round(width), round(height)
    for region in regions:
        if not isinstance(region.get("value"), dict):
            raise ValueError(f"{where}: expected a rectangle's value, got {reprlib.repr(region.get('value'))}")
    solid = [
        region for region in regions if all(read_number(region["value"], side) > 0 for side in ("width", "height"))
    ]
    boxes = boxes_from_regions(solid, size_wh).astype("float64")
    return Truth(size_wh=size_wh, boxes_xyxy=boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)])


def _photo_names(data: Any, image: str, where: str) -> tuple[tuple[str, ...], ...]:
    """The paths that each link to a photo in the task's data may have; of the image's own link alone, where it has."""
    links = {key: names for key, value in _texts(data) if (names := _link_names(value))}
    if not links:
        raise ValueError(f"{where}.data: expected a link to a photo, got {reprlib.repr(data)}")
    return (links[image],) if image in links else tuple(links.values())


def _texts(data: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """All texts in a task's data, with the key that each is below."""
    if isinstance(data, str):
        yield key, data
    elif depth < MAX_DATA_DEPTH and isinstance(data, dict | list):
        for inner, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _texts(value, f"{key}.{inner}" if key else str(inner), depth + 1)


def _link_names(text: str) -> tuple[str, ...]:
    """The paths that a link to a photo may mean: as it is, and without what an upload put before its name."""
    try:
        parts = urlsplit(text)
        path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]  # local files stand in ?d=
    except ValueError:  # brackets that are no host
        return ()
    pure = PurePosixPath(path)
    if pure.suffix.lower() not in SUFFIXES:
        return ()
    bare = _UPLOAD_PREFIX.sub("", pure.name)
    return (path,) if bare in ("", pure.name) else (path, str(pure.with_name(bare)))


def _text(region: Region, key: str) -> str:
    value = region.get(key)
    return value if isinstance(value, str) else ""


def _labels(region: Region) -> list[str]:
    value = region.get("value")
    labels = value.get(RECTANGLES[0]) if isinstance(value, dict) else None
    return [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []
