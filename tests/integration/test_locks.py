"""Locks between processes."""

import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from storage.errors import LockHeld, LockUnusable
from storage.locks import FileLock, check_locking, holder, is_locked


def test_a_held_lock_is_refused_and_names_its_holder(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "lock")
    first.acquire(note={"host": "a"})
    with pytest.raises(LockHeld, match=f"by process {os.getpid()}") as raised:
        FileLock(tmp_path / "lock").acquire()
    assert raised.value.holder == {"pid": os.getpid(), "host": "a"}
    assert raised.value.transient
    first.release()
    assert holder(tmp_path / "lock") is None
    with FileLock(tmp_path / "lock") as second:
        assert second.is_held


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        FileLock(tmp_path / "lock").acquire()
        os.write(writing, b"!")
        signal.pause()
    os.read(reading, 1)
    assert is_locked(tmp_path / "lock")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not is_locked(tmp_path / "lock")
    FileLock(tmp_path / "lock").acquire()
    os.close(reading)
    os.close(writing)


def test_a_forked_child_keeps_the_lock_after_its_parent_gave_it_back(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    pid = os.fork()
    if pid == 0:
        signal.pause()
    lock.release()
    assert is_locked(tmp_path / "lock")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not is_locked(tmp_path / "lock")


def test_waiting_ends_when_the_lock_is_given_back(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "lock")
    first.acquire()
    threading.Timer(0.1, first.release).start()
    second = FileLock(tmp_path / "lock")
    began = time.monotonic()
    second.acquire(5)
    assert time.monotonic() - began < 4


def test_a_lock_in_a_folder_made_anew_is_another_lock(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    old = FileLock(folder / "lock")
    old.acquire()
    shutil.rmtree(folder)
    folder.mkdir()
    new = FileLock(folder / "lock")
    new.acquire()
    with pytest.raises(LockHeld):
        FileLock(folder / "lock").acquire()


def test_a_folder_removed_between_opening_and_locking_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    original = fcntl.flock
    replaced = []

    def slow(fd: int, operation: int) -> None:
        if not replaced:
            replaced.append(path.stat().st_ino)
            path.rename(tmp_path / "gone")
        original(fd, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    lock = FileLock(path)
    lock.acquire()
    assert path.stat().st_ino != replaced[0]
    assert is_locked(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(LockUnusable, match="use a local disk"):
        check_locking(tmp_path)


def test_a_filesystem_that_grants_a_lock_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)
    with pytest.raises(LockUnusable, match="grants one lock twice"):
        check_locking(tmp_path)


def test_a_good_filesystem_passes_from_many_threads_at_once(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def check() -> None:
        try:
            for _ in range(50):
                check_locking(tmp_path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(LockUnusable, match="cannot lock"):
        FileLock(tmp_path / "missing" / "lock").acquire()
