"""An annotator at Label Studio's labelling page: opens a task, prompts, reads the boxes, submits.

Knows the page of Label Studio 1.23.2 (selectors, its `Htx` store) and Playwright. The tests and the pictures of the
README use it alike. Positions and boxes are percent of the photo, as in Label Studio's own JSON.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.demo.label_studio_client import Account

if TYPE_CHECKING:
    from playwright.sync_api import Page, Response

COMMANDS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
NO_BROWSER = (
    "no Chromium on PATH and none of Playwright's: run `apt-get install chromium`, "
    "or `.venv/bin/playwright install chromium` on other systems"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
TIMEOUT_S = 120.0  # Label Studio waits up to 100 s for the boxes of a task that is opened

Tool = Literal["point", "rectangle"]
TOOLS: dict[Tool, str] = {"point": "key-point-tool", "rectangle": "rectangle-tool"}
PAUSE_MS = 300  # after a key, whose effect has no event of its own

_READY = """task => {
    if (window.Htx?.task?.id != task || !window.Htx.annotationStore?.selected) return false;
    const image = window.Htx.annotationStore.selected.objects.find(object => object.type === 'image');
    return image?.stageWidth > 10 && !!document.querySelector('.konvajs-content canvas')
        && !document.querySelector('.lsf-label-view_loading');
}"""
_ANSWERED = "() => !window.Htx.awaitingSuggestions"
_REGIONS = "() => window.Htx.annotationStore.selected.serializeAnnotation()"
_SUGGESTIONS = """() => [...window.Htx.annotationStore.selected.suggestions.values()].map(region => ({
    id: region.cleanId, ...region.serialize(), from_name: region.results[0].from_name.name,
    type: region.results[0].type, labels: region.labels}))"""
_PHOTO_ON_PAGE = """() => {
    const box = document.querySelector('.konvajs-content').getBoundingClientRect();  // may be wider than the photo
    const image = window.Htx.annotationStore.selected.objects.find(object => object.type === 'image');
    return [box.x, box.y, image.stageWidth, image.stageHeight];
}"""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box on the page. x, y: its left top corner; all four in percent of the photo."""

    x: float
    y: float
    width: float
    height: float
    label: str | None = None


def find_chromium() -> str | None:
    """Path of a Chromium: one on PATH, else the one that Playwright installed, else None."""
    from playwright.sync_api import sync_playwright

    if found := next(filter(None, map(shutil.which, COMMANDS)), None):
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


