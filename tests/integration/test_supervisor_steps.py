"""Single steps of the supervisor's loop: what fails for one session costs the others nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually

from storage.errors import DocumentBroken
from storage.sessions import Sessions, Wanted
from whatsapp_worker import supervisor as module
from whatsapp_worker.session import State
from whatsapp_worker.session_process import UNREAPED_S, SessionProcess, socket_pair
from whatsapp_worker.settings import Settings
from whatsapp_worker.supervisor import SPAWN_RETRY_S, UNREADABLE_RETRY_S, Supervisor


class Helper:
    """A fork helper that takes every request and never answers."""

    is_ready = True
    pid = 0

    def fork(self, request: dict[str, Any], *descriptors: int) -> None:
        """Nothing is forked."""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    settings = Settings(
        data_dir=tmp_path / "data", network="sandbox", redis_url="redis://127.0.0.1:1"
    )
    sessions = Sessions(settings.data_dir)
    sessions.prepare()
    it = Supervisor(settings, sessions, environ=os.environ)
    it._helper = Helper()  # type: ignore[assignment]
    yield it
    for run in list(it._processes.values()):
        it._forget(run)


def make(supervisor: Supervisor, session: str) -> None:
    supervisor.sessions.create(session, network="sandbox", now=time.time())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_record_that_could_not_be_read_is_read_again_though_it_does_not_change(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(supervisor, "sales")
    make(supervisor, "other")
    read = supervisor.sessions.wanted

    def fails(id: str) -> Wanted | None:
        if id == "sales":
            raise DocumentBroken(Path("wanted.json"), "cannot be read: too many open files")
        return read(id)

    monkeypatch.setattr(supervisor.sessions, "wanted", fails)
    supervisor._read_wanted(0.0)
    assert list(supervisor._managed) == ["other"]
    monkeypatch.undo()
    supervisor._read_wanted(UNREADABLE_RETRY_S)
    assert sorted(supervisor._managed) == ["other", "sales"]


def test_a_record_removed_by_hand_is_written_as_the_supervisor_knows_it(
    supervisor: Supervisor,
) -> None:
    make(supervisor, "sales")
    supervisor._read_wanted(0.0)
    before, managed = supervisor.sessions.wanted("sales"), supervisor._managed["sales"]
    managed.tick(0.0)
    path = supervisor.sessions.folder("sales") / "wanted.json"
    path.write_text("garbage")
    supervisor._read_wanted(1.0)
    path.unlink()
    supervisor._read_wanted(2.0)
    assert supervisor.sessions.wanted("sales") == before
    supervisor._read_wanted(3.0)
    assert supervisor._managed == {"sales": managed}


def test_a_folder_that_cannot_be_listed_is_not_empty(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(supervisor, "sales")
    supervisor._read_wanted(0.0)

    def fails(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "scandir", fails)
    supervisor._read_wanted(1.0)
    assert list(supervisor._managed) == ["sales"]
    monkeypatch.undo()
    make(supervisor, "other")
    supervisor._read_wanted(1.0 + UNREADABLE_RETRY_S)
    assert sorted(supervisor._managed) == ["other", "sales"]


@pytest.mark.parametrize("what", ["process.output_file", "socket_pair"])
def test_a_process_that_cannot_be_started_leaks_nothing_and_is_tried_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fails() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    before = open_files()
    monkeypatch.setattr(f"{module.__name__}.{what}", fails)
    assert supervisor.spawn("sales", "device", {}) is None
    assert open_files() == before
    monkeypatch.undo()
    assert supervisor.spawn("sales", "device", {}) is None, "not at once"
    assert eventually(lambda: supervisor.spawn("sales", "device", {}), within_s=2 * SPAWN_RETRY_S)


def test_a_canary_that_cannot_be_started_ends_nothing(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(supervisor, "sales")
    supervisor._read_wanted(0.0)
    session = supervisor._managed["sales"]
    monkeypatch.setattr(type(session), "dial", lambda *_, **more: 1 / 0)
    supervisor._send_canary([_failed("sales")], 0.0)


def _failed(session: str) -> Any:
    return module.reconnect.Standing(
        session, State.FAILED, module.reconnect.Reason.CONNECTION_FAILED, 0.0
    )


def test_only_device_processes_consume(supervisor: Supervisor) -> None:
    assert supervisor.spawn("new", "pairing", {}) and supervisor.spawn("sales", "device", {})
    assert supervisor._consumed == {"sales"}


def test_the_death_of_a_process_is_seen_by_whatever_descriptor(tmp_path: Path) -> None:
    ours, theirs = socket_pair()
    theirs.close()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = SessionProcess(1, "device", "sales", ours, 0.0)
    run.forked(child.pid)
    assert run._pidfd is not None
    low, run._pidfd = run._pidfd, fcntl.fcntl(run._pidfd, fcntl.F_DUPFD_CLOEXEC, 1100)
    os.close(low)
    run.hear(0.0)
    assert not run.has_vanished(2 * UNREAPED_S)
    child.send_signal(signal.SIGKILL)
    eventually(lambda: run.has_vanished(2 * UNREAPED_S))
    child.wait()
    run.close()
