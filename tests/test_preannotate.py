"""Boxes of photo files: what a run writes, what it reports, and what is left when it ends early."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, painted_photo
from PIL import Image

from backend.bulk import jobs
from backend.bulk.formats import BoxedTask, Format, open_writer
from backend.bulk.pipeline import Channel, Failure, Tally
from backend.bulk.report import Report
from backend.bulk.service import BulkService
from backend.bulk.sinks import FileSink
from backend.errors import CommandError, Interrupted
from backend.photos.files import find_photos
from backend.settings import Settings
from model import Detections, EngineError, NotReady, Photo
from scripts import preannotate as printing
from scripts.console import format_progress, print_lines, signals_as_interrupt

ROOT = Path(__file__).parents[1]
RED, BLUE = (255, 0, 0), (0, 0, 255)


class FailingEngine(FakeEngine):
    """Raises `error` for every photo."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def preannotate(self, photo: Photo, **options: Any) -> Detections:
        raise self._error


def write_photo(path: Path, boxes: dict[tuple[int, int, int], tuple[int, int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(painted_photo(boxes, (80, 60))).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos and a broken one, written in another order than that of their names."""
    folder = tmp_path / "photos"
    write_photo(folder / "c.png", {RED: (10, 20, 30, 50)})
    write_photo(folder / "a.png", {})
    write_photo(folder / "sub/d.bmp", {RED: (1, 2, 3, 4)})
    (folder / "b.jpg").write_bytes(b"not a photo")
    (folder / "notes.txt").write_text("no photo at all")
    return folder


def run(
    folder: Path, engine: FakeEngine | None = None, *, kind: Format = Format.coco, out_name: str = "out", **options: Any
) -> Report:
    """A run over the folder into `out_name` beside it."""
    config, service = jobs.default_label_config(), BulkService.open(Settings(), engine=engine or FakeEngine())
    with open_writer(folder.parent / out_name, kind, config=config, model_version=service.engine.version) as writer:
        return jobs.preannotate_files(service, find_photos([folder]), writer, config=config, **options)


def interrupt_when(condition: Callable[[Tally], bool]) -> Callable[[Tally], None]:
    """Presses Ctrl-C once, as soon as the condition holds."""
    pressed = False

    def show(tally: Tally) -> None:
        nonlocal pressed
        if condition(tally) and not pressed:
            pressed = True
            raise KeyboardInterrupt

    return show


def test_boxes_of_all_photos_are_in_the_file_with_the_photos_names(folder: Path) -> None:
    report = run(folder)
    written = json.loads((folder.parent / "out").read_text())
    names = {image["id"]: image["file_name"] for image in written["images"]}
    assert names == {1: "a.png", 3: "c.png", 4: "sub/d.bmp"}
    assert [(row["image_id"], row["bbox"]) for row in written["annotations"]] == [
        (3, [10, 20, 20, 30]),
        (4, [1, 2, 2, 2]),
    ]
    assert (report.photos, report.boxes, report.is_stored, report.stopped) == (3, 2, True, None)
    assert 0 < report.engine_busy <= 1


def test_a_failed_photo_is_reported_with_its_reason_and_costs_the_others_nothing(folder: Path) -> None:
    report = run(folder)
    assert [(failure.key, failure.label) for failure in report.failures] == [(2, "b.jpg")]
    lines = list(printing.summary(report, printing.Place(name="boxes.json", kind=Format.coco, things="photos")))
    assert lines[0].startswith("2 boxes of 3 photos in boxes.json; ")
    assert lines[1] == "left out 1: 1 .txt"
    assert lines[2] == "failed photos: 1"
    assert lines[3].startswith("  b.jpg: expected a JPEG")


def test_a_photo_the_engine_fails_on_is_a_failed_photo_too(folder: Path) -> None:
    report = run(folder, FailingEngine(EngineError("too large")))
    assert {failure.label: failure.reason for failure in report.failures}["a.png"] == "too large"
    assert len(report.failures) == 4


def test_an_engine_that_cannot_load_ends_the_run(folder: Path) -> None:
    with pytest.raises(NotReady):
        run(folder, FailingEngine(NotReady("no weights")))
    assert not list(folder.parent.glob("out*"))


def test_label_studio_import_json_is_what_the_backend_would_answer(folder: Path) -> None:
    run(folder, kind=Format.label_studio, address="s3://bucket/")
    tasks = json.loads((folder.parent / "out").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        "s3://bucket/a.png",
        "s3://bucket/c.png",
        "s3://bucket/sub/d.bmp",
    ]
    (prediction,) = tasks[1]["predictions"]
    assert (prediction["model_version"], prediction["score"]) == (FakeEngine().version, 0.9)
    (region,) = prediction["result"]
    assert (region["from_name"], region["to_name"], region["value"]["rectanglelabels"]) == ("box", "image", ["facing"])
    assert [region["value"][side] for side in ("x", "y", "width", "height")] == pytest.approx([12.5, 33.3333, 25, 50])
    assert tasks[0]["predictions"][0]["result"] == []


def test_boxes_are_drawn_into_copies(folder: Path) -> None:
    draw = folder.parent / "drawn"
    report = run(folder, draw=draw)
    assert sorted(path.relative_to(draw).as_posix() for path in draw.rglob("*.jpg")) == [
        "a.jpg",
        "c.jpg",
        "sub/d.jpg",
    ]
    assert report.failed_drawings == []


def test_a_drawing_that_fails_costs_the_drawing_and_not_the_boxes(folder: Path) -> None:
    draw = folder.parent / "drawn"
    draw.mkdir()
    (draw / "sub").write_text("a file where a folder should be")

    report = run(folder, draw=draw)

    assert (report.photos, report.boxes) == (3, 2)
    assert [failure.label for failure in report.failed_drawings] == ["sub/d.bmp"]
    place = printing.Place(name="boxes.json", kind=Format.coco, things="photos")
    assert "failed drawings: 1; the boxes of these photos are complete" in printing.summary(report, place)


@pytest.mark.parametrize("kind", Format)
def test_an_interrupted_run_keeps_what_is_done_and_its_message_says_how_much(tmp_path: Path, kind: Format) -> None:
    folder = tmp_path / "photos"
    for number in range(30):
        write_photo(folder / f"{number:02}.png", {RED: (1, 2, 3, 4)})

    report = run(folder, FakeEngine(seconds=0.05), kind=kind, show=interrupt_when(lambda tally: tally.done > 2))

    assert isinstance(report.stopped, Interrupted)
    assert 2 < report.photos < 30
    place = printing.Place(name="out", kind=kind, things="photos")
    assert f"out holds the boxes of the {report.photos} photos that were done; run again for all" in (
        printing.how_it_stopped(report, place)
    )
    if kind is Format.yolo:
        written = len(list((tmp_path / "out/labels").iterdir()))
    else:
        content = json.loads((tmp_path / "out").read_text())
        written = len(content["images"] if kind is Format.coco else content)
    assert written == report.photos


class InterruptingDisk:
    """A slow writer. The signal of Ctrl-C arrives while it writes the first photo."""

    def __init__(self) -> None:
        self.added = 0

    def add(self, task: BoxedTask) -> None:
        if not self.added:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)
        self.added += 1

    def finish(self) -> None:
        self.added_at_finish = self.added


def test_a_run_that_a_signal_interrupts_waits_until_what_is_done_is_written(folder: Path) -> None:
    config, service = jobs.default_label_config(), BulkService.open(Settings(), engine=FakeEngine(seconds=0.3))
    disk = InterruptingDisk()
    with signals_as_interrupt():
        report = jobs.preannotate_files(service, find_photos([folder]), disk, config=config)
    assert isinstance(report.stopped, Interrupted)
    assert report.photos == disk.added == disk.added_at_finish > 0


def test_a_run_that_ends_before_its_first_photo_leaves_an_earlier_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    config = jobs.default_label_config()
    with open_writer(tmp_path / "out", Format.coco, config=config, model_version="fake") as writer:
        assert not FileSink(writer).finish(is_complete=False)
    assert (tmp_path / "out").read_text() == "before"
    report = small_report(stopped=Interrupted("interrupted"), is_stored=False)
    assert "out was not written" in printing.how_it_stopped(report, printing.Place(name="out", kind=Format.coco))


class FullDisk:
    """A writer without space for a second photo."""

    def __init__(self) -> None:
        self.added = 0

    def add(self, task: BoxedTask) -> None:
        self.added += 1
        if self.added > 1:
            raise CommandError("'out': cannot be written: No space left on device")

    def finish(self) -> None:
        raise AssertionError("expected no file after an error of the file")


def test_a_full_disk_ends_the_run_and_the_report_names_it(folder: Path) -> None:
    service, config = BulkService.open(Settings(), engine=FakeEngine()), jobs.default_label_config()
    report = jobs.preannotate_files(service, find_photos([folder]), FullDisk(), config=config)
    assert not report.is_stored
    assert str(report.stopped) == "'out': cannot be written: No space left on device"
    assert printing.finish(report, printing.Place(name="out", kind=Format.coco), None) == 1


def small_report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "photos": 1,
        "boxes": 2,
        "skipped": {},
        "failures": [],
        "seconds": 1.0,
        "photos_per_s": 1.0,
        "engine_busy": 0.5,
        "model_version": "fake",
    }
    return Report(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"failures": [Failure(key=1, label="a", reason="b")]}, printing.FAILED_PHOTOS_STATUS),
        ({"stopped": CommandError("full")}, 1),
        ({"stopped": Interrupted("interrupted"), "failures": [Failure(key=1, label="a", reason="b")]}, 130),
    ],
)
def test_the_exit_status_says_how_the_run_ended(changes: dict[str, Any], status: int) -> None:
    assert printing.finish(small_report(**changes), printing.Place(name="out"), None) == status


def test_a_report_is_json_with_its_failures(tmp_path: Path) -> None:
    report = small_report(failures=[Failure(key=7, label="a.png", reason="gone")], stopped=Interrupted("interrupted"))
    printing.finish(report, printing.Place(name="out"), tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["failures"] == [{"key": 7, "label": "a.png", "reason": "gone"}]
    assert (written["stopped"], written["engine_busy"], written["skipped"]) == ("interrupted", 0.5, {})


def test_a_closed_standard_output_costs_neither_the_report_nor_the_exit_status(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_preannotate import small_report\n"
        "from scripts import preannotate as printing\n"
        "sys.stdin.read()\n"  # until the reader has gone
        "sys.exit(printing.finish(small_report(), printing.Place(name='out'), Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report.json")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert json.loads((tmp_path / "report.json").read_text())["boxes"] == 2


def test_lines_for_a_stream_without_a_file_are_printed() -> None:
    stream = io.StringIO()
    print_lines(["a", "b"], to=stream)
    assert stream.getvalue() == "a\nb\n"


@pytest.mark.parametrize(
    ("tally", "text"),
    [
        (Tally(started=0, ended=10), "0/?, 0.00 photos/s, 0 boxes, 0 failed"),
        (Tally(total=9, done=4, boxes=8, started=0, ended=2), "4/9, 2.00 photos/s, 8 boxes, 0 failed, 2 s left"),
    ],
)
def test_progress_is_one_line(tally: Tally, text: str) -> None:
    assert format_progress(tally) == text


def test_progress_counts_what_was_skipped() -> None:
    tally = Tally(total=4, done=1, started=0, ended=1)
    tally.skipped["annotated"] += 2
    assert format_progress(tally).startswith("3/4, 2 skipped, ")


def test_a_channel_gives_what_is_there_when_its_writers_have_ended() -> None:
    channel: Channel[int] = Channel(3, writers=1)
    assert [channel.put(number) for number in (1, 2)] == [True, True]
    channel.writer_ended()
    assert (channel.take(3, 3, 60.0), channel.take(1, 1, 60.0)) == ([1, 2], [])


def test_a_channel_that_was_cut_takes_and_gives_nothing() -> None:
    channel: Channel[int] = Channel(1, writers=1)
    channel.put(1)
    channel.cut()
    assert (channel.put(2), list(channel)) == (False, [])


def test_a_request_to_terminate_ends_the_command_with_a_file_of_what_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number in range(200):
        pixels = np.full((480, 640, 3), 255, np.uint8)
        pixels[100:200, 100 : 150 + number] = (200, 30, 30)
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    out, draw, report = tmp_path / "boxes.json", tmp_path / "drawn", tmp_path / "report.json"
    command = [sys.executable, "-m", "scripts.cli", "preannotate", str(folder), "--out", str(out)]
    command += ["--draw", str(draw), "--report", str(report), "--checkpoint", "facings-nano", "--device", "cpu"]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            give_up = time.monotonic() + 240
            while not list(draw.glob("*")):  # a drawing is there: a photo has its boxes
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"stopped early: interrupted" in errors
    done = json.loads(report.read_text())
    assert 0 < done["photos"] < 200
    assert len(json.loads(out.read_text())["images"]) == done["photos"]
