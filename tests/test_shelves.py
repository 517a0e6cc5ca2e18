"""The shelf renderer: what its labels promise."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from model.renderer.camera import new_view
from model.renderer.canvas import Canvas
from model.renderer.paint import Rng
from model.renderer.scene import _bay
from model.renderer.shelves import MIN_SIDE_PX, Textures, load_textures, preview, render_shelf
from model.renderer.shop import Shop
from model.renderer.surroundings import draw_banner, draw_poster, draw_tiles, tiled_floor, tiles

SIZES_WH = [(64, 64), (128, 96), (256, 384)]


def tight_boxes(instance_ids: np.ndarray, count: int) -> np.ndarray:
    boxes = np.zeros((count, 4), np.float32)
    for i in range(count):
        ys, xs = np.nonzero(instance_ids == i + 1)
        boxes[i] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    return boxes


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Textures:
    folder = tmp_path_factory.mktemp("textures")
    rng = np.random.default_rng(0)
    for name in ("icons", "photos"):
        (folder / name).mkdir()
        for i in range(2):
            picture = np.full((200, 150, 3), 255, np.uint8)
            picture[30:170, 40:110] = rng.integers(0, 200, (140, 70, 3))
            assert cv2.imwrite(str(folder / name / f"{i}.png"), picture)
    return load_textures(folder)


@pytest.mark.parametrize("size_wh", SIZES_WH)
@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_tight_around_the_visible_pixels_and_ids_have_boxes(seed: int, size_wh: tuple[int, int]) -> None:
    shelf = render_shelf(seed, size_wh, facing_px=20)
    count = len(shelf.boxes_xyxy)
    assert set(np.unique(shelf.instance_ids)) - {0} == set(range(1, count + 1))
    np.testing.assert_array_equal(shelf.boxes_xyxy, tight_boxes(shelf.instance_ids, count))


@pytest.mark.parametrize("size_wh", SIZES_WH)
def test_photo_boxes_and_ids_have_the_shapes_and_types_that_are_promised(size_wh: tuple[int, int]) -> None:
    shelf = render_shelf(7, size_wh)
    width, height = size_wh
    assert shelf.photo_rgb.shape == (height, width, 3)
    assert shelf.photo_rgb.dtype == np.uint8
    assert shelf.instance_ids.shape == (height, width)
    assert shelf.instance_ids.dtype == np.int32
    assert shelf.boxes_xyxy.dtype == np.float32
    assert shelf.boxes_xyxy.shape[1:] == (4,)


def test_no_box_leaves_the_photo_or_is_smaller_than_the_limit() -> None:
    for seed in range(8):
        boxes = render_shelf(seed, (192, 160), facing_px=18).boxes_xyxy
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (192, 160)).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE_PX).all()


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(textures: Textures) -> None:
    first, second = (render_shelf(3, (160, 160), textures=textures) for _ in range(2))
    np.testing.assert_array_equal(first.photo_rgb, second.photo_rgb)
    np.testing.assert_array_equal(first.instance_ids, second.instance_ids)
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert (first.photo_rgb != render_shelf(4, (160, 160), textures=textures).photo_rgb).any()


def test_facings_are_about_as_wide_as_asked() -> None:
    for asked in (20, 60):
        boxes = np.concatenate([render_shelf(seed, (320, 320), facing_px=asked).boxes_xyxy for seed in range(8)])
        assert 0.5 * asked < np.median(boxes[:, 2] - boxes[:, 0]) < 1.6 * asked


def test_most_pictures_hold_facings() -> None:
    counts = [len(render_shelf(seed, (256, 256), facing_px=24).boxes_xyxy) for seed in range(10)]
    assert np.median(counts) > 15


def test_a_large_photo_shows_a_whole_shelf() -> None:
    assert 30 <= len(render_shelf(1, (1200, 900)).boxes_xyxy) <= 400


def test_textures_are_cut_free_of_white_and_change_the_picture(textures: Textures) -> None:
    assert len(textures.cutouts) == 2
    assert len(textures.faces) == 2
    for cutout in textures.cutouts:
        assert cutout.shape[2] == 4
        assert cutout.shape[0] > cutout.shape[1]
        assert (cutout[..., 3] > 127).mean() > 0.9
    plain, textured = (render_shelf(5, (200, 200), textures=t) for t in (None, textures))
    assert (plain.photo_rgb != textured.photo_rgb).any()


def test_a_folder_without_pictures_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected \.jpg or \.png files below .*found none"):
        load_textures(tmp_path)


def test_a_size_too_small_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size_wh: expected at least 32 x 32 pixels, got 8 x 100"):
        render_shelf(0, (8, 100))


def test_the_shipped_textures_load_when_they_are_there() -> None:
    folder = Path(__file__).parents[2] / "shared" / "textures" / "grocery_store"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    textures = load_textures(folder)
    assert len(textures.faces) > 500
    assert len(textures.cutouts) > 50


def test_the_preview_is_a_page_of_samples_in_a_folder_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "page.png"
    preview(path, seed=1)
    page = cv2.imread(str(path))
    assert page is not None
    assert page.shape == (1536, 2048, 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("draw", ["poster", "banner", "tiles"])
def test_posters_banners_and_tiles_hide_goods_and_hold_none(draw: str, seed: int) -> None:
    rng, canvas = Rng(seed), Canvas(320, 240)
    shop = Shop(rng, canvas, 30.0, new_view(rng, calm=True), None)
    before = canvas.rgb.copy()
    canvas.ids[:] = 1
    if draw == "poster":
        draw_poster(shop, 20, 10)
    elif draw == "banner":
        draw_banner(shop, 20, 300, 10)
    else:
        draw_tiles(shop, 20, 10, 300, 200)
    changed = (canvas.rgb != before).any(-1)
    assert changed.sum() > 500
    assert not canvas.ids[changed].any(), "nothing that was drawn is a facing"
    assert canvas.ids[:10].all()
    assert canvas.ids[:, :20].all(), "goods beside it stay"
    assert len(canvas.areas) == 1, "and there are no new ones"


def test_tiles_fill_their_area_however_large_they_are() -> None:
    for seed in range(10):
        assert tiles(Rng(seed), 40, 70, (2.0, 9.0)).shape == (40, 70, 3)
        assert tiles(Rng(seed), 40, 70, (500.0, 500.0)).shape == (40, 70, 3)
        assert tiled_floor(Rng(seed), 5, 70, 20.0).shape == (5, 70, 3)


@pytest.mark.parametrize("mode", ["shelf", "wall", "hooks", "top", "tiles"])
def test_a_bay_without_room_stays_empty(mode: str) -> None:
    rng, canvas = Rng(1), Canvas(320, 240)
    _bay(Shop(rng, canvas, 30.0, new_view(rng, calm=True), None), 0, 100, [], mode)
    assert not canvas.ids.any()


def test_decoys_are_drawn_only_where_they_are_asked_for() -> None:
    drawn = []
    for seed in range(30):
        plain, decoyed = render_shelf(seed, (160, 160)), render_shelf(seed, (160, 160), decoys=True)
        drawn.append(not np.array_equal(plain.photo_rgb, decoyed.photo_rgb))
    assert any(drawn)
