"""State files: whole or not at all, whoever dies when."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import documents
from storage.documents import MAX_CORRUPT, Document
from storage.errors import (
    DocumentBroken,
    DocumentError,
    DocumentNewer,
    DocumentUnwritable,
    LockHeld,
)
from storage.locks import FileLock


@pytest.fixture
def document(tmp_path: Path) -> Document:
    return Document(tmp_path / "thing.json", version=2)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def put(document: Document, value: object) -> None:
    document.update(lambda _: {"value": value})


def test_older_damaged_versions_that_cannot_be_removed_do_not_stop_a_recovery(
    document: Document,
) -> None:
    for number in range(MAX_CORRUPT + 1):
        (document.path.parent / f"thing.json.corrupt-{number}").mkdir()
    put(document, 1)
    put(document, 2)
    document.path.write_bytes(b"{")
    assert (document.read() or {})["value"] == 1


def test_a_document_never_written_is_none(document: Document) -> None:
    assert document.read() is None


def test_what_was_written_is_read_with_its_version(document: Document) -> None:
    document.write({"value": "ünï"})
    assert document.read() == {"value": "ünï", "version": 2}


def test_files_are_private_whatever_the_umask_says(document: Document) -> None:
    before = os.umask(0)
    try:
        put(document, 1)
        put(document, 2)
    finally:
        os.umask(before)
    for path in document.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_change_that_returns_none_writes_nothing(document: Document) -> None:
    put(document, 1)
    inode = document.path.stat().st_ino
    assert document.update(lambda found: None) == {"value": 1, "version": 2}
    assert document.path.stat().st_ino == inode


def test_an_error_in_the_change_leaves_document_and_lock_alone(document: Document) -> None:
    put(document, 1)
    with pytest.raises(ZeroDivisionError):
        document.update(lambda _: {"value": 1 // 0})
    put(document, 2)
    assert document.read() == {"value": 2, "version": 2}


def test_what_is_not_json_is_refused_before_anything_is_written(document: Document) -> None:
    put(document, 1)
    for value in (float("nan"), {1, 2}, b"bytes"):
        with pytest.raises((TypeError, ValueError)):
            put(document, value)
    assert names(document.path.parent) == {"thing.json", "thing.json.lock"}


def test_a_removed_document_is_gone_with_its_backup(document: Document) -> None:
    put(document, 1)
    put(document, 2)
    document.remove()
    document.remove()
    assert document.read() is None
    assert names(document.path.parent) == {"thing.json.lock"}


# Damage

DAMAGE = {
    "empty": b"",
    "zeros, as some filesystems leave after a power loss": b"\0" * 4096,
    "truncated": b'{"value":2,"ver',
    "not UTF-8": b'{"value":"\xff\xfe","version":2}',
    "not an object": b'[{"version":2}]',
    "without version": b'{"value":2}',
    "wrong version": b'{"value":2,"version":"2"}',
    "version 0": b'{"value":2,"version":0}',
    "a boolean as version": b'{"value":2,"version":true}',
    "nested too deeply": b"[" * 100_000,
    "a constant that is no JSON": b'{"value":NaN,"version":2}',
    "a number that JSON cannot say": b'{"value":1e999,"version":2}',
    "a number too long to read": b'{"version":' + b"9" * 10_000 + b"}",
    "an old version nobody upgrades": b'{"value":2,"version":1}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_restored_from_its_backup_and_kept(
    document: Document, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(document, 1)
    put(document, 2)
    document.path.write_bytes(DAMAGE[kind])
    assert document.read() == {"value": 1, "version": 2}
    assert json.loads(document.path.read_bytes()) == {"value": 1, "version": 2}
    (kept,) = document.path.parent.glob("thing.json.corrupt-*")
    assert kept.read_bytes() == DAMAGE[kind]
    (record,) = [record for record in caplog.records if record.message == "document.recovered"]
    assert record.levelname == "WARNING"
    assert "the last change" in record.__dict__["lost"]


def test_a_shape_that_the_owner_refuses_is_damage(tmp_path: Path) -> None:
    def check(fields: dict[str, Any]) -> None:
        if not isinstance(fields["value"], int):
            raise ValueError("value is no number")

    document = Document(tmp_path / "thing.json", version=2, check=check)
    put(document, 1)
    put(document, 2)
    document.path.write_text('{"value":"x","version":2}')
    assert document.read() == {"value": 1, "version": 2}


def test_a_vanished_file_is_restored_from_its_backup(document: Document) -> None:
    put(document, 1)
    put(document, 2)
    document.path.unlink()
    assert document.read() == {"value": 1, "version": 2}
    assert document.path.exists()


def test_without_a_good_backup_the_error_names_the_file_and_what_to_do(document: Document) -> None:
    document.path.write_bytes(b"nonsense")
    for read in (document.read, lambda: put(document, 1)):
        with pytest.raises(DocumentBroken, match=r"thing\.json: .*restore it from a backup"):
            read()
    assert document.path.read_bytes() == b"nonsense"
    document.path.with_name("thing.json.bak").write_bytes(b"nonsense too")
    with pytest.raises(DocumentBroken, match="bak too"):
        document.read()


def test_a_plain_write_replaces_a_broken_document_and_keeps_it_aside(document: Document) -> None:
    document.path.write_bytes(b"nonsense")
    document.write({"value": 1})
    assert document.read() == {"value": 1, "version": 2}
    (kept,) = document.path.parent.glob("thing.json.corrupt-*")
    assert kept.read_bytes() == b"nonsense"


def test_at_most_five_damaged_versions_are_kept_the_newest(document: Document) -> None:
    put(document, 1)
    put(document, 2)
    for number in range(MAX_CORRUPT + 3):
        document.path.write_bytes(b"bad %d" % number)
        document.read()
    kept = sorted(document.path.parent.glob("thing.json.corrupt-*"))
    assert [path.read_bytes() for path in kept] == [b"bad %d" % n for n in range(3, 8)]


def test_damage_on_a_folder_that_takes_no_writes_is_read_from_the_backup(
    document: Document,
) -> None:
    put(document, 1)
    put(document, 2)
    document.path.write_bytes(b"bad")
    with faults.before_each_step(_only_reading_works):
        assert document.read() == {"value": 1, "version": 2}
    assert document.path.read_bytes() == b"bad"


def _only_reading_works(name: str, arguments: tuple[Any, ...]) -> None:
    if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.EROFS, "Read-only file system")


# Versions


def test_a_newer_version_is_refused_and_not_touched(document: Document) -> None:
    put(document, 1)
    put(document, 2)
    newer = b'{"value":3,"version":3}'
    document.path.write_bytes(newer)
    for call in (document.read, lambda: put(document, 4), lambda: document.write({"value": 4})):
        with pytest.raises(DocumentNewer, match="version 3"):
            call()
    assert document.path.read_bytes() == newer
    assert not list(document.path.parent.glob("*corrupt*"))


def test_yesterdays_version_is_upgraded_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "thing.json"
    Document(path, version=1).write({"old": 5})
    new = Document(path, version=2, upgrade=lambda fields: {"value": fields["old"]})
    assert new.read() == {"value": 5, "version": 2}
    assert json.loads(path.read_bytes()) == {"old": 5, "version": 1}
    new.update(lambda fields: {**(fields or {}), "more": 1})
    assert json.loads(path.read_bytes()) == {"value": 5, "more": 1, "version": 2}


# Disks that say no


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, 5])
def test_a_failure_at_any_step_leaves_the_old_version_and_says_why(
    tmp_path: Path, number: int
) -> None:
    steps: list[str] = []
    dry_run = Document(tmp_path / "dry.json", version=2)
    put(dry_run, "old")
    with faults.before_each_step(lambda name, _: steps.append(name)):
        put(dry_run, "new")
    in_place = len(steps) - steps[::-1].index("replace")  # afterwards only the folder is synced
    for step in range(len(steps)):
        folder = tmp_path / str(step)
        folder.mkdir()
        document = Document(folder / "thing.json", version=2)
        put(document, "older")
        put(document, "old")
        with (
            faults.before_each_step(faults.At(step, faults.fail_with(number))),
            pytest.raises(DocumentUnwritable, match=r"thing\.json: not saved: ") as raised,
        ):
            put(document, "new")
        assert raised.value.transient
        found = document.read()
        assert found is not None
        assert found["value"] == ("new" if step >= in_place else "old"), (step, steps)
        put(document, "newer")
        assert names(folder) == {"thing.json", "thing.json.bak", "thing.json.lock"}


def test_a_full_disk_leaves_the_old_version(tmp_path: Path) -> None:
    document = Document(tmp_path / "thing.json", version=2)
    put(document, "old")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with contextlib.suppress(DocumentUnwritable):
            put(document, "x" * 5000)

    assert not faults.killed_at(-1, limited)
    assert document.read() == {"value": "old", "version": 2}
    assert names(tmp_path) == {"thing.json", "thing.json.lock"}


def test_a_filesystem_without_hard_links_gets_a_copy_as_backup(document: Document) -> None:
    def no_links(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "link":
            raise OSError(errno.EPERM, "Operation not permitted")

    with faults.before_each_step(no_links):
        put(document, 1)
        put(document, 2)
    document.path.write_bytes(b"bad")
    assert document.read() == {"value": 1, "version": 2}


def test_a_folder_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    document = Document(tmp_path / "gone" / "thing.json", version=2)
    assert document.read() is None
    with pytest.raises(DocumentUnwritable):
        put(document, 1)


# Kills


def test_a_kill_at_any_step_leaves_old_or_new_and_nothing_in_the_way(tmp_path: Path) -> None:
    step = 0
    while True:
        folder = tmp_path / str(step)
        folder.mkdir()
        document = Document(folder / "thing.json", version=2)
        put(document, "older")
        put(document, "old")
        was_killed = faults.killed_at(step, lambda document=document: put(document, "new"))
        assert document.path.exists(), "current is never absent"
        found = document.read()
        assert found is not None and found["value"] in ("old", "new")
        document.clean()
        assert names(folder) == {"thing.json", "thing.json.bak", "thing.json.lock"}
        put(document, "newer")
        assert document.read() == {"value": "newer", "version": 2}
        if not was_killed:
            break
        step += 1
    assert step > 8


def test_a_kill_at_any_step_of_the_first_write_leaves_nothing_or_new(tmp_path: Path) -> None:
    step = 0
    while True:
        document = Document(tmp_path / f"thing{step}.json", version=2)
        was_killed = faults.killed_at(step, lambda document=document: put(document, "new"))
        assert document.read() in (None, {"value": "new", "version": 2})
        if not was_killed:
            break
        step += 1
    assert step > 5


def test_a_kill_at_any_step_of_a_removal_brings_nothing_old_back(tmp_path: Path) -> None:
    step = 0
    while True:
        document = Document(tmp_path / f"thing{step}.json", version=2)
        put(document, "old")
        put(document, "new")
        was_killed = faults.killed_at(step, document.remove)
        assert document.read() in (None, {"value": "new", "version": 2})
        document.remove()
        assert document.read() is None
        if not was_killed:
            break
        step += 1
    assert step > 3


def test_a_kill_at_any_step_of_a_recovery_loses_nothing_more(tmp_path: Path) -> None:
    step = 0
    while True:
        document = Document(tmp_path / f"thing{step}.json", version=2)
        put(document, "old")
        put(document, "new")
        document.path.write_bytes(b"bad")
        was_killed = faults.killed_at(step, document.read)
        assert document.read() == {"value": "old", "version": 2}
        if not was_killed:
            break
        step += 1
    assert step > 5


def test_a_thousand_kills_at_random_moments_lose_nothing_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    document = Document(tmp_path / "thing.json", version=2)
    put(document, 0)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    deadline = time.monotonic() + 60
    kills = 0
    for kills in range(1, 1001):
        acknowledged = faults.steps_until_killed(
            lambda: (put(document, number) for number in range(1, 10_000)),
            after_s=chance.uniform(0.0005, 0.004),
        )
        found = document.read()
        assert found is not None
        assert found["value"] in (acknowledged, acknowledged + 1), f"seed {seed}, kill {kills}"
        put(document, 0)
        if time.monotonic() > deadline:
            break
    document.clean()
    assert names(tmp_path) == {"thing.json", "thing.json.bak", "thing.json.lock"}
    print(f"{kills} kills, seed {seed}")


# Power loss


class Disk:
    """A model of what a disk holds: names and bytes count only once they are synced.

    A file's bytes since its last sync may be missing from any point on; names changed since the
    folder's last sync may be there up to any point, in order, or in any choice of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        self._fds: dict[int, str] = {}

    def record(self, work: Callable[[], object]) -> None:
        original = os.open

        def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            fd = original(path, flags, *more, **named)
            self._fds[fd] = os.fspath(path)
            if flags & os.O_CREAT and not str(path).endswith(".lock"):
                self.steps.append(("create", (Path(path).name,)))
            return fd

        with faults.before_each_step(self._note):
            os.open = opened  # type: ignore[assignment]
            work()

    def _note(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            path = Path(self._fds[arguments[0]]).name
            self.steps.append(("write", (path, bytes(arguments[1]))))
        elif name == "fsync":
            path = Path(self._fds[arguments[0]])
            self.steps.append(("sync names", ()) if path == self.folder else ("sync", (path.name,)))
        elif name in ("link", "replace", "unlink"):
            self.steps.append((name, tuple(Path(argument).name for argument in arguments)))


def _disks_after_power_loss(
    disk: Disk, before: dict[str, bytes], chance: random.Random
) -> list[tuple[int, dict[str, bytes]]]:
    found = []
    for end in range(len(disk.steps) + 1):
        for keep in ("none", "half", "choice"):
            found.append((end, _replay(disk.steps[:end], before, keep, chance)))
    return found


def _replay(
    steps: list[tuple[str, tuple[Any, ...]]],
    before: dict[str, bytes],
    keep: str,
    chance: random.Random,
) -> dict[str, bytes]:
    files = {name: (data, data) for name, data in before.items()}  # name: (synced, written)
    contents: dict[int, tuple[bytes, bytes]] = {}
    table = {name: number for number, name in enumerate(files)}
    contents = dict(enumerate(files.values()))
    durable = dict(table)
    pending: list[tuple[str, tuple[Any, ...]]] = []
    for name, arguments in steps:
        match name:
            case "create":
                number = len(contents)
                contents[number] = (b"", b"")
                table[arguments[0]] = number
                pending.append(("bind", (arguments[0], number)))
            case "write":
                synced, written = contents[table[arguments[0]]]
                contents[table[arguments[0]]] = (synced, written + arguments[1])
            case "sync":
                _, written = contents[table[arguments[0]]]
                contents[table[arguments[0]]] = (written, written)
            case "link":
                table[arguments[1]] = table[arguments[0]]
                pending.append(("bind", (arguments[1], table[arguments[0]])))
            case "replace":
                table[arguments[1]] = table.pop(arguments[0])
                pending.append(("move", (*arguments, table[arguments[1]])))
            case "unlink":
                if table.pop(arguments[0], None) is not None:
                    pending.append(("drop", arguments))
            case "sync names":
                durable, pending = dict(table), []
    if keep == "none":
        kept = []
    elif keep == "half":
        kept = pending[: chance.randint(0, len(pending))]
    else:
        kept = [step for step in pending if chance.random() < 0.5]
    for name, arguments in kept:
        if name == "bind":
            durable[arguments[0]] = arguments[1]
        elif name == "move":
            durable.pop(arguments[0], None)
            durable[arguments[1]] = arguments[2]
        else:
            durable.pop(arguments[0], None)
    return {name: _torn(contents[number], chance) for name, number in durable.items()}


def _torn(content: tuple[bytes, bytes], chance: random.Random) -> bytes:
    synced, written = content
    return written[: chance.randint(len(synced), len(written))]


def test_a_power_loss_at_any_step_leaves_old_or_new(tmp_path: Path) -> None:
    """A simulation: what a real disk does with unsynced writes is not tried here."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    document = Document(folder / "thing.json", version=2)
    put(document, "older")
    put(document, "old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    disk = Disk(folder)
    disk.record(lambda: put(document, "new"))
    assert [name for name, _ in disk.steps].count("sync") == 1
    chance = random.Random(7)
    for number in range(40):
        for end, files in _disks_after_power_loss(disk, before, chance):
            lost = tmp_path / f"{number}-{end}"
            lost.mkdir(exist_ok=True)
            for path in lost.iterdir():
                path.unlink()
            for name, data in files.items():
                (lost / name).write_bytes(data)
            found = Document(lost / "thing.json", version=2).read()
            is_done = end == len(disk.steps)
            assert found is not None
            assert found["value"] in (("new",) if is_done else ("old", "new")), files


# Many at once


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """Where syncing costs nothing, if there is such a place; order is all that matters."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def test_twenty_processes_lose_no_update_and_a_reader_never_sees_a_torn_one(
    quick_folder: Path,
) -> None:
    document = Document(quick_folder / "thing.json", version=2)
    document.write({"entries": []})
    children: list[int] = []
    for number in range(20):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for entry in range(200):
                    document.update(_adding(f"{number}-{entry}"), timeout_s=60)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    seen = 0
    reads = 0
    while children:
        fields = json.loads(document.path.read_bytes())  # not `read`: nothing may be repaired
        assert len(fields["entries"]) >= seen, "an update was lost"
        seen = len(fields["entries"])
        reads += 1
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                children.remove(pid)
    found = document.read()
    assert found is not None
    assert sorted(found["entries"]) == sorted(f"{n}-{e}" for n in range(20) for e in range(200))
    assert reads > 20


