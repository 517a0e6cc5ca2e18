"""Photos in object stores: a real S3 server (moto's), read with this process's credentials by every way in."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import boto3
import grpc
import psutil
import pytest
from apps import new_app, predict
from fakes import FakeEngine, painted_photo, png_of
from moto.server import ThreadedMotoServer
from photo_hosts import PNG, Server, body, load, png, status

from backend.errors import (
    PhotoDecodeError,
    PhotoForbidden,
    PhotoMissing,
    PhotoTooLarge,
    PhotoUnreachable,
    SettingsError,
)
from backend.photos.stores import ObjectStores
from backend.service import Service
from backend.settings import Settings
from backend.transports import facings_pb2 as pb
from backend.transports.facings_pb2_grpc import FacingsStub
from backend.transports.grpc_server import Server as GrpcServer
from backend.transports.messages import answer, read_request
from backend.transports.sagemaker import create_app
from scripts.demo.processes import LOOPBACK

MAX_BYTES = 50_000
BUCKET = "shelves"
SHELF = painted_photo({(255, 0, 0): (10, 20, 60, 80)})
ODD_NAME = "2026/ä b+%20#1?.png"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server; the environment names it and credentials for it, as in production."""
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    variables = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "5ec", "AWS_ENDPOINT_URL": url}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        contents = {"2026/a.png": PNG, ODD_NAME: PNG, "2026/empty.png": b"", "2026/large.png": bytes(MAX_BYTES + 1)}
        for name, content in {**contents, "2025/a.png": PNG, "2026/text.png": b"text"}.items():
            client.put_object(Bucket=BUCKET, Key=name, Body=content)
        yield url
    server.stop()


def read(name: str, *, prefix: str = f"s3://{BUCKET}/2026") -> bytes:
    return ObjectStores((prefix,), max_bytes=MAX_BYTES).read(f"s3://{BUCKET}/{name}", until=time.monotonic() + 20)


@pytest.mark.parametrize("name", ["2026/a.png", ODD_NAME])
def test_an_object_is_read_whole_under_exactly_its_name(s3: str, name: str) -> None:
    assert read(name) == PNG


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("2026/none.png", PhotoMissing, "expected an object there, got none"),
        ("2026/empty.png", PhotoDecodeError, "got an empty object"),
        ("2026/large.png", PhotoTooLarge, "expected at most 50,000 bytes, got more"),
        ("2026/../2025/a.png", PhotoForbidden, r"got empty parts, \. or \.\. in it"),
        ("2026//a.png", PhotoForbidden, "got empty parts"),
        ("", PhotoForbidden, "expected s3://bucket/name"),
    ],
)
def test_a_bad_object_is_one_line(s3: str, name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        read(name)


def test_credentials_that_the_store_refuses_are_named_without_the_request(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Server
) -> None:
    elsewhere.answers[f"/{BUCKET}/2026/a.png"] = partial(status, 403)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "5ec"),
        ("AWS_ENDPOINT_URL", elsewhere.url),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(PhotoForbidden, match="expected credentials that may read it, got: ") as caught:
        read("2026/a.png")
    assert "5ec" not in str(caught.value)


