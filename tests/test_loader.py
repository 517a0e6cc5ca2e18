"""From the address in a task to pixels: where photos are read, what is refused, what is kept in memory."""

from __future__ import annotations

import base64
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from photo_hosts import (
    ANSWERS,
    LEGACY,
    PNG,
    Answer,
    Server,
    body,
    load,
    png,
    redirect,
    status,
)

from backend.errors import PhotoDecodeError, PhotoError, PhotoForbidden, PhotoUnreachable, SettingsError
from backend.photos import loader as loader_module
from backend.photos.loader import PhotoLoader
from backend.settings import Settings
from backend.transports.http import STATUSES
from model.types import DeadlineExceeded, Photo

# Where photos come from


def test_an_upload_is_asked_of_label_studio_with_the_token(label_studio: Server) -> None:
    photo = load("/data/upload/1/a.png", url=label_studio.url)
    assert photo.size_wh == (5, 3)
    assert (photo.pixels == (200, 30, 60)).all()
    assert label_studio.asked == [("/data/upload/1/a.png", f"Token {LEGACY}")]


def test_the_settings_address_and_key_come_before_those_of_setup(label_studio: Server, elsewhere: Server) -> None:
    load(
        "/data/upload/1/a.png",
        url=elsewhere.url,
        token="from-setup",
        label_studio_url=label_studio.url,
        label_studio_api_key="from-settings",
    )
    assert label_studio.authorizations == ["Token from-settings"]
    assert elsewhere.asked == []


def test_local_files_are_asked_of_label_studio_by_default(label_studio: Server) -> None:
    label_studio.answers["/data/local-files/"] = partial(body, PNG)
    load("/data/local-files/?d=shop/a%20b.png", url=label_studio.url)
    assert label_studio.targets == ["/data/local-files/?d=shop/a%20b.png"]


@pytest.mark.parametrize("uri", ["s3://shelves/2026/ä b.jpg", "gs://shelves/a.jpg", "azure-blob://shelves/a.jpg"])
def test_cloud_storage_is_resolved_by_label_studio_and_the_token_stays_there(
    uri: str, label_studio: Server, elsewhere: Server
) -> None:
    label_studio.answers["/tasks/7/resolve/"] = partial(redirect, f"{elsewhere.url}/a.png?X-Sig=5ec", code=303)
    load(uri, url=label_studio.url)
    (target,) = label_studio.targets
    assert base64.urlsafe_b64decode(target.removeprefix("/tasks/7/resolve/?fileuri=")).decode() == uri
    assert label_studio.authorizations == [f"Token {LEGACY}"]
    assert elsewhere.asked == [("/a.png?X-Sig=5ec", None)]


def test_cloud_storage_that_label_studio_hands_through_is_read_too(label_studio: Server) -> None:
    label_studio.answers["/tasks/7/resolve/"] = partial(body, PNG)
    assert load("s3://shelves/a.jpg", url=label_studio.url).size_wh == (5, 3)


def test_a_web_address_is_asked_without_any_token(label_studio: Server, elsewhere: Server) -> None:
    load(f"{elsewhere.url}/a.png", url=label_studio.url)
    assert elsewhere.authorizations == [None]
    assert label_studio.asked == []


def test_a_full_address_of_label_studio_gets_the_token(label_studio: Server) -> None:
    load(f"{label_studio.url}/data/upload/1/a.png", url=label_studio.url)
    assert label_studio.authorizations == [f"Token {LEGACY}"]


def test_a_data_address_is_read_as_it_is() -> None:
    content = base64.b64encode(PNG).decode()
    assert load(f"data:image/png;base64,{content}").size_wh == (5, 3)


