"""A worker on a message broker: photos in, boxes out, each at least once.

Knows messages and the Service; the brokers are behind backend.transports.brokers. A request is done, for the broker,
only when its answer or its error is out: a worker that dies before leaves it to another. The answer of a request that
was delivered twice has the same key, so that who stores answers by key has one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from backend.errors import CommandError, RequestError
from backend.reporting import log_event, to_client_error
from backend.service import Service
from backend.transports.brokers import Broker, BrokerError, Delivery, Topics
from backend.transports.fields import json_type, read_object
from backend.transports.messages import answer, answer_to_json, error_to_json, read_request

TAKE_S = 1.0
TRIES = 3  # of a photo that is unreachable, say
TRY_AGAIN_S = 2.0  # after the first try; twice as long after the next
CONNECT_AGAIN_S = 2.0
MAX_ATTEMPTS = 5  # deliveries of a message of which no worker has ever told the outcome: it may be what kills them
MAX_KEY_CHARS = 200
MAX_REQUEST_CHARS = 10_000  # of a request that is repeated in an error


class Store(Protocol):
    """Where answers are kept besides the broker's topic."""

    def put(self, key: str, document: dict[str, Any]) -> None:
        """Stores or replaces the answer with this key. Raises BrokerError."""
        ...


@dataclass(kw_only=True)
class Counts:
    """What a worker did so far."""

    answered: int = 0
    failed: int = 0


def work(
    service: Service,
    connect: Callable[[], Broker],
    topics: Topics,
    stop: threading.Event,
    *,
    deadline_s: float = 90.0,
    store: Store | None = None,
) -> Counts:
    """Answers requests until `stop` is set. A broker that goes away is connected to again.

    deadline_s: for one try of one photo; less than the time after which the broker takes a worker for dead. Raises
    CommandError when the broker cannot be reached at the start.
    """
    counts = Counts()
    try:
        broker = connect()
    except BrokerError as error:
        raise CommandError(str(error)) from error
    while True:
        try:
            with closing(broker):
                log_event(logging.INFO, "working", topic=topics.requests, group=topics.group)
                while not stop.is_set():
                    if delivery := broker.take(TAKE_S):
                        _handle(service, broker, topics, delivery, counts, stop, deadline_s, store)
            return counts
        except BrokerError as error:
            service.metrics.count_error("broker")
            log_event(logging.ERROR, "broker_away", reason=str(error), again_in_s=CONNECT_AGAIN_S)
        connected = None
        while connected is None:
            if stop.wait(CONNECT_AGAIN_S):
                return counts
            try:
                connected = connect()
            except BrokerError as error:
                log_event(logging.DEBUG, "broker_away", reason=str(error))
        broker = connected


def _handle(
    service: Service,
    broker: Broker,
    topics: Topics,
    delivery: Delivery,
    counts: Counts,
    stop: threading.Event,
    deadline_s: float,
    store: Store | None,
) -> None:
    """Answers one request. Raises BrokerError, and then it is delivered again."""
    key = delivery.key or hashlib.blake2b(delivery.content, digest_size=16).hexdigest()
    try:
        if delivery.attempts > MAX_ATTEMPTS:
            raise RequestError(f"was delivered {delivery.attempts} times, and no worker has told its outcome")
        body = read_object(delivery.content, where="request")
        key = _key(body) or key
        document = {"id": key, **_answer(service, body, stop, deadline_s)}
    except Exception as error:
        reason = service.failed(error)
        log_event(logging.WARNING, "request_failed", key=key, kind=reason.kind, reason=str(reason))
        broker.publish(topics.errors, key, _json({"id": key, **error_to_json(reason), **_repeated(delivery)}))
        counts.failed += 1
    else:
        if store is not None:
            store.put(key, document)
        broker.publish(topics.answers, key, _json(document))
        counts.answered += 1
    broker.done(delivery)


def _answer(service: Service, body: dict[str, Any], stop: threading.Event, deadline_s: float) -> dict[str, Any]:
    """Tries again what may help. Raises FacingsError."""
    request = read_request(body)
    tries = 0
    while True:
        try:
            return answer_to_json(answer(service, request, deadline=time.monotonic() + deadline_s))
        except Exception as error:
            reason = to_client_error(error)
            tries += 1
            if not reason.retryable or tries == TRIES or stop.wait(TRY_AGAIN_S * 2 ** (tries - 1)):
                raise reason from error


def _key(body: dict[str, Any]) -> str | None:
    """The request's own id. Raises RequestError."""
    value = body.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not 0 < len(str(value)) <= MAX_KEY_CHARS:
        raise RequestError(f"id: expected a text of at most {MAX_KEY_CHARS} characters, got {json_type(value)}")
    return str(value)


def _repeated(delivery: Delivery) -> dict[str, str]:
    """The request itself, so that it can be mended and sent again; not a large one, which holds a photo."""
    try:
        text = delivery.content.decode()
    except UnicodeDecodeError:
        return {}
    return {"request": text} if len(text) <= MAX_REQUEST_CHARS else {}


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
