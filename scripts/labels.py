"""Photos with known boxes: read from a COCO file or from a Label Studio export.

Knows both formats and where the photos lie; neither the engine nor training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import numpy.typing as npt

from backend.errors import CommandError
from backend.photos.files import SUFFIXES

FloatArray = npt.NDArray[np.float64]

_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploaded files


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The known boxes of one photo.

    boxes_xyxy: `[T, 4]`. crowds_xyxy: `[C, 4]`, areas (COCO's iscrowd) where detections count neither for nor against.
    """

    image_id: int
    file_name: str
    size_wh: tuple[int, int]
    boxes_xyxy: FloatArray
    crowds_xyxy: FloatArray


def read_truth(labels_file: Path, photos_dir: Path, *, limit: int | None = None) -> list[Truth]:
    """The first `limit` photos of a COCO file or a Label Studio JSON export (all when None), with all their boxes.

    Labels and categories do not matter: a facing is a facing. Of an export, only tasks with rectangles count, and of a
    task its latest annotation that was not cancelled.
    Raises CommandError when it is no such file, or a photo is not in its folder.
    """
    try:
        content = json.loads(labels_file.read_text())
        truths = _of_coco(content) if isinstance(content, dict) else _of_export(content, photos_dir)
    except OSError as error:
        raise CommandError(f"{str(labels_file)!r}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSONDecodeError is a ValueError
        raise CommandError(
            f"{str(labels_file)!r}: expected COCO with images and annotations, or a Label Studio export; got {error!r}"
        ) from error
    truths = truths[:limit]
    missing = [truth.file_name for truth in truths if not (photos_dir / truth.file_name).is_file()]
    if not truths or missing:
        culprit = f"{missing[0]!r} and {len(missing) - 1} more are missing" if missing else "the file names none"
        raise CommandError(f"{str(photos_dir)!r}: expected the photos of {str(labels_file)!r}, but {culprit}")
    return truths


def _of_coco(coco: Mapping[str, Any]) -> list[Truth]:
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in coco["images"]}
    crowds: dict[int, list[list[float]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        (crowds if annotation.get("iscrowd") else boxes)[annotation["image_id"]].append(annotation["bbox"])
    return [
        Truth(
            image_id=image["id"],
            file_name=image["file_name"],
            size_wh=(image["width"], image["height"]),
            boxes_xyxy=_xyxy(boxes[image["id"]]),
            crowds_xyxy=_xyxy(crowds[image["id"]]),
        )
        for image in coco["images"]
    ]


def _of_export(tasks: Sequence[Mapping[str, Any]], photos_dir: Path) -> list[Truth]:
    from backend.label_studio.regions import boxes_from_regions

    truths = []
    for task in tasks:
        valid = [annotation for annotation in task["annotations"] if not annotation.get("was_cancelled")]
        latest = max(valid, key=lambda annotation: str(annotation.get("updated_at", "")), default={"result": []})
        rectangles = [region for region in latest["result"] if region.get("type") in ("rectanglelabels", "rectangle")]
        if not rectangles:
            continue
        size_wh = rectangles[0]["original_width"], rectangles[0]["original_height"]
        truths.append(
            Truth(
                image_id=task["id"],
                file_name=_file_name(task["data"], photos_dir),
                size_wh=size_wh,
                boxes_xyxy=np.asarray(boxes_from_regions(rectangles, size_wh), np.float64),
                crowds_xyxy=np.zeros((0, 4)),
            )
        )
    return truths


def _file_name(data: Mapping[str, Any], photos_dir: Path) -> str:
    """The photo's name in its folder, from the task's link to it: as it is, or without what an upload put before it."""
    for url in data.values():
        parts = urlsplit(url if isinstance(url, str) else "")
        path = Path(parse_qs(parts.query).get("d", [unquote(parts.path)])[0])  # local files stand in ?d=
        if path.suffix.lower() in SUFFIXES:
            return path.name if (photos_dir / path.name).is_file() else _UPLOAD_PREFIX.sub("", path.name)
    raise ValueError(f"task data {data!r}: expected a link to a photo")


def _xyxy(boxes_xywh: Sequence[Sequence[float]]) -> FloatArray:
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
