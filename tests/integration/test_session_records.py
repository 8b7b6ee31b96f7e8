"""What operators want and what is: records that survive their writers."""

import contextlib
import dataclasses
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.documents import Document
from storage.errors import (
    DocumentBroken,
    DocumentError,
    DocumentNewer,
    DocumentUnwritable,
    RecordBeingDeleted,
    RecordExists,
    RecordLost,
    RecordMissing,
)
from storage.hold import Hold
from storage.sessions import Sessions, StateRecord, Wanted


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "data")


def made(sessions: Sessions, id: str = "sales") -> Wanted:
    return sessions.create(id, network="sandbox", now=100.0, why="operator")


def stopped(wanted: Wanted) -> Wanted:
    return dataclasses.replace(wanted, run="stop")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(sessions: Sessions) -> None:
    made(sessions)
    assert sessions.changed() == {"sales"}
    folder = sessions.folder("sales").parent
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("not a folder")
    for ask in (sessions.ids, sessions.changed, sessions.clean):
        with pytest.raises(DocumentBroken, match="cannot be read"):
            ask()
    folder.unlink()
    aside.rename(folder)
    assert sessions.changed() == set(), "what was seen before is remembered"


def test_an_absent_data_folder_holds_nothing(sessions: Sessions) -> None:
    assert sessions.ids() == []
    assert sessions.changed() == set()
    assert sessions.wanted("sales") is None
    assert sessions.state("sales") is None
    assert sessions.clean() == []
    with pytest.raises(RecordMissing):
        sessions.want("sales", stopped)
    with pytest.raises(RecordMissing):
        sessions.put_state("sales", StateRecord(generation=1, state="unlinked", since=1.0))
    assert not sessions.data_dir.exists()


