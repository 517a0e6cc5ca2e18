"""Fixtures of real brokers: each a process of its own on a free port, with nothing kept of it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.demo.processes import LOOPBACK, Server, free_port


def is_listening(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def start_redis(folder: Path, port: int) -> Server:
    """A Redis that keeps what it has in `folder`, also over kill -9."""
    command = shutil.which("redis-server")
    if command is None:
        pytest.skip("redis-server is not installed")
    folder.mkdir(exist_ok=True)
    options = ["--port", str(port), "--bind", LOOPBACK, "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    server = Server("redis", [command, *options], environ=os.environ, cwd=folder, log=folder / "redis.log")
    server.wait_until(lambda: is_listening(port), timeout_s=30, what="listening")
    return server


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with start_redis(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://{LOOPBACK}:{port}/0"
