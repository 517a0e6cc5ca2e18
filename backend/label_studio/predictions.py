"""A task's photo and a task's prediction, as Label Studio writes them down.

Knows the JSON of tasks and predictions. Knows neither HTTP nor the engine: whatever answers a task, the backend or a
command, does it with these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from backend.errors import RequestError
from backend.label_studio.label_config import ImageControls
from backend.label_studio.regions import Region

Prediction = dict[str, Any]


def photo_address(data: Any, image: ImageControls) -> Any:
    """What stands in a task's data where the label config expects the photo. Raises RequestError where nothing does."""
    if not isinstance(data, Mapping) or image.image_key not in data:
        keys = sorted(data) if isinstance(data, Mapping) else []
        raise RequestError(f"task data: expected the key {image.image_key!r} of the label config, got {keys!r}")
    return data[image.image_key]


def prediction_of(regions: Sequence[Region], model_version: str) -> Prediction:
    """The prediction that holds these regions. Its score is their mean, 0 without any."""
    score = fmean(region["score"] for region in regions) if regions else 0.0
    return {"result": list(regions), "score": round(score, 4), "model_version": model_version}
