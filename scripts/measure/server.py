"""The backend as a child process, asked as Label Studio asks it: clicks during bulk work, memory over many requests.

Knows Label Studio's requests and the backend's address, nothing of what happens behind it. Photos come from a server
inside this process.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import requests

from backend.errors import CommandError
from scripts.console import track
from scripts.demo.demo import READY_TIMEOUT_S, is_ready, start_facings
from scripts.demo.processes import LOOPBACK, Server, free_port
from scripts.measure.engine import LanesResult, measure_lanes
from scripts.measure.timing import shelf_photos

if TYPE_CHECKING:
    from model import EngineOptions

LABEL_CONFIG = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="point" toName="image" smart="true"><Label value="click"/></KeyPointLabels>
<RectangleLabels name="prompt" toName="image" smart="true"><Label value="region"/></RectangleLabels>
<RectangleLabels name="box" toName="image" smart="false"><Label value="product"/></RectangleLabels></View>"""

NO_LABEL_STUDIO = "http://labels.invalid"  # photos come from elsewhere
SAMPLE_EVERY = 100
SETTLED_AFTER = 200  # requests until caches and pools are full
CLIENTS = 4
REQUEST_TIMEOUT_S = 3600.0
# Caches far smaller than the run's photos, so that growth after the first requests is none of theirs.
SMALL_CACHES = {"CACHE_MB": "64", "PHOTO_CACHE_MB": "16"}
# Twenty requests of a busy team: kinds and how many of each.
MIX = {
    "keypoint": 6,
    "rectangle": 4,
    "dense": 3,
    "setup": 2,
    "health": 2,
    "bad_photo": 1,
    "no_json": 1,
    "no_box": 1,
}
ANSWERED_WITH_BOXES = {"keypoint", "rectangle", "dense"}


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Resident memory of the server's processes together, sampled along the way.

    curve: (requests answered, MiB). unexpected: answers that were not what their request deserves, by kind and status.
    """

    curve: Sequence[tuple[int, float]]
    unexpected: Mapping[str, int]

    @property
    def growth(self) -> float:
        """Last sample over the first one with full caches; 1 is flat."""
        settled = next(mib for requests_done, mib in self.curve if requests_done >= SETTLED_AFTER)
        return self.curve[-1][1] / settled


class Backend:
    """Label Studio's side of the wire."""

    def __init__(self, server: Server, address: str, photos_address: str) -> None:
        self.server = server
        self.address = address
        self.photos_address = photos_address

    def task(self, name: str) -> dict[str, Any]:
        """A task whose photo is `name` of the photo server."""
        return {"id": zlib.crc32(name.encode()), "data": {"image": f"{self.photos_address}/{name}"}}

    def predict(self, names: Sequence[str], region: Mapping[str, Any] | None = None) -> requests.Response:
        """`/predict` for some photos; with a region, as an interactive prompt."""
        body = {
            "tasks": [self.task(name) for name in names],
            "project": "1.1",
            "label_config": LABEL_CONFIG,
            "params": {"login": None, "password": None, "context": None if region is None else {"result": [region]}},
        }
        return self.post("/predict", json=body)

    def setup(self, label_config: str) -> requests.Response:
        """`/setup`, as on connecting and on every opening of a task."""
        body = {"project": "1.1", "schema": label_config, "hostname": NO_LABEL_STUDIO, "access_token": "token"}
        return self.post("/setup", json=body)

    def post(self, path: str, **content: Any) -> requests.Response:
        return requests.post(self.address + path, timeout=REQUEST_TIMEOUT_S, **content)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.address + path, timeout=REQUEST_TIMEOUT_S)

    def resident_mib(self) -> float:
        """Of the server and all its workers."""
        parent = psutil.Process(self.server.pid)
        family = [parent, *parent.children(recursive=True)]
        return float(sum(process.memory_info().rss for process in family)) / 2**20


def keypoint(x: float, y: float) -> dict[str, Any]:
    """A click, at percent of the photo."""
    value = {"x": x, "y": y, "width": 0.2, "labels": ["click"], "keypointlabels": ["click"]}
    return {"type": "keypointlabels", "from_name": "point", "to_name": "image", "is_positive": True, "value": value}


def rectangle(x: float, y: float) -> dict[str, Any]:
    """A rough rectangle, at percent of the photo."""
    value = {"x": x, "y": y, "width": 6, "height": 12, "rotation": 0, "rectanglelabels": ["region"]}
    return {"type": "rectanglelabels", "from_name": "prompt", "to_name": "image", "value": value}


