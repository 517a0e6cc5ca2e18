"""Boxes as files: COCO data sets, Label Studio import JSON, YOLO."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import resource
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from backend.bulk.formats import BoxedPhoto, BoxedTask, Format, image_id, open_writer
from backend.errors import CommandError
from backend.label_studio.label_config import BoxControl, ImageControls, LabelConfig, PromptControls
from model.types import Detections
from scripts.labels import read_truth

VERSION = "fake-12345678"


def image_controls(name: str, labels: Sequence[str], default: str) -> ImageControls:
    return ImageControls(
        image_name=name,
        image_key=name,
        boxes=BoxControl(
            from_name=f"boxes of {name}",
            to_name=name,
            labels=tuple(labels),
            default_label=default,
            default_label_reason="first",
            score_threshold=None,
            predicted_values=MappingProxyType({}),
        ),
        prompts=PromptControls(keypoints=(), rectangles=()),
        polygons=(),
        brushes=(),
    )


FRONT = image_controls("front", ["gap", "facing"], "facing")
BACK = image_controls("back", ["facing", "Größe: \N{BANANA}"], "Größe: \N{BANANA}")
ONE_IMAGE, TWO_IMAGES = LabelConfig(images=(FRONT,)), LabelConfig(images=(FRONT, BACK))
BOXES = [[10, 20, 30.125, 50], [-5, 60, 40, 200], [80, 10, 80.001, 20], [100, 0, 101, 5]]  # two in the photo, two not


def boxed(name: str, boxes: Sequence[Sequence[float]] = (), *, image: ImageControls = FRONT) -> BoxedPhoto:
    scores = np.linspace(0.9, 0.6, len(boxes), dtype=np.float32)
    found = Detections(boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4), scores=scores)
    return BoxedPhoto(image=image, name=name, size_wh=(80, 100), detections=found)


def task_of(number: int, *photos: BoxedPhoto) -> BoxedTask:
    return BoxedTask(id=number, data={photo.image.image_key: photo.name for photo in photos}, photos=photos)


def write(out: Path, kind: Format, tasks: Sequence[BoxedTask], config: LabelConfig = ONE_IMAGE) -> Path:
    with open_writer(out, kind, config=config, model_version=VERSION) as writer:
        for task in tasks:
            writer.add(task)
        writer.finish()
    return out


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this: stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# -- COCO --------------------------------------------------------------------------------------------------------------


def read_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco_is_a_data_set_of_images_annotations_and_categories(tmp_path: Path) -> None:
    out = write(
        tmp_path / "boxes.json", Format.coco, [task_of(3, boxed("sub/c.png", BOXES)), task_of(7, boxed("d.jpg"))]
    )
    assert json.loads(out.read_text()) == {
        "info": {},
        "licenses": [],
        "categories": [{"id": 1, "name": "gap"}, {"id": 2, "name": "facing"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 2,
                "bbox": [10, 20, 20.12, 30],
                "area": 603.6,
                "iscrowd": 0,
                "segmentation": [],
                "score": 0.9,
            },
            {
                "id": 2,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 60, 40, 40],
                "area": 1600,
                "iscrowd": 0,
                "segmentation": [],
                "score": 0.8,
            },
        ],
        "images": [
            {"id": 3, "file_name": "sub/c.png", "width": 80, "height": 100},
            {"id": 7, "file_name": "d.jpg", "width": 80, "height": 100},
        ],
    }
    assert out.read_text().isascii()


def test_pycocotools_reads_the_data_set_and_takes_its_annotations_as_results(tmp_path: Path) -> None:
    tasks = [task_of(1, boxed("a.jpg", BOXES)), task_of(2, boxed("b.jpg", BOXES[:1])), task_of(3, boxed("c.jpg"))]
    path = write(tmp_path / "boxes.json", Format.coco, tasks)
    coco = read_coco(path)
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [len(coco.getAnnIds(imgIds=[number])) for number in (1, 2, 3)] == [2, 1, 0]
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes([*json.loads(path.read_text())["annotations"]])
    assert [found["score"] for found in results.loadAnns(results.getAnnIds())] == [0.9, 0.8, 0.9]


def test_evaluate_reads_the_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "boxes.json", Format.coco, [task_of(1, boxed("a.jpg", BOXES)), task_of(2, boxed("b.jpg"))])
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (80, 100)).save(tmp_path / name)
    first, second = read_truth(path, tmp_path).photos
    assert (first.path.name, first.truth.size_wh, first.truth.boxes_xyxy.tolist()) == (
        "a.jpg",
        (80, 100),
        [[10, 20, pytest.approx(30.12), 50], [0, 60, 40, 100]],
    )
    assert len(second.truth.boxes_xyxy) == 0


@pytest.mark.parametrize("kind", [Format.coco, Format.label_studio])
def test_a_run_without_photos_gives_valid_json(tmp_path: Path, kind: Format) -> None:
    content = json.loads(write(tmp_path / "boxes.json", kind, []).read_text())
    assert content == [] or (content["images"], content["annotations"]) == ([], [])


def test_coco_names_lead_to_the_photos_of_a_folder(tmp_path: Path) -> None:
    names = ["1-3.jpg", "1.jpg", "1.png", "A.jpg", "a.jpg", "odd: name?.jpg", "caf\udce9.jpg"]
    path = write(tmp_path / "boxes.json", Format.coco, [task_of(i, boxed(name)) for i, name in enumerate(names, 1)])
    assert [image["file_name"] for image in json.loads(path.read_text())["images"]] == names


def test_two_tasks_with_one_address_are_two_images(tmp_path: Path) -> None:
    tasks = [task_of(number, boxed(name)) for number, name in ((4, "1.jpg"), (9, "1.jpg"), (11, "../" * 3 + "x" * 300))]
    path = write(tmp_path / "boxes.json", Format.coco, tasks)
    first, second, third = (image["file_name"] for image in json.loads(path.read_text())["images"])
    assert (first, second) == ("1.jpg", "1-9.jpg")
    assert third.startswith("xxx")
    assert len(third) <= 255


def test_a_spool_that_leaves_memory_is_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.bulk.formats.SPOOL_BYTES", 100)
    path = write(tmp_path / "boxes.json", Format.coco, [task_of(i, boxed(f"{i}.jpg", BOXES)) for i in range(1, 50)])
    coco = read_coco(path)
    assert (len(coco.getImgIds()), len(coco.getAnnIds())) == (49, 98)
    assert listed(tmp_path) == ["boxes.json"]


@pytest.mark.parametrize("kind", Format)
def test_memory_does_not_grow_with_the_number_of_boxes(tmp_path: Path, kind: Format) -> None:
    photo = boxed("1.jpg", BOXES[:2] * 200)
    with open_writer(tmp_path / "out", kind, config=ONE_IMAGE, model_version=VERSION) as writer:
        writer.add(task_of(1, photo))
        tracemalloc.start()
        try:
            for number in range(2, 60):
                writer.add(task_of(number, replace(photo, name=f"{number}.jpg")))
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        writer.finish()
    assert grown < 60_000  # 23,600 boxes are some megabytes of JSON


# -- Label Studio ------------------------------------------------------------------------------------------------------


def test_a_task_holds_one_prediction_with_the_boxes_of_all_its_images(tmp_path: Path) -> None:
    task = task_of(5, boxed("a.jpg", BOXES[:1]), boxed("b.jpg", BOXES[:2], image=BACK))
    path = write(tmp_path / "tasks.json", Format.label_studio, [task, task_of(6, boxed("c.jpg"))], TWO_IMAGES)
    first, second = json.loads(path.read_text())
    assert first["data"] == {"front": "a.jpg", "back": "b.jpg"}
    (prediction,) = first["predictions"]
    assert [(region["to_name"], region["value"]["rectanglelabels"]) for region in prediction["result"]] == [
        ("front", ["facing"]),
        ("back", ["Größe: \N{BANANA}"]),
        ("back", ["Größe: \N{BANANA}"]),
    ]
    assert prediction["model_version"] == VERSION
    assert (second["data"], second["predictions"][0]["result"]) == ({"front": "c.jpg"}, [])


def test_images_of_one_task_are_images_of_their_own_elsewhere(tmp_path: Path) -> None:
    tasks = [task_of(5, boxed("a.jpg", BOXES[:1]), boxed("b.jpg", BOXES[:1], image=BACK)), task_of(6, boxed("c.jpg"))]
    content = json.loads(write(tmp_path / "boxes.json", Format.coco, tasks, TWO_IMAGES).read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (9, "a.jpg"),
        (10, "b.jpg"),
        (11, "c.jpg"),
    ]
    assert [(row["image_id"], row["category_id"]) for row in content["annotations"]] == [(9, 2), (10, 3)]
    yolo = write(tmp_path / "yolo", Format.yolo, tasks, TWO_IMAGES)
    assert [(yolo / f"labels/{name}.txt").read_text()[:2] for name in "abc"] == ["1 ", "2 ", ""]


def test_the_number_of_an_image_is_the_task_s_where_tasks_have_one_image() -> None:
    assert image_id(task_of(42, boxed("a.jpg")), boxed("a.jpg"), ONE_IMAGE) == 42


# -- YOLO --------------------------------------------------------------------------------------------------------------


def test_yolo_is_a_data_set_with_labels_classes_and_lists_of_photos(tmp_path: Path) -> None:
    out = write(tmp_path / "yolo", Format.yolo, [task_of(1, boxed("sub/c.png", BOXES)), task_of(2, boxed("d.bmp"))])
    assert listed(out) == ["classes.txt", "data.yaml", "images.txt", "labels/d.txt", "labels/sub/c.txt", "photos.csv"]
    assert (out / "labels/sub/c.txt").read_text().splitlines() == [
        "1 0.250750 0.350000 0.251500 0.300000",
        "1 0.250000 0.800000 0.500000 0.400000",
    ]
    assert (out / "labels/d.txt").read_text() == ""
    assert (out / "classes.txt").read_text() == "gap\nfacing\n"
    assert (out / "images.txt").read_text() == "./images/sub/c.png\n./images/d.bmp\n"
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "path": str(out),
        "train": "images.txt",
        "val": "images.txt",
        "nc": 2,
        "names": ["gap", "facing"],
    }


def test_labels_of_every_language_stand_in_data_yaml(tmp_path: Path) -> None:
    out = write(tmp_path / "Regál: 1", Format.yolo, [], TWO_IMAGES)
    data = yaml.safe_load((out / "data.yaml").read_text())
    assert (data["names"], data["path"]) == (["gap", "facing", "Größe: \N{BANANA}"], str(out))


def test_every_photo_has_a_label_file_of_its_own_and_the_table_names_it(tmp_path: Path) -> None:
    names = [
        "1-3.jpg",
        "1.jpg",
        "1.png",
        "A.jpg",
        "a.jpg",
        "x" * 250 + ".jpg",
        "../../out.jpg",
        "caf\udce9.jpg",
        "1.jpg",
    ]
    out = write(tmp_path / "yolo", Format.yolo, [task_of(i, boxed(name)) for i, name in enumerate(names, 1)])
    with (out / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["photo"] for row in rows] == [*names[:7], "caf\\udce9.jpg", names[8]]
    assert [row["image_id"] for row in rows] == [str(number) for number in range(1, 10)]
    assert (out / "images.txt").read_text().splitlines() == [f"./images/{row['image']}" for row in rows]
    labels = [Path("labels", row["image"]).with_suffix(".txt").as_posix() for row in rows]
    assert sorted(labels) == [name for name in listed(out) if name.startswith("labels/")]
    assert len(set(labels)) == len(names)
    assert listed(tmp_path) == [f"yolo/{name}" for name in listed(out)]


def test_a_second_run_writes_the_same_files(tmp_path: Path) -> None:
    tasks = [task_of(i, boxed(name, BOXES)) for i, name in enumerate(["1.jpg", "1.png", "2.jpg"], 1)]
    contents = []
    for _ in range(2):
        out = write(tmp_path / "yolo", Format.yolo, tasks)
        contents.append({name: (out / name).read_bytes() for name in listed(out)})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", ["data.yaml", "classes.txt", "labels/1.txt"])
def test_a_data_set_that_somebody_else_made_is_not_overwritten(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("by hand")
    with pytest.raises(CommandError, match=f"expected a new folder, or one that an earlier run wrote.*{name[:6]}"):
        write(tmp_path, Format.yolo, [task_of(1, boxed("1.jpg"))])
    assert (listed(tmp_path), path.read_text()) == ([name], "by hand")


def test_labels_may_lie_beside_the_folder_of_their_photos(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write(tmp_path, Format.yolo, [task_of(1, boxed("1.jpg"))])
    assert "labels/1.txt" in listed(tmp_path)


# -- runs that end early -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Format.coco, Format.label_studio])
def test_a_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path, kind: Format) -> None:
    out = tmp_path / "boxes.json"
    out.write_text("before")
    with open_writer(out, kind, config=ONE_IMAGE, model_version=VERSION) as writer:
        writer.add(task_of(1, boxed("1.jpg", BOXES)))
    assert (listed(tmp_path), out.read_text()) == (["boxes.json"], "before")


def test_a_yolo_folder_keeps_the_labels_of_a_run_that_ended_early(tmp_path: Path) -> None:
    out = tmp_path / "yolo"
    with open_writer(out, Format.yolo, config=ONE_IMAGE, model_version=VERSION) as writer:
        writer.add(task_of(1, boxed("1.jpg", BOXES)))
    assert listed(out) == ["classes.txt", "data.yaml", "labels/1.txt"]


@pytest.mark.parametrize("kind", [Format.coco, Format.label_studio])
def test_a_full_disk_costs_the_file_and_says_so_in_one_line(tmp_path: Path, kind: Format) -> None:
    out = tmp_path / "boxes.json"
    tasks = [task_of(number, boxed(f"{number}.jpg", BOXES)) for number in range(1, 1000)]
    with largest_file(20_000), pytest.raises(CommandError) as caught:
        write(out, kind, tasks)
    assert str(caught.value) == f"{str(out)!r}: cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_in_the_images_of_coco_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.bulk.formats.SPOOL_BYTES", 10_000)
    tasks = [task_of(number, boxed(f"{number}.jpg")) for number in range(1, 1000)]
    with largest_file(5_000), pytest.raises(CommandError, match=r"boxes\.json': cannot be written: File too large"):
        write(tmp_path / "boxes.json", Format.coco, tasks)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_empty_label_file(tmp_path: Path) -> None:
    out = tmp_path / "yolo"
    with open_writer(out, Format.yolo, config=ONE_IMAGE, model_version=VERSION) as writer:
        writer.add(task_of(1, boxed("1.jpg", BOXES)))
        with largest_file(50), pytest.raises(CommandError, match=r"labels/2\.txt': cannot be written: File too large"):
            writer.add(task_of(2, boxed("2.jpg", BOXES)))
    assert listed(out) == ["classes.txt", "data.yaml", "labels/1.txt"]


@pytest.mark.parametrize("kind", Format)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, kind: Format) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"file/out.*': cannot be written: Not a directory"):
        write(tmp_path / "file/out", kind, [])
