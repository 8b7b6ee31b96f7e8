"""What systemd hears of a real supervisor; the test is systemd."""

import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World, eventually


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.setblocking(False)
        self.address = str(path)
        self.heard: list[str] = []

    def has_heard(self, word: str) -> bool:
        """Whether this was said, now or before."""
        try:
            while True:
                self.heard.append(self._sock.recv(1000).decode())
        except BlockingIOError:
            return word in self.heard

    def forget(self) -> None:
        self.has_heard("")
        self.heard.clear()

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    with tempfile.TemporaryDirectory(prefix="wa-") as folder:  # short: socket paths are limited
        it = Systemd(Path(folder) / "notify")
        yield it
        it.close()


def test_systemd_hears_ready_status_a_watchdog_that_stands_still_with_the_loop_and_stopping(
    tmp_path: Path, systemd: Systemd
) -> None:
    world = World(tmp_path, NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC="1000000")
    try:
        world.start_sandbox()
        assert not systemd.has_heard("READY=1")
        world.start_supervisor()
        assert world.supervisor is not None
        eventually(lambda: systemd.has_heard("READY=1"))
        world.link("sales")
        eventually(lambda: systemd.has_heard("STATUS=1 of 1 sessions connected"))
        systemd.forget()
        eventually(lambda: systemd.has_heard("WATCHDOG=1"), within_s=3)
        world.supervisor.send_signal(signal.SIGSTOP)
        systemd.forget()
        time.sleep(2)
        assert not systemd.has_heard("WATCHDOG=1"), "the loop stands still, and so does the word"
        world.supervisor.send_signal(signal.SIGCONT)
        eventually(lambda: systemd.has_heard("WATCHDOG=1"), within_s=3)
        assert world.state("sales")["state"] == "connected"
        assert world.run("health").returncode == 0
        systemd.forget()
        world.supervisor.send_signal(signal.SIGTERM)
        assert world.supervisor.wait(20) == 0
        assert world.run("health").returncode == 1
        assert systemd.has_heard("STOPPING=1")
    finally:
        world.close()
        print(world.logs())
