"""Known boxes: from COCO and from what Label Studio exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.errors import CommandError
from scripts.labels import read_truth
from scripts.train import labelled_photos


def rectangle(x: float, y: float, width: float, height: float, **value: float) -> dict[str, Any]:
    return {
        "type": "rectanglelabels",
        "original_width": 400,
        "original_height": 200,
        "value": {"x": x, "y": y, "width": width, "height": height, "rectanglelabels": ["Facing"], **value},
    }


def task(number: int, url: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "data": {"title": "no link", "image": url}, "annotations": list(annotations)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (400, 200)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, content: Any, **options: Any) -> list[Any]:
    labels = folder / "labels.json"
    labels.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_truth(labels, folder, **options)


def test_an_exports_rectangles_are_boxes_in_pixels(folder: Path) -> None:
    (truth,) = read(folder, [task(5, "/data/upload/1/a.png", {"result": [rectangle(25, 50, 10, 20)]})])
    assert (truth.image_id, truth.file_name, truth.size_wh) == (5, "a.png", (400, 200))
    assert truth.boxes_xyxy.tolist() == [[100, 100, 140, 140]]


@pytest.mark.parametrize(
    "url",
    [
        "/data/upload/1/0a1b2c3d-a.png",
        "/data/local-files/?d=shelves/a.png",
        "s3://bucket/deep/a.png",
        "https://example.org/a.png?token=x",
    ],
)
def test_an_exports_photo_is_found_by_its_name(folder: Path, url: str) -> None:
    assert read(folder, [task(1, url, {"result": [rectangle(0, 0, 10, 10)]})])[0].file_name == "a.png"


def test_a_name_with_spaces_is_found_though_links_quote_it(folder: Path) -> None:
    export = [task(1, "/data/upload/1/b%20c.png", {"result": [rectangle(0, 0, 10, 10)]})]
    assert read(folder, export)[0].file_name == "b c.png"


def test_the_latest_annotation_that_was_not_cancelled_counts(folder: Path) -> None:
    old = {"result": [rectangle(0, 0, 10, 10)], "updated_at": "2026-01-01T00:00:00Z"}
    new = {"result": [rectangle(50, 50, 10, 10)] * 2, "updated_at": "2026-01-02T00:00:00Z"}
    cancelled = {"result": [rectangle(0, 0, 5, 5)] * 3, "updated_at": "2026-01-03T00:00:00Z", "was_cancelled": True}
    (truth,) = read(folder, [task(1, "a.png", new, old, cancelled)])
    assert len(truth.boxes_xyxy) == 2


def test_tasks_without_rectangles_are_passed_over(folder: Path) -> None:
    keypoint = {"type": "keypointlabels", "original_width": 400, "original_height": 200, "value": {"x": 1, "y": 1}}
    export = [
        task(1, "a.png"),
        task(2, "a.png", {"result": [keypoint]}),
        task(3, "a.png", {"result": [keypoint, rectangle(0, 0, 10, 10)]}),
    ]
    (truth,) = read(folder, export)
    assert truth.image_id == 3
    assert len(truth.boxes_xyxy) == 1


def test_only_the_first_photos_are_read_when_limited(folder: Path) -> None:
    images = [{"id": number, "file_name": "a.png", "width": 400, "height": 200} for number in (7, 3)]
    assert [truth.image_id for truth in read(folder, {"images": images, "annotations": []}, limit=1)] == [7]


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("", "JSONDecodeError"),
        ("[]", "names none"),
        ("3", "TypeError"),
        ("[1]", "TypeError"),
        ("{}", "'images'"),
        ('{"images": [], "annotations": []}', "names none"),
        ('{"images": [{"id": 1, "file_name": "no.jpg", "width": 9, "height": 9}], "annotations": []}', "'no.jpg'"),
        (json.dumps([task(1, "no link at all", {"result": [rectangle(0, 0, 9, 9)]})]), "expected a link"),
        (json.dumps([task(1, "/no.jpg", {"result": [rectangle(0, 0, 9, 9)]})]), "'no.jpg'"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_in_one_line(folder: Path, content: str, culprit: str) -> None:
    with pytest.raises(CommandError, match=culprit) as caught:
        read(folder, content)
    assert "\n" not in str(caught.value)


def test_photos_that_cannot_serve_are_left_out_of_training_with_a_line_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"no photo")
    Image.new("RGB", (30, 20)).save(folder / "small.png")
    truths = read(
        folder,
        [
            task(i, name, {"result": [rectangle(0, 0, 9, 9)]})
            for i, name in enumerate(("broken.png", "a.png", "small.png"))
        ],
    )
    assert [photo.path.name for photo in labelled_photos(truths, folder).photos] == ["a.png"]
    told = capsys.readouterr().err
    assert "broken.png" in told
    assert "(400, 200), but it is (30, 20)" in told
    with pytest.raises(CommandError, match="none that can serve"):
        labelled_photos(truths[::2], folder)
