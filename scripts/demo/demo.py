"""Everything at once: a Label Studio, Facings behind it, a project with shelf photos, and their boxes.

Knows how the parts fit together and where the demo keeps its files. How a Label Studio is installed and asked, how
servers are started and stopped, and where photos come from, stands in the other modules of this folder. This process
runs as long as the demo: it imports neither torch nor OpenCV.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import requests

from backend.errors import CommandError
from scripts.console import signals_as_interrupt, track
from scripts.demo import label_studio_server as label_studio
from scripts.demo.label_studio_client import Account, ApiError, Client
from scripts.demo.photos import demo_photos
from scripts.demo.processes import LOOPBACK, Server, require_free_port

ROOT = Path(__file__).parents[2]
LABEL_STUDIO_ENVIRONMENT = ROOT / ".cache" / "label-studio"
LABEL_CONFIG = ROOT / "label_config" / "shelf_boxes.xml"
SAMPLES_TITLE = "Shelf photos"
READY_TIMEOUT_S = 300.0
PHOTOS_PER_UPLOAD = 8


def demo(
    photos: Path | None = None, port: int = 9090, label_studio_port: int = 8080, data: Path = ROOT / ".demo"
) -> None:
    """Starts everything and stays until Ctrl-C, which stops everything.

    photos: folder of photos to label; None: sample shelves, rendered once. data: folder that keeps accounts, projects
    and photos between runs. Raises CommandError when a part is unavailable or stops.
    """
    data = data.resolve()
    require_free_port(label_studio_port, name="Label Studio", variable="LS_PORT")
    require_free_port(port, name="Facings", variable="PORT")
    with signals_as_interrupt(), ExitStack() as servers:
        with _step(f"Label Studio {label_studio.VERSION}: environment"):
            executable = label_studio.install(LABEL_STUDIO_ENVIRONMENT, uv=shutil.which("uv") or "uv")
        account = _account(data / "account.json")
        is_new = not (data / "label-studio").exists()
        studio = servers.enter_context(
            label_studio.start(
                executable, data / "label-studio", account, port=label_studio_port, log=data / "label-studio.log"
            )
        )
        client = Client(f"http://{LOOPBACK}:{label_studio_port}", account.token)
        facings = servers.enter_context(
            start_facings(
                {
                    "LABEL_STUDIO_URL": client.url,
                    "LABEL_STUDIO_API_KEY": account.token,
                    "STATE_DIR": str(data / "learned"),
                },
                port=port,
                log=data / "facings.log",
            )
        )
        paths = demo_photos(photos, data / "photos")
        url = f"http://{LOOPBACK}:{port}"
        try:
            with _step("Label Studio: starting" + (", a new data folder takes half a minute" if is_new else "")):
                studio.wait_until(client.is_up, timeout_s=label_studio.START_TIMEOUT_S, what="answering")
            with _step("Facings: loading its checkpoint"):
                facings.wait_until(lambda: is_ready(url), timeout_s=READY_TIMEOUT_S, what="ready to predict")
            project = _project(client, SAMPLES_TITLE if photos is None else f"Shelf photos of {photos.resolve().name}")
            _upload(client, project, paths)
            _connect(client, project, url)
            left = _preannotate(client, project)
        except ApiError as error:
            raise CommandError(str(error)) from error
        print(_welcome(client.url, project, account, url, left, facings.log), flush=True)
        try:
            while True:
                studio.require_running()
                facings.require_running()
                time.sleep(1)
        except KeyboardInterrupt:
            print("\nstopping", file=sys.stderr)


def start_facings(settings: Mapping[str, str], *, port: int, log: Path) -> Server:
    """Starts the backend on the loopback address, with these settings over those of the environment.

    Settings of the environment that belong to another Label Studio do not count.
    """
    elsewhere = ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "STATE_DIR", "BASIC_AUTH_USER", "BASIC_AUTH_PASS")
    environ = {name: value for name, value in os.environ.items() if name not in elsewhere}
    environ |= {"HOST": LOOPBACK, "PORT": str(port), **settings}
    return Server("Facings", [sys.executable, "-m", "scripts.cli", "serve"], environ=environ, cwd=ROOT, log=log)


def is_ready(url: str) -> bool:
    """Whether the backend at this address can predict now. Raises CommandError, with its reason, if it never will."""
    try:
        answer = requests.get(f"{url}/health", timeout=5)
    except (requests.ConnectionError, requests.Timeout):
        return False
    if not answer.ok:
        raise CommandError(f"Facings: {answer.json()['error']}")
    return bool(answer.json()["state"] == "ready")


def _account(path: Path) -> Account:
    """The demo's account, made at the first run."""
    if path.exists():
        return Account(**json.loads(path.read_text()))
    account = Account.new("annotator@example.com")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(account)))
    return account


def _project(client: Client, title: str) -> int:
    project = client.find_project(title)
    return client.create_project(title, LABEL_CONFIG.read_text()) if project is None else project


def _upload(client: Client, project: int, paths: Mapping[str, Path]) -> None:
    """Uploads what the project does not have yet. Label Studio keeps a name behind eight hex digits and a dash."""
    known = {(task["file_upload"] or "")[9:] for task in client.tasks(project)}
    new = [(name, path) for name, path in paths.items() if name not in known]
    if not new:
        return
    batches = [dict(new[i : i + PHOTOS_PER_UPLOAD]) for i in range(0, len(new), PHOTOS_PER_UPLOAD)]
    for batch in track(batches, total=len(batches), label="Uploading photos"):
        client.upload(project, batch)


def _connect(client: Client, project: int, url: str) -> None:
    with _step("Label Studio: connecting Facings"):
        connected = client.backends(project)
        if not connected:
            client.connect_backend(project, url)
        elif connected[0]["url"] != url:
            client.move_backend(connected[0]["id"], project, url)


def _preannotate(client: Client, project: int) -> int:
    """Boxes for all tasks without any; the number of tasks that still have none."""
    bare = _tasks_without_prediction(client, project)
    if not bare:
        return 0
    for task in track(bare, total=len(bare), label="Pre-annotating"):
        client.retrieve_predictions(project, [task])
    return len(_tasks_without_prediction(client, project))


def _tasks_without_prediction(client: Client, project: int) -> list[int]:
    return [task["id"] for task in client.tasks(project) if not task["predictions"]]


def _welcome(studio_url: str, project: int, account: Account, url: str, left: int, log: Path) -> str:
    lines = [
        "",
        f"  Label Studio  {studio_url}/projects/{project}/data",
        f"  login         {account.email}",
        f"  password      {account.password}",
        f"  Facings       {url}, what it learns: {url}/projects/{project}",
        "",
        "Ctrl-C stops both.",
    ]
    if left:
        lines.insert(-1, f"{left} photos got no boxes; the reasons are in {log}.")
    return "\n".join(lines)


@contextmanager
def _step(text: str) -> Iterator[None]:
    """Shows on standard error that something is going on, then how long it took."""
    started = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(text):
            yield
    else:
        print(text, file=sys.stderr, flush=True)
        yield
    print(f"{text}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
