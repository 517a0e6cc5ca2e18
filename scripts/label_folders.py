"""Known boxes in a folder with one file for each photo: Pascal VOC (XML) or Supervisely (JSON).

Knows both formats, from their descriptions; what is not a rectangle is no box. A file that does not follow its format
is refused, with the place that is wrong.

Pascal VOC counts pixels from 1 and includes the last one; of Supervisely, two corners of a rectangle count as they are.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from backend.photos.files import display_name
from model.quality import Truth
from scripts.photo_lookup import LabelledName

MAX_SIDE_PX = 1_000_000
VOC, SUPERVISELY = ".xml", ".json"
_RECTANGLE = "rectangle"


@dataclass(frozen=True, kw_only=True)
class _File:
    """What one file contains. boxes: label and xyxy of each."""

    photo: str
    size_wh: tuple[int, int]
    boxes: list[tuple[str, tuple[float, float, float, float]]]


def read_folder(folder: Path, labels: frozenset[str]) -> tuple[list[LabelledName], list[str]]:
    """The photos of a folder of such files, in the order of their names, and remarks.

    labels: of the boxes that are facings; empty: all. Raises ValueError when a file is none, or none is there.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (VOC, SUPERVISELY) and path.is_file())
    if not paths:
        raise ValueError("the folder has none")
    entries: list[LabelledName] = []
    other = without_area = 0
    for number, path in enumerate(paths):
        try:
            file = _READERS[path.suffix.lower()](path)
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{display_name(path)!r}: {error}") from error
        facings = [box for label, box in file.boxes if not labels or label in labels]
        boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in facings if x0 < x1 and y0 < y1]
        other += len(file.boxes) - len(facings)
        without_area += len(facings) - len(boxes)
        truth = Truth(size_wh=file.size_wh, boxes_xyxy=np.array(boxes, np.float64).reshape(-1, 4))
        entries.append(LabelledName(number=number, names=((file.photo,),), truth=truth))
    remarks = []
    if other:
        remarks.append(f"{other} boxes have other labels than {', '.join(sorted(labels))} and do not count")
    if without_area:
        remarks.append(f"{without_area} boxes without area do not count")
    return entries, remarks


def _read_voc(path: Path) -> _File:
    content = path.read_bytes()
    if b"<!" in content:  # a document type, in which entities could be defined that grow without end
        raise ValueError("expected Pascal VOC, got XML with a document type or a comment")
    try:
        root = ElementTree.fromstring(content)  # noqa: S314  without a document type
    except ElementTree.ParseError as error:
        raise ValueError(f"expected Pascal VOC, got no XML: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"expected Pascal VOC's <annotation>, got <{root.tag}>")
    name = (root.findtext("filename") or "").strip()
    if not name:
        raise ValueError("filename: expected the photo's name, got none")
    boxes = []
    for place, box in enumerate(root.iterfind("object"), 1):
        corners = [_number(box.findtext(f"bndbox/{key}"), f"object {place}: {key}") for key in _VOC_KEYS]
        x0, y0, x1, y1 = corners
        boxes.append(((box.findtext("name") or "").strip(), (x0 - 1, y0 - 1, x1, y1)))
    size_wh = _side(root.findtext("size/width"), "size/width"), _side(root.findtext("size/height"), "size/height")
    return _File(photo=name, size_wh=size_wh, boxes=boxes)


def _read_supervisely(path: Path) -> _File:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"expected Supervisely's JSON, got no JSON: {error}") from error
    size = content.get("size") if isinstance(content, dict) else None
    if not isinstance(size, dict):
        raise ValueError(f"expected Supervisely's object with a size, got {reprlib.repr(content)}")
    size_wh = _side(size.get("width"), "size.width"), _side(size.get("height"), "size.height")
    return _File(photo=path.name.removesuffix(path.suffix), size_wh=size_wh, boxes=list(_rectangles(content)))


def _rectangles(content: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    objects = content.get("objects")
    if not isinstance(objects, list):
        raise ValueError(f"objects: expected a list, got {reprlib.repr(objects)}")
    for place, one in enumerate(objects):
        where = f"objects[{place}]"
        if not isinstance(one, dict):
            raise ValueError(f"{where}: expected an object, got {reprlib.repr(one)}")
        if one.get("geometryType", _RECTANGLE) != _RECTANGLE:
            continue
        points = one.get("points")
        corners = points.get("exterior") if isinstance(points, dict) else None
        if not isinstance(corners, list) or len(corners) != 2 or not all(map(_is_pair, corners)):
            raise ValueError(f"{where}.points.exterior: expected two corners, got {reprlib.repr(corners)}")
        (x0, y0), (x1, y1) = ([_number(value, f"{where}.points.exterior") for value in corner] for corner in corners)
        yield str(one.get("classTitle", "")), (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def _is_pair(corner: object) -> bool:
    return isinstance(corner, list) and len(corner) == 2


def _number(value: object, where: str) -> float:
    try:
        number = float(str(value).strip())
    except ValueError:
        number = float("nan")
    if not abs(number) < 1e9:  # NaN compares false
        raise ValueError(f"{where}: expected a number of pixels, got {reprlib.repr(value)}")
    return number


def _side(value: object, where: str) -> int:
    side = _number(value, where)
    if not 1 <= side <= MAX_SIDE_PX or side != int(side):
        raise ValueError(f"{where}: expected a whole number of pixels, got {reprlib.repr(value)}")
    return int(side)


_VOC_KEYS = ("xmin", "ymin", "xmax", "ymax")
_READERS: dict[str, Callable[[Path], _File]] = {VOC: _read_voc, SUPERVISELY: _read_supervisely}
