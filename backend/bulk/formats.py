"""Boxes as files: COCO detections, Label Studio import JSON, YOLO labels.

Knows the three formats and how to write a file that is either whole or not there. Knows neither photos' pixels nor the
engine. Boxes are written one photo after the other, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from backend.errors import CommandError

if TYPE_CHECKING:
    from backend.label_studio.label_config import LabelConfig
    from model import Detections

CATEGORY_ID = 1


class Format(StrEnum):
    """What can be written."""

    coco = "coco"
    label_studio = "label-studio"
    yolo = "yolo"


@dataclass(frozen=True, kw_only=True)
class Boxed:
    """A photo with its boxes. name: its path, relative and with forward slashes; data: of its task in Label Studio."""

    image_id: int
    name: str
    size_wh: tuple[int, int]
    detections: Detections
    data: Mapping[str, Any]


class Writer(Protocol):
    """Takes photos one by one. The file is there, and whole, when `finish` has returned."""

    def add(self, boxed: Boxed) -> None: ...

    def finish(self) -> None: ...


@contextmanager
def open_writer(out: Path, kind: Format, *, config: LabelConfig, model_version: str) -> Iterator[Writer]:
    """A writer of that format. Raises CommandError when there is no place for `out`. Not finished, it leaves no file.

    out: a file, for YOLO a folder, which keeps what was added. config, model_version: for Label Studio, what its
    regions and predictions name.
    """
    require_place(out, "--out")
    if kind is Format.yolo:
        yield _Yolo(out, config.images[0].boxes.default_label)
        return
    partial = _partial(out)
    with _told(out):
        file = partial.open("w")
    try:
        yield _JsonRows(out, file, _CocoRows() if kind is Format.coco else _ImportRows(config, model_version))
    finally:
        with suppress(OSError):  # a full disk was told already
            file.close()
        partial.unlink(missing_ok=True)


def require_place(out: Path, option: str) -> None:
    """Raises CommandError when `out` cannot be made because its folder is not there."""
    if not out.parent.is_dir():
        raise CommandError(f"{option} {str(out)!r}: expected a file in an existing folder, got {str(out.parent)!r}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one piece. Raises CommandError, in one line, when there is no room."""
    partial = _partial(path)
    with _told(path):
        partial.write_text(text)
        partial.replace(path)


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


class _Rows(Protocol):
    def of(self, boxed: Boxed) -> list[dict[str, Any]]: ...


class _CocoRows:
    def of(self, boxed: Boxed) -> list[dict[str, Any]]:
        return coco_boxes(boxed.image_id, boxed.name, boxed.detections)


class _ImportRows:
    """Tasks with predictions, as Label Studio's import takes them."""

    def __init__(self, config: LabelConfig, model_version: str) -> None:
        self._config = config
        self._model_version = model_version

    def of(self, boxed: Boxed) -> list[dict[str, Any]]:
        from backend.label_studio.predictions import prediction_of
        from backend.label_studio.regions import regions_from_detections

        regions = regions_from_detections(boxed.detections, boxed.size_wh, self._config.images[0])
        return [{"data": dict(boxed.data), "predictions": [prediction_of(regions, self._model_version)]}]


class _JsonRows:
    """A JSON array, written row by row beside its final place."""

    def __init__(self, out: Path, file: TextIO, rows: _Rows) -> None:
        self._out, self._file, self._rows = out, file, rows
        self._before = "["

    def add(self, boxed: Boxed) -> None:
        with _told(self._out):
            for row in self._rows.of(boxed):
                self._file.write(f"{self._before}\n{json.dumps(row)}")
                self._before = ","

    def finish(self) -> None:
        with _told(self._out):
            self._file.write("[]\n" if self._before == "[" else "\n]\n")
            self._file.close()
            _partial(self._out).replace(self._out)


class _Yolo:
    """A folder with `labels/<name>.txt` for each photo, and `classes.txt`. Sizes are fractions of the photo's."""

    def __init__(self, out: Path, label: str) -> None:
        self._out = out
        self._names: set[PurePosixPath] = set()
        with _told(out):
            (out / "labels").mkdir(parents=True, exist_ok=True)
            (out / "classes.txt").write_text(f"{label}\n")

    def add(self, boxed: Boxed) -> None:
        width, height = boxed.size_wh
        rows = [
            ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            for x0, y0, x1, y1 in boxed.detections.boxes_xyxy.tolist()
        ]
        # YOLO looks for the file of a photo's name with another suffix; the second of a name gets its id, too.
        name = PurePosixPath(boxed.name).with_suffix(".txt")
        if name in self._names:
            name = name.with_stem(f"{name.stem}-{boxed.image_id}")
        self._names.add(name)
        path = self._out / "labels" / name
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join("0 {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in rows))

    def finish(self) -> None:
        """Each photo's file is whole already."""


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Failures to write as one line that names the file; a full disk tells none."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{str(path)!r}: cannot be written: {error.strerror or error}") from error
