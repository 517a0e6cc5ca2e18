"""The service of `facings.proto` over gRPC, with health checks and reflection.

Knows gRPC and the messages of `facings.proto`, from which `make setup` writes facings_pb2.py and facings_pb2_grpc.py.
"""

from __future__ import annotations

import base64
import binascii
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import CommandError, EngineDeadline, FacingsError, PromptError, RequestError, extra_needed
from backend.service import Service
from backend.settings import MIB, Settings
from backend.transports.credentials import check_credentials
from backend.transports.messages import MAX_POINTS, MAX_PROMPTS, FoundBox, PhotoAnswer, PhotoRequest, answer, png
from model import Lane, Photo, Prompt

with extra_needed("grpc", "--grpc"):
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

try:
    from backend.transports import facings_pb2, facings_pb2_grpc
except ImportError as error:
    raise CommandError(f"--grpc: expected facings_pb2.py, which make setup writes, got none ({error})") from error

READ_AHEAD = 2  # photos of a stream that are read while the engine has another
GRACE_S = 10.0
CANCELLED_WITHIN_S = 1.0  # how often a stream looks whether its client is still there
# The status of an error of each kind, see backend.errors.
STATUSES = {
    "internal": grpc.StatusCode.INTERNAL,
    "settings": grpc.StatusCode.INTERNAL,
    "auth": grpc.StatusCode.UNAUTHENTICATED,
    "request": grpc.StatusCode.INVALID_ARGUMENT,
    "label_config": grpc.StatusCode.INVALID_ARGUMENT,
    "prompt": grpc.StatusCode.INVALID_ARGUMENT,
    "photo": grpc.StatusCode.INVALID_ARGUMENT,
    "photo_unreachable": grpc.StatusCode.NOT_FOUND,
    "photo_forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "photo_too_large": grpc.StatusCode.INVALID_ARGUMENT,
    "photo_decode": grpc.StatusCode.INVALID_ARGUMENT,
    "engine": grpc.StatusCode.INTERNAL,
    "not_ready": grpc.StatusCode.UNAVAILABLE,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Server:
    """A running server. Raises CommandError when its port or its TLS files cannot be used."""

    def __init__(self, service: Service, settings: Settings) -> None:
        limit = settings.max_request_mb * MIB
        options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.server(ThreadPoolExecutor(settings.threads, thread_name_prefix="grpc"), options=options)
        facings_pb2_grpc.add_FacingsServicer_to_server(_Facings(service, settings), self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        name = facings_pb2.DESCRIPTOR.services_by_name["Facings"].full_name
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._names = ("", name)
        self.port = self._listen(settings)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.start()
        threading.Thread(target=self._watch, args=(service,), name="grpc-health", daemon=True).start()

    def close(self) -> None:
        """Finishes calls in progress, for a few seconds at most."""
        self._health.enter_graceful_shutdown()
        self._server.stop(GRACE_S).wait()

    def _listen(self, settings: Settings) -> int:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port or 0}"
        try:
            if settings.grpc_tls_cert is None or settings.grpc_tls_key is None:
                return int(self._server.add_insecure_port(address))
            pair = Path(settings.grpc_tls_key).read_bytes(), Path(settings.grpc_tls_cert).read_bytes()
            return int(self._server.add_secure_port(address, grpc.ssl_server_credentials([pair])))
        except (RuntimeError, OSError, ValueError) as error:
            raise CommandError(f"gRPC on {address}: {' '.join(str(error).split())}") from error

    def _watch(self, service: Service) -> None:
        try:
            service.engine.wait_ready()
        except Exception:  # its reason is in the log, and in every answer
            return
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _set_health(self, status: Any) -> None:
        for name in self._names:
            self._health.set(name, status)


class _Facings(facings_pb2_grpc.FacingsServicer):  # type: ignore[misc]  # generated, without types
    def __init__(self, service: Service, settings: Settings) -> None:
        self._service, self._settings = service, settings

    def Find(self, request: Any, context: grpc.ServicerContext) -> Any:
        began = time.monotonic()
        try:
            self._check_credentials(context)
            found = self._answer(request, "interactive", self._deadline(context))
        except Exception as error:
            reason = self._service.failed(error)
            self._service.metrics.count_request("grpc/Find", 500, time.monotonic() - began)
            self._abort(context, reason)
        self._service.metrics.count_request("grpc/Find", 200, time.monotonic() - began)
        return _to_message(request.id, found)

    def FindMany(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            self._check_credentials(context)
        except FacingsError as error:
            self._abort(context, self._service.failed(error))
        waiting: queue.Queue[Future[Any] | None] = queue.Queue(READ_AHEAD)

        def put(future: Future[Any] | None) -> None:
            while context.is_active():
                with suppress(queue.Full):
                    waiting.put(future, timeout=CANCELLED_WITHIN_S)
                    return

        def read() -> None:
            # A client that has gone ends the iteration with an exception that has no type of its own.
            with suppress(Exception):
                for request in requests:
                    put(pool.submit(self._answer_or_error, request, context))
            put(None)

        with ThreadPoolExecutor(1 + READ_AHEAD, thread_name_prefix="grpc-stream") as pool:
            pool.submit(read)  # apart from the answers, so that a client may wait for one before it asks for the next
            while context.is_active():
                with suppress(queue.Empty):
                    future = waiting.get(timeout=CANCELLED_WITHIN_S)
                    if future is None:
                        return
                    yield future.result()

    def _answer_or_error(self, request: Any, context: grpc.ServicerContext) -> Any:
        began = time.monotonic()
        try:
            message = _to_message(request.id, self._answer(request, "bulk", self._deadline(context)))
            status = 200
        except Exception as error:
            reason = self._service.failed(error)
            told = facings_pb2.Error(kind=reason.kind, message=str(reason), retryable=reason.retryable)
            message, status = facings_pb2.Answer(id=request.id, error=told), 500
        self._service.metrics.count_request("grpc/FindMany", status, time.monotonic() - began)
        return message

    def _answer(self, request: Any, lane: Lane, deadline: float) -> PhotoAnswer:
        if deadline <= time.monotonic():
            raise EngineDeadline("the deadline passed before this request's turn")
        return answer(self._service, _to_request(request, self._settings), lane=lane, deadline=deadline)

    def _deadline(self, context: grpc.ServicerContext) -> float:
        remaining_s = context.time_remaining()  # of the whole call; None without a deadline
        limit_s = self._settings.deadline_s
        return time.monotonic() + (limit_s if remaining_s is None else min(limit_s, remaining_s))

    def _check_credentials(self, context: grpc.ServicerContext) -> None:
        given = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        user = password = None
        kind, _, encoded = given.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                user, _, password = base64.b64decode(encoded).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                user = password = None
        check_credentials(self._settings, user, password)

    @staticmethod
    def _abort(context: grpc.ServicerContext, reason: FacingsError) -> None:
        context.set_trailing_metadata(
            (("facings-kind", reason.kind), ("facings-retryable", "true" if reason.retryable else "false"))
        )
        context.abort(STATUSES[reason.kind], str(reason))


def _to_request(request: Any, settings: Settings) -> PhotoRequest:
    """Raises RequestError, PromptError."""
    kind = request.WhichOneof("photo")
    if kind is None:
        raise RequestError("photo: expected encoded, raw or url, got none of them")
    threshold = request.score_threshold if request.HasField("score_threshold") else None
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(f"score_threshold: expected 0 to 1, got {threshold:g}")
    if len(request.prompts) > MAX_PROMPTS:
        raise PromptError(f"prompts: expected at most {MAX_PROMPTS}, got {len(request.prompts)}")
    return PhotoRequest(
        photo=_raw_photo(request.raw, settings) if kind == "raw" else getattr(request, kind),
        prompts=tuple(_to_prompt(prompt, f"prompts[{place}]") for place, prompt in enumerate(request.prompts)),
        want_masks=request.masks,
        score_threshold=threshold,
    )


def _raw_photo(raw: Any, settings: Settings) -> Photo:
    expected = raw.height * raw.width * 3
    if not expected or len(raw.rgb) != expected:
        raise RequestError(
            f"raw: expected {raw.height} x {raw.width} pixels of three bytes, {expected:,} in all, got {len(raw.rgb):,}"
        )
    if expected // 3 > settings.max_photo_pixels:
        raise RequestError(f"raw: expected at most {settings.max_photo_pixels:,} pixels, got {expected // 3:,}")
    return Photo(pixels=np.frombuffer(raw.rgb, np.uint8).reshape(raw.height, raw.width, 3))


def _to_prompt(prompt: Any, where: str) -> Prompt:
    if len(prompt.points) > MAX_POINTS:
        raise PromptError(f"{where}.points: expected at most {MAX_POINTS}, got {len(prompt.points)}")
    box = prompt.box
    try:
        return Prompt(
            points_xy=np.array([[point.x, point.y] for point in prompt.points], np.float32).reshape(-1, 2),
            is_foreground=np.array([not point.is_background for point in prompt.points], np.bool_),
            box_xyxy=np.array([box.x0, box.y0, box.x1, box.y1], np.float32) if prompt.HasField("box") else None,
        )
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from error


def _to_message(request_id: str, found: PhotoAnswer) -> Any:
    message = facings_pb2.Answer(
        id=request_id,
        width=found.size_wh[0],
        height=found.size_wh[1],
        model_version=found.model_version,
        boxes=[value for box in found.boxes for value in box.box_xyxy],
        scores=[box.score for box in found.boxes],
        prompts=[box.prompt for box in found.boxes if box.prompt is not None],
    )
    if any(box.mask is not None for box in found.boxes):
        message.masks.extend(_to_mask(box) for box in found.boxes)
    return message


def _to_mask(box: FoundBox) -> Any:
    if box.mask is None:
        return facings_pb2.Mask()
    return facings_pb2.Mask(left=box.mask.left, top=box.mask.top, png=png(box.mask.bitmap))
