"""Objects by their names, and pictures laid over them: with real classes of detectors, tiny and random."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from fakes import FakeEngine, data_url, painted_photo, png_of
from flask.testing import FlaskClient
from PIL import Image
from text_detectors import GRID, write_grounding_dino, write_owlv2

from backend.errors import CommandError, SettingsError
from backend.settings import Settings
from backend.transports.overlays import Catalogue
from backend.transports.sagemaker import check_overlays, create_app
from model.masks import outlined, without_small_holes
from model.text_detector import TextDetector
from model.types import CheckpointError, DeadlineExceeded, EngineError, Mask, NotReady, Photo
from scripts.demo.processes import LOOPBACK, Server, free_port

RED = (255, 0, 0)
BOX = 10, 20, 60, 80
PIXELS = painted_photo({RED: BOX})
GREEN = (0, 90, 0)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_owlv2(tmp_path_factory.mktemp("detectors") / "owlv2")


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grounding_dino(tmp_path_factory.mktemp("detectors") / "grounding-dino")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    (folder / "green.png").write_bytes(png_of(np.full((20, 20, 3), GREEN, np.uint8)))
    (folder / "broken.png").write_bytes(b"no picture")
    rooms = {
        "living": {
            "green": {"picture": "green.png", "tile_width": 0.1},
            "broken": {"picture": "broken.png"},
        }
    }
    (folder / "catalogue.json").write_text(json.dumps(rooms))
    return folder / "catalogue.json"


@pytest.fixture(scope="module")
def client(owlv2: Path, catalogue: Path) -> Iterator[FlaskClient]:
    settings = Settings(text_detector=str(owlv2), catalogue=str(catalogue))
    with create_app(settings, FakeEngine()).test_client() as client:
        wait_for(lambda: client.get("/ping").status_code == 200)
        yield client


def wait_for(is_so: Any, timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


def soon() -> float:
    """A deadline that leaves time to load."""
    return time.monotonic() + 120


def request(**more: Any) -> dict[str, Any]:
    return {"url": data_url(PIXELS), "labels": ["sofa"], "score_threshold": 0, **more}


def painted(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


# The detector


def test_owlv2_proposes_what_its_cells_say_in_pixels_of_the_photo(owlv2: Path) -> None:
    found = TextDetector(str(owlv2), device="cpu").find(
        Photo(pixels=PIXELS), ["sofa"], score_threshold=0, most=100, deadline=soon()
    )
    side = 200 / GRID  # the photo is padded to a square
    boxes = np.stack([one.box_xyxy for one in found])
    whole = boxes[(boxes[:, 2:] < (200, 100)).all(1)]  # those at the edges are cut
    assert len(whole) == (GRID - 1) * 2
    in_cells = whole / side - 0.5  # a box is centred on its cell's lower right corner
    assert np.abs(in_cells - in_cells.round()).max() < 1 / side  # the library gives whole pixels
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_grounding_dino_finds_each_name_on_its_own(grounding_dino: Path) -> None:
    detector, photo = TextDetector(str(grounding_dino), device="cpu"), Photo(pixels=PIXELS)
    both = detector.find(photo, ["Red sofa", "sofa."], score_threshold=0, most=100, deadline=soon())
    assert {one.label for one in both} <= {"Red sofa", "sofa."}
    assert len(detector.find(photo, ["sofa"], score_threshold=0, most=2, deadline=soon())) == 2
    assert detector.find(photo, ["sofa"], score_threshold=1, most=2, deadline=soon()) == []
    for one in both:
        x0, y0, x1, y1 = one.box_xyxy
        assert 0 <= x0 < x1 <= 200
        assert 0 <= y0 < y1 <= 100


def test_one_object_under_two_names_is_found_once(owlv2: Path) -> None:
    detector, photo = TextDetector(str(owlv2), device="cpu"), Photo(pixels=PIXELS)
    alone = detector.find(photo, ["sofa"], score_threshold=0, most=100, deadline=soon())
    both = detector.find(photo, ["sofa", "chair"], score_threshold=0, most=100, deadline=soon())
    assert len(both) == len(alone)


def test_a_detector_that_cannot_be_used_says_so_in_one_line(
    owlv2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = Photo(pixels=PIXELS)
    missing = TextDetector(str(tmp_path / "none"), device="cpu")
    with pytest.raises(CheckpointError, match=r"text detector '.*none': cannot be loaded: [^\n]+$"):
        missing.find(photo, ["sofa"], score_threshold=0, most=1, deadline=soon())
    assert "cannot be loaded" in caplog.text
    detector = TextDetector(str(owlv2), device="cpu")
    with pytest.raises(EngineError, match=r"text detector '.*owlv2': [^\n]+$"):
        detector.find(photo, ["word " * 100], score_threshold=0, most=1, deadline=soon())
    with pytest.raises((DeadlineExceeded, NotReady)):
        detector.find(photo, ["sofa"], score_threshold=0, most=1, deadline=time.monotonic())
    assert detector.find(photo, ["sofa"], score_threshold=0, most=1, deadline=soon())


# The request


def test_objects_have_their_names_and_boxes_and_the_photo_comes_back_painted(client: FlaskClient) -> None:
    answer = client.post("/invocations", json=request(_id="a", masks=True)).json
    assert (answer["_id"], answer["width"], answer["height"]) == ("a", 200, 100)
    assert {box["label"] for box in answer["boxes"]} == {"sofa"}
    red = next(box for box in answer["boxes"] if box["box"] == list(BOX))
    assert red["mask"]["png"]
    (image,) = answer["processed_images"]
    assert painted(image).shape == PIXELS.shape


def test_a_picture_of_the_catalogue_covers_the_objects_and_nothing_else(client: FlaskClient) -> None:
    """The random detector has the cell in the red area and cells on the white ground; all become green but not red."""
    shown = painted(
        client.post("/invocations", json=request(roomName="living", categoryname="green")).json["processed_images"][0]
    )
    assert np.abs(shown[40, 30] - GREEN).max() < 12
    assert np.abs(shown[5, 150] - GREEN).max() < 12
    nothing = client.post("/invocations", json=request(roomName="living", categoryname="green", score_threshold=1)).json
    assert nothing["boxes"] == []
    assert np.abs(painted(nothing["processed_images"][0])[5, 150] - 255).max() < 12


def test_polygons_come_with_the_boxes_when_they_are_asked_for(client: FlaskClient) -> None:
    answer = client.post("/invocations", json=request(polygons=True)).json
    red = next(box for box in answer["boxes"] if box["box"] == list(BOX))
    points = np.array(red["polygon"])
    assert points.min(0) == pytest.approx((10, 20), abs=1)
    assert points.max(0) == pytest.approx((60, 80), abs=1)
    assert "mask" not in red


def test_what_stands_beside_the_list_counts_for_each_and_a_bad_photo_costs_only_itself(client: FlaskClient) -> None:
    body = {
        "labels": ["sofa"],
        "score_threshold": 0,
        "instances": [
            {"_id": 1, "url": data_url(PIXELS)},
            {"_id": 2, "base64": "AAAA"},
            {"_id": 3, "url": data_url(PIXELS), "roomName": "living", "categoryname": "broken"},
            {"_id": 4, "url": data_url(PIXELS), "labels": ["chair"]},
        ],
    }
    answer = client.post("/invocations", json=body).json
    assert [one["_id"] for one in answer["predictions"]] == [1, 2, 3, 4]
    assert [one.get("kind") for one in answer["predictions"]] == [None, "photo_decode", "photo_decode", None]
    assert [image is not None for image in answer["processed_images"]] == [True, False, False, True]
    assert {box["label"] for box in answer["predictions"][3]["boxes"]} == {"chair"}


def test_without_names_the_answer_has_no_painted_photo(client: FlaskClient) -> None:
    assert "processed_images" not in client.post("/invocations", json={"url": data_url(PIXELS)}).json


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"labels": []}, "labels: expected 1 to 20 names, got 0"),
        ({"labels": "sofa"}, "labels: expected a list of names, got a string"),
        ({"labels": ["a"] * 21}, "labels: expected 1 to 20 names, got 21"),
        ({"labels": ["a", 3]}, "labels: expected names of 1 to 100 characters, got a number"),
        ({"labels": [" "]}, "labels: expected names of 1 to 100 characters"),
        ({"labels": ["a" * 101]}, "labels: expected names of 1 to 100 characters"),
        ({"labels": None, "polygons": True}, "expected labels beside categoryname, roomName or polygons, got none"),
        ({"prompts": [{"points": [{"x": 1, "y": 1}]}]}, "expected labels or prompts, got both"),
        ({"roomName": "living"}, "expected roomName and categoryname, got one of them"),
        (
            {"roomName": "cellar", "categoryname": "green"},
            "roomName: expected one of the catalogue (living), got 'cellar'",
        ),
        (
            {"roomName": "living", "categoryname": "x" * 500},
            "categoryname: expected one of the catalogue (broken, green)",
        ),
        ({"roomName": 3, "categoryname": "green"}, "roomName: expected a string, got a number"),
        ({"polygons": 1}, "polygons: expected true or false, got a number"),
    ],
)
def test_a_bad_request_is_one_line(client: FlaskClient, more: dict[str, Any], reason: str) -> None:
    answer = client.post("/invocations", json=request(**more))
    assert answer.status_code == 400
    assert answer.json["error"].startswith(reason)
    assert len(answer.json["error"]) < 400


def test_what_is_not_set_up_is_named(owlv2: Path) -> None:
    with create_app(Settings(), FakeEngine()).test_client() as client:
        answer = client.post("/invocations", json=request())
        assert (answer.status_code, answer.json["kind"]) == (400, "request")
        assert "TEXT_DETECTOR to be set" in answer.json["error"]
    with create_app(Settings(text_detector=str(owlv2)), FakeEngine()).test_client() as client:
        answer = client.post("/invocations", json=request(roomName="living", categoryname="green"))
        assert "CATALOGUE to be set" in answer.json["error"]


def test_ping_fails_where_the_detector_cannot_be_loaded(tmp_path: Path) -> None:
    with create_app(Settings(text_detector=str(tmp_path / "none")), FakeEngine()).test_client() as client:
        wait_for(lambda: client.get("/ping").status_code == 500)
        assert "cannot be loaded" in client.get("/ping").json["error"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "expected a JSON file"),
        ("[]", "expected {room: {category: {picture, tile_width}}}"),
        ('{"living": 3}', "expected {room: "),
        ('{"living": {"oak": {"picture": "none.png"}}}', "no file '.*none.png'"),
        ('{"living": {"oak": {}}}', "got: an entry without a picture"),
        ('{"living": {"oak": {"picture": "catalogue.json", "tile_width": 3}}}', "tile_width 3, which is not from"),
    ],
)
def test_a_bad_catalogue_stops_the_start(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=reason):
        check_overlays(Settings(catalogue=str(path)))
    with pytest.raises(SettingsError, match=reason):
        Catalogue.read(path)


def test_a_missing_extra_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CommandError, match="TEXT_DETECTOR: expected the extra text, got none"):
        check_overlays(Settings(text_detector="google/owlv2"))


def test_three_hundred_requests_leave_the_memory_as_it_was(client: FlaskClient) -> None:
    process, sizes = psutil.Process(), []
    for _ in range(3):
        for _ in range(100):
            assert client.post("/invocations", json=request(polygons=True)).status_code == 200
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 30 << 20


# Masks


def mask_with_holes() -> Mask:
    bitmap = np.zeros((40, 60), np.bool_)
    bitmap[2:38, 2:58] = True
    bitmap[10:12, 10:12] = False  # small
    bitmap[20:32, 20:32] = False  # a real hole
    bitmap[0, 0] = True  # a part of its own
    return Mask(bitmap=bitmap, left=100, top=200)


def test_small_holes_are_filled_and_real_ones_stay() -> None:
    mask = without_small_holes(mask_with_holes())
    assert mask.bitmap[10:12, 10:12].all()
    assert not mask.bitmap[20:32, 20:32].any()
    assert (mask.left, mask.top) == (100, 200)
    assert not mask.bitmap[0, 1]
    assert not mask.bitmap[39].any()


def test_a_mask_as_its_outline_has_one_part_without_holes() -> None:
    mask = outlined(mask_with_holes())
    expected = np.zeros((40, 60), np.bool_)
    expected[2:38, 2:58] = True
    assert (mask.bitmap != expected).sum() <= 4  # the corners


# The whole


def test_the_command_finds_objects_by_their_names_with_the_bundled_network(
    owlv2: Path, catalogue: Path, tmp_path: Path
) -> None:
    port = free_port()
    environ = {**os.environ, "HOST": LOOPBACK, "SAGEMAKER_BIND_TO_PORT": str(port), "PYTHONPATH": str(ROOT)}
    environ |= {"TEXT_DETECTOR": str(owlv2), "CATALOGUE": str(catalogue), "CHECKPOINT": "facings-nano"}
    command, url = [sys.executable, "-m", "scripts.cli", "sagemaker"], f"http://{LOOPBACK}:{port}"
    with Server("facings", command, environ=environ, cwd=tmp_path, log=tmp_path / "log") as server:
        server.wait_until(lambda: is_ready(url), timeout_s=180, what="ready")
        body = request(roomName="living", categoryname="green")
        answer = requests.post(f"{url}/invocations", json=body, timeout=60)
    assert answer.json()["boxes"]
    assert painted(answer.json()["processed_images"][0]).shape == PIXELS.shape


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=2).ok
    except requests.ConnectionError:
        return False
