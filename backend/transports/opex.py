"""OPEX, the exchange format for predictions of objects (github.com/WaikatoLink2020/objdet-predictions-exchange-format).

Knows answers and OPEX's JSON; no network. Coordinates are whole pixels there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.transports.messages import FoundBox, PhotoAnswer
from model.masks import outline_of


def opex(answer: PhotoAnswer, *, photo_id: str, label: str, meta: Mapping[str, str]) -> dict[str, Any]:
    """The answer in OPEX. photo_id: names the photo. meta: facts for the reader; the model's version is added.

    A box with a mask gets its outline as polygon, one without its own corners.
    """
    return {
        "id": photo_id,
        "objects": [_object(box, label) for box in answer.boxes],
        "meta": {**meta, "model_version": answer.model_version},
    }


def _object(box: FoundBox, label: str) -> dict[str, Any]:
    left, top, right, bottom = (round(value) for value in box.box_xyxy)
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    has_mask = box.mask is not None and box.mask.bitmap.any()
    points = [[round(x), round(y)] for x, y in outline_of(box.mask).tolist()] if box.mask and has_mask else corners
    return {
        "score": round(box.score, 4),
        "label": label,
        "bbox": {"left": left, "top": top, "right": right, "bottom": bottom},
        "polygon": {"points": points},
    }
