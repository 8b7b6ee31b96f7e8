"""systemd's protocol, heard on a socket of our own."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from whatsapp_worker.notify import Notifier


@pytest.fixture
def systemd() -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory(prefix="wa-") as folder:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(Path(folder) / "notify"))
        sock.settimeout(1)
        yield sock
        sock.close()


def heard(systemd: socket.socket) -> list[str]:
    words = []
    systemd.setblocking(False)
    while True:
        try:
            words.append(systemd.recv(1000).decode())
        except BlockingIOError:
            return words


def test_ready_status_and_stopping_are_told_and_a_status_only_once(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    notifier.ready()
    notifier.status("1 of 1 sessions connected")
    notifier.status("1 of 1 sessions connected")
    notifier.ticked(100.0)  # no watchdog was asked for
    notifier.stopping()
    assert heard(systemd) == ["READY=1", "STATUS=1 of 1 sessions connected", "STOPPING=1"]


def test_a_status_that_was_not_taken_is_told_again(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                other.sendto(b"x", systemd.getsockname())
    notifier.status("1 of 1 sessions connected")
    assert "STATUS=1 of 1 sessions connected" not in heard(systemd)
    notifier.status("1 of 1 sessions connected")
    assert heard(systemd) == ["STATUS=1 of 1 sessions connected"]


def test_the_watchdog_is_fed_at_half_its_interval_by_ticks_alone(systemd: socket.socket) -> None:
    environ = {
        "NOTIFY_SOCKET": systemd.getsockname(),
        "WATCHDOG_USEC": "10000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    notifier = Notifier(environ)
    for now in (100.0, 101.0, 104.9, 105.0, 106.0):
        notifier.ticked(now)
    assert heard(systemd) == ["WATCHDOG=1", "WATCHDOG=1"]


def test_a_watchdog_for_another_process_or_no_systemd_means_silence(systemd: socket.socket) -> None:
    environ = {
        "NOTIFY_SOCKET": systemd.getsockname(),
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1",
    }
    Notifier(environ).ticked(1.0)
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": "/nowhere/at/all"}).ready()
    assert heard(systemd) == []
