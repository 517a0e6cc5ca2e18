"""Amazon SageMaker's contract of an inference container: /ping and /invocations on port 8080.

Knows Flask and that contract. A body is an image file, or JSON: one request, a list of them, or a list under
"instances" (see backend.transports.messages), each with an `_id` that comes back. What stands beside "instances" counts
for each of them. A request with `labels` is for objects by their names (see backend.transports.overlays). SageMaker
gives up after 60 s, so the answer is given before, with what is done.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flask import Flask, Response, g, request

from backend.errors import EngineDeadline, FacingsError, RequestError, extra_needed
from backend.metrics import CONTENT_TYPE
from backend.reporting import log_event
from backend.service import Service
from backend.settings import MIB, Settings
from backend.transports.fields import json_type, read_json
from backend.transports.http import STATUSES, json_response, read_body, refusal
from backend.transports.messages import PhotoRequest, answer, answer_to_json, error_to_json, read_request
from backend.transports.overlays import Catalogue, answer_named, read_named_request
from model import Engine
from model.text_detector import TextDetector

PORT = 8080
ANSWER_WITHIN_S = 55.0  # of SageMaker's 60
MAX_PHOTOS = 1000  # of one request
MODEL_DIR = "/opt/ml/model"  # where SageMaker unpacks model.tar.gz
WEIGHTS = (".safetensors", ".pt")


def sagemaker_settings(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with SageMaker's port and deadline, and with the weights in its model folder, where it has some and
    CHECKPOINT is not set. environ: of the container."""
    port = environ.get("SAGEMAKER_BIND_TO_PORT", "")  # where a container shares its machine with others
    deadline_s = min(settings.deadline_s, ANSWER_WITHIN_S)
    changed: dict[str, Any] = {"port": int(port) if port.isdecimal() else PORT, "deadline_s": deadline_s}
    folder = Path(environ.get("SM_MODEL_DIR", MODEL_DIR))
    weights = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS) if folder.is_dir() else []
    if weights and settings.checkpoint == Settings.checkpoint:
        changed["checkpoint"] = str(weights[0])
    return replace(settings, **changed)


def check_overlays(settings: Settings) -> None:
    """Raises SettingsError, CommandError for what overlays need and is not there: before the fork, since a worker's
    failure is a traceback."""
    if settings.catalogue is not None:
        Catalogue.read(Path(settings.catalogue))
    if settings.text_detector is not None:
        with extra_needed("text", "TEXT_DETECTOR"):
            import transformers  # noqa: F401


def create_app(settings: Settings, engine: Engine | None = None) -> Flask:
    """The WSGI app. engine: None makes one from the settings; its weights load in the background."""
    catalogue = Catalogue.read(Path(settings.catalogue)) if settings.catalogue is not None else None
    service = Service.open(settings, engine=engine)
    detector = TextDetector(settings.text_detector, device=settings.device) if settings.text_detector else None
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_request_mb * MIB
    app.extensions["facings"] = service
    views = _Views(settings, service, detector, catalogue)
    app.add_url_rule("/ping", view_func=views.ping)
    app.add_url_rule("/invocations", view_func=views.invocations, methods=["POST"])
    app.add_url_rule("/metrics", view_func=views.metrics)
    app.before_request(views.begin)
    app.after_request(views.end)
    app.register_error_handler(Exception, views.refuse)
    return app


class _Views:
    def __init__(
        self, settings: Settings, service: Service, detector: TextDetector | None, catalogue: Catalogue | None
    ) -> None:
        self._settings, self._service = settings, service
        self._detector, self._catalogue = detector, catalogue

    def ping(self) -> Response:
        """Whether a photo would be answered now; until then, SageMaker sends none."""
        self._service.check_ready()
        if self._detector is not None:
            self._detector.check_ready()
        return json_response({"status": "READY", "model_version": self._service.engine.version})

    def invocations(self) -> Response:
        deadline = g.arrived + self._settings.deadline_s
        content = read_body()
        kind = (request.mimetype or "").lower()
        if kind != "application/json":
            found = answer(self._service, PhotoRequest(photo=content), lane="interactive", deadline=deadline)
            return json_response(answer_to_json(found))
        body = read_json(content)
        if isinstance(body, dict) and "instances" not in body:
            one = self._answer(body, deadline)
            return json_response({**_with_id(body, one.content), **_processed([one])})
        listed, shared = body, {}
        if isinstance(body, dict):
            listed, shared = body["instances"], {name: value for name, value in body.items() if name != "instances"}
        if not isinstance(listed, list) or len(listed) > MAX_PHOTOS:
            raise RequestError(f"body: expected a list of at most {MAX_PHOTOS} requests, got {json_type(listed)}")
        bodies = [{**shared, **each} if isinstance(each, dict) else each for each in listed]
        answers = [self._answer_or_error(each, deadline) for each in bodies]
        predictions = [_with_id(each, found.content) for each, found in zip(listed, answers, strict=True)]
        return json_response({"predictions": predictions, **_processed(answers)})

    def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.exposition(), content_type=CONTENT_TYPE)

    def begin(self) -> None:
        g.arrived = time.monotonic()

    def end(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "unknown"
        self._service.metrics.count_request(route, response.status_code, time.monotonic() - g.arrived)
        return response

    def refuse(self, error: Exception) -> Response:
        """Any error as its status and one line."""
        return refusal(error, self._service, server="a SageMaker container")

    def _answer(self, body: Any, deadline: float) -> _Found:
        if not isinstance(body, dict):
            raise RequestError(f"expected an object with url or base64, got {json_type(body)}")
        if body.get("labels") is None:
            if any(body.get(name) is not None for name in ("categoryname", "roomName", "polygons")):
                raise RequestError("expected labels beside categoryname, roomName or polygons, got none")
            return _Found(content=answer_to_json(answer(self._service, read_request(body), deadline=deadline)))
        request = read_named_request(body, self._catalogue)
        if self._detector is None:
            raise RequestError("labels: expected TEXT_DETECTOR to be set where this server runs, got none")
        content, image = answer_named(self._service, self._detector, request, deadline=deadline)
        return _Found(content=content, image=image, is_named=True)

    def _answer_or_error(self, body: Any, deadline: float) -> _Found:
        try:
            if time.monotonic() >= deadline:
                raise EngineDeadline("the deadline passed before this photo's turn; ask for it again")
            return self._answer(body, deadline)
        except Exception as error:
            reason: FacingsError = self._service.failed(error)
            log_event(logging.WARNING, "photo_failed", kind=reason.kind, reason=str(reason))
            content = {**error_to_json(reason), "status": STATUSES[reason.kind]}
            return _Found(content=content, is_named=isinstance(body, dict) and body.get("labels") is not None)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """content: of one request's answer, as JSON. is_named: whether objects were asked for by their names. image: the
    photo with them painted over, a JPEG."""

    content: dict[str, Any]
    is_named: bool = False
    image: bytes | None = None


def _processed(answers: Sequence[_Found]) -> dict[str, Any]:
    """The painted photos, in the order of the requests, with null for those without; nothing where none was asked."""
    if not any(found.is_named for found in answers):
        return {}
    images = [None if found.image is None else base64.b64encode(found.image).decode("ascii") for found in answers]
    return {"processed_images": images}


def _with_id(body: Any, content: dict[str, Any]) -> dict[str, Any]:
    return {"_id": body["_id"], **content} if isinstance(body, dict) and "_id" in body else content
