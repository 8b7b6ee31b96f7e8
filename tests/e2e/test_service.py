"""What runs us for good: the test is systemd, or a process manager with a Procfile."""

import shlex
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from world import World, eventually

PROCFILE = Path(__file__).parents[2] / "Procfile"


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.setblocking(False)
        self.address = str(path)
        self.heard: list[str] = []
        self._lock = threading.RLock()
        self._is_closed = threading.Event()
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()

    def _listen(self) -> None:
        """As systemd does: ten that nobody reads, and the kernel takes no more."""
        while not self._is_closed.wait(0.02):
            self.has_heard("")

    def has_heard(self, word: str) -> bool:
        """Whether this was said, now or before."""
        with self._lock:
            try:
                while True:
                    self.heard.append(self._sock.recv(1000).decode())
            except BlockingIOError:
                return word in self.heard

    def forget(self) -> None:
        with self._lock:
            self.has_heard("")
            self.heard.clear()

    def close(self) -> None:
        self._is_closed.set()
        self._listening.join()
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
        eventually(lambda: systemd.has_heard("WATCHDOG=1"))
        world.supervisor.send_signal(signal.SIGSTOP)
        supervisor = psutil.Process(world.supervisor.pid)
        eventually(lambda: supervisor.status() == psutil.STATUS_STOPPED)
        systemd.forget()
        time.sleep(2)
        assert not systemd.has_heard("WATCHDOG=1"), "the loop stands still, and so does the word"
        world.supervisor.send_signal(signal.SIGCONT)
        eventually(lambda: systemd.has_heard("WATCHDOG=1"))
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


def test_the_lines_of_the_procfile_are_a_whole_host_and_each_ends_on_sigterm(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, CLEANUP_INTERVAL_S="1")
    try:
        world.start_sandbox()
        commands = [line.partition(":")[2] for line in PROCFILE.read_text().splitlines()]
        processes = [world.spawn(*shlex.split(command)[1:]) for command in commands]
        eventually(lambda: world.status()["supervisor"]["alive"], what="worker")
        world.link("sales")
        world.await_outcomes([world.enqueue("sales", "5521988880001", "Hello", "m1")])
        eventually(lambda: world.status_of("sales", "m1") == "delivered", what="events")
        eventually(lambda: (world.status()["purge"] or {}).get("runs"), what="maintenance")
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(30) for process in processes] == [0] * len(processes)
    finally:
        world.close()
        print(world.logs())