# Local files


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    root = tmp_path / "shop"
    (root / "aisle").mkdir(parents=True)
    (root / "aisle" / "a+b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "shop-private").mkdir()
    (tmp_path / "shop-private" / "a.png").write_bytes(PNG)
    (root / "inside.png").symlink_to(root / "aisle" / "a+b.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "value",
    [
        "/data/local-files/?d=aisle/a%2Bb.png",
        "/data/local-files?d=aisle/a%2Bb.png",
        "/data/local-files/?d=/aisle/../aisle/a%2Bb.png",
        "/data/local-files/?d=inside.png",
    ],
)
def test_local_files_are_read_from_their_folder_when_it_is_known(value: str, shop: Path) -> None:
    assert load(value, local_files_root=str(shop)).size_wh == (5, 3)


def test_a_local_file_is_found_by_the_bytes_of_its_name(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert load("/data/local-files/?d=caf%E9.png", local_files_root=str(tmp_path)).size_wh == (5, 3)


@pytest.mark.parametrize(
    ("d", "error", "words"),
    [
        ("../secret.png", PhotoForbidden, "leads out of it"),
        ("%2e%2e/secret.png", PhotoForbidden, "leads out of it"),
        ("aisle/../../secret.png", PhotoForbidden, "leads out of it"),
        ("../shop-private/a.png", PhotoForbidden, "leads out of it"),
        ("outside.png", PhotoForbidden, "leads out of it"),
        ("up/secret.png", PhotoForbidden, "leads out of it"),
        ("loop.png", PhotoForbidden, "leads nowhere"),
        ("a%00.png", PhotoForbidden, "leads nowhere"),
        ("/etc/passwd", PhotoUnreachable, "No such file"),
        ("none.png", PhotoUnreachable, "No such file"),
        ("", PhotoDecodeError, "a folder or a device"),
        ("aisle", PhotoDecodeError, "a folder or a device"),
        ("pipe.png", PhotoDecodeError, "a folder or a device"),
    ],
)
def test_local_files_stay_within_their_folder(d: str, error: type[PhotoError], words: str, shop: Path) -> None:
    with pytest.raises(PhotoError, match=words) as caught:
        load(f"/data/local-files/?d={d}", local_files_root=str(shop))
    assert type(caught.value) is error
    assert str(caught.value).startswith("'/data/local-files/?d=")
    assert str(shop) not in str(caught.value)


def test_the_whole_disk_is_no_folder_of_photos() -> None:
    with pytest.raises(SettingsError, match="LOCAL_FILES_ROOT"):
        PhotoLoader(Settings(local_files_root="/"))


# Bad input: each row one kind, its status and its message


HERE = "{host}"  # replaced by the address of a server with ANSWERS, which is not Label Studio
THERE = "{label studio}"


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (None, 422, "photo: expected its address in the task's data, got None"),
        ("", 422, "photo: expected its address in the task's data, got ''"),
        ("  ", 422, "expected its address in the task's data"),
        (["/a.png"], 422, r"expected its address in the task's data, got \['/a.png'\]"),
        ({"url": "x" * 10_000}, 422, "expected its address in the task's data, got "),
        ("\ud800", 422, "expected its address in the task's data"),
        ("a.png", 403, "'a.png': expected /…, http://, https://, s3://, gs://, azure://, azure-blob:// or data:"),
        ("//evil.example/a.png", 403, "'//evil.example/a.png': expected /…"),
        ("file:///etc/passwd", 403, "'file:///etc/passwd': expected /…"),
        ("ftp://h/a.png?5ec", 403, "'ftp://h/a.png': expected /…"),
        ("javascript:alert(1)", 403, "expected /…"),
        ("data:text/plain,abc", 422, "got 3 bytes of 'text/plain' that begin with"),
        ("data:image/png;base64,!5ec", 422, "'data:image/png;base64,…': expected valid base64"),
        ("data:image/png;base64", 422, "got no comma"),
        ("data:image/png;base64,", 422, "expected an image, got 0 bytes of 'image/png'"),
        ("data:image/png;base64," + "A" * 40_000, 413, "expected at most 20,000 bytes, got 30,000"),
        ("http://me:5ec@h/a.png", 403, "'http://h/a.png': expected an address without user and password"),
        ("http://h:99999/a.png", 403, "'http://h:99999/a.png': expected a valid"),
        ("http://169.254.169.254/latest?5ec", 403, r"got 169.254.169.254 \(link-local\)"),
        ("http://[fe80::1]/a.png", 403, "link-local"),
        ("http://[fd00:ec2::254]/a.png", 403, "cloud metadata"),
        ("http://100.100.100.200/a.png", 403, "cloud metadata"),
        ("http://0/a.png", 403, "unspecified"),
        ("http://224.0.0.1/a.png", 403, "multicast"),
        ("http://no.such.host.invalid/a.png", 502, "'no.such.host.invalid' cannot be resolved"),
        ("http://127.0.0.1:1/a.png?5ec", 502, "'http://127.0.0.1:1/a.png': expected a connection .*refused"),
        (f"{HERE}/missing.png?5ec", 502, "/missing.png': expected 200 OK, got 404 Not Found"),
        (f"{HERE}/500?5ec", 502, "/500': expected 200 OK, got 500 Internal Server Error"),
        (f"{HERE}/799", 502, "/799': expected 200 OK, got 799"),
        (f"{HERE}/401", 403, "/401': expected 200 OK, got 401 Unauthorized$"),
        (f"{THERE}/401", 403, "got 401 Unauthorized; Label Studio refuses the access token: set LABEL_STUDIO_API_KEY"),
        ("/403", 403, "/403': expected 200 OK, got 403 Forbidden; Label Studio refuses the access token"),
        (f"{HERE}/nothing", 502, "/nothing': expected an answer, got: Server disconnected without sending a response"),
        (
            f"{HERE}/short",
            502,
            r"/short': expected an answer, got: peer closed connection .*received \d+ bytes, expected 1000",
        ),
        (f"{HERE}/huge", 413, "/huge': expected at most 20,000 bytes, got 1,000,000,000,000"),
        (f"{HERE}/endless", 413, "/endless': expected at most 20,000 bytes, got more"),
        (f"{HERE}/unannounced", 413, "/unannounced': expected at most 20,000 bytes, got more"),
        (f"{HERE}/empty", 422, "/empty': expected an image, got 0 bytes of 'image/png'"),
        (f"{HERE}/html?5ec", 422, "/html': expected a JPEG, .* got 30 bytes of 'text/html' that begin with"),
        (f"{HERE}/cut.png", 422, "/cut.png': expected a whole image, got one that ends early: 94% of it is missing"),
        (f"{HERE}/big.png", 413, "/big.png': expected at most 10,000 pixels, got 400 x 300"),
        (f"{HERE}/loop", 502, "/loop': expected at most 5 redirects, got more"),
        (f"{HERE}/nowhere", 502, "/nowhere': expected 200 OK, got 302 Found"),
        (f"{HERE}/to-file", 403, "/to-file': 'file:///etc/passwd': expected an http:// or https:// address"),
        (f"{HERE}/to-login", 403, "/to-login': 'http://127.0.0.1/': expected an address without user and password"),
        (f"{HERE}/to-metadata", 403, r"/to-metadata': 'http://169.254.169.254/latest/meta-data/': .*link-local"),
        (f"{HERE}/to-invalid", 403, "/to-invalid': expected a redirect to a valid address"),
        ("s3://shelves/gone.jpg?5ec", 502, "'s3://shelves/gone.jpg': 'http://127.0.0.1:.*got 404 Not Found"),
    ],
)
def test_bad_input_is_answered_by_status_and_one_line(
    value: Any, code: int, words: str, label_studio: Server, elsewhere: Server
) -> None:
    label_studio.answers |= ANSWERS
    elsewhere.answers |= ANSWERS
    if isinstance(value, str):
        value = value.replace(HERE, elsewhere.url).replace(THERE, label_studio.url)
    with pytest.raises(PhotoError, match=words) as caught:
        load(value, url=label_studio.url, max_photo_bytes=20_000, max_photo_pixels=10_000)
    assert STATUSES[caught.value.kind] == code
    message = str(caught.value)
    assert "\n" not in message
    assert "5ec" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("value", "url", "task_id", "words"),
    [
        ("/data/upload/1/a.png", "", 7, "expected to know Label Studio's address, from /setup or LABEL_STUDIO_URL"),
        ("s3://shelves/a.jpg", "", 7, "expected to know Label Studio's address"),
    ],
)
def test_the_message_names_what_is_missing_where_only_label_studio_can_serve(
    value: str, url: str, task_id: int | None, words: str
) -> None:
    with pytest.raises(PhotoUnreachable, match=words):
        load(value, url=url, task_id=task_id)


