"""The calls that the page for one photo makes of its server, and what it keeps; the engine is a fake."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_kinds as kinds
import numpy as np
import psutil
import pytest
from fakes import FakeEngine, painted_photo
from fastapi.testclient import TestClient
from PIL import Image
from starlette.requests import ClientDisconnect

from backend.errors import RequestError
from backend.service import Service
from backend.settings import Settings
from backend.transports.page import create_app
from backend.transports.page_gate import MAX_BYTES
from backend.transports.workbench import MAX_WORKS, Workbench, begin

RED, BLUE = (255, 0, 0), (0, 0, 255)
PIXELS = painted_photo({RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)})
PNG = kinds.saved(Image.fromarray(PIXELS), "PNG")


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


def test_an_upload_that_is_no_file_is_refused_or_cut_off(files: Path) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="field"\r\n\r\n' + bytes(100_000 + MAX_BYTES)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with calling(max_photo_bytes=100_000) as caller:
        answer = caller.http.post("/gradio_api/upload", content=part, headers=headers)
        assert (answer.status_code, answer.text) == (413, "expected a body of at most 165,536 bytes")
        with pytest.raises(ClientDisconnect):
            caller.http.post("/gradio_api/upload", content=iter([part]), headers=headers)
        assert photos_in(files) == []
        assert "2 boxes" in caller.drop(PNG)


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


@pytest.mark.parametrize("path", [__file__, "pyproject.toml", str(Path("pyproject.toml").resolve()), "/etc/passwd"])
def test_files_of_this_machine_are_not_handed_out(path: str) -> None:
    with calling() as caller:
        assert caller.http.get(f"/gradio_api/file={path}").status_code == 404


@pytest.mark.parametrize(
    "path", ["vibe-edit", "vibe-code", "process_recording", "run-history/connect", "queue/join", "component_server"]
)
def test_of_gradios_routes_only_those_that_the_page_needs_are_open(path: str) -> None:
    with calling() as caller:
        assert caller.http.post(f"/gradio_api/{path}", json={}).status_code == 404


@pytest.mark.parametrize("is_announced", [True, False], ids=["with its length", "in chunks"])
@pytest.mark.parametrize("path", ["/gradio_api/run/select", "/login", "/config"])
def test_a_call_that_is_too_large_is_refused_before_it_is_read(path: str, is_announced: bool) -> None:
    content = bytes(MAX_BYTES + 1) if is_announced else iter([b" " * 10_000] * 10)
    with calling() as caller:
        answer = caller.http.post(path, content=content)
        assert answer.status_code == 413
        assert answer.text == "expected a body of at most 64 KiB"
        assert caller.http.post(path, content=b"{}").status_code != 413
        assert "2 boxes" in caller.drop(PNG)


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


def test_the_photos_that_are_kept_are_few_and_small_enough(tmp_path: Path) -> None:
    service = Service.open(Settings(), engine=FakeEngine())
    (tmp_path / "shelf.png").write_bytes(PNG)
    work = begin(service, tmp_path / "shelf.png", name="shelf.png", deadline=1e12)
    bench = Workbench(max_bytes=int(2.5 * work.photo.pixels.nbytes))
    for key in "abc":
        bench.put(key, work)
    assert len(bench) == 2
    with pytest.raises(RequestError, match="drop it again"):
        bench.get("a")
    bench.release("b")
    assert bench.get("c") is work
    assert len(bench) == 1

    tiny = Workbench(max_bytes=0)
    tiny.put("a", work)
    assert tiny.get("a") is work

    wide = Workbench(max_bytes=1 << 40)
    for key in range(MAX_WORKS + 3):
        wide.put(str(key), work)
    assert len(wide) == MAX_WORKS
