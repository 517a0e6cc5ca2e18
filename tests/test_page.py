"""The page for one photo, `facings demo --page`: in a real browser, over HTTP, and as a command."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_kinds as kinds
import numpy as np
import psutil
import pytest
import screenshots
from fakes import FakeEngine, painted_photo
from fastapi.testclient import TestClient
from PIL import Image
from pycocotools.coco import COCO
from screenshots import PHOTO_SIZE_WH, clear_facings, in_pixels
from visitor import ROOT, Visitor, running_page, visitor

from backend.errors import RequestError
from backend.service import Service
from backend.settings import Settings
from backend.transports.page import create_app
from backend.transports.workbench import MAX_WORKS, Workbench, begin
from model.boxes import iou_matrix
from model.renderer.shelves import Shelf
from scripts.demo.processes import LOOPBACK

REAL_PHOTOS = ROOT.parent / "shared" / "shelves_dev" / "images"
RED, BLUE = (255, 0, 0), (0, 0, 255)
PIXELS = painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)})
PNG = kinds.saved(Image.fromarray(PIXELS), "PNG")


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
    with running_page(tmp_path_factory.mktemp("page") / "log") as (url, server):
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


def test_a_click_on_nothing_and_a_cut_out_of_nothing_are_told(page: Visitor, facings: list[np.ndarray]) -> None:
    assert "click on one first" in page.press("cutout")
    assert "expected a click on an object first" in page.click(*middle(facings[0]), alt=True)


# -- Over HTTP -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Calls the page's functions as its script does. session: of the browser that it stands for."""

    http: TestClient
    session: str = "a"

    def upload(self, content: bytes) -> str:
        answer = self.http.post("/gradio_api/upload", files={"files": ("shelf.png", content)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()[0])

    def call(self, name: str, /, **event: Any) -> list[Any]:
        body = {"data": [], "event_data": event, "session_hash": self.session}
        answer = self.http.post(f"/gradio_api/run/{name}", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    def drop(self, content: bytes) -> str:
        """What is said of a dropped photo."""
        return str(self.call("drop", file=self.upload(content), name="shelf.png")[1])

    def metric(self, sample: str) -> float:
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def calling(engine: FakeEngine | None = None, **settings: Any) -> Iterator[Caller]:
    chosen = Settings(**settings)
    service = Service.open(chosen, engine=engine or FakeEngine())
    with TestClient(create_app(chosen, service)) as http:
        yield Caller(http=http)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Gradio's files, in this process."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    return tmp_path / "files"


def photos_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"", "photo_decode", "expected"),
        (b"no photo", "photo_decode", "expected a JPEG"),
        (kinds.share(kinds.LARGE_PNG, 0.3), "photo_decode", "expected"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "photo_decode", "expected a JPEG"),
        (kinds.saved(Image.new("1", (5000, 5000)), "PNG"), "photo_too_large", "pixels"),
    ],
    ids=["empty", "text", "truncated", "SVG", "gigantic"],
)
def test_a_bad_file_is_told_counted_and_deleted(content: bytes, kind: str, reason: str, files: Path) -> None:
    with calling(max_photo_pixels=20_000_000) as caller:
        status = caller.drop(content)
        assert 'class="failed"' in status
        assert reason in status
        assert "\n" not in status
        assert caller.metric(f'facings_errors_total{{kind="{kind}"}}') == 1
        assert photos_in(files) == []
        assert "2 boxes" in caller.drop(PNG)


@pytest.mark.parametrize(
    "name", ["JPEG, CMYK", "JPEG turned by EXIF", "JPEG, gray", "PNG", "MPO"], ids=lambda name: name.replace(", ", " ")
)
def test_odd_photos_are_shown_as_browsers_show_them(name: str) -> None:
    with calling() as caller:
        shelf = caller.call("drop", file=caller.upload(kinds.AS_IN_CHROMIUM[name]), name="odd")[0]["props"]
    size = (96, 128) if "EXIF" in name else (128, 96)
    assert (shelf["across"], shelf["down"]) == size
    with Image.open(io.BytesIO(base64.b64decode(shelf["photo"].partition(",")[2]))) as image:
        assert (image.mode, image.size) == ("RGB", size)


def test_a_file_with_too_many_bytes_is_refused_before_it_is_kept(files: Path) -> None:
    with calling(max_photo_bytes=100_000) as caller:
        answer = caller.http.post("/gradio_api/upload", files={"files": ("shelf.png", bytes(200_000))})
        assert answer.status_code == 413
        assert photos_in(files) == []