def test_a_new_session_is_wanted_to_run_and_was_touched_now(sessions: Sessions) -> None:
    wanted = made(sessions)
    assert wanted == sessions.wanted("sales")
    assert (wanted.run, wanted.generation, wanted.created_at, wanted.touched_at) == (
        "run",
        1,
        100.0,
        100.0,
    )
    with pytest.raises(RecordExists):
        made(sessions)
    for path in (sessions.data_dir, sessions.folder("sales")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_every_change_raises_the_generation(sessions: Sessions) -> None:
    made(sessions)
    assert sessions.want("sales", stopped, now=200.0).generation == 2
    wanted = sessions.want("sales", lambda wanted: wanted)
    assert (wanted.generation, wanted.run, wanted.touched_at) == (3, "stop", 200.0)
    assert sessions.wanted("sales") == wanted


def test_fields_of_other_versions_are_kept(sessions: Sessions) -> None:
    made(sessions)
    path = sessions.folder("sales") / "wanted.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "blue"}))
    sessions.want("sales", stopped)
    assert json.loads(path.read_text())["colour"] == "blue"


def test_a_state_comes_back_as_it_was_put(sessions: Sessions) -> None:
    made(sessions)
    state = StateRecord(
        generation=3, state="connected", since=5.5, jid="1@s", queue={"depth": 1}, pid=7
    )
    sessions.put_state("sales", state)
    assert sessions.state("sales") == state


def test_names_that_are_no_ids_are_refused(sessions: Sessions) -> None:
    for name in ("", "..", "a/b", "A", ".deleted-x", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="no session id"):
            sessions.folder(name)


def test_changes_are_told_once_each(sessions: Sessions) -> None:
    made(sessions)
    made(sessions, "other")
    assert sessions.changed() == {"sales", "other"}
    assert sessions.changed() == set()
    sessions.want("sales", stopped)
    assert sessions.changed() == {"sales"}
    sessions.put_state("sales", StateRecord(generation=1, state="stopped", since=1.0))
    assert sessions.changed() == set()
    Sessions(sessions.data_dir).remove("sales")
    made(sessions, "third")
    assert sessions.changed() == {"sales", "third"}


def test_a_broken_record_stops_no_other(sessions: Sessions) -> None:
    made(sessions)
    made(sessions, "other")
    (sessions.folder("sales") / "wanted.json").write_bytes(b"rubbish")
    assert sessions.ids() == ["other", "sales"]
    with pytest.raises(DocumentBroken):
        sessions.wanted("sales")
    assert sessions.wanted("other") is not None
    (sessions.folder("other") / "state.json").write_bytes(b"rubbish")
    sessions.put_state("other", StateRecord(generation=1, state="unlinked", since=1.0))
    assert sessions.state("other") is not None


@pytest.mark.parametrize("left", ["state.json", "device.db"])
def test_a_session_without_its_record_is_no_unknown_one(sessions: Sessions, left: str) -> None:
    made(sessions)
    folder = sessions.folder("sales")
    (folder / left).write_text('{"version": 1, "generation": 7, "state": "stopped", "since": 1}')
    (folder / "wanted.json").write_bytes(b"rubbish")
    with pytest.raises(DocumentBroken, match=r"remove it and wanted\.json\.bak .* start sales"):
        sessions.wanted("sales")
    (folder / "wanted.json").unlink()
    for ask in (sessions.wanted, lambda id: sessions.want(id, stopped)):
        with pytest.raises(RecordLost, match="start sales"):
            ask("sales")
    lost = Wanted(generation=8, network="sandbox", run="stop", created_at=2.0, touched_at=2.0)
    sessions.restore("sales", lost)
    assert sessions.wanted("sales") == lost
    sessions.restore("sales", dataclasses.replace(lost, run="run"))
    assert sessions.wanted("sales") == lost, "somebody else was first"


def test_a_session_that_is_being_deleted_needs_no_record(sessions: Sessions) -> None:
    made(sessions)
    (sessions.folder("sales") / "device.db").touch()
    (sessions.folder("sales") / "wanted.json").unlink()
    sessions.tombstones.add("sales", None, "delete", 1.0)
    assert sessions.wanted("sales") is None


def test_a_record_of_a_newer_version_is_left_alone(sessions: Sessions) -> None:
    made(sessions)
    path = sessions.folder("sales") / "wanted.json"
    path.write_text('{"version": 2}')
    with pytest.raises(DocumentNewer):
        sessions.want("sales", stopped)
    assert path.read_text() == '{"version": 2}'


# Deletion


def test_a_deletion_is_never_taken_back(sessions: Sessions) -> None:
    made(sessions)
    sessions.want("sales", lambda wanted: dataclasses.replace(wanted, run="delete"))
    with pytest.raises(RecordBeingDeleted):
        sessions.want("sales", lambda wanted: dataclasses.replace(wanted, run="run"))


def test_a_tombstone_outweighs_what_the_record_says(sessions: Sessions) -> None:
    made(sessions)
    sessions.tombstones.add("sales", None, "purge", 5.0)
    wanted = sessions.wanted("sales")
    assert wanted is not None
    assert (wanted.run, wanted.why) == ("delete", "purge")
    with pytest.raises(RecordBeingDeleted):
        sessions.want("sales", lambda wanted: dataclasses.replace(wanted, run="run"))
    with pytest.raises(RecordBeingDeleted):
        made(sessions)


def test_a_deleted_id_may_be_created_again_on_purpose(sessions: Sessions) -> None:
    made(sessions)
    sessions.tombstones.add("sales", None, "purge", 5.0)
    sessions.remove("sales")
    sessions.remove("sales")
    assert sessions.wanted("sales") is None
    assert made(sessions).run == "run"
    assert sessions.tombstones.find("sales") is None


def test_what_was_enqueued_for_a_deleted_session_is_held_when_its_id_is_used_again(
    sessions: Sessions,
) -> None:
    made(sessions)
    assert sessions.hold("sales").before() is None
    sessions.tombstones.add("sales", None, "operator", 2.0)
    sessions.remove("sales")
    sessions.create("sales", network="sandbox", now=3.0)
    assert sessions.hold("sales").before() == 3.0
    assert sessions.hold("sales").release()
    assert not sessions.hold("sales").release()
    assert sessions.hold("sales").before() is None


def used(data: Path) -> Sessions:
    """A folder in which the session sales was deleted."""
    sessions = Sessions(data)
    made(sessions)
    sessions.tombstones.add("sales", None, "operator", 2.0)
    sessions.remove("sales")
    return sessions


def adopted(sessions: Sessions, *, now: float) -> None:
    wanted = Wanted(generation=1, network="sandbox", run="stop", created_at=now, touched_at=now)
    state = StateRecord(generation=1, state="stopped", since=now)
    sessions.adopt("sales", sessions.incoming(), wanted, state)


def created(sessions: Sessions, *, now: float) -> None:
    sessions.create("sales", network="sandbox", now=now)


Make = Callable[..., None]


@pytest.mark.parametrize("make", [created, adopted])
@pytest.mark.parametrize(
    ("place", "name"), [(Hold, "put"), (Path, "mkdir"), (Path, "rename"), (Document, "write")]
)
def test_an_id_used_again_is_held_though_its_first_creation_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, place: type, name: str
) -> None:
    sessions = used(tmp_path / "data")

    def fail(self: Any, *_: Any, **__: Any) -> None:
        path = self if isinstance(self, Path) else Path("queue.json")
        if name != "mkdir" or path.name == "sales":
            raise OSError(28, "the disk is full") if place is Path else full(path)

    def full(path: Path) -> Exception:
        return DocumentUnwritable(path, "not saved: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with contextlib.suppress(DocumentUnwritable):
            make(sessions, now=100.0)
    if sessions.wanted("sales") is None:
        make(sessions, now=101.0)
    assert sessions.hold("sales").before() in (100.0, 101.0)


@pytest.mark.parametrize("make", [created, adopted])
def test_an_id_used_again_is_held_wherever_its_creation_was_killed(
    tmp_path: Path, make: Make
) -> None:
    step = 0
    while True:
        sessions = used(tmp_path / str(step))
        was_killed = faults.killed_at(
            step,
            lambda sessions=sessions: make(sessions, now=100.0),
            also=[(Path, "mkdir"), (Path, "rename")],
        )
        found = sessions.wanted("sales")
        assert found is None or found.run != "delete"
        if found is None:
            make(sessions, now=101.0)
        assert sessions.hold("sales").before() in (100.0, 101.0)
        assert sessions.tombstones.find("sales") is None
        if not was_killed:
            break
        step += 1
    assert step > 15


@pytest.mark.parametrize("make", [created, adopted])
def test_nobody_ever_finds_a_session_that_is_created_again_to_be_deleted(
    tmp_path: Path, make: Make
) -> None:
    sessions, seen = used(tmp_path / "data"), []

    def look(name: str, arguments: tuple[Any, ...]) -> None:
        wanted = Sessions(sessions.data_dir).wanted("sales")
        seen.append(wanted and wanted.run)

    with faults.before_each_step(look):
        make(sessions, now=100.0)
    assert None in seen and "delete" not in seen


def test_an_id_is_held_for_each_deletion_once(tmp_path: Path) -> None:
    sessions = used(tmp_path / "data")
    created(sessions, now=100.0)
    sessions.remove("sales")  # as of one that was never linked
    created(sessions, now=200.0)
    assert sessions.hold("sales").before() is None


def test_a_queue_is_held_when_its_session_gets_another_number(sessions: Sessions) -> None:
    made(sessions)
    hold = sessions.hold("sales")
    assert not hold.number_is("one", 1.0)
    assert not hold.number_is("one", 2.0)
    assert hold.before() is None
    assert hold.number_is("two", 3.0)
    assert not hold.number_is("two", 4.0)
    assert hold.before() == 3.0
    hold.put(5.0)
    assert not hold.number_is("two", 6.0)
    assert hold.before() == 5.0


def test_whose_credentials_claimed_last_is_remembered_beside_the_rest(sessions: Sessions) -> None:
    made(sessions)
    hold = sessions.hold("sales")
    hold.put(5.0)
    assert hold.device() is None
    hold.device_is("one")
    hold.device_is("one")
    assert (hold.device(), hold.before()) == ("one", 5.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"version":1,"held_before":"x"}',
        b'{"version":1,"device":1}',
        b'{"version":9}',
    ],
)
def test_a_hold_that_cannot_be_read_is_said_and_not_forgotten(
    sessions: Sessions, content: bytes
) -> None:
    made(sessions)
    (sessions.folder("sales") / "queue.json").write_bytes(content)
    with pytest.raises(DocumentError, match="queue"):
        sessions.hold("sales").before()


