"""Makes the pictures of the documents: a real Label Studio, the real backend, a real browser, on a rendered shelf; the
page for one photo. And the picture of the checkpoint's card: rendered shelves that it reads worst.

Run as `python tests/screenshots.py`. The browser tests look at the same photo through the same eyes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from browser import NO_BROWSER, Annotator, Box, annotator, find_chromium
from learners import shelf_project, submit, wait_for

from backend.errors import CommandError
from backend.learning.store import ProjectStore
from scripts.demo import label_studio_server as label_studio
from scripts.demo.demo import LABEL_CONFIG, LABEL_STUDIO_ENVIRONMENT, ROOT, is_ready, start_facings
from scripts.demo.label_studio_client import Account, Client
from scripts.demo.processes import LOOPBACK, free_port

if TYPE_CHECKING:
    from PIL.Image import Image

    from model.renderer.shelves import Shelf

PICTURES = ROOT / "docs" / "pictures"
PHOTO_SEED = 17
PHOTO_SIZE_WH = (1600, 1200)
WINDOW_SIZE_WH = (1600, 1000)
PAGE_SIZE_WH = (1280, 760)
LEARNED_PHOTOS = 14
COLOURS = 128  # of a picture's palette; keeps it small
WEAK_OF = 60  # rendered shelves, of which the picture has the worst
WEAK_SHOWN = 4  # two by two
WEAK_SIZE_PX = 1000
WEAK_FACING_PX = 55.0
RIGHT, FALSE, MISSED = (40, 220, 60), (255, 225, 0), (255, 40, 40)


def render_photo() -> Shelf:
    """The photo of the pictures, with its truth."""
    from model.renderer.shelves import render_shelf

    return render_shelf(PHOTO_SEED, PHOTO_SIZE_WH)


def photo(folder: Path) -> tuple[Path, Shelf]:
    """The photo of the pictures, as a file and with its truth."""
    from PIL import Image

    shelf = render_photo()
    path = folder / "shelf.jpg"
    Image.fromarray(shelf.photo_rgb).save(path, quality=92)
    return path, shelf


def clear_facings(shelf: Shelf, count: int) -> list[Box]:
    """Truth of facings that are seen whole, clearest first, far from each other so that prompts do not meet."""
    height, width = shelf.instance_ids.shape
    boxes = shelf.boxes_xyxy
    visible = np.bincount(shelf.instance_ids.ravel(), minlength=len(boxes) + 1)[1:]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    margin = np.array([width, height]) * 0.08
    inside = (boxes[:, :2] > margin).all(1) & (boxes[:, 2:] < np.array([width, height]) - margin).all(1)
    clearness = np.where(inside, visible / area * np.sqrt(area), 0)
    chosen: list[int] = []
    for facing in np.argsort(-clearness):
        centre = (boxes[facing, :2] + boxes[facing, 2:]) / 2
        others = (boxes[chosen, :2] + boxes[chosen, 2:]) / 2
        if (np.linalg.norm(others - centre, axis=1) > width / 5).all():
            chosen.append(int(facing))
        if len(chosen) == count:
            break
    return [percent(boxes[facing], PHOTO_SIZE_WH) for facing in chosen]


def percent(box_xyxy: npt.NDArray[np.float32], size_wh: tuple[int, int]) -> Box:
    """A box in pixels as the page has it."""
    x0, y0, x1, y1 = (float(value) / size_wh[i % 2] * 100 for i, value in enumerate(box_xyxy))
    return Box(x=x0, y=y0, width=x1 - x0, height=y1 - y0)


def in_pixels(box: Box, size_wh: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A box of the page `[4]` in pixels."""
    sides = box.x, box.y, box.x + box.width, box.y + box.height
    return np.array(sides, np.float32) / 100 * np.array(size_wh * 2, np.float32)


def rough(box: Box) -> Box:
    """How an annotator in a hurry draws around a box: a sixth too wide on all sides."""
    return Box(x=box.x - box.width / 6, y=box.y - box.height / 6, width=box.width * 4 / 3, height=box.height * 4 / 3)


def take_pictures(page: Annotator, project: int, task: int, facings: list[Box], folder: Path) -> None:
    """A task as it opens, the page ready for clicks, a click on one facing, and a rough rectangle around another."""
    by_click, by_rectangle = facings
    page.open_task(project, task)
    _picture(page, folder / "open.png")
    page.start_prompting("point", auto_accept=True)
    _picture(page, folder / "toolbar.png")
    page.start_prompting("point")
    page.click(by_click.x + by_click.width / 2, by_click.y + by_click.height / 2)
    _picture(page, folder / "keypoint.png")
    page.accept()
    page.start_prompting("rectangle")
    page.drag(rough(by_rectangle))
    _picture(page, folder / "rectangle.png")
    page.accept()


