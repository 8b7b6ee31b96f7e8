"""Whether a connection that says it is up still hears anything, and what its process weighs.

neonize tells of trouble only: a KeepAliveTimeout for each ping without an answer (every 20 to
30 s, 10 s waited), nothing for those that are answered. On Linux the kernel knows when the last
byte came.
"""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

_TCP_INFO_LAST_DATA_RECV = 52  # offset in struct tcp_info; milliseconds
_WHATSAPP_PORTS = (443, 5222)


class Liveness:
    """The proofs of life of one connection. Safe from any thread; times are monotonic."""

    def __init__(self, *, silence_limit_s: float, ports: Collection[int] = _WHATSAPP_PORTS) -> None:
        """
        Args:
            silence_limit_s: A degraded connection that stays silent for so long is deaf.
            ports: Remote TCP ports that only the client's own connections go to.
        """
        self._silence_limit_s = silence_limit_s
        self._ports = frozenset(ports)
        self._lock = threading.Lock()
        self._alive_at: float | None = None
        self._suspected_at: float | None = None

    def alive(self) -> None:
        """Something came through: an event, an acknowledgement."""
        with self._lock:
            self._alive_at = time.monotonic()
            self._suspected_at = None

    def suspect(self, last_success: float) -> None:
        """A ping got no answer; the last one that did was at `last_success` (UTC seconds)."""
        now = time.monotonic()
        with self._lock:
            self._suspected_at = self._suspected_at or now
            heard_at = now - max(0.0, time.time() - last_success)
            self._alive_at = max(self._alive_at or heard_at, heard_at)

    @property
    def is_degraded(self) -> bool:
        """Whether a proof of life is overdue."""
        return self._suspected_at is not None

    def age_s(self) -> float | None:
        """Seconds since the last proof of life; None before the first."""
        with self._lock:
            alive_at = self._alive_at
        if alive_at is None:
            return None
        age_s = time.monotonic() - alive_at
        heard_s = _last_heard_s(self._ports)
        return age_s if heard_s is None else min(age_s, heard_s)

    def deaf_for_s(self) -> float | None:
        """How long the connection has been silent, when that is too long; else None."""
        if not self.is_degraded:
            return None
        age_s = self.age_s()
        return age_s if age_s is not None and age_s > self._silence_limit_s else None


def client_ports(environ: Mapping[str, str]) -> frozenset[int]:
    """The remote ports that WhatsApp is reached through: its own, or the proxy's."""
    ports = set(_WHATSAPP_PORTS)
    for name in ("HTTPS_PROXY", "https_proxy"):
        with contextlib.suppress(ValueError):
            ports.add(urlsplit(environ.get(name, "")).port or 443)
    return frozenset(ports)


def _last_heard_s(ports: Collection[int]) -> float | None:
    """Seconds since one of this process's sockets to these ports got data; None when the system
    does not say. Go owns the sockets, so they are looked up by descriptor."""
    if sys.platform != "linux":
        return None
    ages = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            # A duplicate: closing it leaves Go's own descriptor alone.
            with socket.socket(fileno=os.dup(int(name))) as found:
                ages += _received_s(found, ports)
    return min(ages, default=None)


def _received_s(found: socket.socket, ports: Collection[int]) -> list[float]:
    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    if not is_tcp or found.getpeername()[1] not in ports:
        return []
    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return [struct.unpack_from("@I", info, _TCP_INFO_LAST_DATA_RECV)[0] / 1000]


def footprint() -> dict[str, float | int]:
    """Memory, open files and threads of this process."""
    threads = threading.active_count()
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        threads = len(os.listdir("/proc/self/task"))
        fds = len(os.listdir("/proc/self/fd")) - 1
        return {"rss_mib": round(rss_mib, 1), "fds": fds, "threads": threads}
    return {"threads": threads}
