"""A file name for every photo: unique, safe, readable."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.bulk.names import FileNames, drawing_names, photo_name
from backend.photos.files import SUFFIXES

NASTY = st.sampled_from(
    [
        *("..", ".", "", " ", "/", "a", "A", "å", "a\u030a", "ß", "ss", "photo", "con", "NUL.txt", "a.", "a.txt"),
        *("a.jpg", "1.jpg", "1.png", "1.JPG", "1-2.jpg", "1.jpg ", "a" * 300, "é" * 200),
        *("\0", "\n", "\udcff", "\u2028", "?", ":"),
    ]
)
NAMES = st.one_of(
    st.text(max_size=12),
    st.lists(NASTY, max_size=4).map("/".join),
    st.lists(NASTY, max_size=4).map("".join),
    st.text(alphabet="aA./1", max_size=6),
)


def folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


# -- names from addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (None, "no photo"),
        (["a.jpg"], "no photo"),
        ("", "no photo"),
        ("https://photos.example.com", "no photo"),
        ("https://photos.example.com/..", "no photo"),
        ("http://[broken", "no photo"),
        ("data:image/png;base64,AAAA", "data URL"),
        ("https://photos.example.com/store1/1.jpg?width=3#top", "store1/1.jpg"),
        ("https://photos.example.com/a/./..//1.jpg/.", "a/1.jpg"),
        ("https://photos.example.com/a%2F..%2F..%2Fetc/passwd", "a/etc/passwd"),
        ("https://photos.example.com/Reg%C3%A1l%201.jpg", "Regál 1.jpg"),
        ("https://photos.example.com/caf%E9.jpg", "caf\N{REPLACEMENT CHARACTER}.jpg"),
        ("https://photos.example.com/two%0Alines%00.jpg", "two\\nlines\\x00.jpg"),
        ("s3://bucket/store 1/1.jpg", "store 1/1.jpg"),
        ("/data/upload/3/8fe01234-1.jpg", "data/upload/3/8fe01234-1.jpg"),
        ("/data/local-files/?d=store1/1.jpg", "store1/1.jpg"),
        ("/data/local-files/?d=store2%2F1%20a%2B.jpg", "store2/1 a+.jpg"),
        ("https://labels.example.com/x/data/local-files?d=/store2/1.jpg&x=1", "store2/1.jpg"),
        ("\ud800.jpg", "\\ud800.jpg"),
    ],
)
def test_a_photo_is_called_by_the_path_of_its_address(address: object, name: str) -> None:
    assert photo_name(address) == name


@given(st.one_of(st.text(), NAMES.map("https://photos.example.com/{}".format), st.none(), st.integers()))
def test_a_name_is_one_printable_line_without_parts_that_lead_elsewhere(address: object) -> None:
    name = photo_name(address)
    assert name
    assert name.encode()
    assert name.splitlines() == [name]
    assert not {"", ".", ".."} & set(name.split("/"))


# -- names of files ----------------------------------------------------------------------------------------------------


def names_of(*photos: str) -> list[str]:
    files = FileNames()
    return [files.name(photo, image_id) for image_id, photo in enumerate(photos, 1)]


@pytest.mark.parametrize(
    ("photo", "name"),
    [
        ("1.jpg", "1.jpg"),
        ("store 1/Regál (2).JPG", "store 1/Regál (2).JPG"),
        (".hidden.jpg", ".hidden.jpg"),
        ("v1.2/1.tar.webp", "v1.2/1.tar.webp"),
        ("no suffix", "no suffix.jpg"),
        ("a.pdf", "a.pdf.jpg"),
        (".jpg", ".jpg.jpg"),
        ("", "photo.jpg"),
        ("../../etc/passwd.png", "etc/passwd.png"),
        ("/absolute/1.jpg", "absolute/1.jpg"),
        ('a<b>:"|?*\\.jpg', "a_b_______.jpg"),
        ("two\nlines\u2028\0.jpg", "two_lines__.jpg"),
        ("caf\udce9.jpg", "caf_.jpg"),
        ("con.jpg", "_con.jpg"),
        ("aux.x/LPT1 .jpg", "_aux.x/_LPT1 .jpg"),
        ("folder. /1.jpg", "folder. _/1.jpg"),
        ("1.jpg/2.jpg", "1.jpg_/2.jpg"),
    ],
)
def test_a_safe_name_is_kept_and_another_one_is_made_safe(photo: str, name: str) -> None:
    assert names_of(photo) == [name]


def test_a_name_that_is_taken_gets_the_id_of_the_photo() -> None:
    assert names_of("1-3.jpg", "1.jpg", "1.png", "1.webp", "1.jpg") == [
        "1-3.jpg",
        "1.jpg",
        "1-3-2.png",  # the third photo; 1-3 itself is taken
        "1-4.webp",
        "1-5.jpg",
    ]
    assert names_of("store1/1.jpg", "store2/1.jpg") == ["store1/1.jpg", "store2/1.jpg"]
    assert names_of("A.jpg", "a.jpg", "å.jpg", "a\u030a.jpg") == ["A.jpg", "a-2.jpg", "å.jpg", "a\u030a-4.jpg"]


def test_a_long_name_is_shortened_and_still_tells_photos_apart() -> None:
    longest = "n" * 251 + ".jpg"
    assert names_of(longest) == [longest]
    first, second, third = names_of("é" * 200 + "1.jpg", "é" * 200 + "2.jpg", "é" * 200 + "2.jpg")
    assert first.startswith("é" * 100)
    assert first[:100] == second[:100]
    assert third.endswith("-3.jpg")
    assert len({first, second, third}) == 3
    deep = names_of("/".join(["folder"] * 1000) + "/1.jpg")[0]
    assert (len(deep.split("/")), deep.split("/")[-1]) == (2, "1.jpg")


@given(st.lists(NAMES, max_size=30), st.booleans())
@example(["A.jpg", "a-2.jpg", "a.jpg", "a.png"], False)
@example(["a.jpg/b.jpg", "a.jpg", "a/b.jpg", "a"], True)
@example(["x" * 300, "x" * 300 + "-2"], False)
def test_every_photo_gets_a_portable_name_of_its_own(photos: list[str], is_drawing: bool) -> None:
    names = drawing_names(photos) if is_drawing else names_of(*photos)
    assert len({folded(PurePosixPath(name).with_suffix("").as_posix()) for name in names}) == len(photos)
    folders = {folded(str(parent)) for name in names for parent in PurePosixPath(name).parents}
    assert not folders & {folded(name) for name in names}
    for name in names:
        assert len(name.encode()) <= 1024
        assert PurePosixPath(name).suffix.lower() in SUFFIXES
        assert len(PurePosixPath(name).with_suffix(".txt").name.encode()) <= 255
        assert name.splitlines() == [name]
        for part in name.split("/"):
            assert part not in ("", ".", "..")
            assert len(part.encode()) <= 255
            assert not set(part) & set('<>:"|?*\\\0')
            assert part[-1] not in ". "


@given(st.lists(NAMES, max_size=10))
def test_the_same_photos_get_the_same_names_again(photos: list[str]) -> None:
    assert names_of(*photos) == names_of(*photos)
    assert drawing_names(photos) == drawing_names(photos)


@given(st.lists(NAMES, max_size=10))
def test_files_of_all_names_lie_side_by_side_in_their_folder(photos: list[str]) -> None:
    with TemporaryDirectory() as folder:
        for name in names_of(*photos):
            for path in (Path(folder, "images", name), Path(folder, "labels", name).with_suffix(".txt")):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
                assert path.resolve().is_relative_to(Path(folder).resolve())


@given(st.lists(NAMES, max_size=30))
@example(["1.jpg", "1.png", "A.jpg", "a.jpg", "a:b.jpg", "\udcff.jpg"])
def test_names_of_files_of_this_machine_are_kept_while_they_are_unique(photos: list[str]) -> None:
    files = FileNames(is_portable=False)
    names = [files.name(photo, image_id) for image_id, photo in enumerate(photos, 1)]
    assert len(set(names)) == len(photos)
    for number, (photo, name) in enumerate(zip(photos, names, strict=True)):
        assert not {"", ".", ".."} & set(name.split("/"))
        is_usual = all(part.strip().strip(".") and len(part) <= 80 for part in photo.split("/"))
        if is_usual and "\0" not in photo and photo not in {*photos[:number], *names[:number]}:
            assert name == photo


def test_drawings_are_named_like_their_photos() -> None:
    assert drawing_names(["a.jpg", "a.png", "b.JPEG", "sub/c.bmp"]) == ["a.jpg", "a-2.jpg", "b.jpg", "sub/c.jpg"]
