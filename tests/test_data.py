"""The boxes in docs/data, drawn on photos that are public but not in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.labels import read_truth

ROOT = Path(__file__).parents[1]
BOXES = ROOT / "docs" / "data" / "shelf-analysis.json"
PHOTOS = ROOT.parent / "shared" / "shelves_mit" / "images"


def dhash(path: Path) -> str:
    """As the file's "info" says."""
    with Image.open(path) as photo:
        grey = np.asarray(photo.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, :-1] > grey[:, 1:]).flatten()
    return f"{sum(1 << place for place in np.nonzero(bits)[0].tolist()):016x}"


def test_boxes_drawn_on_public_photos_lie_on_them_and_each_photo_can_be_recognised() -> None:
    content = json.loads(BOXES.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    assert len({image["dhash"] for image in content["images"]}) == len(sizes)
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        photo_width, photo_height = sizes[annotation["image_id"]]
        assert 0 <= x < x + width <= photo_width
        assert 0 <= y < y + height <= photo_height
        assert annotation["area"] == width * height


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos of ../shared/shelves_mit")
def test_boxes_drawn_on_public_photos_are_read_as_truth() -> None:
    content = json.loads(BOXES.read_text())
    hashes = {image["file_name"]: image["dhash"] for image in content["images"]}
    truth = read_truth(BOXES, PHOTOS)
    assert {entry.path.name: dhash(entry.path) for entry in truth.photos} == hashes
    for is_crowd, group in enumerate(("boxes_xyxy", "crowds_xyxy")):
        boxes = [annotation for annotation in content["annotations"] if annotation["iscrowd"] == is_crowd]
        assert sum(len(getattr(entry.truth, group)) for entry in truth.photos) == len(boxes) > 100