def test_a_store_that_does_not_answer_is_given_up_in_time(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    stores = ObjectStores(("s3://",), max_bytes=MAX_BYTES)
    with pytest.raises(PhotoUnreachable, match="expected an answer"):
        stores.read(f"s3://{BUCKET}/2026/a.png", until=time.monotonic() + 1)


def test_what_may_be_read_ends_at_a_slash() -> None:
    stores = ObjectStores(("s3://shelves/2026", "azure://photos/"), max_bytes=MAX_BYTES)
    addresses = {
        "s3://shelves/2026/a.png": True,
        "s3://shelves/2026-private/a.png": False,
        "s3://shelves/2025/a.png": False,
        "azure-blob://photos/a.png": True,
        "azure://photos/a.png": True,
        "gs://shelves/2026/a.png": False,
    }
    assert {address: stores.allows(address) for address in addresses} == addresses
    assert not ObjectStores((), max_bytes=MAX_BYTES).allows("s3://shelves/2026/a.png")


def test_label_studio_is_asked_only_for_what_may_not_be_read_directly(s3: str, label_studio: Server) -> None:
    label_studio.answers["/tasks/7/resolve/"] = partial(body, png(size_wh=(9, 9)))
    allowed: dict[str, Any] = {"url": label_studio.url, "object_stores": (f"s3://{BUCKET}/2026",)}
    assert load(f"s3://{BUCKET}/2026/a.png", **allowed).size_wh == (5, 3)
    assert label_studio.asked == []
    assert load(f"s3://{BUCKET}/2025/a.png", **allowed).size_wh == (9, 9)
    with pytest.raises(PhotoForbidden, match="a task of Label Studio, or an address that OBJECT_STORES allows"):
        load(f"s3://{BUCKET}/2025/a.png", **allowed, task_id=None)


def test_every_way_in_reads_object_stores(s3: str) -> None:
    """Those that take addresses: Label Studio's, SageMaker's, gRPC's, and the JSON that brokers carry."""
    client = boto3.client("s3", region_name="us-east-1")
    client.put_object(Bucket=BUCKET, Key="shelf.png", Body=png_of(SHELF))
    address, settings = f"s3://{BUCKET}/shelf.png", Settings(object_stores=(f"s3://{BUCKET}",))
    expected = [10, 20, 60, 80]

    (region,) = predict(new_app(FakeEngine(), object_stores=settings.object_stores), [address])[0]["result"]
    assert region["value"]["x"] == pytest.approx(100 * 10 / 200)
    with create_app(settings, FakeEngine()).test_client() as sagemaker:
        listed = [{"url": address}, {"url": f"s3://{BUCKET}/none.png"}]
        first, second = sagemaker.post("/invocations", json=listed).json["predictions"]
    assert (first["boxes"][0]["box"], second["kind"]) == (expected, "photo_unreachable")
    with Service.open(settings, engine=FakeEngine()) as service:
        found = answer(service, read_request({"url": address}))
        assert list(found.boxes[0].box_xyxy) == expected
        assert list(grpc_answer(service, settings, address).boxes[:4]) == expected


def test_a_thousand_photos_leave_the_memory_as_it_was(s3: str) -> None:
    stores, process, sizes = ObjectStores((f"s3://{BUCKET}",), max_bytes=MAX_BYTES), psutil.Process(), []
    for _ in range(4):
        for _ in range(250):
            stores.read(f"s3://{BUCKET}/2026/a.png", until=time.monotonic() + 20)
        sizes.append(process.memory_info().rss)
    # The server is in this process, and remembers each request.
    assert sizes[-1] - sizes[0] < 64 << 20


@pytest.mark.parametrize("text", ["shelves", "s3:/shelves", "http://shelves/", "s3://a b"])
def test_a_setting_of_other_addresses_stops_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="OBJECT_STORES: expected addresses that begin with s3://"):
        Settings.from_env({"OBJECT_STORES": text})


def test_the_setting_is_a_list_of_addresses() -> None:
    assert Settings.from_env({"OBJECT_STORES": "s3://a/b, gs://c"}).object_stores == ("s3://a/b", "gs://c")


def test_a_missing_extra_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SettingsError, match="OBJECT_STORES with gs://: expected the extra stores, got none"):
        ObjectStores(("gs://shelves",), max_bytes=MAX_BYTES)


def grpc_answer(service: Service, settings: Settings, address: str) -> Any:
    server = GrpcServer(service, Settings(host=LOOPBACK, object_stores=settings.object_stores))
    try:
        with grpc.insecure_channel(f"{LOOPBACK}:{server.port}") as channel:
            return FacingsStub(channel).Find(pb.Request(url=address), timeout=60)
    finally:
        server.close()
