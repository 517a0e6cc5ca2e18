"""A folder of photos to a COCO file of boxes, without any Label Studio.

Knows COCO, files and the engine. Photos without their boxes are told apart from those done, and stop nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.console import CommandError, track

if TYPE_CHECKING:
    from model import Detections, Engine, Photo

CATEGORY_ID = 1


@dataclass(frozen=True, kw_only=True)
class Preannotation:
    """What became of a folder. boxes: COCO detections. broken: file name → reason, one line each."""

    photos: int
    boxes: Sequence[Mapping[str, Any]]
    broken: Mapping[str, str]


def detect(
    engine: Engine, photos: Iterable[tuple[Path, Photo | Exception]], *, score_threshold: float | None = None
) -> Iterator[tuple[Path, Photo | None, Detections | Exception]]:
    """Detections of each photo, or why there are none, in order. score_threshold: None takes the engine's."""
    from model import EngineError, NotReady

    for path, photo in photos:
        if isinstance(photo, Exception):
            yield path, None, photo
            continue
        try:
            yield path, photo, engine.preannotate(photo, score_threshold=score_threshold)
        except NotReady:
            raise  # no later photo would fare better
        except EngineError as error:
            yield path, photo, error


def coco_boxes(image_id: int, file_name: str, detections: Detections) -> list[dict[str, Any]]:
    """COCO's result format (`bbox`: x, y, width, height in photo pixels), and `file_name`, since ids are ours alone."""
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": CATEGORY_ID,
            "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(score), 4),
        }
        for (x0, y0, x1, y1), score in zip(detections.boxes_xyxy, detections.scores, strict=True)
    ]


def photos_to_do(photos_dir: Path, out: Path) -> list[Path]:
    """The photos under a folder, in order. Raises CommandError when there is none, or no place for their boxes."""
    from scripts.photos import find_photos

    if not out.parent.is_dir():
        raise CommandError(f"--out {str(out)!r}: expected a file in an existing folder, got {str(out.parent)!r}")
    return find_photos(photos_dir)


def preannotate(
    engine: Engine,
    paths: Sequence[Path],
    out: Path,
    *,
    photos_dir: Path,
    score_threshold: float | None = None,
    draw: Path | None = None,
) -> Preannotation:
    """Boxes of every photo, written to `out` in one piece at the end, with file names relative to `photos_dir`.

    Image ids count the paths from 1, broken photos included, so that a second run gives the same ids.
    draw: folder for copies of the photos with their boxes, or None.
    """
    from scripts.photos import draw_boxes, read_ahead

    boxes: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    outcomes = detect(engine, read_ahead(paths), score_threshold=score_threshold)
    for image_id, (path, photo, found) in enumerate(track(outcomes, total=len(paths), label="preannotate"), 1):
        file_name = path.relative_to(photos_dir).as_posix()
        if photo is None or isinstance(found, Exception):
            broken[file_name] = str(found)
            continue
        boxes += coco_boxes(image_id, file_name, found)
        if draw is not None:
            draw_boxes(photo, found.boxes_xyxy, draw / f"{file_name}.jpg")
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(boxes))
    partial.replace(out)
    return Preannotation(photos=len(paths), boxes=boxes, broken=broken)


def print_report(result: Preannotation, out: Path) -> None:
    """What was done, then the photos that are broken."""
    print(f"{len(result.boxes)} boxes of {result.photos - len(result.broken)} photos in {out}")
    if result.broken:
        print(f"{len(result.broken)} of {result.photos} photos are broken and have no boxes:")
        for file_name, reason in result.broken.items():
            print(f"  {file_name}: {reason}")