def test_a_state_put_while_the_session_is_removed_finds_no_record(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(sessions)
    original = os.open

    def removed_first(*arguments: Any, **named: Any) -> int:
        if str(arguments[0]).endswith("state.json.lock"):
            sessions.remove("sales")
        return original(*arguments, **named)

    monkeypatch.setattr(os, "open", removed_first)
    with pytest.raises(RecordMissing):
        sessions.put_state("sales", StateRecord(generation=1, state="stopped", since=1.0))


def test_a_removal_killed_at_any_step_leaves_a_whole_session_or_none(tmp_path: Path) -> None:
    step = 0
    while True:
        sessions = Sessions(tmp_path / str(step))
        made(sessions)
        sessions.put_state("sales", StateRecord(generation=1, state="stopped", since=1.0))
        before = sorted(path.name for path in sessions.folder("sales").iterdir())
        was_killed = faults.killed_at(step, lambda sessions=sessions: sessions.remove("sales"))
        folder = sessions.folder("sales")
        if folder.exists():
            assert sorted(path.name for path in folder.iterdir()) == before
        sessions.clean()
        left = [path.name for path in (sessions.data_dir / "sessions").iterdir()]
        assert left in ([], ["sales"])
        if not was_killed:
            assert left == []
            break
        step += 1
    assert step > 4


def test_a_creation_killed_at_any_step_can_be_repeated(tmp_path: Path) -> None:
    step = 0
    while True:
        sessions = Sessions(tmp_path / str(step))
        was_killed = faults.killed_at(step, lambda sessions=sessions: made(sessions))
        if sessions.wanted("sales") is None:
            made(sessions)
        assert sessions.wanted("sales") is not None
        if not was_killed:
            break
        step += 1
    assert step > 6


def test_imports_given_up_long_ago_are_swept_and_present_ones_are_not(sessions: Sessions) -> None:
    old, new = sessions.incoming(), sessions.incoming()
    os.utime(old, (0, 0))
    assert sessions.clean() == [old.name]
    assert new.is_dir()
    assert sessions.ids() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small filesystem can only be mounted by root, outside a container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only_is_told_and_records_stay(small_disk: Path) -> None:
    sessions = Sessions(small_disk / "data")
    made(sessions)
    sessions.want("sales", stopped)
    state = StateRecord(generation=2, state="stopped", since=1.0)
    with (small_disk / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
        while True:
            fill.write(b"x" * 1024)
    for call in (
        lambda: sessions.put_state("sales", state),
        lambda: sessions.want("sales", lambda wanted: wanted),
        lambda: made(sessions, "other"),
    ):
        with pytest.raises(DocumentUnwritable, match="the disk is full"):
            call()
    (small_disk / "fill").unlink()
    sessions.put_state("sales", state)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for call in (
        lambda: sessions.put_state("sales", state),
        lambda: sessions.want("sales", lambda wanted: wanted),
        lambda: sessions.remove("sales"),
    ):
        with pytest.raises(DocumentUnwritable, match="read-only"):
            call()
    wanted = sessions.wanted("sales")
    assert wanted is not None
    assert (wanted.run, wanted.generation) == ("stop", 2)
    assert sessions.state("sales") == state


# The install key


def test_the_install_key_is_made_once_and_private(sessions: Sessions) -> None:
    sessions.prepare()
    key = sessions.install_key()
    assert len(key) == 32
    assert Sessions(sessions.data_dir).install_key() == key
    assert stat.S_IMODE((sessions.data_dir / "install.key").stat().st_mode) == 0o600


def test_processes_that_start_together_agree_on_the_install_key(sessions: Sessions) -> None:
    sessions.prepare()
    reading, writing = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.write(writing, sessions.install_key())
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    assert {said[i : i + 32] for i in range(0, len(said), 32)} == {sessions.install_key()}
    assert [path.name for path in sessions.data_dir.iterdir() if "key" in path.name] == [
        "install.key"
    ]


def test_a_damaged_install_key_is_never_replaced(sessions: Sessions) -> None:
    sessions.prepare()
    (sessions.data_dir / "install.key").write_bytes(b"short")
    with pytest.raises(DocumentBroken, match="restore it from a backup"):
        sessions.install_key()
    assert (sessions.data_dir / "install.key").read_bytes() == b"short"


# Anything at all

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = [field.name for field in dataclasses.fields(Wanted)]
FIELDS += [field.name for field in dataclasses.fields(StateRecord)]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["wanted.json", "state.json"]),
    data=st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(FIELDS), ANYTHING).map(lambda fields: json.dumps(fields)),
)
def test_whatever_lies_in_a_record_only_that_session_is_hurt(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: Any
) -> None:
    sessions = Sessions(tmp_path_factory.mktemp("any"))
    made(sessions)
    made(sessions, "other")
    path = sessions.folder("sales") / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    for read in (sessions.wanted, sessions.state):
        try:
            found = read("sales")
        except DocumentError:
            continue
        assert found is None or dataclasses.asdict(found)
    assert sessions.ids() == ["other", "sales"]
    assert sessions.wanted("other") is not None