def take_page_pictures(chromium: str, folder: Path, photo: Path, facing: Box) -> None:
    """The page of `facings demo --page` with all boxes of a photo, and with one object in hand."""
    from visitor import running_page, visitor

    with running_page(photo.with_name("page.log")) as (url, _), visitor(chromium, url, size_wh=PAGE_SIZE_WH) as page:
        page.choose(photo)
        page.picture(folder / "page.jpg")
        x0, y0, x1, y1 = in_pixels(facing, PHOTO_SIZE_WH)
        for _ in range(2):  # the first click of a process takes longer than others
            page.press("next")
            page.click((x0 + x1) / 2, (y0 + y1) / 2)
        page.picture(folder / "page-object.jpg")


def take_project_picture(client: Client, facings: str, learned: Path, chromium: str, folder: Path) -> None:
    """The page of a project whose annotators submitted some photos, and whose detector learned from them."""
    from playwright.sync_api import sync_playwright

    project, tasks = shelf_project(client, learned.parent, LEARNED_PHOTOS)
    backend = client.connect_backend(project, facings)
    client.retrieve_predictions(project)
    submit(client, tasks)
    client.start_training(backend)
    store = wait_for(lambda: ProjectStore.find(learned, project))
    wait_for(store.versions, timeout_s=900)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 675})
        page.goto(f"{facings}/projects/{project}")
        page.screenshot(path=folder / "project.png")
        browser.close()
    _small(folder / "project.png")


def _picture(page: Annotator, path: Path) -> None:
    page.picture(path)
    _small(path)


def _small(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def weaknesses() -> Image:
    """The rendered shelves with most corrections for each facing: right boxes, false boxes and missed facings, in the
    colours above."""
    from PIL import Image, ImageDraw

    from model import EngineOptions, Photo, Sam2Engine
    from model.quality import Truth, count_corrections, match
    from model.renderer.shelves import render_shelf

    engine = Sam2Engine(EngineOptions())
    drawn: list[tuple[float, Image.Image]] = []
    side = WEAK_SIZE_PX
    for seed in range(WEAK_OF):
        shelf = render_shelf(seed, (side, side), facing_px=WEAK_FACING_PX)
        truth = Truth(size_wh=(side, side), boxes_xyxy=shelf.boxes_xyxy.astype(np.float64))
        found = engine.preannotate(Photo(pixels=shelf.photo_rgb))
        owner = match(found, truth).truth_index
        picture = Image.fromarray(shelf.photo_rgb)
        draw = ImageDraw.Draw(picture)
        missed = np.delete(truth.boxes_xyxy, owner[owner >= 0], axis=0)
        for colour, boxes in (
            (MISSED, missed),
            (RIGHT, found.boxes_xyxy[owner >= 0]),
            (FALSE, found.boxes_xyxy[owner < 0]),
        ):
            for box in boxes:
                draw.rectangle(box.tolist(), outline=colour, width=2)
        (corrections,) = count_corrections([truth], [found], [engine.score_threshold])
        drawn.append((corrections.per_100() if len(truth.boxes_xyxy) > 30 else 0.0, picture))
    engine.close()
    worst = sorted(drawn, key=lambda entry: -entry[0])[:WEAK_SHOWN]
    page = Image.new("RGB", (2 * side, 2 * side))
    for place, (_, picture) in enumerate(worst):
        page.paste(picture, (side * (place % 2), side * (place // 2)))
    return page.resize((side, side), reducing_gap=3)


def main() -> None:
    """Starts what the pictures need, takes them and stops everything."""
    chromium = find_chromium()
    if chromium is None:
        sys.exit(f"screenshots: {NO_BROWSER}")
    executable = label_studio.install(LABEL_STUDIO_ENVIRONMENT, uv=shutil.which("uv") or "uv")
    account = Account.new("annotator@example.com")
    port, facings_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, shelf = photo(folder)
        client = Client(f"http://{LOOPBACK}:{port}", account.token)
        url = f"http://{LOOPBACK}:{facings_port}"
        with (
            label_studio.start(executable, folder / "data", account, port=port, log=folder / "studio.log") as studio,
            start_facings(
                {
                    "LABEL_STUDIO_URL": client.url,
                    "LABEL_STUDIO_API_KEY": account.token,
                    "STATE_DIR": str(folder / "learned"),
                    "LEARN_MINUTES": "1",
                },
                port=facings_port,
                log=folder / "facings.log",
            ) as facings,
        ):
            facings.wait_until(lambda: is_ready(url), timeout_s=300, what="ready to predict")
            studio.wait_until(client.is_up, timeout_s=label_studio.START_TIMEOUT_S, what="answering")
            project = client.create_project("Shelf photos", LABEL_CONFIG.read_text())
            client.connect_backend(project, url)
            (task,) = client.upload(project, {path.name: path})
            with annotator(chromium, client.url, account, size_wh=WINDOW_SIZE_WH) as page:
                take_pictures(page, project, task, clear_facings(shelf, 2), PICTURES)
            take_project_picture(client, url, folder / "learned", chromium, PICTURES)
        take_page_pictures(chromium, PICTURES, path, clear_facings(shelf, 1)[0])
    weaknesses().save(PICTURES / "weaknesses.jpg", quality=85)
    print(*sorted(PICTURES.iterdir()), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except CommandError as error:
        sys.exit(f"screenshots: {error}")
