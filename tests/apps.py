"""An app of the Label Studio protocol over a fake engine, and the requests that it gets."""

from __future__ import annotations

import re
from typing import Any

from fakes import FakeEngine, data_url, painted_photo
from flask import Flask
from werkzeug.test import TestResponse

from backend.settings import Settings
from backend.transports.label_studio_app import create_app

BOXES = '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/></RectangleLabels>'
POINTS = '<KeyPointLabels name="point" toName="image" smart="true"><Label value="click"/></KeyPointLabels>'
CONFIG = f'<View><Image name="image" value="$image"/>{POINTS}{BOXES}</View>'
OTHER_CONFIG = CONFIG.replace('"box"', '"crate"').replace("facing", "bottle").replace("image", "photo")

NO_BOXES = '<View><Text name="text" value="$text"/></View>'

RED, GREEN = (255, 0, 0), (0, 255, 0)
PHOTO = data_url(painted_photo({RED: (20, 20, 60, 60)}))
CLICK = {
    "type": "keypointlabels",
    "from_name": "point",
    "to_name": "image",
    "is_positive": True,
    "value": {"x": 15, "y": 30, "width": 0.3, "keypointlabels": ["click"]},
}


def new_app(engine: FakeEngine | None = None, **settings: Any) -> Flask:
    return create_app(Settings(**settings), engine or FakeEngine())  # type: ignore[arg-type]


def setup_body(**more: Any) -> dict[str, Any]:
    return {
        "project": "3.17",
        "schema": CONFIG,
        "hostname": "http://127.0.0.1:8080",
        "access_token": "0123456789abcdef",
        "extra_params": None,
        **more,
    }


def predict_body(photos: list[str], context: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "tasks": [{"id": i, "data": {"image": photo}} for i, photo in enumerate(photos)],
        "project": "3.17",
        "label_config": CONFIG,
        "params": {"login": None, "password": None, "context": context},
        **more,
    }


def predict(app: Flask, photos: list[str], context: Any = None, **more: Any) -> list[dict[str, Any]]:
    response = app.test_client().post("/predict", json=predict_body(photos, context, **more))
    assert response.status_code == 200
    results: list[dict[str, Any]] = response.json["results"]  # type: ignore[index]
    return results


def metric(app: Flask, sample: str) -> float:
    """The value of a line of /metrics; 0 where there is none."""
    text = app.test_client().get("/metrics").text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def is_one_line_of_json(response: TestResponse) -> bool:
    return response.text.count("\n") == 1 and response.text.endswith("}\n") and response.is_json
