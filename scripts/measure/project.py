"""Pre-annotating a project on a Label Studio of its own, compared with the bare engine on the same photos.

Knows how a Label Studio is started and filled. Measuring returns values; printing is apart.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from backend.bulk.choice import Wanted
from backend.bulk.jobs import preannotate_project
from backend.bulk.service import BulkService
from backend.label_studio.project import Project
from backend.photos.files import read_photo
from backend.settings import Settings
from model import Engine, EngineOptions, Sam2Engine
from scripts.console import track
from scripts.demo import label_studio_server as label_studio
from scripts.demo.demo import LABEL_CONFIG, LABEL_STUDIO_ENVIRONMENT
from scripts.demo.label_studio_client import Account, Client
from scripts.demo.processes import LOOPBACK, free_port
from scripts.measure.timing import shelf_photos

PHOTOS = 200
MEGAPIXELS = 2
MAX_PIXELS = Settings.max_photo_pixels
PHOTOS_PER_UPLOAD = 20


@dataclass(frozen=True, kw_only=True)
class ProjectResult:
    """Photos per second, of the engine alone, with photos decoded beforehand, and of the whole command.

    bare_per_s: before and after the project. engine_busy: share of the command's time in which the engine had a photo.
    label_studio_cpu: processors that Label Studio, on the same machine, kept busy meanwhile, on average.
    """

    photos: int
    boxes: int
    bare_per_s: tuple[float, float]
    project_per_s: float
    engine_busy: float
    label_studio_cpu: float

    @property
    def share(self) -> float:
        """Of the bare rate, which is reached."""
        return self.project_per_s * sum(1 / rate for rate in self.bare_per_s) / 2

    @property
    def share_apart(self) -> float:
        """The same, had Label Studio a machine of its own: the engine, kept from what it took, would go on by as much.

        Calculated, not measured; for a CPU whose cores are all busy.
        """
        return self.share / (1 - self.label_studio_cpu / (os.cpu_count() or 1))


def measure_project(options: EngineOptions, *, photos: int = PHOTOS) -> ProjectResult:
    """Half of the photos through the bare engine, all through a project, the other half through the bare engine."""
    executable = label_studio.install(LABEL_STUDIO_ENVIRONMENT, uv=shutil.which("uv") or "uv")
    account, port = Account.new("annotator@example.com"), free_port()
    # No features kept: both see every photo for the first time.
    engine = Sam2Engine(replace(options, cache_bytes=0))
    with tempfile.TemporaryDirectory() as folder:
        paths = _shelves(Path(folder), photos)
        try:
            engine.wait_ready()
            with label_studio.start(
                executable, Path(folder) / "data", account, port=port, log=Path(folder) / "label-studio.log"
            ) as server:
                client = Client(f"http://{LOOPBACK}:{port}", account.token)
                server.wait_until(client.is_up, timeout_s=label_studio.START_TIMEOUT_S, what="answering")
                number = client.create_project("benchmark", LABEL_CONFIG.read_text())
                for start in range(0, photos, PHOTOS_PER_UPLOAD):
                    client.upload(number, {path.name: path for path in paths[start : start + PHOTOS_PER_UPLOAD]})
                engine.preannotate(read_photo(paths[0], max_pixels=MAX_PIXELS))
                before = _bare_rate(engine, paths[::2])
                cpu_s = _cpu_s(server.pid)
                settings = Settings(label_studio_url=client.url, label_studio_api_key=account.token)
                service = BulkService.open(settings, engine=engine)
                with Project(client.url, account.token, number, retry_budget_s=60) as project:
                    report = preannotate_project(service, project, Wanted())
                cpu_s = _cpu_s(server.pid) - cpu_s
                after = _bare_rate(engine, paths[1::2])
        finally:
            engine.close()
    return ProjectResult(
        photos=report.photos,
        boxes=report.boxes,
        bare_per_s=(before, after),
        project_per_s=report.photos_per_s,
        engine_busy=report.engine_busy,
        label_studio_cpu=cpu_s / report.seconds,
    )


def print_project(result: ProjectResult) -> None:
    """Both rates and their ratio, in a line."""
    before, after = result.bare_per_s
    print(
        f"project of {result.photos} photos ({MEGAPIXELS} MP, {result.boxes} boxes): "
        f"{result.project_per_s:.2f} photos/s, "
        f"bare engine {before:.2f} before and {after:.2f} after: {result.share:.1%}; "
        f"engine busy for {result.engine_busy:.1%} of the time, "
        f"Label Studio for {result.label_studio_cpu:.2f} processors, without which it would be {result.share_apart:.1%}"
    )


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process and its children so far."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _bare_rate(engine: Engine, paths: list[Path]) -> float:
    seconds = 0.0
    for path in track(paths, total=len(paths), label="bare engine"):
        photo = read_photo(path, max_pixels=MAX_PIXELS)
        began = time.monotonic()
        engine.preannotate(photo)
        seconds += time.monotonic() - began
    return len(paths) / seconds


def _shelves(folder: Path, count: int) -> list[Path]:
    """As many different shelves: one, shifted."""
    import cv2
    import numpy as np

    base = next(shelf_photos(MEGAPIXELS, seed=4)).pixels[..., ::-1]
    paths = [folder / f"shelf-{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), np.roll(base, 16 * i, axis=1))
    return paths
