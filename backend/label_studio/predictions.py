"""A task's photos and a task's prediction, as Label Studio writes them down.

Knows the JSON of tasks and predictions. Knows neither HTTP nor the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from backend.errors import RequestError
from backend.label_studio.label_config import ImageControls
from backend.label_studio.regions import Region

Prediction = dict[str, Any]

# A step into a nested key: the b of "a.b", the 0 of "a[0]".
_STEP = re.compile(r"\[([^\]]*)\]|([^.\[\]]+)")


def photo_address(data: Any, image: ImageControls) -> Any:
    """What stands in a task's data where the label config expects the photo. Raises RequestError where nothing does.

    As Label Studio's editor finds it (`get` of es-toolkit): under the whole key if the data has it, else step by step,
    "a.b[1].c" in objects and lists.
    """
    if isinstance(data, Mapping) and image.image_key in data:
        return data[image.image_key]
    found = data
    for step in _steps(image.image_key):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            keys = sorted(map(str, data)) if isinstance(data, Mapping) else []
            raise RequestError(f"task data: expected the key {image.image_key!r} of the label config, got {keys!r}")
    return found


def task_data(image: ImageControls, address: str) -> dict[str, Any]:
    """The least data of a task whose photo stands where the label config expects it, as Label Studio imports it."""
    value: Any = address
    for step in reversed(_steps(image.image_key)):
        value = [*[None] * int(step), value] if step.isdecimal() else {step: value}
    return value if isinstance(value, dict) else {image.image_key: address}


def prediction_of(regions: Sequence[Region], model_version: str) -> Prediction:
    """The prediction that holds these regions. Its score is their mean, 0 without any."""
    score = fmean(region["score"] for region in regions) if regions else 0.0
    return {"result": list(regions), "score": round(score, 4), "model_version": model_version}


def _steps(key: str) -> list[str]:
    return [in_brackets or name for in_brackets, name in _STEP.findall(key)]
