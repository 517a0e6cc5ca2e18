"""The HTTP side: Label Studio's ML backend protocol, for several projects at once.

Knows Flask, the protocol and who may ask. Parses, calls the annotator and maps errors to HTTP statuses; knows no
pixels.

/health and /setup never touch the device nor wait for anything: Label Studio calls both on every page load, with limits
of 1 and 3 seconds.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache
from flask import Flask, Response, g, request

from backend.errors import LabelConfigError, RequestError
from backend.label_studio.label_config import LabelConfig, parse_label_config
from backend.label_studio.predictions import Prediction
from backend.label_studio.standing import RecentAnswers
from backend.learning.learning import Learning, learning_of
from backend.metrics import CONTENT_TYPE
from backend.photos.loader import Access
from backend.reporting import configure_logging, log_event
from backend.service import Service
from backend.settings import MIB, Settings
from backend.transports.annotator import FacingsAnnotator, annotator_class
from backend.transports.credentials import check_credentials
from backend.transports.fields import field, json_type, read_object
from backend.transports.http import json_response, read_body, refusal
from backend.transports.project_page import project_page
from model import Engine

# Setups kept. The one that was not used for the longest time goes first, and comes back with its project's next page
# load.
MAX_PROJECTS = 1000
MAX_WEBHOOK_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a project's last /setup contained."""

    label_config: str
    access: Access


class Setups:
    """The last /setup of each project, by the key that Label Studio gives the project. Bounded; thread-safe."""

    def __init__(self) -> None:
        self._setups: LRUCache[str, Setup] = LRUCache(MAX_PROJECTS)
        self._lock = threading.Lock()

    def get(self, key: str) -> Setup | None:
        """What the project's last /setup contained, or None."""
        with self._lock:
            return self._setups.get(key)

    def remember(self, key: str, setup: Setup) -> bool:
        """Keeps the project's setup. Returns whether anything in it is new."""
        with self._lock:
            is_new = self._setups.get(key) != setup
            self._setups[key] = setup
            return is_new


def create_app(settings: Settings | None = None, engine: Engine | None = None) -> Flask:
    """The WSGI app. settings: None reads the environment and starts logging; wrong ones raise SettingsError.

    engine: None makes one from the settings; its weights load in the background.
    """
    if settings is None:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
    service = Service.open(settings, engine=engine)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_request_mb * MIB
    app.extensions["facings"] = service
    learning = learning_of(settings, service)
    app.extensions["facings_learning"] = learning
    backend = _Backend(settings, service, learning)
    app.add_url_rule("/", view_func=backend.index)
    app.add_url_rule("/health", view_func=backend.health)
    app.add_url_rule("/ready", view_func=backend.ready)
    app.add_url_rule("/setup", view_func=backend.setup, methods=["POST"])
    app.add_url_rule("/predict", view_func=backend.predict, methods=["POST"])
    app.add_url_rule("/versions", view_func=backend.versions)
    app.add_url_rule("/webhook", view_func=backend.webhook, methods=["POST"])
    app.add_url_rule("/metrics", view_func=backend.metrics)
    app.add_url_rule("/projects/<int:project_id>", view_func=backend.project)
    app.before_request(backend.begin)
    app.after_request(backend.end)
    app.register_error_handler(Exception, backend.refuse)
    return app


