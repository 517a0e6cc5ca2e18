"""Tiles cover the photo, and their pixels map back to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tiling import DENSE_LEVELS, LEVELS, dense_tiles, tile_for_box, tile_for_points, tiles_of

sizes = st.tuples(st.integers(1, 6000), st.integers(1, 6000))


@given(size_wh=sizes, level=st.integers(0, len(LEVELS) - 1))
def test_the_tiles_of_a_level_cover_the_photo_and_overlap(size_wh: tuple[int, int], level: int) -> None:
    tiles = tiles_of(size_wh, 1024, level)
    if not tiles:
        assert level > 0  # small photos are not enlarged more than twofold; the whole photo is always seen
        return
    for axis in (0, 1):
        starts = sorted({(tile.left, tile.top)[axis] for tile in tiles})
        side = tiles[0].side
        assert starts[0] == 0
        assert starts[-1] + side >= size_wh[axis]
        assert all(later - earlier < side for earlier, later in pairwise(starts))


@given(size_wh=sizes.filter(lambda size_wh: max(size_wh) <= 2 * min(size_wh)))
def test_the_first_tile_of_an_ordinary_photo_shows_all_of_it(size_wh: tuple[int, int]) -> None:
    tile, *others = dense_tiles(size_wh, 1024)
    assert (tile.left, tile.top, tile.side) == (0, 0, max(size_wh))
    assert all(other.level > 0 for other in others)


@pytest.mark.parametrize(
    ("size_wh", "corners_and_sides"),
    [
        ((640, 480), [(0, 0, 640)]),
        ((1600, 1200), [(0, 0, 1600), (0, 0, 928), (672, 0, 928), (0, 272, 928), (672, 272, 928)]),
        ((3264, 2448), [(0, 0, 3264), (0, 0, 1893), (1371, 0, 1893), (0, 555, 1893), (1371, 555, 1893)]),
        ((2448, 3264), [(0, 0, 3264), (0, 0, 1893), (555, 0, 1893), (0, 1371, 1893), (555, 1371, 1893)]),
        ((4000, 2000), [(0, 0, 4000), (0, 0, 2320), (1680, 0, 2320)]),
    ],
)
def test_ordinary_photos_have_these_tiles(
    size_wh: tuple[int, int], corners_and_sides: list[tuple[int, int, int]]
) -> None:
    assert [(tile.left, tile.top, tile.side) for tile in dense_tiles(size_wh, 1024)] == corners_and_sides


def sides_of(size_wh: tuple[int, int]) -> set[int]:
    return {tile.side for tile in dense_tiles(size_wh, 1024)}


panoramas = st.tuples(st.integers(100, 2000), st.integers(2, 40)).map(lambda drawn: (drawn[0] * drawn[1], drawn[0]))


@given(size_wh=panoramas)
def test_the_tiles_of_a_panorama_are_those_of_photos_of_its_height_in_a_row(size_wh: tuple[int, int]) -> None:
    width, height = size_wh
    tiles = dense_tiles(size_wh, 1024)
    if width > max(2 * height, 1024):
        assert {tile.side for tile in tiles} <= {
            side for photo in ((round(4 / 3 * height), height), (1024, 768)) for side in sides_of(photo)
        }
    assert len(tiles) <= 4 * (1 + width / height)


@given(size_wh=panoramas)
def test_a_portrait_panorama_has_the_tiles_of_a_landscape_one(size_wh: tuple[int, int]) -> None:
    lying = {(tile.left, tile.top, tile.side) for tile in dense_tiles(size_wh, 1024)}
    standing = {(tile.top, tile.left, tile.side) for tile in dense_tiles(size_wh[::-1], 1024)}
    assert lying == standing


def test_a_prompt_that_no_window_of_a_panorama_holds_sees_the_whole_photo() -> None:
    size_wh = (9600, 900)
    points = np.array([[100, 450], [9000, 450]], np.float32)
    assert tile_for_points(points, size_wh, 1024).side == 9600
    assert tile_for_box(np.array([100, 100, 5000, 800], np.float32), size_wh, 1024).side == 9600
    assert tile_for_points(points[:1], size_wh, 1024) in dense_tiles(size_wh, 1024)
    assert tile_for_box(np.array([5000, 400, 5080, 520], np.float32), size_wh, 1024).side < 1000


@given(size_wh=sizes, fractions=st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.02, 0.1)] * 2))
def test_tile_pixels_map_back_to_photo_pixels(size_wh: tuple[int, int], fractions: tuple[float, ...]) -> None:
    x, y, width, height = fractions
    box = (np.array([x, y, x + width, y + height]) * (size_wh * 2)).astype(np.float32)
    for tile in dense_tiles(size_wh, 1024):
        there = tile.to_tile(box.reshape(2, 2)).reshape(1, 4)
        assert tile.to_photo(there)[0] == pytest.approx(box, abs=0.01 + 1e-5 * max(size_wh))


def test_a_box_at_an_inner_edge_is_cut_and_one_at_the_photos_edge_is_not() -> None:
    size_wh = (3264, 2448)
    left, right = tiles_of(size_wh, 1024, 1)[:2]
    at_seam = np.array([[left.side - 60, 500, left.side, 700]], np.float32)
    at_photos_edge = np.array([[0, 0, 80, 90]], np.float32)
    assert left.is_cut(at_seam, size_wh, 4)[0]
    assert not right.is_cut(at_seam, size_wh, 4)[0]
    assert not left.is_cut(at_photos_edge, size_wh, 4)[0]


@given(size_wh=st.tuples(st.integers(300, 5000), st.integers(300, 5000)), place=st.tuples(*[st.floats(0, 1)] * 2))
def test_a_prompt_is_answered_from_a_tile_that_shows_all_of_it(
    size_wh: tuple[int, int], place: tuple[float, float]
) -> None:
    side = 0.05 * max(size_wh)
    corner = np.array(place) * np.maximum(np.array(size_wh) - side, 0)
    box = np.array([*corner, *np.minimum(corner + side, size_wh)], np.float32)
    for tile in (tile_for_box(box, size_wh, 1024), tile_for_points(box[None, :2], size_wh, 1024)):
        assert tile.left <= box[0] < tile.left + tile.side
        assert tile.top <= box[1] < tile.top + tile.side
    suited = tile_for_box(box, size_wh, 1024)
    assert suited.left + suited.side >= min(box[2], size_wh[0])
    assert suited.top + suited.side >= min(box[3], size_wh[1])


def test_small_objects_are_seen_in_fine_tiles_and_large_ones_in_the_whole_photo() -> None:
    size_wh = (2448, 3264)
    small = tile_for_box(np.array([1200, 1200, 1260, 1300], np.float32), size_wh, 1024)
    large = tile_for_box(np.array([300, 300, 2000, 2500], np.float32), size_wh, 1024)
    assert small.level > large.level == 0


def test_a_click_uses_a_tile_that_preannotation_has_encoded() -> None:
    size_wh = (2448, 3264)
    known = set(dense_tiles(size_wh, 1024))
    rng = np.random.default_rng(0)
    assert all(
        tile_for_points((rng.random((1, 2)) * size_wh).astype(np.float32), size_wh, 1024) in known for _ in range(50)
    )
    assert len(known) == sum(len(tiles_of(size_wh, 1024, level)) for level in range(DENSE_LEVELS)) == 5