@contextmanager
def photo_server(megapixels: float) -> Iterator[str]:
    """Address of a server with endless different shelf photos, `/0.jpg`, `/1.jpg` …, and a `/damaged.jpg`."""
    import cv2

    base = next(shelf_photos(megapixels, seed=4)).pixels[..., ::-1]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = Path(self.path).stem
            content = b"not a photo"
            if name != "damaged":
                shift = divmod(int(name), base.shape[1])
                content = cv2.imencode(".jpg", np.roll(base, shift, axis=(0, 1)))[1].tobytes()
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """No line on standard error for each photo."""

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="photos", daemon=True)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running_backend(
    options: EngineOptions, *, megapixels: float, settings: Mapping[str, str] | None = None
) -> Iterator[Backend]:
    """`facings serve` in a process of its own, ready to predict, and photos for it."""
    environ = {
        "CHECKPOINT": options.checkpoint,
        "CHECKPOINT_CONFIG": options.checkpoint_config or "",
        "DEVICE": options.device,
        "DEADLINE_S": "3600",
        "BASIC_AUTH_USER": "",
        "BASIC_AUTH_PASS": "",
        **(settings or {}),
    }
    port = free_port()
    address = f"http://{LOOPBACK}:{port}"
    with (
        tempfile.TemporaryDirectory() as folder,
        photo_server(megapixels) as photos_address,
        start_facings(environ, port=port, log=Path(folder) / "facings.log") as server,
    ):
        server.wait_until(lambda: is_ready(address), timeout_s=READY_TIMEOUT_S, what="ready to predict")
        yield Backend(server, address, photos_address)


def measure_http_lanes(options: EngineOptions, *, photos: int) -> LanesResult:
    """`measure_lanes` through HTTP: keypoints on one known photo while one request asks for `photos` others."""
    with running_backend(options, megapixels=2) as backend:
        _boxes_of(backend.setup(LABEL_CONFIG), "setup")
        _boxes_of(backend.predict(["0.jpg"]), "dense")
        generator = np.random.default_rng(0)

        def click() -> None:
            x, y = generator.uniform(10, 90, 2)
            _boxes_of(backend.predict(["0.jpg"], keypoint(x, y)), "keypoint")

        def bulk() -> None:
            items = _boxes_of(backend.predict([f"{i}.jpg" for i in range(1, photos + 1)]), "dense")
            if sum("result" in item for item in items) < photos:
                raise CommandError(f"the backend: expected boxes of {photos} photos, got fewer")

        return measure_lanes(click, bulk, name=f"{photos} photos")


def _boxes_of(response: requests.Response, kind: str) -> list[dict[str, Any]]:
    if not response.ok:
        raise CommandError(f"the backend: expected status 200 for {kind}, got {response.status_code} {response.reason}")
    results: list[dict[str, Any]] = response.json().get("results", [])
    return results


def measure_memory(options: EngineOptions, *, count: int) -> MemoryResult:
    """`count` requests of mixed kinds by a few clients at once, the memory sampled every hundred."""
    curve: list[tuple[int, float]] = []
    unexpected: Counter[str] = Counter()
    kinds = itertools.cycle(_mixed_kinds())
    with (
        running_backend(options, megapixels=0.5, settings=SMALL_CACHES) as backend,
        ThreadPoolExecutor(CLIENTS, thread_name_prefix="client") as clients,
    ):
        curve.append((0, backend.resident_mib()))
        starts = range(0, count, SAMPLE_EVERY)
        for start in track(starts, total=len(starts), label=f"requests, by {SAMPLE_EVERY}"):
            numbers = range(start, min(start + SAMPLE_EVERY, count))
            chunk = [(kind, number) for number, kind in zip(numbers, kinds, strict=False)]
            answers = clients.map(lambda one: _ask(backend, *one), chunk)
            unexpected.update(answer for answer in answers if answer is not None)
            backend.server.require_running()
            curve.append((numbers.stop, backend.resident_mib()))
    return MemoryResult(curve=curve, unexpected=dict(unexpected))


def _mixed_kinds() -> list[str]:
    """One round of MIX, its kinds well shuffled but always the same."""
    kinds = [kind for kind, count in MIX.items() for _ in range(count)]
    return [kinds[i] for i in np.random.default_rng(0).permutation(len(kinds))]


def _ask(backend: Backend, kind: str, number: int) -> str | None:
    """Sends the request of this number; returns what is wrong with its answer, or None."""
    seen = f"{number // 10}.jpg"  # a few requests on each photo, and ever new ones
    x, y = (int(value) for value in np.random.default_rng(number).integers(10, 80, 2))
    if kind == "health":
        response = backend.get("/health")
    elif kind == "setup":
        response = backend.setup(LABEL_CONFIG)
    elif kind == "no_box":
        response = backend.setup('<View><Text name="text" value="$text"/></View>')
    elif kind == "no_json":
        response = backend.post("/predict", data=b"{")
    elif kind == "keypoint":
        response = backend.predict([seen], keypoint(x, y))
    elif kind == "rectangle":
        response = backend.predict([seen], rectangle(x, y))
    else:
        response = backend.predict(["damaged.jpg" if kind == "bad_photo" else f"{number}.jpg"])
    if kind in ANSWERED_WITH_BOXES:
        fits = response.ok and all("result" in item for item in response.json()["results"])
    elif kind in ("no_box", "no_json"):
        fits = response.status_code == 400
    else:
        fits = response.ok
    return None if fits else f"{kind} {response.status_code}"


def print_memory(result: MemoryResult) -> None:
    """The curve, a sample a line."""
    for done, mib in result.curve:
        print(f"{done:>6} requests  {mib:>7.0f} MiB")
    print(f"memory at the end is {result.growth:.3f} times that after {SETTLED_AFTER} requests")
    if result.unexpected:
        answers = ", ".join(f"{answer} ({count} times)" for answer, count in result.unexpected.items())
        print(f"unexpected answers: {answers}")
