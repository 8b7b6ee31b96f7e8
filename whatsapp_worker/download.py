"""Files from the web for messages, by URLs that strangers chose.

Connections are made to addresses that were checked, and to nothing else: a name is resolved
once, every address of it must be public, and the connection goes to one of those, also after
each redirect. Proxies of the environment are not used: a proxy would resolve the name again.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import SplitResult, urljoin, urlsplit

from whatsapp_worker import __version__
from whatsapp_worker.content import is_link
from whatsapp_worker.errors import MediaFailed

MAX_REDIRECTS = 5
_CHUNK = 65_536
_CONNECT_S = 10.0  # to one address; a name may have several
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {
    "User-Agent": f"whatsapp-worker/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # what is inflated here could be of any size
    "Connection": "close",
}
_TYPE = re.compile(r"[a-z0-9.+-]{1,80}/[a-z0-9.+-]{1,80}")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Set aside by IANA, and called global by some versions of Python: protocol assignments, the relay
# of 6to4, local NAT64, documentation, segment routing.
_SET_ASIDE = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "64:ff9b:1::/48", "3fff::/20", "5f00::/16"),
    )
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def download(url: str, into: BinaryIO, *, limit: int, deadline: float, allow_private: bool) -> str:
    """Write what a URL gives into a file, as it comes.

    Args:
        url: http or https.
        limit: Bytes; more is refused, at once when the server says so.
        deadline: Monotonic seconds; everything ends by then, but for the resolver's own time.
        allow_private: Also from addresses that are not public.

    Returns:
        The server's Content-Type, without its parameters; empty when it says none, or nonsense.

    Raises:
        MediaFailed: It could not be had, or is not allowed.
    """
    with _Cutoff(deadline) as cutoff:
        try:
            return _follow(url, into, limit, cutoff, allow_private)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if cutoff.is_over():
                raise MediaFailed("the server took too long") from error
            raise MediaFailed(f"the server could not be asked: {_said(error)}") from error


def _follow(url: str, into: BinaryIO, limit: int, cutoff: "_Cutoff", allow_private: bool) -> str:
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        with _request(parts, cutoff, allow_private) as response:
            if response.status not in _REDIRECTS:
                return _body(response, into, limit, cutoff)
            target = urljoin(url, response.headers.get("Location", ""))
        if not is_link(target) or (parts.scheme, urlsplit(target).scheme) == ("https", "http"):
            raise MediaFailed("the server redirects to where nobody may follow")
        url = target
    raise MediaFailed(f"the server redirects more than {MAX_REDIRECTS} times")


def _body(response: http.client.HTTPResponse, into: BinaryIO, limit: int, cutoff: "_Cutoff") -> str:
    if response.status != 200:
        raise MediaFailed(f"the server answered {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise MediaFailed("the server sends it compressed, though it was told not to")
    length = response.length
    if length is not None and length > limit:
        raise MediaFailed(f"is {length} bytes long; at most {limit} are allowed")
    received = 0
    while chunk := response.read1(_CHUNK):
        received += len(chunk)
        if received > limit:
            raise MediaFailed(f"is longer than the {limit} bytes that are allowed")
        into.write(chunk)
    if cutoff.is_over():  # what was cut off looks like the end of the file
        raise TimeoutError
    if length is not None and received < length:
        raise MediaFailed(f"the server sent {received} of {length} bytes")
    said = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return said if _TYPE.fullmatch(said) else ""


@contextlib.contextmanager
def _request(
    parts: SplitResult, cutoff: "_Cutoff", allow_private: bool
) -> Iterator[http.client.HTTPResponse]:
    host, is_tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = 443 if is_tls else 80
    try:
        sock = _connected(_checked(host, port, allow_private), port, cutoff)
        if is_tls:
            sock = _encrypted(sock, host, cutoff)
        connection.sock = sock
        path = parts.path or "/"
        target = f"{path}?{parts.query}" if parts.query else path
        connection.request("GET", target, headers=_HEADERS)
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def _checked(host: str, port: int, allow_private: bool) -> list[Address]:
    """The addresses of a host; raises when one of them is not public.

    One private address among public ones is refused as a whole: a name that has both is either
    set up wrong or is meant to get in.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaFailed("its host has no address") from error
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
    if not allow_private and not all(map(is_public, addresses)):
        raise MediaFailed("its host has a private address; MEDIA_ALLOW_PRIVATE allows that")
    return list(dict.fromkeys(addresses))


def is_public(address: Address) -> bool:
    """Whether an address is one of the open Internet, also through what carries IPv4 in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    if any(address in network for network in _SET_ASIDE):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _connected(addresses: list[Address], port: int, cutoff: "_Cutoff") -> socket.socket:
    problem: OSError | None = None
    for address in addresses:
        left_s = cutoff.left_s()
        try:
            sock = socket.create_connection((str(address), port), min(_CONNECT_S, left_s))
            sock.settimeout(left_s)
            return cutoff.watch(sock)
        except OSError as error:
            problem = error
    raise problem or OSError("no address")


def _encrypted(sock: socket.socket, host: str, cutoff: "_Cutoff") -> ssl.SSLSocket:
    context = ssl.create_default_context()
    encrypted = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    cutoff.watch(encrypted)
    encrypted.do_handshake()
    return encrypted


def _said(error: Exception) -> str:
    """An error in words, without what may repeat the URL."""
    reason = getattr(error, "verify_message", None) or getattr(error, "strerror", None)
    return f"{type(error).__name__}{f' ({reason})' if reason else ''}"


class _Cutoff:
    """Ends whatever a socket waits for when time is up: a server that sends a byte now and then
    would hold up every time-out that counts from the last byte."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._sock: socket.socket | None = None
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._cut)
        self._timer.daemon = True

    def __enter__(self) -> "_Cutoff":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def left_s(self) -> float:
        """Seconds left, and never none: 0 would make a socket not wait but fail."""
        return max(0.001, self._deadline - time.monotonic())

    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def watch(self, sock: socket.socket) -> socket.socket:
        """The socket that is in use from now on."""
        self._sock = sock
        if self.is_over():
            raise TimeoutError
        return sock

    def _cut(self) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own, which would take the TLS state from under the reader.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
