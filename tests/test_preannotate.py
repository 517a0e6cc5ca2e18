from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.bulk import jobs as command
from backend.bulk.formats import Format, open_writer, write_whole
from backend.errors import CommandError
from model.types import Detections, EngineError, NotReady, Photo


class MarkEngine:
    """Boxes the bright pixels of a photo, so that the answer depends on the pixels it got."""

    version = "mark-12345678"

    def __init__(self, *, refuses: EngineError | None = None) -> None:
        self.refuses = refuses

    def preannotate(self, photo: Photo, *, lane: str) -> Detections:
        assert lane == "bulk"
        if self.refuses is not None:
            raise self.refuses
        rows, columns = np.nonzero(photo.pixels.max(axis=2) > 128)
        if not len(rows):
            return Detections(boxes_xyxy=np.zeros((0, 4)), scores=np.zeros(0))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return Detections(boxes_xyxy=np.array([box], np.float32), scores=np.array([0.75], np.float32))


def write_photo(path: Path, box_xyxy: tuple[int, int, int, int] | None) -> None:
    pixels = np.zeros((60, 80, 3), np.uint8)
    if box_xyxy is not None:
        x0, y0, x1, y1 = box_xyxy
        pixels[y0:y1, x0:x1] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos and a broken one, written in another order than that of their names."""
    folder = tmp_path / "photos"
    write_photo(folder / "c.png", (10, 20, 30, 50))
    write_photo(folder / "a.png", None)
    write_photo(folder / "sub/d.bmp", (1, 2, 3, 4))
    (folder / "b.jpg").write_bytes(b"not a photo")
    (folder / "notes.txt").write_text("no photo at all")
    return folder


def run(
    engine: MarkEngine, folder: Path, kind: Format = Format.coco, out_name: str = "boxes.json", **options: object
) -> command.Report:
    out = folder.parent / out_name
    paths = command.photos_to_do(folder, out)
    config = command.default_label_config()
    with open_writer(out, kind, config=config, model_version=engine.version) as writer:
        return command.preannotate_folder(engine, paths, writer, photos_dir=folder, config=config, **options)  # type: ignore[arg-type]


def test_boxes_are_coco_detections_with_file_names(folder: Path) -> None:
    run(MarkEngine(), folder)
    assert json.loads((folder.parent / "boxes.json").read_text()) == [
        {"image_id": 3, "file_name": "c.png", "category_id": 1, "bbox": [10, 20, 20, 30], "score": 0.75},
        {"image_id": 4, "file_name": "sub/d.bmp", "category_id": 1, "bbox": [1, 2, 2, 2], "score": 0.75},
    ]


def test_a_broken_photo_is_told_with_its_reason_and_costs_the_others_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(MarkEngine(), folder)
    assert (result.photos, [f["photo"] for f in result.failures], result.boxes) == (3, ["b.jpg"], 2)
    assert command.tell(result, Path("boxes.json"), None) == command.BROKEN_PHOTOS_STATUS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 boxes of 3 photos")
    assert lines[-1].strip().startswith("b.jpg: ")


def test_a_photo_the_engine_fails_on_is_told_too(folder: Path) -> None:
    result = run(MarkEngine(refuses=EngineError("too large")), folder)
    assert {f["photo"]: f["reason"] for f in result.failures}["a.png"] == "too large"
    assert len(result.failures) == 4


def test_an_engine_that_cannot_load_ends_it(folder: Path) -> None:
    with pytest.raises(NotReady):
        run(MarkEngine(refuses=NotReady("no weights")), folder)
    assert not list(folder.parent.glob("boxes.json*"))


def test_label_studio_import_json_is_what_the_backend_would_answer(folder: Path) -> None:
    run(MarkEngine(), folder, Format.label_studio, address="s3://bucket/")
    tasks = json.loads((folder.parent / "boxes.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        "s3://bucket/a.png",
        "s3://bucket/c.png",
        "s3://bucket/sub/d.bmp",
    ]
    (prediction,) = tasks[1]["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("mark-12345678", 0.75)
    (region,) = prediction["result"]
    assert (region["from_name"], region["to_name"], region["value"]["rectanglelabels"]) == ("box", "image", ["facing"])
    assert [region["value"][side] for side in ("x", "y", "width", "height")] == pytest.approx([12.5, 33.3333, 25, 50])
    assert tasks[0]["predictions"][0]["result"] == []


def test_yolo_labels_are_fractions_of_each_photo_beside_their_classes(folder: Path) -> None:
    run(MarkEngine(), folder, Format.yolo, "yolo")
    out = folder.parent / "yolo"
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.txt"))
    assert files == ["classes.txt", "labels/a.txt", "labels/c.txt", "labels/sub/d.txt"]
    assert (out / "classes.txt").read_text() == "facing\n"
    assert (out / "labels/c.txt").read_text() == "0 0.250000 0.583333 0.250000 0.500000\n"
    assert (out / "labels/a.txt").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.json.partial").symlink_to("/dev/full")
    with pytest.raises(CommandError, match=r"report.json': cannot be written: No space left"):
        write_whole(tmp_path / "report.json", "x")


def test_boxes_are_drawn_into_copies(folder: Path) -> None:
    draw = folder.parent / "drawn"
    run(MarkEngine(), folder, draw=draw)
    assert sorted(p.relative_to(draw).as_posix() for p in draw.rglob("*.jpg")) == [
        "a.png.jpg",
        "c.png.jpg",
        "sub/d.bmp.jpg",
    ]
    blank, boxed = (np.asarray(Image.open(draw / name)).astype(int) for name in ("a.png.jpg", "c.png.jpg"))
    edge_green = boxed[20:50, 10, 1] - boxed[20:50, 10, 0]
    assert edge_green.min() > 80
    assert blank.max() < 40


def test_photos_of_one_name_but_different_suffixes_are_drawn_apart(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a.png", "a.bmp"):
        write_photo(folder / name, None)
    run(MarkEngine(), folder, draw=tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 2


@pytest.mark.parametrize(("name", "expected"), [("nowhere", "no such file"), ("empty", "found none")])
def test_a_folder_without_photos_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match=expected):
        command.photos_to_do(tmp_path / name, tmp_path / "boxes.json")


def test_a_place_for_the_boxes_is_asked_for_before_any_work(folder: Path) -> None:
    with pytest.raises(CommandError, match="existing folder"):
        command.photos_to_do(folder, folder / "no/boxes.json")