@pytest.mark.parametrize("way", ["path", "link"])
def test_only_uploaded_files_are_read_and_no_other_is_deleted(way: str, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(PNG)
    with calling() as caller:
        link = Path(caller.upload(PNG)).with_name("link.png")
        link.symlink_to(other)
        status = caller.call("drop", file=str(other if way == "path" else link), name="shelf.png")[1]
    assert "expected the path of an uploaded file" in status
    assert other.read_bytes() == PNG


def test_no_call_takes_files_or_addresses_in_a_components_value() -> None:
    with calling() as caller:
        config = caller.http.get("/config").json()
    assert [one["inputs"] for one in config["dependencies"] if one["inputs"]] == []


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"point": [1]},
        {"point": [1, "2"]},
        {"point": {"x": 1}},
        {"corners": [[1, 2], [3]]},
        {"corners": [[5, 5], [5, 5]]},
        {"point": [1e99, 2]},
    ],
    ids=json.dumps,
)
def test_a_malformed_click_is_told_and_changes_nothing(event: dict[str, Any]) -> None:
    with calling() as caller:
        caller.drop(PNG)
        caller.call("select", point=[20, 30], on=True)
        marks, status = caller.call("select", **event)
        assert isinstance(marks, dict)
        assert "expected" in status
        assert 'kind="internal"' not in caller.http.get("/metrics").text
        assert "1 object" in caller.call("select", point=[20, 40], on=True)[1]


def test_a_cut_out_has_the_objects_pixels_and_nothing_else() -> None:
    with calling() as caller:
        caller.drop(PNG)
        caller.call("select", point=[110, 20], on=True)
        file = json.loads(caller.call("cut_out")[0])
    with Image.open(io.BytesIO(base64.b64decode(file["base64"]))) as image:
        cut_out = np.asarray(image)
    assert cut_out.shape == (30, 20, 4)
    assert (cut_out == (*BLUE, 255)).all()


def test_a_photo_that_is_no_longer_kept_is_asked_for_again() -> None:
    with calling() as caller:
        assert "drop it again" in caller.call("select", point=[20, 30], on=True)[1]
        assert "drop it again" in caller.call("coco")[1]


def test_people_see_their_own_photo() -> None:
    other = kinds.saved(Image.fromarray(painted_photo({BLUE: (5, 5, 15, 25)})), "PNG")
    with calling() as caller:
        caller.drop(PNG)
        second = Caller(http=caller.http, session="b")
        second.drop(other)
        assert "1 object, 10 × 20" in second.call("select", point=[10, 10], on=True)[1]
        assert "1 object, 50 × 60" in caller.call("select", point=[20, 30], on=True)[1]


def test_with_a_password_the_page_and_its_metrics_ask_for_it() -> None:
    with calling(basic_auth_user="ann", basic_auth_pass="shelves") as caller:
        assert caller.http.get("/metrics").status_code == 401
        assert caller.http.get("/metrics", auth=("ann", "shelves")).status_code == 200
        assert caller.http.get("/config").status_code == 401
        assert caller.http.post("/gradio_api/upload", files={"files": ("shelf.png", PNG)}).status_code == 401
        assert caller.http.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert caller.http.post("/login", data={"username": "ann", "password": "shelves"}).status_code == 200
        assert "2 boxes" in caller.drop(PNG)


def test_a_thousand_clicks_and_a_hundred_photos_leave_the_memory_as_it_was(files: Path) -> None:
    process = psutil.Process()
    sizes = []
    with calling(photo_cache_mb=1) as caller:
        for turn in range(4):
            for place in range(25):
                visitor = Caller(http=caller.http, session=f"{turn}-{place}")
                assert "2 boxes" in visitor.drop(PNG)
                for step in range(10):
                    assert "1 object" in visitor.call("select", point=[20 + step, 30], on=True)[1]
                visitor.call("coco")
                visitor.call("next_object")
            sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 30 * 2**20
    assert photos_in(files) == []


# -- The workbench ---------------------------------------------------------------------------------------------------


def test_the_photos_that_are_kept_are_few_and_small_enough(tmp_path: Path) -> None:
    service = Service.open(Settings(), engine=FakeEngine())
    (tmp_path / "shelf.png").write_bytes(PNG)
    work = begin(service, tmp_path / "shelf.png", name="shelf.png", deadline=1e12)
    bench = Workbench(max_bytes=int(2.5 * work.photo.pixels.nbytes))
    for key in "abc":
        bench.put(key, work)
    assert len(bench) == 2
    with pytest.raises(RequestError, match="drop it again"):
        bench.change("a", lambda work: work)
    bench.release("b")
    assert bench.change("c", lambda work: work) is work
    assert len(bench) == 1

    tiny = Workbench(max_bytes=0)
    tiny.put("a", work)
    assert tiny.change("a", lambda work: work) is work

    wide = Workbench(max_bytes=1 << 40)
    for key in range(MAX_WORKS + 3):
        wide.put(str(key), work)
    assert len(wide) == MAX_WORKS


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