class _Backend:
    """The views of one app."""

    def __init__(self, settings: Settings, service: Service, learning: Learning | None) -> None:
        self._settings = settings
        self._service = service
        self._learning = learning
        self._recent = RecentAnswers()
        self._annotator_class: type[FacingsAnnotator] = annotator_class(service, self._recent)
        self._setups = Setups()

    def index(self) -> Response:
        """For people who open the address in a browser."""
        engine = self._service.engine
        return json_response(
            {
                "name": "Facings, a Label Studio ML backend",
                "state": engine.state,
                "model_version": engine.version,
                "failure": engine.failure,
            }
        )

    def health(self) -> Response:
        """Up also while the weights load; down when they never will."""
        self._service.check_alive()
        engine = self._service.engine
        return json_response({"status": "UP", "model_class": self._annotator_class.__name__, "state": engine.state})

    def ready(self) -> Response:
        """Whether a photo would be answered now."""
        self._service.check_ready()
        return json_response({"status": "READY", "model_version": self._service.engine.version})

    def setup(self) -> Response:
        """Takes a project's label config, the address of its Label Studio and a token for its photos."""
        self._service.check_alive()
        body = _body()
        key = _project_key(body)
        label_config = field(body, "schema", str, "a string")
        config = self._parse_label_config(label_config)
        access = Access(
            label_studio_url=field(body, "hostname", str, "a string", optional=True) or "",
            token=field(body, "access_token", str, "a string", optional=True) or "",
        )
        is_new = self._setups.remember(key, Setup(label_config=label_config, access=access))
        engine = self._service_of(key).engine
        version = config.model_version(engine.version)
        log_event(
            logging.INFO if is_new else logging.DEBUG,
            "setup",
            project=key,
            label_studio=access.label_studio_url,
            model_version=version,
            score_threshold=engine.score_threshold,
            understood=config.describe(),
        )
        return json_response({"model_version": version})

    def predict(self) -> Response:
        """One result for each task, in order; those without boxes to give carry an error and no `result`."""
        self._service.check_alive()
        body = _body()
        tasks = field(body, "tasks", list, "a list of tasks")
        if not all(isinstance(task, dict) for task in tasks):
            raise RequestError("tasks: expected an object for each task")
        params = field(body, "params", dict, "an object", optional=True) or {}
        context = field(params, "context", dict, "an object", optional=True)
        key = _project_key(body)
        setup = self._setups.get(key)
        label_config = field(body, "label_config", str, "a string", optional=True)
        if not label_config:
            if setup is None:
                raise RequestError(f"label_config: expected the label config of project {key!r}, got none")
            label_config = setup.label_config
        self._parse_label_config(label_config)  # refused with our message, before label-studio-ml reads it

        annotator = annotator_class(self._service_of(key), self._recent)(
            project_id=key,
            label_config=label_config,
            access=setup.access if setup else None,
            deadline=g.arrived + self._settings.deadline_s,
        )
        predictions = annotator.predict(tasks, context)
        self._log_predictions(key, predictions, is_prompted=bool(context))
        # Piece by piece: encoding everything in one call would hold up every other thread, /health among them.
        results = ",".join(json.dumps(prediction, separators=(",", ":")) for prediction in predictions)
        return Response(f'{{"results":[{results}]}}\n', mimetype="application/json")

    def versions(self) -> Response:
        """The one version there is."""
        return json_response({"versions": [self._service.engine.version]})

    def webhook(self) -> Response:
        """Label Studio reports what annotators did; their saving waits for the answer, so learning happens later.

        Anybody may send it: Label Studio sends no credentials here. So nothing of it is believed but the project's id,
        and what is learned from is asked of Label Studio itself.
        """
        request.max_content_length = min(MAX_WEBHOOK_BYTES, self._settings.max_request_mb * MIB)
        body = _body()
        action = field(body, "action", str, "the name of an action")
        project = body.get("project")
        given = project.get("id") if isinstance(project, dict) else None
        project_id = given if type(given) is int and given > 0 else None  # true is an int, too
        log_event(logging.INFO, "webhook", action=action, project=project_id)
        if self._learning is not None and project_id is not None:
            self._learning.happened(action, project_id)
        return json_response({"status": "ok"})

    def project(self, project_id: int) -> Response:
        """For people: what the project's annotators correct, and what its detector learned."""
        if self._learning is None:
            raise RequestError("/projects: expected STATE_DIR to be set where this server runs, got none")
        store = self._learning.find(project_id)
        version = self._learning.service_of(store.key).engine.version
        page = project_page(store, learn_every=self._settings.learn_every, engine_version=version)
        return Response(page, content_type="text/html; charset=utf-8")

    def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.exposition(), content_type=CONTENT_TYPE)

    def begin(self) -> None:
        """Before every request, also one for no route."""
        g.arrived = time.monotonic()
        if request.endpoint != "webhook":  # Label Studio sends no credentials there
            self._require_credentials()

    def end(self, response: Response) -> Response:
        """After every request, also a refused one."""
        # Not the path: anybody may invent paths, and each would be remembered.
        route = request.url_rule.rule if request.url_rule else "unknown"
        seconds = time.monotonic() - g.arrived
        self._service.metrics.count_request(route, response.status_code, seconds)
        log_event(logging.DEBUG, "request", route=route, status=response.status_code, seconds=seconds)
        return response

    def refuse(self, error: Exception) -> Response:
        """Any error as its status and one line."""
        return refusal(error, self._service, server="an ML backend")

    def _service_of(self, key: str) -> Service:
        return self._service if self._learning is None else self._learning.service_of(key)

    def _parse_label_config(self, xml: str) -> LabelConfig:
        limit = self._settings.max_label_config_chars
        if len(xml) > limit:
            raise LabelConfigError(
                f"label config: expected at most {limit} characters, as MAX_LABEL_CONFIG_CHARS allows, got {len(xml)}"
            )
        return parse_label_config(xml)

    def _require_credentials(self) -> None:
        given = request.authorization
        user, password = (given.username, given.password) if given else (None, None)
        check_credentials(self._settings, user, password)

    def _log_predictions(self, key: str, predictions: list[Prediction], *, is_prompted: bool) -> None:
        kinds = [prediction.get("kind") for prediction in predictions]
        log_event(
            logging.INFO,
            "predict",
            project=key,
            mode="prompt" if is_prompted else "dense",
            tasks=len(predictions),
            done=kinds.count(None),
            deadline=kinds.count("deadline"),
            regions=sum(len(prediction.get("result", ())) for prediction in predictions),
            seconds=time.monotonic() - g.arrived,
        )


def _body() -> Mapping[str, Any]:
    """The request's JSON object. Its content type is ignored: people forget it when they try things with curl."""
    return read_object(read_body())


def _project_key(body: Mapping[str, Any]) -> str:
    """How Label Studio names the project: "3.1795244969", the project's id and when it was created."""
    value = body.get("project")
    if value is None or isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > 200:
        raise RequestError(f"project: expected the project's key, got {json_type(value)}")
    return str(value)