def _adding(entry: str) -> Callable[[Any], Any]:
    return lambda fields: {**fields, "entries": [*fields["entries"], entry]}


def test_threads_of_one_process_lose_no_update(document: Document) -> None:
    document.write({"value": 0})

    def count() -> None:
        for _ in range(50):
            document.update(lambda fields: {"value": (fields or {})["value"] + 1}, timeout_s=30)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert document.read() == {"value": 200, "version": 2}


def test_a_writer_that_waits_too_long_says_so_and_readers_wait_for_nobody(
    document: Document,
) -> None:
    put(document, 1)
    with FileLock(document.path.with_name("thing.json.lock"), signed=False):
        began = time.monotonic()
        with pytest.raises(LockHeld):
            document.update(lambda _: {"value": 2}, timeout_s=0.2)
        assert 0.15 < time.monotonic() - began < 2
        assert document.read() == {"value": 1, "version": 2}
        document.clean()


# Anything at all


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=400), backup=st.none() | st.binary(max_size=60))
def test_arbitrary_bytes_never_crash_a_reader_or_writer(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, backup: bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("any")
    document = Document(folder / "thing.json", version=2)
    document.path.write_bytes(data)
    if backup is not None:
        document.path.with_name("thing.json.bak").write_bytes(backup)
    for call in (document.read, lambda: put(document, 1), lambda: document.write({"value": 1})):
        with contextlib.suppress(DocumentError):
            call()


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
        max_size=5,
    )
)
def test_every_json_object_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    document = Document(tmp_path_factory.mktemp("any") / "thing.json", version=2)
    document.write(fields)
    assert document.read() == {**fields, "version": 2}


def test_a_file_beyond_the_limit_is_damage_and_not_read_whole(
    document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    document.path.write_bytes(b'{"version":2,"value":"' + b"x" * 2000 + b'"}')
    with pytest.raises(DocumentBroken, match="longer than"):
        document.read()
