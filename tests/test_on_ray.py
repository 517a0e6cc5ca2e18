"""A project's photos on Ray: by two local actors, one of which is killed, and on a cluster of two nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Studio
from PIL import Image

from backend.bulk import on_ray
from backend.bulk.choice import UP_TO_DATE, Wanted
from backend.bulk.on_ray import Assignment, Cluster, preannotate_on_ray
from backend.bulk.pipeline import Tally
from backend.bulk.report import Report
from backend.errors import CommandError
from backend.label_studio.project import Project
from backend.settings import Settings
from model import version_of
from model.renderer.shelves import render_shelf
from scripts.console import format_progress
from scripts.demo.demo import LABEL_CONFIG, ROOT

ray = pytest.importorskip("ray", reason="needs the extra ray")

TASKS = 120
ACTOR = "RayWorker"
OBJECT_STORE_BYTES = 80 << 20
Nodes = list[dict[str, float]]


def nodes_of(*sizes: tuple[int, int]) -> Nodes:
    """Nodes with so many processors and GPUs as Ray describes them: it leaves out what there is none of."""
    return [
        {"memory": 1e9} | {name: float(n) for name, n in zip(("CPU", "GPU"), size, strict=True) if n} for size in sizes
    ]


@pytest.mark.parametrize(
    ("nodes", "asked", "device", "plan"),
    [
        (nodes_of((8, 0)), {}, "auto", (1, 8, 0)),
        (nodes_of((8, 0), (4, 0)), {}, "auto", (1, 8, 0)),
        (nodes_of((8, 0), (4, 0)), {"actors": 2}, "auto", (2, 4, 0)),
        (nodes_of((8, 0), (3, 0)), {"actors": 3}, "auto", (3, 3, 0)),
        (nodes_of((16, 1)), {}, "auto", (1, 16, 1)),
        (nodes_of((16, 1)), {}, "cpu", (1, 16, 0)),
        (nodes_of((16, 1)), {"gpus": 0}, "auto", (1, 16, 0)),
        (nodes_of((32, 0), (16, 1), (16, 1)), {}, "auto", (2, 16, 1)),
        (nodes_of((32, 2), (16, 1)), {}, "cuda", (3, 16, 1)),
        (nodes_of((32, 2), (16, 1)), {"gpus": 2}, "auto", (1, 32, 2)),
        (nodes_of((16, 1), (16, 1)), {"gpus": 0.5}, "auto", (4, 8, 0.5)),
        (nodes_of((16, 2)), {"gpus": 0.6}, "auto", (2, 8, 0.6)),
        (nodes_of((16, 1)), {"gpus": 0.2}, "auto", (5, 3, 0.2)),
        (nodes_of((0, 0), (4, 0)), {}, "auto", (1, 4, 0)),
    ],
)
def test_every_actor_gets_as_many_processors_of_one_node_as_leave_room_for_the_others(
    nodes: Nodes, asked: dict[str, Any], device: str, plan: tuple[int, int, float]
) -> None:
    found = on_ray.plan_actors(nodes, Cluster(address="", **asked), device=device)
    assert (found.actors, found.cpus, found.gpus) == plan


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        ([], {}, r"expected nodes that hold 1 actors of 1 CPUs and 0 GPUs at least, found space for 0: no nodes"),
        (
            nodes_of((8, 0)),
            {"gpus": 1},
            r"1 actors of 1 CPUs and 1 GPUs at least, found space for 0: 1 with 8 CPUs and 0",
        ),
        (nodes_of((8, 1), (8, 1)), {"gpus": 2}, r"of 1 CPUs and 2 GPUs .* found space for 0: 2 with 8 CPUs and 1 GPUs"),
        (nodes_of((0, 1), (8, 0)), {}, r"space for 0: 1 with 0 CPUs and 1 GPUs; 1 with 8 CPUs and 0 GPUs"),
        (nodes_of((2, 0), (1, 0)), {"actors": 4}, r"hold 4 actors .* found space for 3"),
        (nodes_of((16, 2)), {"gpus": 1.5}, r"--gpus: expected a fraction below one, or a whole number, got 1.5"),
    ],
)
def test_what_no_node_can_hold_is_refused(nodes: Nodes, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        on_ray.plan_actors(nodes, Cluster(address="", **asked), device="auto")


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray's actors below the command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(ACTOR in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def test_an_actor_is_killed_and_every_task_has_one_prediction(studio: Studio, tmp_path: Path) -> None:
    client = studio.client
    Image.fromarray(render_shelf(2, (320, 240)).photo_rgb).save(tmp_path / "shelf.jpg")
    source = client.create_project("photo", LABEL_CONFIG.read_text())
    (photo,) = client.upload(source, {"shelf.jpg": tmp_path / "shelf.jpg"})
    number = client.create_project("ray", LABEL_CONFIG.read_text())
    tasks = client.import_tasks(number, [client.task(photo)["data"]] * TASKS)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "scripts.cli", "project", "preannotate", str(number), "--url", studio.url]
    command += ["--ray", "local", "--actors", "2", "--checkpoint", "facings-nano", "--device", "cpu"]
    environ = {**os.environ, "LABEL_STUDIO_API_KEY": studio.account.token}

    with subprocess.Popen(
        [*command, "--report", str(report)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            give_up = time.monotonic() + 400
            while not (stored := client.project(number)["total_predictions_number"]):
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                assert time.monotonic() < give_up
                time.sleep(0.1)
            actors = actors_of(process)
            actors[0].send_signal(signal.SIGKILL)
            printed, _ = process.communicate(timeout=400)
        finally:
            process.kill()

    assert process.returncode == 0, printed
    assert len(actors) == 2
    assert stored < TASKS
    held = {task["id"]: len(task["predictions"]) for task in client.tasks(number)}
    assert held == dict.fromkeys(tasks, 1)
    counts = json.loads(report.read_text())
    assert counts["photos"] + sum(counts["skipped"].values()) == TASKS


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A Ray cluster of two nodes with one processor each."""
    from ray.cluster_utils import Cluster as Nodes

    size = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    nodes = Nodes(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        nodes.add_node(**size)
        yield Cluster(address=nodes.address)
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of a shelf."""
    path = tmp_path_factory.mktemp("shelf") / "shelf.jpg"
    Image.fromarray(render_shelf(2, (640, 480)).photo_rgb).save(path)
    return path


@contextmanager
def served_together(photo: Path, count: int) -> Iterator[str]:
    """Where a photo is, under any name, that is sent only when so many are asked for at the same time."""
    together = threading.Barrier(count)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                together.wait(timeout=15)
            except threading.BrokenBarrierError:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.end_headers()
            self.wfile.write(photo.read_bytes())

        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def settings_of(studio: Studio) -> Settings:
    return Settings(
        label_studio_url=studio.url,
        label_studio_api_key=studio.account.token,
        checkpoint="facings-nano",
        device="cpu",
    )


def assignment_of(studio: Studio, project_id: int) -> Assignment:
    return Assignment(
        project_id=project_id,
        settings=settings_of(studio),
        wanted=Wanted(),
        score_threshold=None,
        retry_budget_s=20,
    )


@pytest.fixture(scope="module")
def version(studio: Studio) -> str:
    """The version of the predictions."""
    return version_of(settings_of(studio).engine_options())


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A run by one actor on two nodes. lines: its progress; double: the task that held two of the version before."""

    report: Report
    lines: list[str]
    held: dict[int, list[int]]
    double: int
    first: int


@pytest.fixture(scope="module")
def ran(studio: Studio, two_nodes: Cluster, shelf: Path, version: str) -> Ran:
    """A run over a task done twice, and one for each chunk, whose photo comes when all chunks ask for theirs."""
    client, chunks = studio.client, on_ray.CHUNKS_AT_ONCE
    number = client.create_project("two nodes", LABEL_CONFIG.read_text())
    lines: list[str] = []

    def show(tally: Tally) -> None:
        lines.append(format_progress(tally))

    with served_together(shelf, chunks) as address:
        tasks = client.import_tasks(number, [{"image": f"{address}/{i}.jpg"} for i in range(chunks + 1)])
        with Project(studio.url, studio.account.token, number, retry_budget_s=20) as project:
            body = {"task": tasks[0], "result": [], "score": 0.0, "model_version": version}
            for _ in range(2):
                assert project.post([json.dumps(body).encode()]) == 1
            first, _ = project.predictions_of(tasks[0], version)
            report = preannotate_on_ray(two_nodes, project, assignment_of(studio, number), show=show)
    held = {task["id"]: [prediction["id"] for prediction in task["predictions"]] for task in client.tasks(number)}
    return Ran(report=report, lines=lines, held=held, double=tasks[0], first=first)


def test_an_actor_on_two_nodes_works_on_two_chunks_at_once(ran: Ran) -> None:
    assert (ran.report.photos, ran.report.failures, ran.report.stopped) == (2, [], None)
    assert [len(predictions) for predictions in ran.held.values()] == [1, 1, 1]


def test_what_a_kill_left_double_is_taken_away_and_the_first_one_stays(ran: Ran) -> None:
    assert (ran.report.skipped, ran.report.duplicates_deleted) == ({UP_TO_DATE: 1}, 1)
    assert ran.held[ran.double] == [ran.first]


def test_progress_is_shown_from_before_the_first_chunk_until_after_the_last(ran: Ran) -> None:
    assert ran.lines[0].startswith("1/3, 1 skipped, 0.00 photos/s")
    assert ran.lines[-1].startswith("3/3, 1 skipped, ")


def test_a_cluster_without_free_resources_is_reported(
    studio: Studio, two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "PLACEMENT_TIMEOUT_S", 1.0)
    with on_ray.connected(ray, two_nodes):
        others = [ray.remote(num_cpus=1)(threading.Event).remote() for _ in range(2)]
        ray.get([other.is_set.remote() for other in others])
        resources = on_ray.ActorResources(actors=1, cpus=1, gpus=0)
        actors = on_ray.start_actors(ray, resources, assignment_of(studio, 0))
        with pytest.raises(CommandError, match=r"1 CPUs and 0 GPUs free within 1 s, got 0 CPUs and 0 GPUs free"):
            on_ray.engine_version(ray, actors, resources)


def test_the_engine_is_busy_once_however_many_chunks_have_photos_in_it(
    studio: Studio, shelf: Path, version: str
) -> None:
    client = studio.client
    number = client.create_project("busy", LABEL_CONFIG.read_text())
    tasks = client.upload(number, {f"{i}.jpg": shelf for i in range(8)})
    with (
        closing(on_ray.RayWorker(assignment_of(studio, number))) as worker,
        ThreadPoolExecutor(on_ray.CHUNKS_AT_ONCE) as threads,
    ):
        worker.version()
        started = time.monotonic()
        reports = list(threads.map(lambda chunk: worker.preannotate(chunk, version), (tasks[:4], tasks[4:])))
        seconds = time.monotonic() - started

    assert [chunk.report.photos for chunk in reports] == [4, 4]
    assert 0 < sum(chunk.busy_s for chunk in reports) <= seconds


def test_an_engine_of_another_version_is_refused(studio: Studio) -> None:
    with (
        closing(on_ray.RayWorker(assignment_of(studio, 0))) as worker,
        pytest.raises(CommandError, match="expected other-1 on every machine, got facings-nano"),
    ):
        worker.preannotate([], "other-1")


@pytest.mark.parametrize(
    ("tasks", "actors", "sizes"), [(0, 2, []), (1, 2, [1]), (9, 2, [3, 2, 2, 2]), (300, 1, [100] * 3)]
)
def test_tasks_go_in_chunks_of_nearly_equal_size_for_all_actors(tasks: int, actors: int, sizes: list[int]) -> None:
    chunks = on_ray._chunks(range(tasks), actors)
    assert [len(chunk) for chunk in chunks] == sizes
    assert sorted(task for chunk in chunks for task in chunk) == list(range(tasks))
