"""The page for one photo as a visitor meets it, in a real browser, and as the command `facings demo --page`."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import screenshots
from PIL import Image
from pycocotools.coco import COCO
from screenshots import PHOTO_SIZE_WH, clear_facings, in_pixels
from visitor import ROOT, Visitor, running_page, visitor

from model.boxes import iou_matrix
from model.renderer.shelves import Shelf
from scripts.demo.processes import LOOPBACK

MAX_PHOTO_BYTES = 5_000_000
REAL_PHOTOS = ROOT.parent / "shared" / "shelves_dev" / "images"


def middle(box: np.ndarray) -> tuple[float, float]:
    return float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2


def widened(box: np.ndarray) -> list[float]:
    """How somebody in a hurry draws around a box: a sixth too wide on all sides."""
    side = (box[2:] - box[:2]) / 6
    return [float(value) for value in (*(box[:2] - side), *(box[2:] + side))]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(iou_matrix(one[None], other[None])[0, 0])


# -- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shelf]:
    return screenshots.photo(tmp_path_factory.mktemp("photo"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("page") / "log"
    with running_page(log, MAX_PHOTO_BYTES=str(MAX_PHOTO_BYTES)) as (url, server):
        yield url
        outside = [one.raddr for one in psutil.Process(server.pid).net_connections() if one.raddr]
        assert {address.ip for address in outside} <= {LOOPBACK}


@pytest.fixture(scope="module")
def page(chromium: str, url: str) -> Iterator[Visitor]:
    with visitor(chromium, url) as page:
        yield page
        assert page.hosts == {url.removeprefix("http://")}
        assert page.errors == []


@pytest.fixture
def facings(page: Visitor, photo: tuple[Path, Shelf]) -> list[np.ndarray]:
    """The photo is on the page; boxes of three facings that are seen whole."""
    page.choose(photo[0])
    page.say_on_the_object()
    return [in_pixels(box, PHOTO_SIZE_WH) for box in clear_facings(photo[1], 3)]


def test_a_dropped_photo_is_seen_with_the_boxes_of_its_facings(page: Visitor, photo: tuple[Path, Shelf]) -> None:
    path, shelf = photo
    status = page.drop(path)
    boxes = page.boxes()
    assert re.fullmatch(rf"shelf.jpg: {len(boxes)} boxes in \d+\.\d s", status)
    found = iou_matrix(boxes, shelf.boxes_xyxy).max(axis=0) > 0.5
    assert found.mean() > 0.7, f"{found.sum()} of {len(found)} facings found by {len(boxes)} boxes"


def test_a_click_gives_the_object_there_in_place_of_the_box_that_stood_there(
    page: Visitor, facings: list[np.ndarray]
) -> None:
    fits = []
    for facing in facings:
        before = len(page.boxes())
        status = page.click(*middle(facing))
        (clicked,) = page.boxes("object")
        assert status.startswith("1 object, ")
        assert page.tints().count() == 1
        standing = iou_matrix(page.boxes(), clicked[None])[:, 0]
        assert (standing < 0.5).all()
        fits.append(overlap(clicked, facing))
        page.press("next")
        assert len(page.boxes("object")) == 0
        assert len(page.boxes()) in (before, before + 1)
    assert np.median(fits) > 0.7, fits


@pytest.mark.parametrize("way", ["Alt", "choice"])
def test_a_click_that_is_not_on_the_object_takes_that_place_off_it(
    page: Visitor, facings: list[np.ndarray], way: str
) -> None:
    page.click(*middle(facings[0]))
    (before,) = page.boxes("object")
    place = float(before[2]) - 4, middle(before)[1]
    if way == "choice":
        page.say_not_on_the_object()
    page.click(*place, alt=way == "Alt")
    (after,) = page.boxes("object")
    assert after[2] <= place[0]
    assert after[:2] == pytest.approx(before[:2], abs=1)


def test_a_click_on_a_second_object_takes_it_in_hand_too(page: Visitor, facings: list[np.ndarray]) -> None:
    page.click(*middle(facings[0]))
    assert page.click(*middle(facings[1])).startswith("2 objects, in")
    assert len(page.boxes("object")) == page.tints().count() == 2


def test_a_rough_rectangle_gives_the_object_in_it(page: Visitor, facings: list[np.ndarray]) -> None:
    fits = []
    for facing in facings:
        page.drag(*widened(facing))
        (drawn,) = page.boxes("object")
        fits.append(overlap(drawn, facing))
        page.press("next")
    assert np.median(fits) > 0.65, fits


def test_a_removed_object_is_gone_with_the_box_that_stood_there(page: Visitor, facings: list[np.ndarray]) -> None:
    page.click(*middle(facings[0]))
    (clicked,) = page.boxes("object")
    page.press("remove")
    assert len(page.boxes("object")) == 0
    assert iou_matrix(page.boxes(), clicked[None]).max() < 0.5


def test_what_is_seen_is_what_is_downloaded(
    page: Visitor, photo: tuple[Path, Shelf], facings: list[np.ndarray], tmp_path: Path
) -> None:
    page.click(*middle(facings[0]))
    (clicked,) = page.boxes("object")
    name, content = page.download("cutout")
    assert name == "shelf-cutout.png"
    with Image.open(io.BytesIO(content)) as image:
        cut_out = np.asarray(image)
    (left, top), (right, bottom) = np.floor(clicked[:2]).astype(int), np.ceil(clicked[2:]).astype(int)
    assert abs(cut_out.shape[0] - (bottom - top)) <= 1
    assert abs(cut_out.shape[1] - (right - left)) <= 1
    assert set(np.unique(cut_out[..., 3])) == {0, 255}
    assert 0.4 < (cut_out[..., 3] == 255).mean() < 1
    with Image.open(photo[0]) as image:
        seen = np.asarray(image)[top : top + cut_out.shape[0], left : left + cut_out.shape[1]]
    assert np.abs(cut_out[..., :3].astype(int) - seen).mean() < 2

    name, content = page.download("coco")
    assert name == "shelf.coco.json"
    (tmp_path / name).write_bytes(content)
    data = COCO(str(tmp_path / name))
    (image,) = data.loadImgs(data.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == ("shelf.jpg", *PHOTO_SIZE_WH)
    listed = np.array([one["bbox"] for one in data.loadAnns(data.getAnnIds())], np.float32)
    listed[:, 2:] += listed[:, :2]
    seen = np.concatenate([page.boxes("object"), page.boxes()])
    assert np.abs(listed - seen).max() < 0.2


def test_places_on_a_photo_that_the_camera_turned_are_those_that_are_seen(page: Visitor, tmp_path: Path) -> None:
    shelf = Image.fromarray(screenshots.render_photo().photo_rgb)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise to be seen upright
    path = tmp_path / "turned.jpg"
    shelf.rotate(90, expand=True).save(path, exif=turned, quality=92)
    page.choose(path)
    assert page.page.locator("#shelf svg").get_attribute("viewBox") == "0 0 1600 1200"
    facing = in_pixels(clear_facings(screenshots.render_photo(), 1)[0], PHOTO_SIZE_WH)
    page.click(*middle(facing))
    assert overlap(page.boxes("object")[0], facing) > 0.6


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="needs the real photos")
def test_a_real_photo_larger_than_the_window_is_seen_with_its_boxes(page: Visitor) -> None:
    path = max(REAL_PHOTOS.iterdir(), key=lambda path: path.stat().st_size)
    page.choose(path)
    boxes = page.boxes()
    assert len(boxes) > 20
    box = boxes[len(boxes) // 2]
    page.click(*middle(box))
    assert len(page.boxes("object")) >= 1


def test_a_bad_file_is_told_in_one_line_and_the_page_goes_on(
    page: Visitor, facings: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "<b>.jpg").write_bytes(b"no photo")
    before = len(page.boxes())
    status = page.choose(tmp_path / "<b>.jpg")
    assert "expected a JPEG" in status
    assert "\n" not in status
    assert len(page.boxes()) == before
    assert page.click(*middle(facings[0])).startswith("1 object, ")


def test_a_file_with_too_many_bytes_is_told_in_one_line(page: Visitor, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(bytes(MAX_PHOTO_BYTES + 1))
    assert page.choose(tmp_path / "large.jpg") == "'large.jpg': expected at most 5,000,000 bytes, got 5,000,001"


def test_the_photo_of_somebody_who_leaves_is_forgotten(page: Visitor, photo: tuple[Path, Shelf], url: str) -> None:
    other = Visitor(page.page.context.browser.new_page(), url)
    other.choose(photo[0])
    call = {"data": [], "event_data": {"point": [-1, -1], "on": True}, "session_hash": other.session}

    def is_kept() -> bool:
        answer = requests.post(f"{url}/gradio_api/run/select", json=call, timeout=30).json()
        return "drop it again" not in answer["data"][1]

    assert is_kept()
    other.page.close()
    give_up = time.monotonic() + 30
    while is_kept() and time.monotonic() < give_up:
        time.sleep(0.2)
    assert not is_kept()


def test_a_click_on_nothing_and_a_cut_out_of_nothing_are_told(page: Visitor, facings: list[np.ndarray]) -> None:
    assert "click on one first" in page.press("cutout")
    assert "expected a click on an object first" in page.click(*middle(facings[0]), alt=True)


# -- As a command ----------------------------------------------------------------------------------------------------


def run(*options: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_stops_when_it_is_told_to_and_leaves_no_files(number: signal.Signals, tmp_path: Path) -> None:
    with running_page(tmp_path / "log", TMPDIR=str(tmp_path), GRADIO_SHARE="True") as (_, server):
        assert len(list(tmp_path.glob("facings-page-*"))) == 1
        process = psutil.Process(server.pid)
        listening = [one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
        process.send_signal(number)
        assert process.wait(timeout=60) in (0, None)
    assert listening == [LOOPBACK]
    assert list(tmp_path.glob("facings-page-*")) == []
    assert (tmp_path / "log").read_text().endswith("stopping\n")


@pytest.mark.parametrize("option", ["--photos", "--data"])
def test_folders_do_not_go_with_the_page(option: str, tmp_path: Path) -> None:
    ended = run("-m", "scripts.cli", "demo", "--page", option, tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == f"facings: {option}: expected no folder next to --page, got {str(tmp_path)!r}\n"


def test_a_port_in_use_ends_the_page_with_one_line() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = str(listener.getsockname()[1])
        ended = run("-m", "scripts.cli", "demo", "--page", "--port", port)
    assert ended.returncode == 1
    assert re.fullmatch(rf"facings: port {port}, meant for the page, .* PORT\n", ended.stderr), ended.stderr


def test_without_the_extra_one_line_names_it() -> None:
    code = "import sys; sys.modules['gradio'] = None; sys.argv[1:] = ['demo', '--page', '--port', '{}']; "
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    ended = run("-c", code.format(port) + "from scripts.cli import main; main()")
    assert ended.returncode == 1
    assert "facings: --page: expected the extra page, got none: install facings[page]" in ended.stderr
    assert "Traceback" not in ended.stderr
