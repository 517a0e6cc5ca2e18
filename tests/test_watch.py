"""A watched folder: every photo that is put there is boxed once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fakes import FakeEngine, in_thread, painted_photo
from PIL import Image

from backend.errors import CommandError
from backend.service import Service
from backend.settings import Settings
from backend.transports import folder as transport
from backend.transports.folder import BoxFormat, Counts, WatchOptions, watch
from scripts.demo.processes import Server

RED, BLUE = (255, 0, 0), (0, 0, 255)
BOXES = {RED: (10, 20, 60, 80), BLUE: (100, 10, 120, 40)}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


def put(path: Path, boxes: dict[Any, Any] = BOXES) -> None:
    """A photo that is there at once, as one that is moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.part")
    Image.fromarray(painted_photo(boxes)).save(hidden, "PNG")
    hidden.rename(path)


@contextmanager
def watching(folders: tuple[Path, Path], *, engine: FakeEngine | None = None, **options: Any) -> Iterator[Counts]:
    """A watcher in a thread. The counts are there when it has ended."""
    counts = Counts()

    def run(stop: threading.Event) -> None:
        chosen = {"source": folders[0], "target": folders[1], "settle_s": 0.0} | options
        with Service.open(Settings(), engine=engine or FakeEngine()) as service:
            ended = watch(service, WatchOptions(**chosen), stop)
        counts.done, counts.failed = ended.done, ended.failed

    with in_thread(run):
        yield counts


def until(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_photo_is_boxed_and_moved_and_keeps_its_path(folders: tuple[Path, Path]) -> None:
    source, target = folders
    with watching(folders) as counts:
        put(source / "shop" / "a.png")
        until((target / "done/shop/a.png").is_file)

    answer = json.loads((target / "shop/a.png.json").read_text())
    assert (answer["width"], answer["height"], answer["model_version"]) == (200, 100, "fake-12345678")
    assert answer["boxes"] == [{"box": [10, 20, 60, 80], "score": 0.9}, {"box": [100, 10, 120, 40], "score": 0.8}]
    assert counts.done == 1
    assert names(source) == set()


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (BoxFormat.coco, "a.png.coco.json", '"bbox": [10.0, 20.0, 50.0, 60.0]'),
        (BoxFormat.yolo, "a.txt", "0 0.175000 0.500000 0.250000 0.600000\n0 0.550000 0.250000 0.100000 0.300000\n"),
    ],
)
def test_boxes_are_also_coco_or_yolo(folders: tuple[Path, Path], kind: BoxFormat, name: str, expected: str) -> None:
    put(folders[0] / "a.png")
    with watching(folders, kind=kind):
        until((folders[1] / "done/a.png").is_file)

    assert expected in (folders[1] / name).read_text()


def test_masks_are_one_picture_and_outlines_in_opex(folders: tuple[Path, Path]) -> None:
    put(folders[0] / "a.png")
    with watching(folders, want_masks=True):
        until((folders[1] / "done/a.png").is_file)

    mask = np.asarray(Image.open(folders[1] / "a.png.mask.png"))
    assert mask.shape == (100, 200)
    assert (mask[50, 30], mask[20, 110], mask[0, 0]) == (1, 2, 0)
    described = json.loads((folders[1] / "a.png.opex.json").read_text())
    assert described["id"] == "a"
    assert described["objects"][0]["bbox"] == {"left": 10, "top": 20, "right": 60, "bottom": 80}
    assert len(described["objects"][0]["polygon"]["points"]) >= 4


def test_prompts_beside_a_photo_ask_for_single_objects(folders: tuple[Path, Path]) -> None:
    source, target = folders
    with watching(folders, needs_prompt=True):
        put(source / "a.png")
        put(source / "b.png")
        time.sleep(2.5)  # two looks
        assert (source / "a.png").is_file()  # its prompt is not there yet
        (source / "a.prompt").write_text(json.dumps({"points": [{"x": 110, "y": 20, "label": 1}]}))
        until((target / "done/a.png").is_file)

    answer = json.loads((target / "a.png.json").read_text())
    assert answer["boxes"] == [{"box": [100, 10, 120, 40], "score": 0.8, "prompt": 0}]
    assert names(target) == {"a.png.json", "done/a.png", "done/a.prompt"}
    assert names(source) == {"b.png"}


@pytest.mark.parametrize(
    ("photo", "prompt", "kind", "reason"),
    [
        (b"nothing", None, "photo_decode", "'a.png': expected a JPEG"),
        (b"", None, "photo_decode", "'a.png': expected"),
        (None, "{", "request", "'a.prompt': expected JSON"),
        (None, "[]", "request", "'a.prompt': expected a JSON object, got a list"),
        (None, "{}", "prompt", "'a.prompt': prompt: expected a box or at least one foreground point"),
        (None, '{"points": [{"x": 1}]}', "prompt", "'a.prompt'.points.y: expected a number, got nothing"),
        (None, '{"box": {"x0": 9, "y0": 0, "x1": 1, "y1": 1}}', "prompt", "x0 < x1"),
        (None, '{"prompts": 3}', "prompt", "expected a list of prompts"),
        (None, '{"points": [{"x": 1, "y": 1, "label": 2}]}', "prompt", "1 (on the object) or 0 (not on it), got 2"),
    ],
)
def test_what_cannot_be_boxed_is_set_aside_with_the_reason_and_its_neighbours_are_boxed(
    folders: tuple[Path, Path], photo: bytes | None, prompt: str | None, kind: str, reason: str
) -> None:
    source, target = folders
    put(source / "a.png")
    if photo is not None:
        (source / "a.png").write_bytes(photo)
    if prompt is not None:
        (source / "a.prompt").write_text(prompt)
    put(source / "b.png")
    with watching(folders) as counts:
        until(lambda: (target / "done/b.png").is_file() and (target / "failed/a.png").is_file())

    error = json.loads((target / "failed/a.png.error.json").read_text())
    assert error["kind"] == kind
    assert reason in error["error"]
    assert error["retryable"] is False
    assert (counts.done, counts.failed) == (1, 1)


