"""HTTP and gRPC beside each other: the same photos and clicks to one server, in turn.

Knows both clients. The photo travels in every request, as an image file in base64, as an image file, or as pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backend.errors import CommandError, extra_needed
from scripts.demo.processes import LOOPBACK, free_port
from scripts.measure.server import LABEL_CONFIG, keypoint, running_backend
from scripts.measure.timing import Timing, format_timing, seconds_of, shelf_photos, timing

if TYPE_CHECKING:
    from model import EngineOptions

CLIENTS = 4
PHOTOS = 16
CLICKS = 50


@dataclass(frozen=True, kw_only=True)
class TransportResult:
    """One way in. name: with how the photo travels. click: on a photo that is known already."""

    name: str
    photos_per_s: float
    click: Timing


def measure_transports(options: EngineOptions, *, megapixels: float) -> Iterator[TransportResult]:
    """PHOTOS different photos by CLIENTS clients, then CLICKS clicks on one of them, for each way in."""
    with extra_needed("grpc", "--section transports"):
        import grpc
    from backend.transports import facings_pb2 as pb
    from backend.transports.facings_pb2_grpc import FacingsStub

    photos = [photo.pixels for photo, _ in zip(shelf_photos(megapixels, seed=4), range(3 * PHOTOS), strict=False)]
    files = [_jpeg(pixels) for pixels in photos]
    port = free_port()
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with (
        running_backend(options, megapixels=0.5, settings={"GRPC_PORT": str(port)}) as backend,
        grpc.insecure_channel(f"{LOOPBACK}:{port}", options=unlimited) as channel,
    ):
        backend.setup(LABEL_CONFIG)
        stub: Any = FacingsStub(channel)

        def http(number: int, click: bool) -> int:
            address = "data:image/jpeg;base64," + base64.b64encode(files[number]).decode("ascii")
            context = {"result": [keypoint(50, 50)]} if click else None
            body = {
                "tasks": [{"id": number, "data": {"image": address}}],
                "project": "1.1",
                "label_config": LABEL_CONFIG,
                "params": {"context": context},
            }
            answer = backend.post("/predict", json=body)
            return len(answer.json()["results"][0].get("result", ()))

        def over_grpc(click: bool, **photo: Any) -> int:
            height, width = photos[0].shape[:2]
            prompts = [pb.Prompt(points=[pb.Point(x=width / 2, y=height / 2)])] if click else ()
            return len(stub.Find(pb.Request(prompts=prompts, **photo)).scores)

        def raw(number: int, click: bool) -> int:
            height, width = photos[number].shape[:2]
            return over_grpc(click, raw=pb.Raw(height=height, width=width, rgb=photos[number].tobytes()))

        yield _measured("HTTP, base64", http, range(PHOTOS))
        yield _measured(
            "gRPC, image file", lambda n, click: over_grpc(click, encoded=files[n]), range(PHOTOS, 2 * PHOTOS)
        )
        yield _measured("gRPC, raw pixels", raw, range(2 * PHOTOS, 3 * PHOTOS))


def print_transport(result: TransportResult) -> None:
    print(f"{result.name:18} {result.photos_per_s:5.2f} photos/s   click {format_timing(result.click)}")


def _measured(name: str, ask: Callable[[int, bool], int], numbers: Sequence[int]) -> TransportResult:
    with ThreadPoolExecutor(CLIENTS, thread_name_prefix="client") as clients:
        boxes: list[int] = []
        seconds = seconds_of(lambda: boxes.extend(clients.map(lambda number: ask(number, False), numbers)))
    if not any(boxes):
        raise CommandError(f"{name}: expected boxes, got none on {len(numbers)} photos")
    clicks = [seconds_of(ask, numbers[-1], True) for _ in range(CLICKS)]
    return TransportResult(name=name, photos_per_s=len(numbers) / seconds, click=timing(clicks))


def _jpeg(pixels: Any) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    return content.getvalue()
