"""Somebody at the page of `facings demo --page`, in a real browser: drops a photo, clicks, downloads.

Knows the page's elements and Playwright. The tests and the pictures of the documentation use it alike. Positions and
boxes are pixels of the photo.
"""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from browser import FLAGS, PAUSE_MS

from scripts.demo.processes import LOOPBACK, Server, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Request, Response

ROOT = Path(__file__).parents[1]
TIMEOUT_MS = 60_000
_DROPPED = "() => !document.querySelector('#status [data-old]')"
_RECTANGLES = """kind => [...document.querySelectorAll('#shelf g rect.' + kind)].map(
    rect => ['x', 'y', 'width', 'height'].map(name => parseFloat(rect.getAttribute(name))))"""
_ON_PAGE = """([x, y]) => {
    const at = new DOMPoint(x, y).matrixTransform(document.querySelector('#shelf svg').getScreenCTM());
    return [at.x, at.y];
}"""
_SHOWN = """([status, marks]) => document.querySelector('#status span').textContent === status
    && (marks === null || document.querySelectorAll('#shelf g > *').length === marks)"""


@contextmanager
def running_page(log: Path, **settings: str) -> Iterator[tuple[str, Server]]:
    """The page with the bundled checkpoint, in a process of its own, and its address."""
    port = free_port()
    environ = os.environ | {"CHECKPOINT": "facings-nano", "DEVICE": "cpu", "PORT": str(port), **settings}
    command = [sys.executable, "-m", "scripts.cli", "demo", "--page"]
    with Server("page", command, environ=environ, cwd=ROOT, log=log) as server:
        server.wait_until(lambda: "Ctrl-C" in log.read_text(), timeout_s=120, what="ready")
        yield f"http://{LOOPBACK}:{port}", server


@contextmanager
def visitor(chromium: str, url: str, *, size_wh: tuple[int, int] = (1280, 860)) -> Iterator[Visitor]:
    """Somebody who has opened the page, in a browser that ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": size_wh[0], "height": size_wh[1]})
            page.set_default_timeout(TIMEOUT_MS)
            yield Visitor(page, url)
        finally:
            browser.close()


class Visitor:
    """What a visitor does and sees. Every method returns when the page shows the outcome.

    hosts: all that the page asked for something. errors: of its scripts. session: by which the server knows this
    visitor; None before the first call.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.session: str | None = None
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#chooser", state="attached")

    def choose(self, path: Path) -> str:
        """Chooses a photo; what the page says of it."""
        self.page.evaluate("() => document.querySelector('#status span').setAttribute('data-old', '')")
        self.page.set_input_files("#chooser", path)
        self.page.wait_for_function(_DROPPED)
        return self.status()

    def drop(self, path: Path) -> str:
        """Drops a photo on the shelf; what the page says of it."""
        self.page.evaluate("() => document.querySelector('#status span').setAttribute('data-old', '')")
        content = f"new Uint8Array({list(path.read_bytes())})"
        transfer = self.page.evaluate_handle(
            f"name => {{ const data = new DataTransfer(); data.items.add(new File([{content}], name)); return data; }}",
            path.name,
        )
        self.page.dispatch_event("#shelf .html-container > *", "drop", {"dataTransfer": transfer})
        self.page.wait_for_function(_DROPPED)
        return self.status()

    def status(self) -> str:
        """The line that tells what happened."""
        return self.page.locator("#status span").inner_text()

    def boxes(self, kind: str = "box") -> npt.NDArray[np.float32]:
        """The boxes `[N, 4]` that are drawn. kind: `box` for those that stand, `object` for the object in hand."""
        rows = np.array(self.page.evaluate(_RECTANGLES, kind), np.float32).reshape(-1, 4)
        return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1)

    def tints(self) -> Locator:
        """The masks that are drawn."""
        return self.page.locator("#shelf .tint")

    def click(self, x: float, y: float, *, alt: bool = False) -> str:
        """A click on the photo; what the page says of it. alt: with that key held."""
        place = self.on_page(x, y)
        if alt:
            self.page.keyboard.down("Alt")
        status = self._answer(lambda: self.page.mouse.click(*place))
        if alt:
            self.page.keyboard.up("Alt")
        return status

    def say_on_the_object(self) -> None:
        """Chooses that the next clicks are on the object."""
        self.page.get_by_label("On the object", exact=True).check()

    def say_not_on_the_object(self) -> None:
        """Chooses that the next clicks are not on the object."""
        self.page.get_by_label("Not on the object").check()

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> str:
        """A rectangle over the photo; what the page says of it."""

        def move() -> None:
            self.page.mouse.move(*self.on_page(x0, y0))
            self.page.mouse.down()
            self.page.mouse.move(*self.on_page((x0 + x1) / 2, (y0 + y1) / 2))
            self.page.mouse.move(*self.on_page(x1, y1))
            self.page.mouse.up()

        return self._answer(move)

    def press(self, button: str) -> str:
        """A button by its id; what the page says of it."""
        return self._answer(lambda: self.page.click(f"#{button}"), calls=2 if button in ("cutout", "coco") else 1)

    def download(self, button: str) -> tuple[str, bytes]:
        """What a button downloads: a file's name and its content."""
        with self.page.expect_download() as started:
            self.press(button)
        return started.value.suggested_filename, Path(started.value.path()).read_bytes()

    def picture(self, path: Path) -> None:
        """A screenshot of the page as JPEG, without the mouse over it."""
        self.page.mouse.move(0, 0)
        self.page.evaluate("() => document.querySelector('#shelf image')?.decode()")
        self.page.wait_for_timeout(2 * PAUSE_MS)  # in which Gradio's sign of work fades
        self.page.screenshot(path=path, type="jpeg", quality=80)

    def on_page(self, x: float, y: float) -> tuple[float, float]:
        """Where a place on the photo is in the window."""
        left, top = self.page.evaluate(_ON_PAGE, [float(x), float(y)])
        return left, top

    def _note(self, request: Request) -> None:
        if request.url.startswith("http"):
            self.hosts.add(urlsplit(request.url).netloc)
        if "/gradio_api/run/" in request.url:
            self.session = request.post_data_json["session_hash"]

    def _answer(self, act: Callable[[], object], *, calls: int = 1) -> str:
        """Does something that makes calls, and waits until the first answer is seen and the last is there."""
        answers: list[Response] = []

        def is_last(response: Response) -> bool:
            if response.request.method == "POST":
                answers.append(response)
            return len(answers) == calls

        with self.page.expect_response(is_last):
            act()
        marks, status = answers[0].json()["data"]
        count = len(re.findall(r"<(?:rect|circle|polygon|image)\b", marks)) if "<rect" in marks else None
        text = re.sub(r"<[^>]*>", "", status) if isinstance(status, str) else self.status()
        self.page.wait_for_function(_SHOWN, arg=[html.unescape(text), count])
        return self.status()
