"""Photos in folders are found, each once, and what is left out is counted."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from backend.errors import CommandError, PhotoDecodeError, PhotoTooLarge, PhotoUnreachable
from backend.photos.files import (
    AHEAD,
    SUFFIXES,
    display_name,
    find_photos,
    format_left_out,
    read_ahead,
    read_photo,
    read_pixels,
)

read = partial(read_photo, max_pixels=10_000)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(*paths: Path) -> list[str]:
    return [photo.name for photo in find_photos(paths).photos]


def test_photos_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "c.png", "a.PNG", "b/z.jpg", "b/a/x.webp", "B.jpg")
    assert names(tmp_path) == ["B.jpg", "a.PNG", "b/a/x.webp", "b/z.jpg", "c.png"]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_of_a_photo_is_found(suffix: str, tmp_path: Path) -> None:
    assert names(touch(tmp_path, f"a{suffix}")) == [f"a{suffix}"]


def test_what_is_left_out_is_counted_by_its_suffix_or_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.txt", "b.TXT", "notes", ".hidden.jpg", ".cache/b.jpg", "folder.jpg/a.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "same.jpg").symlink_to(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = find_photos([tmp_path])
    assert [photo.name for photo in found.photos] == ["a.jpg", "folder.jpg/a.png"]
    assert found.left_out == {
        ".txt": 2,
        "hidden": 2,
        "link that leads nowhere": 2,
        "without suffix": 1,
        "not a file": 1,
        "found twice": 1,
    }


def test_linked_folders_are_followed_and_end_where_they_lead_back(tmp_path: Path) -> None:
    shelves = touch(tmp_path / "shelves", "aisle/1.jpg")
    elsewhere = touch(tmp_path / "elsewhere", "2.jpg")
    (shelves / "Linked").symlink_to(elsewhere)
    (shelves / "aisle" / "up").symlink_to(shelves)
    (shelves / "Aisle again").symlink_to(shelves / "aisle")
    found = find_photos([shelves])
    assert [photo.name for photo in found.photos] == ["Linked/2.jpg", "aisle/1.jpg"]
    assert found.left_out == {"folder found twice": 2}


def test_files_are_taken_as_they_are_named_and_each_once(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "b/2.jpg", "a/scan", ".x.jpg")
    assert names(tmp_path / "b" / "2.jpg", tmp_path / "a" / "scan", tmp_path / ".x.jpg", tmp_path / "b") == [
        "b/2.jpg",
        "a/scan",
        ".x.jpg",
        "b/1.jpg",
    ]


def test_photos_of_the_same_name_in_two_folders_keep_their_folders_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "shop/1/a.jpg", "shop/2/a.jpg")
    monkeypatch.chdir(tmp_path / "shop" / "1")
    assert names(Path(), Path("../2")) == ["1/a.jpg", "2/a.jpg"]
    assert names(Path("a.jpg"), Path("../2/a.jpg")) == ["1/a.jpg", "2/a.jpg"]
    assert names(Path("a.jpg")) == names(Path()) == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "found no such file"), ("empty", r"found none$"), ("texts", r"left out 1: 1 \.txt")]
)
def test_a_path_without_photos_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/a.txt")
    with pytest.raises(CommandError, match=words):
        find_photos([tmp_path / name])


def test_a_name_that_is_not_utf_8_is_found_read_and_fit_for_messages_and_json(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (4, 3)).save(path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (photo,) = find_photos([tmp_path]).photos
    assert photo.name == r"caf\xe9.png"
    assert photo.quoted == "caf%E9.png"
    assert json.dumps(photo.name).encode()
    assert read(photo.path).size_wh == (4, 3)
    path.write_bytes(b"no photo")
    with pytest.raises(PhotoDecodeError, match=r"caf.*xe9\.png': expected") as caught:
        read(photo.path)
    assert str(caught.value).encode()


@pytest.mark.parametrize(("name", "displayed"), [("ä.jpg", "ä.jpg"), (os.fsdecode(b"\xff/\xe9"), r"\xff/\xe9")])
def test_a_name_is_displayed_in_utf_8(name: str, displayed: str) -> None:
    assert display_name(name) == display_name(Path(name)) == displayed


@pytest.mark.parametrize(
    ("left_out", "text"),
    [
        ({}, ""),
        ({".txt": 1}, "left out 1: 1 .txt"),
        ({"hidden": 2, ".txt": 1500}, "left out 1,502: 1,500 .txt, 2 hidden"),
        ({f".{i}": 10 - i for i in range(8)}, "left out 52: 10 .0, 9 .1, 8 .2, 7 .3, 6 .4, 12 others"),
    ],
)
def test_what_is_left_out_is_summed_up_in_a_few_words(left_out: dict[str, int], text: str) -> None:
    assert format_left_out(left_out) == text


@pytest.mark.parametrize("count", [0, 1, AHEAD, AHEAD + 3])
def test_reading_ahead_keeps_the_order(count: int) -> None:
    assert list(read_ahead(range(count), lambda i: i * i)) == [(i, i * i) for i in range(count)]


def test_what_cannot_be_read_is_an_outcome_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    outcomes = dict(read_ahead([tmp_path / "gone.jpg", tmp_path / "text.jpg"], read))
    assert [type(outcome) for outcome in outcomes.values()] == [PhotoUnreachable, PhotoDecodeError]
    assert [str(outcome).split(":")[0] for outcome in outcomes.values()] == ["'gone.jpg'", "'text.jpg'"]


def test_a_file_is_read_within_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (40, 30), (1, 2, 3)).save(path)
    assert (read_pixels(path, max_pixels=1200) == (1, 2, 3)).all()
    with pytest.raises(PhotoTooLarge, match=r"'a\.bmp': expected at most 1,199 pixels"):
        read_photo(path, max_pixels=1199)
    with pytest.raises(PhotoTooLarge, match=r"'a\.bmp': expected at most 100 bytes"):
        read_photo(path, max_pixels=1200, max_bytes=100)
