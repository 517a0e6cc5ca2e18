"""Stand-ins: an engine that answers from the pixels it got, and photos for it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model import DeadlineExceeded, Detections, Engine, EngineStats, Lane, Mask, NotReady, Photo, Prompt
from model.types import State

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

BACKGROUND: Color = (255, 255, 255)


def painted_photo(boxes: Mapping[Color, Box], size_wh: tuple[int, int] = (200, 100)) -> npt.NDArray[np.uint8]:
    """uint8 `[H, W, 3]`: a rectangle of each colour on white. Boxes are xyxy in pixels."""
    pixels = np.full((size_wh[1], size_wh[0], 3), BACKGROUND, np.uint8)
    for color, (x0, y0, x1, y1) in boxes.items():
        pixels[y0:y1, x0:x1] = color
    return pixels


def png_of(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The photo as an image file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def data_url(pixels: npt.NDArray[np.uint8]) -> str:
    """The photo as an address that needs no server."""
    return f"data:image/png;base64,{base64.b64encode(png_of(pixels)).decode()}"


class FakeEngine:
    """Takes every area of one colour on white for a facing, and a prompt for the area of the colour it points at.

    Scores fall from 0.9 in steps of 0.1, larger areas first. Every call is recorded. A call takes `seconds`, but never
    longer than its deadline allows. `on_call` runs at the start of each call.
    """

    name = "fake"
    score_threshold = 0.0

    def __init__(
        self,
        *,
        state: State = "ready",
        failure: str | None = None,
        seconds: float = 0.0,
        on_call: Callable[[], None] = lambda: None,
    ) -> None:
        self.state: State = state
        self.failure = failure
        self.seconds = seconds
        self.on_call = on_call
        self.calls: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        return "fake-loading" if self.state == "loading" else "fake-12345678"

    def wait_ready(self, timeout_s: float | None = None) -> None:
        if self.state != "ready":
            raise NotReady(self.failure or f"fake is {self.state}")

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Detections:
        self._begin(deadline, method="preannotate", digest=photo.digest, lane=lane, score_threshold=score_threshold)
        areas = sorted(self._areas(photo), key=lambda area: -area.sum())
        boxes = [_bounds(area) for area in areas]
        scores = [max(0.1, 0.9 - 0.1 * i) for i in range(len(areas))]
        found = Detections(boxes_xyxy=np.array(boxes, np.float32), scores=np.array(scores, np.float32))
        return found.above(self.score_threshold if score_threshold is None else score_threshold)

    def refine(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        *,
        accepted_xyxy: npt.NDArray[np.float32] | None = None,
        want_masks: bool = False,
        deadline: float | None = None,
    ) -> list[Detections]:
        accepted = [] if accepted_xyxy is None else accepted_xyxy.tolist()
        self._begin(
            deadline,
            method="refine",
            digest=photo.digest,
            prompts=list(prompts),
            accepted=accepted,
            want_masks=want_masks,
        )
        areas = [self._area_at(photo, prompt) for prompt in prompts]
        return [
            Detections(
                boxes_xyxy=np.array([_bounds(area)], np.float32),
                scores=np.full(1, 0.8, np.float32),
                masks=[Mask(bitmap=area, left=0, top=0)] if want_masks else None,
            )
            for area in areas
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            cache_hits=3, cache_misses=2, cache_entries=2, cache_bytes=64, queued_interactive=0, queued_bulk=1
        )

    def close(self) -> None:
        self.state = "closed"

    def _begin(self, deadline: float | None, **call: Any) -> None:
        with self._lock:
            self.calls.append(call)
        self.on_call()
        remaining_s = float("inf") if deadline is None else deadline - time.monotonic()
        time.sleep(max(0.0, min(self.seconds, remaining_s)))
        if remaining_s <= self.seconds:
            raise DeadlineExceeded("the deadline passed before the engine had an answer")

    @staticmethod
    def _areas(photo: Photo) -> list[npt.NDArray[np.bool_]]:
        colors = np.unique(photo.pixels.reshape(-1, 3), axis=0)
        return [(photo.pixels == color).all(axis=2) for color in colors if tuple(color) != BACKGROUND]

    @staticmethod
    def _area_at(photo: Photo, prompt: Prompt) -> npt.NDArray[np.bool_]:
        if prompt.box_xyxy is not None:
            x, y = (prompt.box_xyxy[:2] + prompt.box_xyxy[2:]) / 2
        else:
            x, y = prompt.points_xy[prompt.is_foreground][0]
        area: npt.NDArray[np.bool_] = (photo.pixels == photo.pixels[int(y), int(x)]).all(axis=2)
        return area


_: Engine = FakeEngine()  # mypy compares them


def first_boxes(answers: Sequence[Detections]) -> npt.NDArray[np.float32]:
    """The first box `[4]` of each prompt's answer; zeros where there is none."""
    boxes = [answer.boxes_xyxy[0] if len(answer) else np.zeros(4, np.float32) for answer in answers]
    return np.array(boxes, np.float32).reshape(-1, 4)


def _bounds(area: npt.NDArray[np.bool_]) -> Box:
    ys, xs = np.nonzero(area)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@contextmanager
def in_thread(run: Callable[[threading.Event], object], timeout_s: float = 60.0) -> Iterator[None]:
    """`run` in a thread of its own, until the block is left: then it is told to stop, and what it raised is raised."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, stop)
        try:
            yield
        finally:
            stop.set()
        running.result(timeout_s)