def test_without_a_token_the_message_explains_how_to_set_one(label_studio: Server) -> None:
    label_studio.answers["/401"] = partial(status, 401)
    with pytest.raises(PhotoForbidden, match="no access token is known: set LABEL_STUDIO_API_KEY"):
        load("/401", url=label_studio.url, token="")
    assert label_studio.authorizations == [None]


# Memory


def test_a_known_photo_is_not_fetched_again(label_studio: Server) -> None:
    loader = PhotoLoader(Settings())
    first = load("/data/upload/1/a.png", loader=loader, url=label_studio.url)
    second = load(f"{label_studio.url}/data/upload/1/a.png", loader=loader, url=label_studio.url)
    assert second is first
    assert len(label_studio.asked) == 1
    stats = loader.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.bytes) == (1, 1, 1, 5 * 3 * 3)


@pytest.mark.parametrize("change", ["token", "label studio"])
def test_what_one_token_has_opened_is_not_given_to_another(
    change: str, label_studio: Server, elsewhere: Server
) -> None:
    elsewhere.answers["/data/upload/1/a.png"] = partial(body, png((1, 2, 3)))
    loader = PhotoLoader(Settings())
    load("/data/upload/1/a.png", loader=loader, url=label_studio.url)
    if change == "token":
        label_studio.answers["/data/upload/1/a.png"] = partial(status, 403)
        with pytest.raises(PhotoForbidden):
            load("/data/upload/1/a.png", loader=loader, url=label_studio.url, token="another")
    else:
        assert (load("/data/upload/1/a.png", loader=loader, url=elsewhere.url).pixels == (1, 2, 3)).all()


