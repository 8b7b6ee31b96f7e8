"""systemd's readiness protocol: one datagram a message to NOTIFY_SOCKET, nothing without it."""

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells systemd how the supervisor is. Without NOTIFY_SOCKET every call does nothing."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = _watchdog_s(environ)
        self._next_watchdog = 0.0
        self._status = ""

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent when it changed, again where it was not taken."""
        if text != self._status and self._send(f"STATUS={text}"):
            self._status = text

    def ticked(self, now: float) -> None:
        """Say that the loop is alive, at half of the interval that systemd asks for."""
        if self._watchdog_s and now >= self._next_watchdog:
            self._next_watchdog = now + self._watchdog_s / 2
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> bool:
        """Whether it was taken."""
        if not self._address:
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.2)
            return sock.sendto(text.encode(), self._address) > 0
        return False


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """Seconds, 0 for no watchdog or one that is meant for another process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0
