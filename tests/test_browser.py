"""Facings as an annotator meets it: a real Label Studio in a real browser, the bundled checkpoint behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import screenshots
from browser import Annotator, Box, annotator
from conftest import Studio
from screenshots import PHOTO_SIZE_WH, clear_facings, rough

from model.boxes import iou_matrix
from model.renderer.shelves import Shelf
from scripts.demo.demo import LABEL_CONFIG


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
    page.start_prompting("click", "key-point-tool")
    fits = []

    for facing in facings:
        before = len(page.boxes())
        page.click(*middle(facing))
        (suggestion,) = page.suggestions()
        page.accept()
        assert len(page.boxes()) == before + 1
        fits.append(float(overlaps([suggestion], [facing])[0, 0]))

    assert np.median(fits) > 0.7, fits


def test_a_rough_rectangle_gives_a_box_that_fits_the_facing(
    page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    facings = clear_facings(photo[1], 3)
    page.start_prompting("region", "rectangle-tool")
    fits = []

    for facing in facings:
        before = len(page.boxes())
        page.drag(rough(facing))
        (suggestion,) = page.suggestions()
        page.accept()
        assert len(page.boxes()) == before + 1, "the rectangle is replaced by the box"
        fits.append(float(overlaps([suggestion], [facing])[0, 0]))

    assert np.median(fits) > 0.7, fits


def test_a_negative_click_changes_the_box(page: Annotator, task: int, photo: tuple[Path, Shelf]) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("click", "key-point-tool")
    page.click(*middle(facing))
    (first,) = page.suggestions()

    page.click(facing.x + facing.width / 2, facing.y + facing.height * 0.9, negative=True)

    (second,) = page.suggestions()
    assert float(overlaps([first], [second])[0, 0]) < 0.999


def test_submitting_saves_the_pre_annotated_boxes_and_the_one_clicked(
    studio: Studio, page: Annotator, task: int, photo: tuple[Path, Shelf]
) -> None:
    (facing,) = clear_facings(photo[1], 1)
    page.start_prompting("click", "key-point-tool")
    page.click(*middle(facing))
    page.accept()
    drawn = page.boxes()

    page.submit()

    (annotation,) = studio.client.task(task)["annotations"]
    saved = [region["value"] for region in annotation["result"] if region["type"] == "rectanglelabels"]
    assert len(saved) == len(drawn)
    assert {label for value in saved for label in value["rectanglelabels"]} == {"facing"}
    np.testing.assert_allclose(
        sorted((value["x"], value["y"]) for value in saved), sorted((box.x, box.y) for box in drawn), atol=0.01
    )
