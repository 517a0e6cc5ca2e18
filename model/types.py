"""The values that travel through the model: Photo, Prompt, Mask, Detections; the Engine protocol; the errors.

Knows numpy only. All values are frozen, their arrays read-only, and they refuse impossible content, so that everything
behind them can rely on it. Boxes are float32 `xyxy`, half-open, in photo pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
PixelArray = npt.NDArray[np.uint8]

State = Literal["loading", "ready", "failed", "closed"]
Lane = Literal["interactive", "bulk"]


class EngineError(Exception):
    """Base of the errors that the engine raises.

    EngineError
    ├── CheckpointError    the weights are unavailable, unreadable or do not fit their network
    ├── DeviceError        there is no such device
    ├── DeviceMemoryError  out of device memory even for a batch of one
    ├── EncoderError       the server that encodes answered with an error, or with something else than features
    ├── ExportError        an export cannot be made or written
    ├── NotReady           the engine is still loading, has failed to load, or the server that encodes is away
    └── DeadlineExceeded   the caller's deadline passed before the answer was there
    """


class CheckpointError(EngineError):
    """The weights are unavailable, unreadable or do not fit their network."""


class DeviceError(EngineError):
    """There is no such device."""


class DeviceMemoryError(EngineError):
    """Out of device memory even for a batch of one."""


class EncoderError(EngineError):
    """The server that encodes answered with an error, or with something else than features."""


class ExportError(EngineError):
    """An export cannot be made or written."""


class NotReady(EngineError):
    """The engine is still loading, has failed to load, or the server that encodes is away."""


class DeadlineExceeded(EngineError):
    """The caller's deadline passed before the answer was there."""


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """A decoded photo.

    pixels: uint8 `[H, W, 3]`, RGB, EXIF orientation already applied, H and W at least 1.
    digest: hex digest of size and content; two photos with the same pixels share it.
    """

    pixels: PixelArray
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        pixels = np.ascontiguousarray(self.pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels: expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        hasher = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        hasher.update(pixels.data)
        object.__setattr__(self, "pixels", _read_only(pixels))
        object.__setattr__(self, "digest", hasher.hexdigest())

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What names one object: points, at most one box, or both; all in photo pixels.

    points_xy: float32 `[N, 2]`.
    is_foreground: bool `[N]`; False marks a point that the object must not contain.
    box_xyxy: float32 `[4]` with x0 < x1 and y0 < y1, or None.
    is_redrawn: whether the box was drawn over one that was wrong; then its edges count more, and the network's less.

    At least one foreground point or a box is needed: background points alone name no object.
    """

    points_xy: FloatArray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    is_foreground: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    box_xyxy: FloatArray | None = None
    is_redrawn: bool = False

    def __post_init__(self) -> None:
        points = np.array(self.points_xy, np.float32).reshape(-1, 2)
        is_foreground = np.array(self.is_foreground, np.bool_).reshape(-1)
        if len(points) != len(is_foreground):
            raise ValueError(f"is_foreground: expected {len(points)} values, one a point, got {len(is_foreground)}")
        if not np.isfinite(points).all():
            raise ValueError(f"points_xy: expected finite numbers, got {points.tolist()!r}")
        if self.box_xyxy is not None:
            box = np.array(self.box_xyxy, np.float32)
            if box.shape != (4,) or not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(f"box_xyxy: expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {box.tolist()!r}")
            object.__setattr__(self, "box_xyxy", _read_only(box))
        elif not is_foreground.any():
            raise ValueError("prompt: expected a box or at least one foreground point, got neither")
        object.__setattr__(self, "points_xy", _read_only(points))
        object.__setattr__(self, "is_foreground", _read_only(is_foreground))


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """The pixels of one object, cut to a window of the photo.

    bitmap: bool `[h, w]`, True where the object is.
    left, top: photo pixel of the window's corner.
    """

    bitmap: BoolArray
    left: int
    top: int

    def __post_init__(self) -> None:
        bitmap = np.asarray(self.bitmap)
        if bitmap.dtype != np.bool_ or bitmap.ndim != 2:
            raise ValueError(f"bitmap: expected bool [h, w], got {bitmap.dtype} {list(bitmap.shape)}")
        object.__setattr__(self, "bitmap", _read_only(bitmap))

    def in_photo(self, size_wh: tuple[int, int]) -> BoolArray:
        """The mask as bool `[H, W]` of a whole photo."""
        canvas = np.zeros((size_wh[1], size_wh[0]), np.bool_)
        height, width = self.bitmap.shape
        canvas[self.top : self.top + height, self.left : self.left + width] = self.bitmap
        return canvas


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """Boxes that are handed out.

    boxes_xyxy: float32 `[N, 4]`, photo pixels, x0 <= x1 and y0 <= y1 (equal only for an answer that found nothing).
    scores: float32 `[N]` in [0, 1].
    masks: one for each box, or None when masks were not asked for.
    """

    boxes_xyxy: FloatArray
    scores: FloatArray
    masks: Sequence[Mask] | None = None

    def __post_init__(self) -> None:
        boxes = np.array(self.boxes_xyxy, np.float32).reshape(-1, 4)
        scores = np.array(self.scores, np.float32).reshape(-1)
        if len(boxes) != len(scores):
            raise ValueError(f"scores: expected {len(boxes)} values, one a box, got {len(scores)}")
        if not np.isfinite(boxes).all() or (boxes[:, :2] > boxes[:, 2:]).any():
            raise ValueError("boxes_xyxy: expected finite x0 <= x1, y0 <= y1")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"scores: expected values in [0, 1], got {scores.min()} to {scores.max()}")
        if self.masks is not None and len(self.masks) != len(boxes):
            raise ValueError(f"masks: expected {len(boxes)}, one a box, got {len(self.masks)}")
        object.__setattr__(self, "boxes_xyxy", _read_only(boxes))
        object.__setattr__(self, "scores", _read_only(scores))

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def above(self, score_threshold: float) -> Detections:
        """Those with a score of at least `score_threshold`, order kept."""
        return self._only(np.flatnonzero(self.scores >= score_threshold))

    def first(self, count: int) -> Detections:
        """At most the first `count`."""
        return self if count >= len(self) else self._only(np.arange(count))

    def _only(self, keep: npt.NDArray[np.int64]) -> Detections:
        masks = None if self.masks is None else tuple(self.masks[i] for i in keep)
        return Detections(boxes_xyxy=self.boxes_xyxy[keep], scores=self.scores[keep], masks=masks)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the start; bytes and queue lengths now."""

    cache_hits: int
    cache_misses: int
    cache_entries: int
    cache_bytes: int
    queued_interactive: int
    queued_bulk: int


class Engine(Protocol):
    """Photos and prompts in, Detections out.

    - All methods may be called from any thread and block until they have an answer.
    - deadline: a `time.monotonic()` value. A call that has no answer by then raises DeadlineExceeded; None waits.
    - A call to an engine that failed to load, or is closed, raises NotReady.
    """

    @property
    def state(self) -> State:
        """What the engine is doing now. Never blocks."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine will never be ready, in one line, or None."""
        ...

    @property
    def name(self) -> str:
        """Name of the checkpoint; the requested one until it is known."""
        ...

    @property
    def version(self) -> str:
        """Changes exactly when the boxes may change. Never blocks; `<name>-loading` until it is known."""
        ...

    @property
    def score_threshold(self) -> float:
        """The default of `preannotate`, in [0, 1]."""
        ...

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Blocks until the engine can answer. Raises NotReady, with the reason, on failure or after `timeout_s`."""
        ...

    def preannotate(
        self,
        photo: Photo,
        *,
        score_threshold: float | None = None,
        lane: Lane = "bulk",
        deadline: float | None = None,
    ) -> Detections:
        """All facings of the photo with a score of at least `score_threshold` (None: the default), best first."""
        ...

    def refine(
        self,
        photo: Photo,
        prompts: Sequence[Prompt],
        *,
        accepted_xyxy: FloatArray | None = None,
        want_masks: bool = False,
        deadline: float | None = None,
    ) -> list[Detections]:
        """What each prompt names, in order; with `want_masks` the masks too.

        A rectangle names one object, and comes back as it was drawn, with score 0, where nothing is found. Points name
        one object or several: those that nothing explains together are objects of their own. Every foreground point of
        a prompt lies in one of its boxes, no background point lies inside one, and a rectangle's box overlaps it by an
        IoU of 0.3 at least; where that cannot be, there is no box. Prompts outside the photo name nothing.

        accepted_xyxy: float32 `[N, 4]`, boxes of other objects that an annotator has accepted on this photo; objects in
        their row are probably alike. What the engine remembers of the photo may make the answer better, so that it need
        not be the same each time.
        """
        ...

    def stats(self) -> EngineStats:
        """Counters and queue lengths. Never blocks."""
        ...

    def close(self) -> None:
        """Ends the engine; work that waits is refused with NotReady."""
        ...
