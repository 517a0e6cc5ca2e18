"""Fixtures of the tests against real servers: a Label Studio, a Facings backend under gunicorn, a Chromium.

Each starts once in each process that runs tests, on a port of its own, and only when a test asks for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import browser as annotator_browser
import pytest
from omegaconf import OmegaConf
from safetensors.torch import save_file

import model
from model.checkpoints import BUNDLED_WEIGHTS, OWN_CONFIGS, Checkpoint, find_checkpoint, read_weights
from scripts.demo import label_studio_server as label_studio
from scripts.demo.demo import LABEL_STUDIO_ENVIRONMENT, ROOT, is_ready, start_facings
from scripts.demo.label_studio_client import Account, Client
from scripts.demo.processes import LOOPBACK, free_port

pytest_plugins = ["brokers", "photo_hosts"]  # the fixtures of brokers, and of hosts that serve photos

ACCOUNT = Account(
    email="annotator@example.com", password="shelves-and-boxes", token="0123456789abcdef" * 2 + "01234567"
)
MIGRATED_DATA = ROOT / ".cache" / f"label-studio-data-{label_studio.VERSION}"


@dataclass(frozen=True, kw_only=True)
class Studio:
    """A running Label Studio. client: its API as the owner of `account`."""

    url: str
    account: Account
    client: Client


@pytest.fixture(scope="session")
def servers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the servers' data and logs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def label_studio_command() -> Path:
    """The command of the Label Studio that the demo installs."""
    with _alone("installed"):
        return label_studio.install(LABEL_STUDIO_ENVIRONMENT, uv=shutil.which("uv") or "uv")


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """While the block runs, no other process of this checkout does the same."""
    MIGRATED_DATA.parent.mkdir(exist_ok=True)
    with (MIGRATED_DATA.parent / f".label-studio-{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def migrated_data(label_studio_command: Path, servers_dir: Path) -> Path:
    """A data folder of Label Studio with nothing in it but `ACCOUNT`, to copy: making one takes half a minute. One of
    the processes that run tests makes it, the others wait."""
    with _alone("migrated"):
        if not MIGRATED_DATA.exists():
            fresh = servers_dir / "migrated"
            with _running_studio(label_studio_command, fresh, servers_dir / "migrations.log"):
                pass
            partial = MIGRATED_DATA.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(fresh, partial)
            partial.rename(MIGRATED_DATA)
    return MIGRATED_DATA


@pytest.fixture(scope="session")
def studio(label_studio_command: Path, migrated_data: Path, servers_dir: Path) -> Iterator[Studio]:
    """A Label Studio without projects."""
    data = servers_dir / "label-studio"
    shutil.copytree(migrated_data, data)
    with _running_studio(label_studio_command, data, servers_dir / "label-studio.log") as running:
        yield running


@pytest.fixture(scope="session")
def personal_token(studio: Studio) -> str:
    """A personal access token of the account, which can have one at a time."""
    return Client.login(studio.url, studio.account).personal_access_token()


@contextmanager
def _running_studio(executable: Path, data: Path, log: Path) -> Iterator[Studio]:
    port = free_port()
    with label_studio.start(executable, data, ACCOUNT, port=port, log=log) as server:
        client = Client(f"http://{LOOPBACK}:{port}", ACCOUNT.token)
        server.wait_until(client.is_up, timeout_s=label_studio.START_TIMEOUT_S, what="answering")
        yield Studio(url=client.url, account=ACCOUNT, client=client)


@pytest.fixture(scope="session")
def facings(servers_dir: Path) -> Iterator[str]:
    """Address of a Facings backend with the bundled checkpoint, ready to predict."""
    with running_facings(servers_dir) as url:
        yield url


@contextmanager
def running_facings(logs: Path, **settings: str) -> Iterator[str]:
    """Address of one more backend with the bundled checkpoint and these settings, ready to predict."""
    port = free_port()
    settings = {"CHECKPOINT": "facings-nano", "DEVICE": "cpu", **settings}
    with start_facings(settings, port=port, log=logs / f"facings-{port}.log") as server:
        url = f"http://{LOOPBACK}:{port}"
        server.wait_until(lambda: is_ready(url), timeout_s=300, what="ready to predict")
        yield url


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium. Without one the test is skipped, in CI it fails."""
    found = annotator_browser.find_chromium()
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(annotator_browser.NO_BROWSER)
    return found


@pytest.fixture(scope="session")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The bundled weights without their proposal head: what an official checkpoint is like."""
    folder = tmp_path_factory.mktemp("headless")
    config = find_checkpoint("facings-nano", config=None, has_gpu=False).config
    tree = OmegaConf.load(Path(model.__file__).with_name(OWN_CONFIGS[config]))
    del tree["proposal_head"]
    OmegaConf.save(tree, folder / "headless.yaml")
    tensors = read_weights(BUNDLED_WEIGHTS)
    sam = {name.removeprefix("sam."): value.clone() for name, value in tensors.items() if name.startswith("sam.")}
    save_file(sam, folder / "headless.safetensors")
    return find_checkpoint(str(folder / "headless.safetensors"), config=str(folder / "headless.yaml"), has_gpu=False)
