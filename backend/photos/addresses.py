"""Which hosts may be asked for a photo, and how a connection to one is opened.

Knows URLs, origins and IP addresses. Knows neither HTTP nor tokens nor pixels.

A host name is resolved once, its IP addresses are judged, and the socket is opened to a judged one: no second lookup
can answer differently (DNS rebinding), and spellings such as `http://2130706433/` or `::ffff:127.0.0.1` are judged as
what they reach. Connections are direct: behind a proxy there would be nothing to judge, so none is used.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from backend.errors import PhotoForbidden, PhotoUnreachable, photo_label

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_PORTS = {"http": 80, "https": 443}
LABEL_LENGTH = 200

# Where clouds answer with credentials, beyond the link-local 169.254.0.0/16 and fe80::/10:
METADATA_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure's host agent
        "192.0.0.192/32",  # Oracle Cloud
        "fd00:42::42/128",  # Scaleway
        "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254/128",  # Google Cloud
    )
)
THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")  # RFC 1122: "this host"; Linux connects 0.0.0.0 to itself
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address that is reached


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Scheme, host and port: what a token belongs to. host: in ASCII, as DNS knows it; IPv6 without brackets."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Address:
    """An http(s) URL in its parts.

    target: path and query as they go into a request line, percent-encoded; begins with a slash.
    label: the URL for messages and logs, without its query, which may be a signature.
    """

    origin: Origin
    target: str
    label: str

    @property
    def host_header(self) -> str:
        """The value of HTTP's Host header."""
        host = self.origin.host
        name = f"[{host}]" if ":" in host else host
        return name if self.origin.port == DEFAULT_PORTS[self.origin.scheme] else f"{name}:{self.origin.port}"

    def at(self, path: str) -> Address:
        """Another path, maybe with a query, below this address; this one's own path is not put before it twice."""
        prefix = urlsplit(self.target).path.rstrip("/")
        target = path if not prefix or path.startswith(f"{prefix}/") else prefix + path
        root = f"{self.origin.scheme}://{self.host_header}"
        return parse_address(root + target)

    def redirected(self, location: str) -> Address:
        """Where a `Location` header sends to. Raises PhotoForbidden as `parse_address` does."""
        try:
            url = urljoin(f"{self.origin.scheme}://{self.host_header}{self.target}", location)
        except ValueError:
            raise PhotoForbidden("expected a redirect to a valid address") from None
        with photo_label(without_query(url)):
            return parse_address(url)


def without_query(url: str) -> str:
    """A URL or path as it may stand in a message: no query, no fragment, no user and password, not too long."""
    bare = url.partition("#")[0].partition("?")[0]
    scheme, separator, rest = bare.rpartition("://")
    host, slash, path = rest.partition("/")
    label = scheme + separator + host.rpartition("@")[2] + slash + path
    return label if len(label) <= LABEL_LENGTH else label[:LABEL_LENGTH] + "…"


def parse_address(url: str) -> Address:
    """An http(s) URL as an Address.

    Raises PhotoForbidden for any other scheme, and for a URL with a user and password in it or without a valid host.
    """
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        if ":" not in host:
            host = host.encode("idna").decode()
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~[]")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~[]?")
    except ValueError:  # UnicodeError, from idna and quote, is one
        raise PhotoForbidden("expected a valid http:// or https:// address") from None
    if parts.scheme not in DEFAULT_PORTS or not host:
        raise PhotoForbidden("expected an http:// or https:// address")
    if "@" in parts.netloc:
        raise PhotoForbidden("expected an address without user and password, got one with them")
    return Address(origin=Origin(scheme=parts.scheme, host=host, port=port), target=target, label=without_query(url))


def why_refused(ip: IPAddress, *, allow_private: bool) -> str | None:
    """What kind of IP address this is when it may not be asked, else None.

    Always refused: link-local, cloud metadata, multicast, unspecified and reserved ones.
    Refused unless `allow_private`: loopback, private and all else that is not globally routed.
    """
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return why_refused(embedded, allow_private=allow_private)
    if ip.is_link_local:
        return "link-local"
    if any(ip in network for network in METADATA_NETWORKS):
        return "cloud metadata"
    if ip.is_multicast:
        return "multicast"
    if ip.is_unspecified or ip in THIS_NETWORK:
        return "unspecified"
    if ip.is_loopback:  # before reserved: ::1 is within the reserved ::/8
        return None if allow_private else "loopback, see ALLOW_PRIVATE_ADDRESSES"
    if ip.is_reserved:
        return "reserved"
    return None if allow_private or ip.is_global else "private, see ALLOW_PRIVATE_ADDRESSES"


def connect(host: str, port: int, *, allow_private: bool, until: float) -> socket.socket:
    """An open TCP connection to the host, on an IP address that may be asked.

    until: `time.monotonic()` value that ends the attempts.
    Raises PhotoForbidden when all IP addresses of the host are refused, PhotoUnreachable when no other one answers.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise PhotoUnreachable(f"expected a known host, but {host!r} cannot be resolved") from None
    allowed, refused = [], ""
    for family, _, _, _, sockaddr in found:
        reason = why_refused(ipaddress.ip_address(sockaddr[0]), allow_private=allow_private)
        if reason is None:
            allowed.append((family, sockaddr))
        else:
            refused = f"{sockaddr[0]} ({reason})"
    if not allowed:
        raise PhotoForbidden(f"expected a host that may be asked, got {refused}")
    failure = "timed out"
    for tried, (family, sockaddr) in enumerate(allowed):
        left_s = until - time.monotonic()
        if left_s <= 0:
            break
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(left_s / (len(allowed) - tried))  # a silent address leaves time for the next
            connection.connect(sockaddr)
        except OSError as error:
            connection.close()
            failure = "timed out" if isinstance(error, TimeoutError) else (error.strerror or type(error).__name__)
        else:
            return connection
    raise PhotoUnreachable(f"expected a connection to {host!r} port {port}, got: {failure}")
