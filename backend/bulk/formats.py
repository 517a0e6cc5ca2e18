"""Boxes as files: a COCO data set, tasks for Label Studio's import, a YOLO data set.

Knows the three formats. Knows neither photos' pixels nor the engine. Boxes are written photo by photo, so that memory
does not grow with their number; of each photo only eight bytes, of its name, are remembered.

coco          one file: images, annotations (with `score`, so that the list of annotations is COCO's result format too)
              and categories
label-studio  one file: tasks with predictions
yolo          a folder. labels/<name>.txt for each photo; classes.txt; data.yaml and images.txt, which Ultralytics'
              `yolo train data=…` reads; photos.csv, which photo is expected as images/<name>

Boxes are clipped to their photo, and those without area are left out, in all three formats.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from backend.bulk.names import FileNames
from backend.bulk.outputs import GrowingFile, os_errors_as_command_error, write_whole
from backend.errors import CommandError

if TYPE_CHECKING:
    from backend.label_studio.label_config import ImageControls, LabelConfig
    from model import Detections

SPOOL_BYTES = 1 << 20  # of COCO's images in memory; more of them go to a file without a name
YOLO_HEADER = """\
# Boxes by Facings.
# Put or link the photos into images/, under the names in images.txt; photos.csv lists which photo has which name.
# path: change it when this folder is moved. val: these boxes are predictions; validate on photos of your own.
"""


class Format(StrEnum):
    """What can be written."""

    coco = "coco"
    label_studio = "label-studio"
    yolo = "yolo"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files, not one file."""
        return self is Format.yolo


@dataclass(frozen=True, kw_only=True)
class BoxedPhoto:
    """A photo with its boxes.

    image: the part of the label config that the photo belongs to; its default label is that of the boxes.
    name: the photo's path below the folder of photos, with forward slashes; of a task, `names.photo_name`.
    """

    image: ImageControls
    name: str
    size_wh: tuple[int, int]
    detections: Detections


@dataclass(frozen=True, kw_only=True)
class BoxedTask:
    """A task with its photos that have boxes: at most one for each image of the label config; failed ones are absent.

    id: at least 1 and unique in a run: of the task, or the position of a photo in a folder, counted from 1.
    data: of the task in Label Studio.
    """

    id: int
    data: Mapping[str, Any]
    photos: Sequence[BoxedPhoto]


class Writer(Protocol):
    """Takes tasks one by one. Not thread-safe. Both methods raise CommandError where a file cannot be written."""

    def add(self, task: BoxedTask) -> None: ...

    def finish(self) -> None:
        """Puts the files in their place, with all that was added; to be called once, also by a run that ends early."""
        ...


@contextmanager
def open_writer(out: Path, kind: Format, *, config: LabelConfig, model_version: str) -> Iterator[Writer]:
    """A writer of that format. Raises CommandError where `out` cannot be written.

    Left without `finish`, a file is not there, or is what it was before; a YOLO folder keeps the labels that were
    added. config: of the tasks; its box labels become the classes. model_version: for predictions in Label Studio.
    """
    with ExitStack() as stack:
        if kind is Format.yolo:
            yield _Yolo(Path(os.path.realpath(out)), config, stack)
        elif kind is Format.coco:
            yield _Coco(out, config, stack)
        else:
            yield _Tasks(out, model_version, stack)


def image_id(task: BoxedTask, photo: BoxedPhoto, config: LabelConfig) -> int:
    """A number for the photo, the same in every run: the task's where tasks have one photo, else unique among them."""
    return 1 + (task.id - 1) * len(config.images) + config.images.index(photo.image)


def box_labels(config: LabelConfig) -> list[str]:
    """The labels that boxes can have, in the config's order, each once."""
    return list(dict.fromkeys(label for image in config.images for label in image.boxes.labels))


def yolo_rows(photo: BoxedPhoto, classes: Sequence[str]) -> Iterator[str]:
    """The lines of a photo's YOLO label file. classes: the labels, of which each box has a number."""
    width, height = photo.size_wh
    number = classes.index(photo.image.boxes.default_label)
    for (x0, y0, x1, y1), _ in _clipped(photo):
        row = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        yield "{} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(number, *row)


class _Tasks:
    """A JSON array of tasks, as Label Studio's import takes them."""

    def __init__(self, out: Path, model_version: str, stack: ExitStack) -> None:
        self._file = stack.enter_context(GrowingFile(out))
        self._rows = _Rows()
        self._model_version = model_version

    def add(self, task: BoxedTask) -> None:
        from backend.label_studio.predictions import prediction_of
        from backend.label_studio.regions import regions_from_detections

        regions = [
            region
            for photo in task.photos
            for region in regions_from_detections(photo.detections, photo.size_wh, photo.image)
        ]
        row = {"data": dict(task.data), "predictions": [prediction_of(regions, self._model_version)]}
        self._file.write(self._rows.next(row))

    def finish(self) -> None:
        self._file.write(self._rows.end() + "\n")
        self._file.commit()


