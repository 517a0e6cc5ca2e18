"""The Redis wire format of the SAM command-line tools: a photo and a prompt in, a mask and contours out, over channels.

Knows Redis' publish and subscribe, and that format; everybody who speaks it can have Facings answer instead of
`sam_predict_redis`.

    in       {"image": base64 of a JPEG, "prompt": {"points": [{"x", "y", "label"}], "box": {"x0", "y0", "x1", "y1"}}}
    out      {"mask": base64 of a PNG of the photo's size, "contours": OPEX, "meta": {"prompt": …, …}}
    errors   {"error", "kind", "retryable", "meta": {"prompt": …}}, which the SAM tools do not have

Redis keeps nothing for a channel: what is published while nobody listens is lost. For photos that must not be lost, see
backend.transports.brokers.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.bulk.outputs import os_errors_as_command_error, write_whole
from backend.errors import CommandError, EngineNotReady, FacingsError, RequestError
from backend.reporting import log_event
from backend.service import Service
from backend.transports.brokers import server_name
from backend.transports.fields import field, read_object
from backend.transports.messages import (
    PhotoAnswer,
    PhotoRequest,
    answer,
    error_to_json,
    png,
    read_base64,
    read_prompt,
)
from backend.transports.opex import opex

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import PubSub

MAX_WAITING = 100  # requests; a publisher does not see that a listener is slow, so the next ones are refused
CONNECT_AGAIN_S = 2.0
LISTEN_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Names of the channels for requests, answers and errors."""

    requests: str = "images"
    answers: str = "predictions"
    errors: str = "errors"


def connect(url: str) -> Redis:
    """A client of the server at `redis://[:password@]host[:port][/db]`. Raises CommandError for another address."""
    import redis

    try:
        return redis.Redis.from_url(url, socket_connect_timeout=5, socket_keepalive=True, health_check_interval=30)
    except ValueError:
        raise CommandError(f"{server_name(url)!r}: expected redis://host:port/db, got another address") from None


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turns an error of the connection into a CommandError that names the server, without its password."""
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise CommandError(f"{server_name(url)}: {type(error).__name__}: {error}") from None


def serve(service: Service, url: str, channels: Channels, stop: threading.Event, *, max_bytes: int) -> int:
    """Answers requests until `stop` is set; returns how many. A server that goes away is connected to again.

    max_bytes: of a request. Raises CommandError when the server cannot be reached at the start.
    """
    import redis

    client = connect(url)
    with redis_errors(url):
        client.ping()
    waiting: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
    worker = _Worker(service, client, channels, waiting, max_bytes)
    worker.start()
    log_event(logging.INFO, "listening", server=server_name(url), channel=channels.requests)
    while not stop.is_set():
        try:
            with _subscription(client) as subscription:
                subscription.subscribe(channels.requests)
                while not stop.is_set():
                    message = subscription.get_message(timeout=LISTEN_S)
                    if message is None:
                        continue
                    try:
                        waiting.put_nowait(message["data"])
                    except queue.Full:
                        worker.refuse(
                            {}, EngineNotReady(f"expected at most {MAX_WAITING} requests that wait, got more")
                        )
        except redis.RedisError as error:
            log_event(logging.ERROR, "disconnected", server=server_name(url), reason=str(error))
            stop.wait(CONNECT_AGAIN_S)
    waiting.put(None)
    worker.join()
    return worker.answered


def _subscription(client: Redis) -> PubSub:
    return client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call, no-any-return]


def receive(url: str, out: Path, answers: str, errors: str, stop: threading.Event) -> Iterator[str]:
    """Writes each answer into the folder `out` and gives the mask's path; of an error, its text. Until `stop` is set.

    Raises CommandError when the server or the folder is unavailable.
    """
    with os_errors_as_command_error(out):
        out.mkdir(parents=True, exist_ok=True)
    with redis_errors(url), _subscription(connect(url)) as subscription:
        subscription.subscribe(answers, errors)
        number = 0
        while not stop.is_set():
            message = subscription.get_message(timeout=LISTEN_S)
            if message is None:
                continue
            content = read_object(message["data"], where="answer")
            if "error" in content:
                yield f"error: {content['error']}"
                continue
            number += 1
            path = out / f"{time.time_ns()}-{number}.png"
            write_whole(path, read_base64(field(content, "mask", str, "a PNG in base64")))
            write_whole(path.with_suffix(".json"), json.dumps(content.get("contours")) + "\n")
            yield str(path)


class _Worker(threading.Thread):
    """Answers one request after the other."""

    def __init__(
        self,
        service: Service,
        client: Redis,
        channels: Channels,
        waiting: queue.Queue[bytes | None],
        max_bytes: int,
    ) -> None:
        super().__init__(name="redis-requests")
        self.answered = 0
        self._service, self._client, self._channels = service, client, channels
        self._waiting, self._max_bytes = waiting, max_bytes

    def run(self) -> None:
        while (content := self._waiting.get()) is not None:
            prompt: dict[str, Any] = {}
            try:
                request, prompt = read_sam_request(content, max_bytes=self._max_bytes)
                found = answer(self._service, request, lane="interactive")
                self._publish(self._channels.answers, sam_answer(found, prompt))
                self.answered += 1
            except Exception as error:
                self.refuse(prompt, self._service.failed(error))

    def refuse(self, prompt: Mapping[str, Any], reason: FacingsError) -> None:
        log_event(logging.WARNING, "refused", kind=reason.kind, reason=str(reason))
        self._publish(self._channels.errors, {**error_to_json(reason), "meta": {"prompt": prompt}})

    def _publish(self, channel: str, content: Mapping[str, Any]) -> None:
        import redis

        try:
            self._client.publish(channel, json.dumps(content))
        except redis.RedisError as error:
            log_event(logging.ERROR, "answer_lost", channel=channel, reason=str(error))


def read_sam_request(content: bytes, *, max_bytes: int) -> tuple[PhotoRequest, dict[str, Any]]:
    """The request, and its prompt as it came. Raises RequestError, PromptError."""
    if len(content) > max_bytes:
        raise RequestError(f"expected at most {max_bytes:,} bytes, got {len(content):,}")
    body = read_object(content, where="request")
    prompt: dict[str, Any] = field(body, "prompt", dict, "an object with points or a box")
    photo = read_base64(field(body, "image", str, "a photo in base64"))
    return PhotoRequest(photo=photo, prompts=(read_prompt(prompt),), want_masks=True), prompt


def sam_request(photo: bytes, prompt: Mapping[str, Any]) -> bytes:
    """The request as it is published."""
    return json.dumps({"image": base64.b64encode(photo).decode("ascii"), "prompt": prompt}).encode()


def sam_answer(found: PhotoAnswer, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The answer in the tools' words. The mask is that of all objects together; each has a contour of its own."""
    canvas = np.zeros((found.size_wh[1], found.size_wh[0]), np.bool_)
    for box in found.boxes:
        if box.mask is not None:
            canvas |= box.mask.in_photo(found.size_wh)
    segmenter = {"type": "facings", "model_type": found.model_version}
    return {
        "mask": base64.b64encode(png(canvas)).decode("ascii"),
        "contours": opex(found, photo_id="", label="object", meta={}),
        "meta": {"segmenter": segmenter, "prompt": prompt},
    }