def test_the_same_cloud_address_of_two_tasks_may_be_two_photos(label_studio: Server) -> None:
    for task_id, colour in ((1, (1, 1, 1)), (2, (2, 2, 2))):
        label_studio.answers[f"/tasks/{task_id}/resolve/"] = partial(body, png(colour))
    loader = PhotoLoader(Settings())
    for task_id in (1, 2):
        photo = load("s3://shelves/a.jpg", loader=loader, url=label_studio.url, task_id=task_id)
        assert (photo.pixels == task_id).all()


def test_kept_photos_stay_within_their_bytes_and_the_oldest_leave_first(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=1))
    for name in "abcd":
        elsewhere.answers[f"/{name}.png"] = partial(body, png(size_wh=(400, 300)))  # 360,000 bytes decoded
    for name in "abacb":
        load(f"{elsewhere.url}/{name}.png", loader=loader)
    assert elsewhere.targets == ["/a.png", "/b.png", "/c.png", "/b.png"]
    assert loader.stats().entries == 2
    assert loader.stats().bytes == 2 * 360_000


def test_a_photo_larger_than_the_cache_is_given_and_not_kept(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=0))
    assert load(f"{elsewhere.url}/a.png", loader=loader).size_wh == (5, 3)
    assert loader.stats().bytes == loader.stats().entries == 0


def test_a_kept_photo_is_read_anew_after_a_while(elsewhere: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "KEPT_S", 0.0)
    loader = PhotoLoader(Settings())
    load(f"{elsewhere.url}/a.png", loader=loader)
    elsewhere.answers["/a.png"] = partial(body, png((1, 2, 3)))
    assert (load(f"{elsewhere.url}/a.png", loader=loader).pixels == (1, 2, 3)).all()
    assert loader.stats().entries == 0


def test_a_failure_is_not_kept(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    with pytest.raises(PhotoUnreachable):
        load(f"{elsewhere.url}/b.png", loader=loader)
    elsewhere.answers["/b.png"] = partial(body, PNG)
    assert load(f"{elsewhere.url}/b.png", loader=loader).size_wh == (5, 3)


def gated(server: Server, path: str, answer: Answer) -> tuple[threading.Event, threading.Event]:
    """Makes `path` answer only once the second event is set; the first is set when it was asked."""
    asked, go = threading.Event(), threading.Event()

    def answer_later(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go.wait(10)
        answer(handler)

    server.answers[path] = answer_later
    return asked, go


@pytest.mark.parametrize("answer", [partial(body, PNG), partial(status, 500)])
def test_requests_at_the_same_time_fetch_a_photo_once(answer: Answer, elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", answer)

    def one(_: int) -> object:
        try:
            return load(f"{elsewhere.url}/a.png", loader=loader)
        except PhotoUnreachable as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(one, 0)]
        assert asked.wait(5)
        answers += [pool.submit(one, i) for i in range(5)]
        time.sleep(0.1)
        go.set()
        given = [answer.result(10) for answer in answers]
    assert len(elsewhere.asked) == 1
    assert len({id(photo) if isinstance(photo, Photo) else photo for photo in given}) == 1


def test_one_who_waits_is_not_bound_by_anothers_deadline(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", partial(body, PNG))
    with ThreadPoolExecutor(2) as pool:
        sooner = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader, deadline=time.monotonic() + 0.3)
        assert asked.wait(5)
        later = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader)
        with pytest.raises(DeadlineExceeded):
            sooner.result(5)
        go.set()
        assert later.result(5).size_wh == (5, 3)


def test_one_who_waits_gives_up_at_their_own_deadline(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings())
    asked, go = gated(elsewhere, "/a.png", partial(body, PNG))
    with ThreadPoolExecutor(2) as pool:
        later = pool.submit(load, f"{elsewhere.url}/a.png", loader=loader)
        assert asked.wait(5)
        with pytest.raises(DeadlineExceeded):
            load(f"{elsewhere.url}/a.png", loader=loader, deadline=time.monotonic() + 0.1)
        go.set()
        assert later.result(5).size_wh == (5, 3)


def test_threads_get_the_photos_they_asked_for(elsewhere: Server) -> None:
    loader = PhotoLoader(Settings(photo_cache_mb=1))
    for i in range(12):
        elsewhere.answers[f"/{i}.png"] = partial(body, png((i, i, i), size_wh=(300, 300)))
    with ThreadPoolExecutor(8) as pool:
        photos = pool.map(lambda i: load(f"{elsewhere.url}/{i % 12}.png", loader=loader), range(96))
        assert [int(photo.pixels[0, 0, 0]) for photo in photos] == [i % 12 for i in range(96)]
    assert loader.stats().bytes <= 1 << 20
