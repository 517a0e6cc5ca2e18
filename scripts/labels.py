"""Truth files: photos with known boxes, from a COCO file, a Label Studio export (JSON), or a folder of label files.

Knows COCO, and puts together what `label_studio_export`, `label_folders` and `photo_lookup` know. Knows neither the
engine nor training.

Labels and categories do not matter, unless they are named: a facing is a facing. A file that does not follow its format
is refused as a whole, with the place that is wrong. What a single photo lacks costs that photo: it is left out, with a
line.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.errors import CommandError
from backend.photos.files import display_name, read_ahead
from model.quality import Truth
from scripts.console import track
from scripts.label_folders import MAX_SIDE_PX, read_folder
from scripts.label_studio_export import read_export
from scripts.photo_lookup import LabelledName, find_files

if TYPE_CHECKING:
    from model import Photo

MAX_COORDINATE_PX = 1e9


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownPhoto:
    """A photo's file and its known boxes. number: its id in the truth file, or its place there; never negative."""

    number: int
    path: Path
    truth: Truth


@dataclass(frozen=True, kw_only=True)
class KnownPhotos:
    """The photos of a truth file, at least one, in its order.

    left_out: a line for each photo of the file that is not among them. remarks: a line for anything else that was not
    taken as it is in the file.
    """

    photos: tuple[KnownPhoto, ...]
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def read_truth(
    truth_file: Path,
    photos_dir: Path,
    *,
    limit: int | None = None,
    controls: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> KnownPhotos:
    """The first `limit` photos of a truth file or folder (all when None), with all their boxes.

    controls: names of the Label Studio controls whose rectangles are facings; without any, `label_studio_export`
    decides. labels: of the boxes in a folder of label files that are facings; without any, all. Which file a photo
    is: see `photo_lookup`.
    Raises CommandError when the file is no such file, or none of its photos is in the folder.
    """
    name = display_name(truth_file)
    if truth_file.is_dir():
        if controls:
            raise CommandError(f"{name!r}: --control is for Label Studio exports; this is a folder of label files")
        try:
            names, remarks = read_folder(truth_file, frozenset(labels))
        except ValueError as error:
            raise CommandError(f"{name!r}: expected label files of Pascal VOC or Supervisely: {error}") from error
    else:
        names, remarks = _read_file(truth_file, controls)
    photos: list[KnownPhoto] = []
    left_out: list[str] = []
    for entry, path in zip(names, find_files(photos_dir, names), strict=True):
        if isinstance(path, str):
            left_out.append(path)
        elif limit is None or len(photos) < limit:
            photos.append(KnownPhoto(number=entry.number, path=path, truth=entry.truth))
        else:
            break
    if not photos:
        reason = f"found none of {len(names)}; the first: {left_out[0]}" if names else "but the file names none"
        raise CommandError(f"{display_name(photos_dir)!r}: expected the photos of {name!r}, {reason}")
    return KnownPhotos(photos=tuple(photos), left_out=tuple(left_out), remarks=tuple(remarks))


def _read_file(truth_file: Path, controls: Sequence[str]) -> tuple[list[LabelledName], list[str]]:
    """The entries of a COCO file or a Label Studio export, and remarks. Raises CommandError."""
    name = display_name(truth_file)
    try:
        content = json.loads(truth_file.read_bytes())
    except OSError as error:
        raise CommandError(f"{name!r}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # neither JSON nor text
        raise CommandError(f"{name!r}: expected COCO or a Label Studio export, got no JSON: {error}") from error
    except RecursionError:
        raise CommandError(
            f"{name!r}: expected COCO or a Label Studio export, got JSON that is nested too deep"
        ) from None
    try:
        if isinstance(content, dict):
            if controls:
                raise ValueError("--control is for Label Studio exports; this is an object, as COCO is")
            return _read_coco(content)
        if isinstance(content, list):
            return read_export(content, controls)
        raise ValueError(f"got {reprlib.repr(content)}")
    except ValueError as error:
        raise CommandError(f"{name!r}: expected COCO or a Label Studio export (JSON): {error}") from error


def read_photos(
    known: Sequence[KnownPhoto], read: Callable[[Path], Photo], *, label: str, leave_out: Callable[[str], None]
) -> Iterator[tuple[KnownPhoto, Photo]]:
    """Each with its photo, which `read` gives, and progress on standard error under this label.

    A photo that cannot be read, or has another size than its boxes were drawn on, is left out: `leave_out` gets a line.
    """
    outcomes = read_ahead(known, lambda entry: read(entry.path))
    for entry, photo in track(outcomes, total=len(known), label=label):
        name = display_name(entry.path)
        if isinstance(photo, Exception):
            leave_out(f"{name!r}: {photo}")
        elif photo.size_wh != entry.truth.size_wh:
            leave_out(
                f"{name!r}: expected {_size(entry.truth.size_wh)} as in the truth file, got {_size(photo.size_wh)}"
            )
        else:
            yield entry, photo


def print_left_out(line: str) -> None:
    """One line on standard error, for a photo that is left out."""
    print(f"left out: {line}", file=sys.stderr, flush=True)


def print_remarks(known: KnownPhotos) -> None:
    """What was not taken from a truth file, on standard error."""
    for line in known.remarks:
        print(f"facings: {line}", file=sys.stderr)
    for line in known.left_out:
        print_left_out(line)


def _size(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]} x {size_wh[1]} px"


def _read_coco(coco: Mapping[str, Any]) -> tuple[list[LabelledName], list[str]]:
    """The entries of a COCO file, and remarks. Raises ValueError, with the place that is wrong."""
    images = _list(coco, "images")
    boxes: dict[Any, list[list[float]]] = {}
    for place, image in enumerate(images):
        image_id = _image_id(image, "id", f"images[{place}]")
        if image_id in boxes:
            raise ValueError(f"images[{place}].id: expected each id once, got {image_id!r} again")
        boxes[image_id] = []
    crowds: defaultdict[Any, list[list[float]]] = defaultdict(list)
    without_area: list[str] = []
    for place, annotation in enumerate(_list(coco, "annotations")):
        where = f"annotations[{place}]"
        image_id = _image_id(annotation, "image_id", where)
        if image_id not in boxes:
            raise ValueError(f"{where}.image_id: expected the id of one of the images, got {image_id!r}")
        x, y, width, height = _bbox(annotation, where)
        if width <= 0 or height <= 0:
            without_area.append(f"{where}.bbox {[x, y, width, height]!r}")
            continue
        group = crowds if annotation.get("iscrowd") else boxes
        group[image_id].append([x, y, x + width, y + height])
    entries = []
    for place, image in enumerate(images):
        image_id, where = image["id"], f"images[{place}]"
        file_name = image.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{where}.file_name: expected the photo's path, got {reprlib.repr(file_name)}")
        truth = Truth(
            size_wh=(_side(image, "width", where), _side(image, "height", where)),
            boxes_xyxy=np.array(boxes[image_id], np.float64).reshape(-1, 4),
            crowds_xyxy=np.array(crowds[image_id], np.float64).reshape(-1, 4),
        )
        number = image_id if isinstance(image_id, int) and image_id >= 0 else place
        entries.append(LabelledName(number=number, names=((file_name,),), truth=truth))
    if not without_area:
        return entries, []
    return entries, [f"{len(without_area)} boxes without area do not count, such as {without_area[0]}"]


def _list(coco: Mapping[str, Any], key: str) -> list[Any]:
    value = coco.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key}: expected a list, got {reprlib.repr(value)}")
    return value


def _image_id(entry: Any, key: str, where: str) -> int | str:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {reprlib.repr(entry)}")
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{where}.{key}: expected a whole number or a text, got {reprlib.repr(value)}")
    return value


def _bbox(annotation: Mapping[str, Any], where: str) -> list[float]:
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"{where}.bbox: expected [x, y, width, height], got {reprlib.repr(bbox)}")
    for number in bbox:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) < MAX_COORDINATE_PX:  # NaN compares false
            raise ValueError(f"{where}.bbox: expected numbers of pixels, got {reprlib.repr(number)}")
    return [float(number) for number in bbox]


def _side(image: Mapping[str, Any], key: str, where: str) -> int:
    value = image.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= MAX_SIDE_PX or value != int(value):  # type: ignore[operator, arg-type]
        raise ValueError(f"{where}.{key}: expected a whole number of pixels, got {reprlib.repr(value)}")
    return int(value)
