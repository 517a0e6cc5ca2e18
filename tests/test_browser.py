"""Facings as an annotator meets it: a real Label Studio in a real browser, the bundled checkpoint behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import screenshots
from browser import Annotator, Box, annotator
from conftest import Studio, running_facings
from screenshots import PHOTO_SIZE_WH, clear_facings, rough

from model.boxes import iou_matrix
from model.renderer.shelves import Shelf
from scripts.demo.demo import LABEL_CONFIG, ROOT


def overlaps(boxes: list[Box], truth: list[Box]) -> np.ndarray:
    """Intersection over union of each box with each truth."""

    def pixels(some: list[Box]) -> np.ndarray:
        corners = [(box.x, box.y, box.x + box.width, box.y + box.height) for box in some]
        return np.array(corners, np.float32).reshape(-1, 4) / 100 * np.array(PHOTO_SIZE_WH * 2, np.float32)

    return iou_matrix(pixels(boxes), pixels(truth))


def middle(box: Box) -> tuple[float, float]:
    return box.x + box.width / 2, box.y + box.height / 2


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shelf]:
    return screenshots.photo(tmp_path_factory.mktemp("photo"))


@pytest.fixture(scope="module")
def project(studio: Studio, facings: str) -> int:
    project = studio.client.create_project("browser", LABEL_CONFIG.read_text())
    studio.client.connect_backend(project, facings)
    return project


@pytest.fixture(scope="module")
def page(studio: Studio, chromium: str) -> Iterator[Annotator]:
    with annotator(chromium, studio.url, studio.account, size_wh=screenshots.WINDOW_SIZE_WH) as page:
        yield page


@pytest.fixture
def task(studio: Studio, project: int, page: Annotator, photo: tuple[Path, Shelf]) -> int:
    """A new task, open in the browser."""
    path, _ = photo
    (task,) = studio.client.upload(project, {path.name: path})
    page.open_task(project, task)
    return task


def test_opening_a_task_shows_the_boxes_of_its_facings(
    studio: Studio, page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    _, shelf = photo
    truth = [screenshots.percent(box, PHOTO_SIZE_WH) for box in shelf.boxes_xyxy]

    boxes = page.boxes()

    (prediction,) = studio.client.task(task)["predictions"]
    assert len(boxes) == len(prediction["result"])
    found = overlaps(boxes, truth).max(axis=0) > 0.5
    assert found.mean() > 0.7, f"{found.sum()} of {len(truth)} facings found by {len(boxes)} boxes"


def test_a_click_gives_a_box_that_fits_the_facing(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    facings = clear_facings(photo[1], 3)
    page.start_prompting("point")
    fits = []

    for facing in facings:
        page.click(*middle(facing))
        (suggestion,) = page.suggestions()
        page.accept()
        fits.append(float(overlaps([suggestion], [facing])[0, 0]))

    assert np.median(fits) > 0.7, fits


def test_a_rough_rectangle_gives_a_box_that_fits_the_facing(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    facings = clear_facings(photo[1], 3)
    page.start_prompting("rectangle")
    fits = []

    for facing in facings:
        page.drag(rough(facing))
        (suggestion,) = page.suggestions()
        page.accept()
        fits.append(float(overlaps([suggestion], [facing])[0, 0]))

    assert np.median(fits) > 0.65, fits


def emptied(page: Annotator, places: list[Box]) -> None:
    """Removes the boxes over these places, as an annotator does: by an Alt-click in the middle of each."""
    for place in places:
        for box in page.boxes():
            if overlaps([box], [place])[0, 0] > 0.3:
                page.click(*middle(box), negative=True)


def over(page: Annotator, facing: Box) -> list[Box]:
    return [box for box in page.boxes() if overlaps([box], [facing])[0, 0] > 0.3]


def test_an_alt_click_in_the_middle_of_a_box_removes_it_and_nothing_stays(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    facings = clear_facings(photo[1], 3)
    page.start_prompting("point", auto_accept=True)
    before, standing = len(page.boxes()), sum(len(over(page, facing)) for facing in facings)
    assert standing

    emptied(page, facings)

    assert [over(page, facing) for facing in facings] == [[], [], []]
    assert len(page.boxes()) == before - standing
    assert page.points() == 0


def test_missed_facings_take_one_click_each_without_a_key_between(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    facings = clear_facings(photo[1], 3)
    page.start_prompting("point", auto_accept=True)
    emptied(page, facings)
    before = len(page.boxes())

    for facing in facings:
        page.click(*middle(facing))

    assert len(page.boxes()) == before + 3
    assert {box.label for box in page.boxes()} == {"facing"}
    assert page.points() == 0
    assert all(len(over(page, facing)) == 1 for facing in facings)


def test_a_click_in_a_box_replaces_it(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("point", auto_accept=True)
    before = len(page.boxes())
    assert len(over(page, facing)) == 1

    page.click(*middle(facing))

    assert len(page.boxes()) == before
    assert len(over(page, facing)) == 1


def test_a_rectangle_over_a_box_replaces_it(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("rectangle", auto_accept=True)
    before = len(page.boxes())
    (old,) = over(page, facing)
    drawn = Box(x=old.x, y=old.y, width=old.width, height=old.height * 0.75)

    page.drag(drawn)

    assert len(page.boxes()) == before
    (new,) = over(page, drawn)
    assert float(overlaps([new], [drawn])[0, 0]) > 0.75
    assert new.height < 0.95 * old.height


@pytest.mark.parametrize("is_new", [False, True], ids=["a pre-annotated box", "a box made a moment ago"])
def test_an_alt_click_near_an_edge_trims_the_box_there_and_only_there(
    page: Annotator, task: int, photo: tuple[Path, Shelf], is_new: bool
) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("point", auto_accept=True)
    if is_new:
        emptied(page, [facing])
        page.click(*middle(facing))
    (old,) = over(page, facing)
    before = len(page.boxes())

    page.click(old.x + 0.95 * old.width, old.y + old.height / 2, negative=True)

    (new,) = over(page, facing)
    assert len(page.boxes()) == before
    assert (new.x, new.y, new.height) == pytest.approx((old.x, old.y, old.height), abs=0.01)
    assert 0.85 * old.width < new.width < 0.95 * old.width + 0.01
    page.press("Control+z")
    (undone,) = over(page, facing)
    assert undone.width == pytest.approx(old.width, abs=0.01)


def test_pending_clicks_on_two_products_give_two_boxes(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    facings = clear_facings(photo[1], 2)
    page.start_prompting("point")
    for facing in facings:
        page.click(*middle(facing))

    suggestions = page.suggestions()

    assert len(suggestions) == 2
    assert (overlaps(suggestions, facings).max(axis=0) > 0.5).all()
    page.accept()
    assert page.points() == 0


def test_a_pending_alt_click_trims_the_suggestion(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("point")
    page.click(*middle(facing))
    (first,) = page.suggestions()

    page.click(first.x + first.width / 2, first.y + first.height * 0.95, negative=True)

    (second,) = page.suggestions()
    assert (second.x, second.y, second.width) == pytest.approx((first.x, first.y, first.width), abs=0.01)
    assert second.height < first.height * 0.96


def test_pending_clicks_on_one_product_give_one_box(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    (facing,) = clear_facings(photo[1], 1)
    x, y = middle(facing)
    page.start_prompting("point")
    page.click(x, y)
    page.click(x, y - facing.height * 0.2)

    (suggestion,) = page.suggestions()

    assert overlaps([suggestion], [facing])[0, 0] > 0.5


def test_a_pending_click_in_a_pending_rectangle_gives_one_box(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("rectangle")
    page.drag(rough(facing))
    page.take("point")
    page.click(*middle(facing))

    (suggestion,) = page.suggestions()

    assert overlaps([suggestion], [facing])[0, 0] > 0.5


def is_point_saved(studio: Studio, task: int) -> bool:
    drafts = studio.client.task(task)["drafts"]
    return any("keypoint" in region["type"] for draft in drafts for region in draft["result"])


def test_a_point_that_is_pending_when_the_page_is_left_comes_back_without_its_suggestion(
    studio: Studio, page: Annotator, task: int, project: int, photo: tuple[Path, Shelf]
) -> None:
    facing, other = clear_facings(photo[1], 2)
    page.start_prompting("point")
    page.click(*middle(facing))
    assert len(page.suggestions()) == 1
    for _ in range(120):  # Label Studio saves drafts every few seconds
        if is_point_saved(studio, task):
            break
        page.page.wait_for_timeout(250)

    page.open_task(project, task)
    page.wait_for_point()

    assert page.points() == 1
    assert page.suggestions() == []
    page.start_prompting("point")
    page.click(*middle(other))
    assert any(contains(suggestion, middle(other)) for suggestion in page.suggestions())


def test_several_boxes_are_selected_with_control_and_deleted_by_one_key(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    facings = clear_facings(photo[1], 2)
    before = len(page.boxes())
    page.page.mouse.click(5, 400)
    page.press("v")
    for facing in facings:
        with page.held("Control"):
            page.page.mouse.click(*page.on_page(*middle(facing)))
        page.page.wait_for_timeout(300)

    page.press("Backspace")

    assert len(page.boxes()) == before - 2


def test_submitting_saves_what_is_drawn_and_nothing_else(
    studio: Studio, page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    first, second = clear_facings(photo[1], 2)
    page.start_prompting("point", auto_accept=True)
    emptied(page, [first])
    page.click(*middle(second))
    drawn = page.boxes()

    page.submit()

    (annotation,) = studio.client.task(task)["annotations"]
    assert {region["type"] for region in annotation["result"]} == {"rectanglelabels"}
    saved = [region["value"] for region in annotation["result"]]
    assert {label for value in saved for label in value["rectanglelabels"]} == {"facing"}
    np.testing.assert_allclose(
        sorted((value["x"], value["y"]) for value in saved), sorted((box.x, box.y) for box in drawn), atol=0.01
    )


def test_on_a_real_photo_a_click_adds_or_replaces_one_box_and_an_alt_click_removes_it(
    studio: Studio, project: int, page: Annotator
) -> None:
    photos = sorted((ROOT.parent / "shared" / "shelves_dev" / "images").glob("*.jpg"))
    if not photos:
        pytest.skip("no ../shared/shelves_dev: a folder of real shelf photos, which is not part of the project")
    (task,) = studio.client.upload(project, {photos[0].name: photos[0]})
    page.open_task(project, task)
    page.start_prompting("point", auto_accept=True)
    boxes = page.boxes()
    in_view = [box for box in boxes if 5 < middle(box)[1] < 35]  # a portrait photo is higher than the window
    box = next(box for box in in_view if sum(contains(other, middle(box)) for other in boxes) == 1)
    before = len(boxes)

    page.click(*middle(box))
    assert len(page.boxes()) == before
    (replacement,) = (one for one in page.boxes() if contains(one, middle(box)))
    page.click(*middle(replacement), negative=True)

    assert len(page.boxes()) == before - 1
    assert page.points() == 0


def contains(box: Box, place: tuple[float, float]) -> bool:
    return box.x < place[0] < box.x + box.width and box.y < place[1] < box.y + box.height


def test_without_a_backend_a_click_leaves_a_point_and_no_message(
    studio: Studio, page: Annotator, photo: tuple[Path, Shelf], servers_dir: Path
) -> None:
    project = studio.client.create_project("backend gone", LABEL_CONFIG.read_text())
    path, _ = photo
    with running_facings(servers_dir) as url:
        studio.client.connect_backend(project, url)
        (task,) = studio.client.upload(project, {path.name: path})
        page.open_task(project, task)
        page.start_prompting("point", auto_accept=True)
        before = len(page.boxes())

    page.click(2, 2)

    assert len(page.boxes()) == before
    assert page.points() == 1
    messages = page.page.locator(".ant-notification, .ant-message, [class*=toast]").all_inner_texts()
    assert not any(messages)