def test_a_photo_is_taken_only_when_nobody_writes_to_it_any_more(folders: tuple[Path, Path]) -> None:
    source, target = folders
    put(source / "whole.png")
    content = (source / "whole.png").read_bytes()
    with watching(folders, settle_s=2.0), (source / "slow.png").open("wb") as file:
        for place in range(0, len(content), max(1, len(content) // 5)):
            file.write(content[place : place + max(1, len(content) // 5)])
            file.flush()
            time.sleep(0.8)
        assert (source / "slow.png").is_file()
        until((target / "done/slow.png").is_file)

    assert len(json.loads((target / "slow.png.json").read_text())["boxes"]) == 2


def test_two_photos_with_one_name_and_different_suffixes_keep_their_boxes(folders: tuple[Path, Path]) -> None:
    source, target = folders
    put(source / "a.png")
    put(source / "a.bmp", {RED: (0, 0, 9, 9)})
    with watching(folders):
        until(lambda: {"done/a.png", "done/a.bmp"} <= names(target))

    assert [len(json.loads((target / f"a.{kind}.json").read_text())["boxes"]) for kind in ("png", "bmp")] == [2, 1]


def test_two_watchers_share_a_folder_and_box_each_photo_once(folders: tuple[Path, Path]) -> None:
    source, target = folders
    for number in range(40):
        put(source / f"{number}.png")
    engines = FakeEngine(), FakeEngine()
    with watching(folders, engine=engines[0]), watching(folders, engine=engines[1]):
        until(lambda: len(names(target / "done")) == 40)

    assert len(engines[0].calls) + len(engines[1].calls) == 40
    assert names(source) == set()


def test_boxes_that_cannot_be_written_leave_the_photo_where_it_was(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = folders
    monkeypatch.setattr(transport, "RETRY_AFTER_S", 0.2)
    target.mkdir()
    (target / "shop").write_text("a file where a folder should be")
    put(source / "shop" / "a.png")
    put(source / "b.png")
    with watching(folders):
        until((target / "done/b.png").is_file)
        assert not (target / "done/shop/a.png").exists()
        (target / "shop").unlink()
        until((target / "done/shop/a.png").is_file)

    assert (target / "shop/a.png.json").is_file()


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("missing", "out", "expected an existing folder of photos"),
        ("in", "in", "outside of the one that is watched"),
        ("in", "in/out", "outside of the one that is watched"),
        ("in", ".", "outside of the one for boxes"),
        ("in", "file", "cannot be written"),
    ],
)
def test_folders_that_do_not_go_together_are_refused(tmp_path: Path, source: str, target: str, reason: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").touch()
    with Service.open(Settings(), engine=FakeEngine()) as service, pytest.raises(CommandError, match=reason):
        watch(service, WatchOptions(source=tmp_path / source, target=tmp_path / target), threading.Event())


def test_photos_of_a_killed_watcher_are_boxed_by_the_next_and_files_belong_to_the_user(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    for number in range(6):
        put(tmp_path / "in" / f"{number}.png")
    command = [sys.executable, "-m", "scripts.cli", "watch", "in", "out", "--settle", "0"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start(log: str) -> Server:
        return Server("facings watch", command, environ=environ, cwd=tmp_path, log=tmp_path / log)

    with start("first.log") as first:
        first.wait_until(lambda: any((tmp_path / "in").glob(".facings/*/taken/*.png")), timeout_s=120, what="at work")
        psutil.Process(first.pid).send_signal(signal.SIGKILL)
        until(lambda: not psutil.pid_exists(first.pid) or psutil.Process(first.pid).status() == "zombie")
    with start("second.log") as second:
        second.wait_until(lambda: len(names(tmp_path / "out/done")) == 6, timeout_s=240, what="done")

    assert len(list((tmp_path / "out").glob("*.json"))) == 6
    assert {path.stat().st_uid for path in (tmp_path / "out").rglob("*")} == {os.getuid()}
    assert names(tmp_path / "in") == set()


def test_a_thousand_photos_leave_the_memory_as_it_was(folders: tuple[Path, Path]) -> None:
    source, target = folders
    put(source / "0.png")
    process = psutil.Process()
    with watching(folders, kind=BoxFormat.yolo):
        until((target / "done/0.png").is_file)
        sizes = []
        for part in range(4):
            for number in range(250):
                shutil.copyfile(target / "done/0.png", source / f".{part}-{number}")
                (source / f".{part}-{number}").rename(source / f"{part}-{number}.png")
            until(lambda part=part: len(list((target / "done").iterdir())) == 1 + 250 * (part + 1), timeout_s=300)
            sizes.append(process.memory_info().rss)

    assert sizes[-1] - sizes[0] < 30 * 2**20
