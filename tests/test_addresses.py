"""Which addresses are understood, which IP addresses may be asked, and that only judged ones are connected to."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator

import pytest

from backend.errors import PhotoForbidden, PhotoUnreachable
from backend.photos import addresses
from backend.photos.addresses import Origin, connect, parse_address, why_refused, without_query


@pytest.mark.parametrize(
    ("url", "origin", "target"),
    [
        ("http://h", ("http", "h", 80), "/"),
        ("HTTPS://Host.Example./a.jpg", ("https", "host.example", 443), "/a.jpg"),
        ("http://h:8080/a b/ü.jpg?x=1 2#part", ("http", "h", 8080), "/a%20b/%C3%BC.jpg?x=1%202"),
        ("http://h/a%20b+c.jpg?sig=a%2Fb%3D", ("http", "h", 80), "/a%20b+c.jpg?sig=a%2Fb%3D"),
        ("http://[::1]:81/x", ("http", "::1", 81), "/x"),
        ("http://h?x=1", ("http", "h", 80), "/?x=1"),
    ],
)
def test_an_address_is_its_origin_and_a_target_that_fits_a_request_line(
    url: str, origin: tuple[str, str, int], target: str
) -> None:
    address = parse_address(url)
    assert address.origin == Origin(scheme=origin[0], host=origin[1], port=origin[2])
    assert address.target == target
    assert address.target.isascii()
    assert " " not in address.target


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "expected an http:// or https:// address"),
        ("http://", "expected an http:// or https:// address"),
        ("file:///etc/passwd", "expected an http:// or https:// address"),
        ("ftp://h/a.jpg", "expected an http:// or https:// address"),
        ("gopher://h/", "expected an http:// or https:// address"),
        ("http://h:99999/", "expected a valid"),
        ("http://h:port/", "expected a valid"),
        ("http://[::1/", "expected a valid"),
        ("http://a..b/", "expected a valid"),
        ("http://" + "a" * 70 + "/", "expected a valid"),
        ("http://user:pa55@h/a.jpg", "without user and password"),
        ("http://ls:8080\\@evil/", "without user and password"),
    ],
)
def test_other_addresses_are_refused(url: str, words: str) -> None:
    with pytest.raises(PhotoForbidden, match=words) as caught:
        parse_address(url)
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("", ""),
        ("http://h/a.jpg?X-Amz-Signature=5ec", "http://h/a.jpg"),
        ("http://h/a.jpg#5ec", "http://h/a.jpg"),
        ("https://me:5ec@h:1/a@b.jpg", "https://h:1/a@b.jpg"),
        ("me:5ec@h/a.jpg", "h/a.jpg"),
        ("/data/x?next=http://h/&sig=5ec", "/data/x"),
        ("s3://bucket/key.jpg?versionId=5ec", "s3://bucket/key.jpg"),
        ("http://h/" + "a" * 500, "http://h/" + "a" * 191 + "…"),
    ],
)
def test_what_is_label_of_an_address_holds_no_secret(url: str, label: str) -> None:
    assert without_query(url) == label


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        ("http://ls:8080", "/data/upload/1/a.jpg", "http://ls:8080/data/upload/1/a.jpg"),
        ("http://ls/", "/data/local-files/?d=a/b.jpg", "http://ls/data/local-files/?d=a/b.jpg"),
        ("https://host/label/", "/data/a.jpg", "https://host/label/data/a.jpg"),
        ("https://host/label", "/label/data/a.jpg", "https://host/label/data/a.jpg"),
        ("http://ls", "/\\evil/a.jpg", "http://ls/%5Cevil/a.jpg"),
        ("http://ls", "/@evil/a.jpg", "http://ls/@evil/a.jpg"),
    ],
)
def test_a_path_stays_below_the_address_it_is_put_to(base: str, path: str, expected: str) -> None:
    address = parse_address(base).at(path)
    assert f"{address.origin.scheme}://{address.host_header}{address.target}" == expected


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("b.jpg", "http://h:1/x/b.jpg"),
        ("/b.jpg?s=1", "http://h:1/b.jpg?s=1"),
        ("//other/b.jpg", "http://other/b.jpg"),
        ("https://h:1/b.jpg", "https://h:1/b.jpg"),
    ],
)
def test_a_redirect_is_resolved_against_where_it_came_from(location: str, expected: str) -> None:
    address = parse_address("http://h:1/x/a.jpg").redirected(location)
    assert f"{address.origin.scheme}://{address.host_header}{address.target}" == expected


ALWAYS = "always"  # refused whatever the settings say
BY_SETTING = "by setting"
NEVER = "never"


@pytest.mark.parametrize(
    ("ip", "refused"),
    [
        ("8.8.8.8", NEVER),
        ("2606:4700:4700::1111", NEVER),
        ("127.0.0.1", BY_SETTING),
        ("127.9.9.9", BY_SETTING),
        ("10.0.0.1", BY_SETTING),
        ("172.16.0.1", BY_SETTING),
        ("192.168.1.1", BY_SETTING),
        ("100.64.0.1", BY_SETTING),
        ("::1", BY_SETTING),
        ("fd12:3456::1", BY_SETTING),
        ("::ffff:10.0.0.1", BY_SETTING),
        ("64:ff9b::7f00:1", BY_SETTING),
        ("2002:7f00:1::", BY_SETTING),
        ("0.0.0.0", ALWAYS),
        ("0.1.2.3", ALWAYS),
        ("::", ALWAYS),
        ("169.254.169.254", ALWAYS),
        ("169.254.0.1", ALWAYS),
        ("fe80::1", ALWAYS),
        ("fe80::1%1", ALWAYS),
        ("::ffff:169.254.169.254", ALWAYS),
        ("64:ff9b::a9fe:a9fe", ALWAYS),
        ("2002:a9fe:a9fe::", ALWAYS),
        ("fd00:ec2::254", ALWAYS),
        ("fd20:ce::254", ALWAYS),
        ("100.100.100.200", ALWAYS),
        ("168.63.129.16", ALWAYS),
        ("192.0.0.192", ALWAYS),
        ("224.0.0.1", ALWAYS),
        ("ff02::1", ALWAYS),
        ("240.0.0.1", ALWAYS),
        ("255.255.255.255", ALWAYS),
    ],
)
def test_an_ip_address_may_be_asked_or_not(ip: str, refused: str) -> None:
    address = ipaddress.ip_address(ip)
    assert (why_refused(address, allow_private=True) is not None) == (refused == ALWAYS)
    assert (why_refused(address, allow_private=False) is not None) == (refused != NEVER)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def resolving(monkeypatch: pytest.MonkeyPatch, *ips: str) -> list[str]:
    """Makes every host name resolve to `ips`; gives the list of names that were looked up."""
    looked_up: list[str] = []

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (ip, port)) for ip in ips]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    return looked_up


def test_a_name_is_looked_up_once_and_only_its_allowed_addresses_are_connected_to(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = resolving(monkeypatch, "169.254.169.254", "127.0.0.1")
    with connect(
        "photos.example", listener.getsockname()[1], allow_private=True, until=time.monotonic() + 5
    ) as connection:
        assert connection.getpeername()[0] == "127.0.0.1"
    assert looked_up == ["photos.example"]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "loopback"),
        ("2130706433", "loopback"),
        ("0x7f.1", "loopback"),
        ("017700000001", "loopback"),
        ("localhost", "loopback"),
        ("[::ffff:127.0.0.1]", "loopback"),
        ("10.1.2.3", "private"),
    ],
)
def test_spellings_of_inner_addresses_are_seen_through(host: str, words: str) -> None:
    with pytest.raises(PhotoForbidden, match=words):
        connect(host.strip("[]"), 9, allow_private=False, until=time.monotonic() + 5)


def test_a_refused_address_is_not_even_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "169.254.169.254")
    monkeypatch.setattr(addresses.socket, "socket", None)
    with pytest.raises(PhotoForbidden, match=r"link-local"):
        connect("photos.example", 80, allow_private=True, until=time.monotonic() + 5)


def test_a_closed_port_and_an_unknown_host_are_unreachable(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(PhotoUnreachable, match="Connection refused"):
        connect("127.0.0.1", port, allow_private=True, until=time.monotonic() + 5)
    with pytest.raises(PhotoUnreachable, match="cannot be resolved"):
        connect("no.such.host.invalid", 80, allow_private=True, until=time.monotonic() + 5)
    with pytest.raises(PhotoUnreachable, match="timed out"):
        connect("127.0.0.1", 80, allow_private=True, until=time.monotonic() - 1)
