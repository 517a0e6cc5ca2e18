"""Objects by their names: a zero-shot detector of the transformers library, such as Grounding DINO or OWLv2.

Knows transformers and its checkpoints. Knows nothing of masks: the engine makes them from the boxes found here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model import boxes as geometry
from model.device import choose_placement
from model.types import CheckpointError, DeadlineExceeded, EngineError, FloatArray, NotReady, Photo

log = logging.getLogger(__name__)

SAME_OBJECT_IOU = 0.7  # boxes that overlap by more are one object, also under two names


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedObject:
    """box_xyxy: float32 `[4]`, in photo pixels. score: the detector's, 0 to 1. label: one of those asked for."""

    box_xyxy: FloatArray
    score: float
    label: str


class TextDetector:
    """One detector, resident. Thread-safe; one photo at a time.

    checkpoint: a name on the Hugging Face hub, or a folder. It loads in the background; `check_ready` tells how far.
    device: as `EngineOptions` has it.
    """

    def __init__(self, checkpoint: str, *, device: str) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._ended = threading.Event()  # loading has, one way or the other
        self._pipeline: Any = None
        self._failure = ""
        threading.Thread(target=self._load, args=(device,), name="text-detector", daemon=True).start()

    def check_ready(self) -> None:
        """Raises NotReady while it is loading, CheckpointError when it cannot be loaded."""
        self._detector(until=time.monotonic())

    def find(
        self, photo: Photo, labels: Sequence[str], *, score_threshold: float, most: int, deadline: float
    ) -> list[NamedObject]:
        """The objects of these names, best first, `most` at most. Each name is looked for on its own, so time grows
        with their number.

        deadline: `time.monotonic()` value, looked at between two names. Raises NotReady, CheckpointError,
        DeadlineExceeded, EngineError.
        """
        from PIL import Image

        detector = self._detector(until=deadline)
        image = Image.fromarray(photo.pixels)
        found: list[NamedObject] = []
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("the deadline passed before the text detector was free")
        try:
            for label in labels:
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the deadline passed before {label!r} was looked for")
                rows = detector(image, candidate_labels=[_query(detector, label)], threshold=score_threshold)
                found += [_named(row, label, photo) for row in rows]
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:  # of the library: a label longer than it takes, or worse
            raise EngineError(f"text detector {self.checkpoint!r}: {_first_line(error)}") from error
        finally:
            self._lock.release()
        return _once_each(found)[:most]

    def _load(self, device: str) -> None:
        try:
            from transformers import pipeline
            from transformers.utils import logging

            logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            placed = choose_placement(device).device
            self._pipeline = pipeline("zero-shot-object-detection", model=self.checkpoint, device=placed)
        except Exception as error:  # of the hub, of files, of networks that are no detectors
            self._failure = _first_line(error)
            log.error("text detector %r cannot be loaded: %s", self.checkpoint, self._failure)
        finally:
            self._ended.set()

    def _detector(self, *, until: float) -> Any:
        if not self._ended.wait(max(0.0, until - time.monotonic())):
            raise NotReady(f"text detector {self.checkpoint!r} is loading")
        if self._pipeline is None:
            raise CheckpointError(f"text detector {self.checkpoint!r}: cannot be loaded: {self._failure}")
        return self._pipeline


def _query(detector: Any, label: str) -> str:
    # Grounding DINO was trained on phrases in lower case that end with a full stop.
    return f"{label.lower().rstrip('.')}." if detector.model.config.model_type.endswith("grounding-dino") else label


def _named(row: dict[str, Any], label: str, photo: Photo) -> NamedObject:
    corners = np.array([row["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")], np.float32)
    return NamedObject(box_xyxy=geometry.clip_boxes(corners, photo.size_wh), score=float(row["score"]), label=label)


def _once_each(found: list[NamedObject]) -> list[NamedObject]:
    solid = [one for one in found if (one.box_xyxy[:2] < one.box_xyxy[2:]).all()]
    if not solid:
        return []
    boxes = torch.from_numpy(np.stack([one.box_xyxy for one in solid]))
    scores = torch.tensor([one.score for one in solid])
    return [solid[place] for place in geometry.nms(boxes, scores, SAME_OBJECT_IOU).tolist()]


def _first_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split("\n")[0].split())[:300]
