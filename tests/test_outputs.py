"""Outputs: checked before a run, and written whole or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.bulk.outputs import GrowingFile, check_outputs, draw_boxes, write_whole
from backend.errors import CommandError, OptionError
from model.types import Photo

LONGEST = 255
NO_BOXES = np.zeros((0, 4), np.float32)


def photo_of(width: int, height: int) -> Photo:
    return Photo(pixels=np.full((height, width, 3), 200, np.uint8))


def listed(folder: Path) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this: stands for a full disk where nothing may be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mounted(*arguments: str | Path) -> bool:
    """Whether that could be mounted, which needs root."""
    mount = shutil.which("mount")
    return mount is not None and subprocess.run([mount, *arguments], capture_output=True, check=False).returncode == 0


def unmount(path: Path) -> None:
    subprocess.run([str(shutil.which("umount")), path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", disk):
        pytest.skip("file systems cannot be mounted here")
    yield disk
    unmount(disk)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


# -- before the run ----------------------------------------------------------------------------------------------------


def refusal(**outputs: object) -> str:
    """The message of the check, which is one line."""
    with pytest.raises(OptionError) as caught:
        check_outputs(**outputs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_outputs_are_accepted_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "old.json").write_text("old")
    check_outputs()
    check_outputs(
        out=tmp_path / "boxes.json",
        report=tmp_path / "old.json",
        draw=tmp_path / "drawn",
        photos=[tmp_path / "photos"],
    )
    check_outputs(out=tmp_path / "yolo", out_is_folder=True, report=tmp_path / "report.json")
    assert listed(tmp_path) == ["old.json", "photos"]
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("option", ["out", "report"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(a_folder, "a folder"), (a_pipe, "a pipe"), (a_socket, "a socket"), (a_link_to_a_device, "a device")],
)
def test_what_is_no_regular_file_is_never_replaced(
    tmp_path: Path, option: str, make: Callable[[Path], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("place"))
    assert refusal(**{option: Path("place")}) == f"--{option} 'place': expected a file, got {kind}"
    with pytest.raises(CommandError, match=f"'place': expected a file, got {kind}"):
        write_whole(Path("place"), "x")
    assert listed(tmp_path) == ["place"]


def test_a_device_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(out=Path("/dev/null")) == "--out '/dev/null': expected a file, got a device"
    assert refusal(out=Path("/dev/null"), out_is_folder=True) == "--out '/dev/null': expected a folder, got a device"
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize(
    "spelling",
    ["boxes.json", "sub/../boxes.json", "link.json", "linked/boxes.json", "BOXES.json", "hard.json"],
)
@pytest.mark.parametrize("exists", [False, True])
def test_the_report_and_the_boxes_are_different_files(tmp_path: Path, spelling: str, exists: bool) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "link.json").symlink_to("boxes.json")
    if exists:
        (tmp_path / "boxes.json").touch()
        (tmp_path / "hard.json").hardlink_to(tmp_path / "boxes.json")
    can_tell_apart = spelling == "BOXES.json" if exists else spelling == "hard.json"
    if can_tell_apart:
        check_outputs(out=tmp_path / "boxes.json", report=tmp_path / spelling)
    else:
        message = refusal(out=tmp_path / "boxes.json", report=tmp_path / spelling)
        assert message.startswith("--out and --report: expected different paths, got ")


def test_files_and_folders_of_one_run_lie_apart(tmp_path: Path) -> None:
    yolo = tmp_path / "yolo"
    assert "--report" in refusal(out=yolo, out_is_folder=True, report=yolo)
    yolo.mkdir()
    assert "neither inside nor around" in refusal(out=yolo, out_is_folder=True, report=yolo / "report.json")
    assert "neither inside nor around" in refusal(out=yolo, out_is_folder=True, draw=yolo / "images")
    assert "neither inside nor around" in refusal(out=yolo, out_is_folder=True, draw=tmp_path)
    assert "different paths" in refusal(out=tmp_path / "same", draw=tmp_path / "same")


@pytest.mark.parametrize("drawn", ["photos", "photos/drawn", "linked", "photos/../photos/drawn", "."])
def test_drawings_never_become_photos_of_the_next_run(tmp_path: Path, drawn: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "linked").symlink_to(photos)
    message = refusal(draw=tmp_path / drawn, photos=[photos])
    assert message.startswith("--draw ")
    assert "neither inside nor around the photos" in message


def test_no_photo_is_overwritten(tmp_path: Path) -> None:
    photo = tmp_path / "shelf.scan"
    photo.touch()
    assert "another folder than that of the photos" in refusal(draw=tmp_path, photos=[photo])
    check_outputs(draw=tmp_path / "drawn", photos=[photo])
    assert "another file than the photo" in refusal(out=photo, photos=[photo])
    (tmp_path / "links").mkdir()
    (tmp_path / "links/1.jpg").symlink_to(photo)
    for folder in (tmp_path, tmp_path / "links"):
        assert "another folder than that of the photos" in refusal(draw=folder, photos=[tmp_path / "links/1.jpg"])
    assert "expected a file that is no photo" in refusal(out=tmp_path / "1.JPG")
    assert "expected a file that is no photo" in refusal(report=tmp_path / "1.png")


@pytest.mark.parametrize("outputs", [{}, {"out_is_folder": True}])
def test_a_folder_that_is_missing_or_no_folder_is_named(tmp_path: Path, outputs: dict[str, bool]) -> None:
    (tmp_path / "file").touch()
    for parent in ("none", "file"):
        message = refusal(out=tmp_path / parent / "boxes", **outputs)
        assert "in an existing folder, got" in message
        assert str(tmp_path / parent) in message
    assert "in an existing folder" in refusal(draw=tmp_path / "none/drawn")
    assert refusal(draw=tmp_path / "file") == f"--draw {str(tmp_path / 'file')!r}: expected a folder, got a file"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, is_folder: bool) -> None:
    check_outputs(out=tmp_path / ("n" * LONGEST), out_is_folder=is_folder)
    assert "File name too long" in refusal(out=tmp_path / ("n" * (LONGEST + 1)), out_is_folder=is_folder)


def test_a_link_that_leads_round_in_circles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert "Too many levels of symbolic links" in refusal(out=tmp_path / "link")


def test_a_disk_that_takes_no_file_is_found_before_the_run(small_disk: Path) -> None:
    (small_disk / "old.json").touch()
    if not mounted("-o", "remount,ro", small_disk):
        pytest.skip("file systems cannot be mounted again here")
    assert "Read-only file system" in refusal(out=small_disk / "new.json")
    assert "got a read-only one" in refusal(out=small_disk / "old.json")
    assert "Read-only file system" in refusal(draw=small_disk / "drawn")
    assert "Read-only file system" in refusal(draw=small_disk)


def test_a_disk_that_is_full_already_is_found_before_the_run(small_disk: Path) -> None:
    (small_disk / "old.json").write_bytes(bytes(60 * 1024))
    (small_disk / "filler").write_bytes(bytes(4 * 1024))
    for outputs in (
        {"out": small_disk / "new.json"},
        {"report": small_disk / "old.json"},
        {"draw": small_disk / "new"},
    ):
        assert "No space left on device" in refusal(**outputs)
    assert listed(small_disk) == ["filler", "old.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_are_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch(0o400)
    assert "read-only" in refusal(out=tmp_path / "old.json")
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(out=tmp_path / "new.json")
    tmp_path.chmod(0o700)


# -- files that are whole ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_committed_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    for before in (None, "before"):
        if before is not None:
            path.write_text(before)
        with GrowingFile(path) as file:
            file.write("half of it")
        assert listed(tmp_path) == ([] if before is None else ["boxes.json"])
    assert path.read_text() == "before"


def test_a_committed_file_holds_all_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * LONGEST)
    with GrowingFile(path) as file:
        file.write("Regál ")
        file.write(b"\x00")
        file.write("\udcff")
        file.commit()
    assert path.read_bytes() == "Regál ".encode() + b"\x00" + b"\\udcff"
    assert len(listed(tmp_path)) == 1


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_new_file_is_as_readable_as_the_user_wants_files(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write_whole(tmp_path / "report.json", "{}")
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o666 & ~mask


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    path.chmod(0o640)
    write_whole(path, "after")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("after", 0o640)


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_the_file_it_leads_to_is_written(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store/boxes.json", tmp_path / "boxes.json"
    if exists:
        target.write_text("before")
    link.symlink_to("store/boxes.json")
    check_outputs(out=link)
    write_whole(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert listed(tmp_path) == ["boxes.json", "store", "store/boxes.json"]


def test_a_file_that_is_mounted_alone_is_written_in_place(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside.json", tmp_path / "inside.json"
    outside.write_text("much longer than what comes")
    inside.touch()
    if not mounted("--bind", outside, inside):
        pytest.skip("file systems cannot be mounted here")
    try:
        check_outputs(out=inside)
        write_whole(inside, "boxes")
        assert outside.read_text() == "boxes"
    finally:
        unmount(inside)
    assert listed(tmp_path) == ["inside.json", "outside.json"]


def test_a_full_disk_leaves_what_was_there_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "boxes.json"
    path.write_text("before")
    with pytest.raises(CommandError) as caught:
        write_whole(path, "x" * 100_000)
    assert str(caught.value) == f"{str(path)!r}: cannot be written: No space left on device"
    assert (listed(small_disk), path.read_text()) == (["boxes.json"], "before")


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(CommandError, match=r"boxes\.json': cannot be written: File too large"):
        write_whole(tmp_path / "boxes.json", "x" * 1001)
    assert listed(tmp_path) == []


def test_what_only_the_last_flush_finds_out_is_reported_too(small_disk: Path) -> None:
    path = small_disk / "boxes.json"
    (small_disk / "filler").write_bytes(bytes(64 * 1024))
    with GrowingFile(path) as file:
        file.write("short, so that it waits in memory")
        with pytest.raises(CommandError, match="No space left"):
            file.commit()
    assert listed(small_disk) == ["filler"]


# -- drawings ----------------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_into_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "new/folders/1.jpg"
    assert draw_boxes(photo_of(80, 60), np.array([[10, 20, 30, 50]], np.float32), path) is None
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (80, 60))
        drawn = np.asarray(image).astype(int)
    edge, inside = drawn[25:45, 10], drawn[35, 20]
    assert (edge[:, 1] - edge[:, 0]).min() > 80
    assert np.ptp(inside) < 30


def test_a_photo_that_is_too_wide_for_jpeg_is_drawn_smaller(tmp_path: Path) -> None:
    path = tmp_path / "wide.jpg"
    assert draw_boxes(photo_of(131_000, 20), np.array([[130_000, 2, 130_400, 18]], np.float32), path) is None
    with Image.open(path) as image:
        assert image.size == (65_500, 10)
        drawn = np.asarray(image).astype(int)
    greenest = (drawn[:, :, 1] - drawn[:, :, 0]).max(axis=0).argmax()
    assert 65_000 - 100 < greenest < 65_200 + 100


def test_a_drawing_takes_the_place_of_a_link_and_not_of_the_photo_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"a photo")
    (tmp_path / "drawn.jpg").symlink_to("photo.jpg")
    assert draw_boxes(photo_of(10, 10), NO_BOXES, tmp_path / "drawn.jpg") is None
    assert (tmp_path / "photo.jpg").read_bytes() == b"a photo"
    assert not (tmp_path / "drawn.jpg").is_symlink()


def test_a_drawing_that_cannot_be_written_gives_its_reason(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    reason = draw_boxes(Photo(pixels=noise), NO_BOXES, small_disk / "1.jpg")
    assert reason == f"{str(small_disk / '1.jpg')!r}: cannot be written: No space left on device"
    assert listed(small_disk) == []


def test_every_failure_of_a_drawing_is_a_reason_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    photo = photo_of(10, 10)
    assert "cannot be written: File exists" in str(draw_boxes(photo, NO_BOXES, tmp_path / "file/1.jpg"))
    assert "expected a file, got a folder" in str(draw_boxes(photo, NO_BOXES, tmp_path))
    assert "File name too long" in str(draw_boxes(photo, NO_BOXES, tmp_path / ("n" * 252 + ".jpg")))
    upside_down = np.array([[5, 5, 1, 1]], np.float32)
    assert "cannot be drawn: ValueError" in str(draw_boxes(photo, upside_down, tmp_path / "1.jpg"))
    assert listed(tmp_path) == ["file"]