class _Coco:
    """A COCO object. Its long part, the annotations, is written at once; the images are kept aside until the end."""

    def __init__(self, out: Path, config: LabelConfig, stack: ExitStack) -> None:
        self._out, self._config = out, config
        self._category_ids = {label: number for number, label in enumerate(box_labels(config), 1)}
        self._names = FileNames(is_portable=False)
        self._file = stack.enter_context(GrowingFile(out))
        folder = Path(os.path.realpath(out)).parent  # which has space for it, unlike a /tmp in memory
        self._images = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder))  # noqa: SIM115  closed by the stack
        stack.callback(_close, self._images)
        self._image_rows, self._annotation_rows = _Rows(), _Rows()
        self._annotations = 0
        categories = [{"id": number, "name": label} for label, number in self._category_ids.items()]
        self._file.write(f'{{"info": {{}}, "licenses": [],\n"categories": {json.dumps(categories)},\n"annotations": ')

    def add(self, task: BoxedTask) -> None:
        for photo in task.photos:
            number = image_id(task, photo, self._config)
            width, height = photo.size_wh
            row = {"id": number, "file_name": self._names.name(photo.name, number), "width": width, "height": height}
            with os_errors_as_command_error(self._out):
                self._images.write(self._image_rows.next(row).encode())
            for annotation in self._annotations_of(photo, number):
                self._file.write(self._annotation_rows.next(annotation))

    def finish(self) -> None:
        self._file.write(self._annotation_rows.end() + ',\n"images": ')
        with os_errors_as_command_error(self._out):
            self._images.seek(0)
            while chunk := self._images.read(SPOOL_BYTES):
                self._file.write(chunk)
        self._file.write(self._image_rows.end() + "}\n")
        self._file.commit()

    def _annotations_of(self, photo: BoxedPhoto, number: int) -> Iterator[dict[str, Any]]:
        for (x0, y0, x1, y1), score in _clipped(photo):
            self._annotations += 1
            x, y, width, height = (round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0))
            yield {
                "id": self._annotations,
                "image_id": number,
                "category_id": self._category_ids[photo.image.boxes.default_label],
                "bbox": [x, y, width, height],
                "area": round(width * height, 2),
                "iscrowd": 0,
                "segmentation": [],  # some readers insist on the key
                "score": round(score, 4),
            }


class _Yolo:
    """A YOLO data set. A label file is there, and whole, once its photo was added; the lists are there at the end."""

    def __init__(self, out: Path, config: LabelConfig, stack: ExitStack) -> None:
        self._out, self._config = out, config
        self._classes = box_labels(config)
        self._names = FileNames()
        with os_errors_as_command_error(out):
            self._refuse_foreign()
            (out / "labels").mkdir(parents=True, exist_ok=True)
        write_whole(out / "data.yaml", self._data_yaml())
        write_whole(out / "classes.txt", "".join(f"{label}\n" for label in self._classes))
        self._list = stack.enter_context(GrowingFile(out / "images.txt"))
        self._table = stack.enter_context(GrowingFile(out / "photos.csv"))
        self._table.write(_csv_row("image_id", "photo", "image"))

    def add(self, task: BoxedTask) -> None:
        for photo in task.photos:
            number = image_id(task, photo, self._config)
            name = self._names.name(photo.name, number)
            path = self._out / "labels" / PurePosixPath(name).with_suffix(".txt")
            with os_errors_as_command_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(yolo_rows(photo, self._classes)))
            self._list.write(f"./images/{name}\n")
            self._table.write(_csv_row(number, photo.name, name))

    def finish(self) -> None:
        self._list.commit()
        self._table.commit()

    def _refuse_foreign(self) -> None:
        """A data set that somebody else made, perhaps with boxes by hand, is not overwritten."""
        description = self._out / "data.yaml"
        if description.is_file() and description.read_bytes().startswith(YOLO_HEADER.encode()[:20]):
            return
        for name in ("data.yaml", "classes.txt", "images.txt", "photos.csv", "labels"):
            path = self._out / name
            if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
                expected = "expected a new folder, or one that an earlier run wrote"
                raise CommandError(f"{str(self._out)!r}: {expected}; got one with {name!r}")

    def _data_yaml(self) -> str:
        # Strings and lists of strings are the same in JSON and YAML.
        path, names = (json.dumps(value, ensure_ascii=False) for value in (str(self._out), self._classes))
        lines = f"path: {path}", "train: images.txt", "val: images.txt", f"nc: {len(self._classes)}", f"names: {names}"
        return YOLO_HEADER + "".join(f"{line}\n" for line in lines)


class _Rows:
    """The punctuation of a JSON array that is written row by row."""

    def __init__(self) -> None:
        self._before = "[\n"

    def next(self, row: Mapping[str, Any]) -> str:
        before, self._before = self._before, ",\n"
        return before + json.dumps(row)

    def end(self) -> str:
        return "[]" if self._before == "[\n" else "\n]"


def _clipped(photo: BoxedPhoto) -> Iterator[tuple[tuple[float, float, float, float], float]]:
    """The boxes, xyxy in pixels to two digits, and their scores: clipped to the photo, without those of no area."""
    width, height = photo.size_wh
    boxes = np.clip(photo.detections.boxes_xyxy.astype(np.float64), 0, [width, height, width, height]).round(2)
    for (x0, y0, x1, y1), score in zip(boxes.tolist(), photo.detections.scores.tolist(), strict=True):
        if x0 < x1 and y0 < y1:
            yield (x0, y0, x1, y1), score


def _csv_row(*values: object) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _close(file: tempfile.SpooledTemporaryFile[bytes]) -> None:
    with suppress(OSError):  # of a full disk, which was reported by what failed first
        file.close()