@contextmanager
def annotator(
    chromium: str, url: str, account: Account, *, size_wh: tuple[int, int] = (1440, 900)
) -> Iterator[Annotator]:
    """An annotator logged in at a Label Studio, in a browser that ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": size_wh[0], "height": size_wh[1]})
            page.set_default_timeout(TIMEOUT_S * 1000)
            page.goto(f"{url}/user/login/")
            page.fill("input[name=email]", account.email)
            page.fill("input[name=password]", account.password)
            page.click("button[type=submit]")
            page.wait_for_url(lambda address: "/user/login" not in address)
            yield Annotator(page, url)
        finally:
            browser.close()


class Annotator:
    """What an annotator does and sees. Every method returns when the page shows the outcome."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url

    def open_task(self, project: int, task: int) -> None:
        """Opens a task for labelling."""
        self.page.goto(f"{self.url}/projects/{project}/data?task={task}")
        self.page.wait_for_function(_READY, arg=task)

    def boxes(self) -> list[Box]:
        """The rectangles drawn on the photo, pending prompts included, suggestions not."""
        return [_box(region) for region in self.page.evaluate(_REGIONS) if region["type"] == "rectanglelabels"]

    def points(self) -> int:
        """How many points are drawn on the photo: prompts that wait, or that nobody answered."""
        return sum("keypoint" in region["type"] for region in self.page.evaluate(_REGIONS))

    def wait_for_point(self) -> None:
        """Waits until a point is drawn on the photo: a draft's regions come after the page is ready."""
        self.page.wait_for_function(f"() => ({_REGIONS})().some(region => region.type.startsWith('keypoint'))")

    def suggestions(self) -> list[Box]:
        """The boxes that the backend suggests and the annotator has not accepted yet."""
        return [_box(region) for region in self.page.evaluate(_SUGGESTIONS) if region["type"] == "rectanglelabels"]

    def start_prompting(self, tool: Tool, *, auto_accept: bool = False) -> None:
        """Turns Auto-Annotation on, with or without auto-accept, and takes a smart tool in hand."""
        self.page.get_by_test_id("bottombar-auto-annotation-toggle").check(force=True)
        accept = self.page.get_by_test_id("bottombar-auto-accept-toggle")
        accept.set_checked(auto_accept, force=True)
        self.page.mouse.click(5, 400)  # the switch keeps the focus, and hotkeys do nothing meanwhile
        self.take(tool)

    def take(self, tool: Tool) -> None:
        """Takes a smart tool in hand."""
        self.page.locator(".lsf-toolbar__group > .lsf-tool_smart").hover()
        self.page.locator(f'.lsf-toolbar__smart button[aria-label="{TOOLS[tool]}"]').click()

    def press(self, key: str) -> None:
        """A key, or keys held together, such as `Control+z`."""
        self.page.keyboard.press(key)
        self.page.wait_for_timeout(PAUSE_MS)

    def click(self, x: float, y: float, *, negative: bool = False) -> None:
        """A smart keypoint; negative: with Alt held, for what the object must not contain."""
        with self._answer(), self.held(*(("Control", "Alt") if negative else ("Control",))):
            self.page.mouse.click(*self.on_page(x, y))

    def drag(self, box: Box) -> None:
        """A smart rectangle."""
        with self._answer(), self.held("Control"):
            self.page.mouse.move(*self.on_page(box.x, box.y))
            self.page.mouse.down()
            self.page.mouse.move(*self.on_page(box.x + box.width / 2, box.y + box.height / 2))
            self.page.mouse.move(*self.on_page(box.x + box.width, box.y + box.height))
            self.page.mouse.up()

    def accept(self) -> None:
        """Accepts the suggestions."""
        self.page.get_by_test_id("bottombar-accept-suggestions-button").click()
        self.page.wait_for_function("() => window.Htx.annotationStore.selected.suggestions.size === 0")

    def submit(self) -> None:
        """Submits the annotation."""
        with self.page.expect_response(_saves_annotation):
            self.page.get_by_test_id("bottombar-submit-button").click()

    def picture(self, path: Path) -> None:
        """A screenshot of the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)

    @contextmanager
    def _answer(self) -> Iterator[None]:
        with self.page.expect_response(lambda response: "/interactive-annotating" in response.url):
            yield
        self.page.wait_for_function(_ANSWERED)

    @contextmanager
    def held(self, *keys: str) -> Iterator[None]:
        """Keys held down. Control prompts even inside a box, where a plain click would select that box."""
        for key in keys:
            self.page.keyboard.down(key)
        yield
        for key in reversed(keys):
            self.page.keyboard.up(key)

    def on_page(self, x: float, y: float) -> tuple[float, float]:
        """Where a place on the photo is on the page, in pixels."""
        left, top, width, height = self.page.evaluate(_PHOTO_ON_PAGE)
        return left + width * x / 100, top + height * y / 100


def _saves_annotation(response: Response) -> bool:
    return response.request.method in ("POST", "PATCH") and "/annotations" in response.url and response.ok


def _box(region: Mapping[str, Any]) -> Box:
    value = region["value"]
    labels = value.get("rectanglelabels") or region.get("labels")
    return Box(
        x=value["x"], y=value["y"], width=value["width"], height=value["height"], label=next(iter(labels or ()), None)
    )
