"""A session moves to another host in one encrypted file."""

import dataclasses
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import faults
import postgres
import pytest

from storage.errors import RecordExists, RecordExported, StorageError
from storage.ledger import Claim, Ledger, Settlement
from storage.sessions import Sessions, StateRecord
from whatsapp_worker import device_store, transfer
from whatsapp_worker.errors import AlreadyRunning, UnknownSession, UsageError, WorkerError
from whatsapp_worker.session import State
from whatsapp_worker.transfer import TransferFailed, export_session, import_session

PASSPHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_COST", 10)


@pytest.fixture
def here(tmp_path: Path) -> Sessions:
    sessions = Sessions(tmp_path / "here")
    sessions.prepare()
    sessions.create("sales", network="sandbox", now=100.0)
    state = StateRecord(
        generation=1, state="stopped", since=1.0, jid="5511:3@s.whatsapp.net", phone="5511", pid=7
    )
    sessions.put_state("sales", state)
    with sqlite3.connect(sessions.folder("sales") / "device.db") as database:
        database.execute("CREATE TABLE whatsmeow_device (jid, lid, push_name, platform)")
        row = "'5511:3@s.whatsapp.net', '77@lid', 'Sales', 'android'"
        database.execute(f"INSERT INTO whatsmeow_device VALUES ({row})")
        database.execute("CREATE TABLE filler (data)")
        database.execute("INSERT INTO filler VALUES (randomblob(300000))")
    database.close()
    with_rows(sqlite_ledger(sessions)("sales"))
    return sessions


@pytest.fixture
def there(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "there")


def sqlite_ledger(sessions: Sessions) -> Callable[[str], Ledger]:
    return lambda session: Ledger.open(sessions.folder(session) / "ledger.db", session)


def with_rows(ledger: Ledger) -> None:
    for number in range(600):
        claim = Claim(f"m{number}", "h", "j", "r", 1.0)
        ledger.record([(claim, Settlement(f"m{number}", "failed", at=2.0))])
    ledger.claim(Claim("m0", "h", "j2", "r", 3.0), secret=lambda attempt: b"s" * 32)
    ledger.receipt("WA9", "delivered", 5.0)
    ledger.close()


def moved(here: Sessions, target: Path) -> transfer.Transfer:
    return export_session(
        here,
        "sales",
        target,
        passphrase=PASSPHRASE,
        open_ledger=sqlite_ledger(here),
        now=500.0,
    )


def taken(there: Sessions, source: Path, **more: object) -> transfer.Transfer:
    known: dict[str, object] = {"passphrase": PASSPHRASE, "open_ledger": None, "now": 600.0}
    return import_session(there, source, **{**known, **more})  # type: ignore[arg-type]


def test_a_session_arrives_whole_and_stopped(
    here: Sessions, there: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    exported = moved(here, target)
    assert (exported.session, exported.messages) == ("sales", 600)
    assert exported.bytes == target.stat().st_size
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert taken(there, target) == exported
    wanted, state = there.wanted("sales"), there.state("sales")
    assert wanted is not None
    assert state is not None
    assert (wanted.run, wanted.network, wanted.created_at) == ("stop", "sandbox", 100.0)
    assert (state.state, state.phone, state.pid) == (State.STOPPED, "5511", None)
    identity = device_store.identity(there.folder("sales") / "device.db")
    assert identity is not None
    assert identity.phone == "5511"
    ledger = sqlite_ledger(there)("sales")
    assert ledger.counts() == {"failed": 599, "sending": 1}
    assert ledger.sending()[0].secret == b"s" * 32
    assert len(ledger.attempts("m0")) == 1
    assert len(ledger.pending_receipts()) == 1
    ledger.close()
    names = {path.name for path in there.folder("sales").iterdir()}
    assert {name for name in names if not name.endswith(".lock")} == {
        "wanted.json",
        "state.json",
        "device.db",
        "ledger.db",
    }


def test_the_source_runs_again_only_by_force(here: Sessions, tmp_path: Path) -> None:
    moved(here, tmp_path / "sales.session")
    wanted = here.wanted("sales")
    assert wanted is not None
    assert (wanted.run, wanted.exported_at) == ("stop", 500.0)
    with pytest.raises(RecordExported, match="exported to another host"):
        here.want("sales", lambda wanted: dataclasses.replace(wanted, run="run"))
    forced = here.want(
        "sales", lambda wanted: dataclasses.replace(wanted, run="run", exported_at=None)
    )
    assert forced.run == "run"
    here.want("sales", lambda wanted: dataclasses.replace(wanted, run="delete"))


def test_nothing_can_be_read_without_the_passphrase(
    here: Sessions, there: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    moved(here, target)
    data = target.read_bytes()
    for secret in (b"5511", b"whatsmeow", b"SQLite", b"sales"):
        assert secret not in data
    with pytest.raises(UsageError, match="wrong passphrase"):
        taken(there, target, passphrase="correct horse batterz")
    assert there.ids() == []
    assert list((there.data_dir / "sessions").iterdir()) == []


def test_a_file_changed_anywhere_is_refused(
    here: Sessions, there: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    moved(here, target)
    data = target.read_bytes()
    changed = [b"", data[:10], data[:-1], data[:-20], data + b"x", data[: len(data) // 2]]
    for place in (0, 26, 30, 45, 60, len(data) // 2, len(data) - 1):
        changed.append(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    first = 26 + 24
    length = 4 + int.from_bytes(data[first : first + 4], "big")
    second = data[first + length : first + 2 * length]
    changed.append(
        data[:first] + second + data[first : first + length] + data[first + 2 * length :]
    )
    changed.append(data[:first] + data[first + length :])
    for number, bad in enumerate(changed):
        target.write_bytes(bad)
        with pytest.raises((TransferFailed, UsageError)):
            taken(there, target)
        assert there.ids() == [], number
        assert list((there.data_dir / "sessions").iterdir()) == []


def test_a_running_session_is_not_exported(here: Sessions, tmp_path: Path) -> None:
    with here.session_lock("sales"), pytest.raises(AlreadyRunning, match="stop it first"):
        moved(here, tmp_path / "sales.session")
    assert not (tmp_path / "sales.session").exists()


def test_what_cannot_be_exported_says_why_and_stays_as_it_was(
    here: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    here.create("bare", network="sandbox", now=1.0)
    for session, passphrase, error in (
        ("nobody", PASSPHRASE, UnknownSession),
        ("bare", PASSPHRASE, TransferFailed),
        ("sales", "short", UsageError),
    ):
        with pytest.raises(error):
            export_session(
                here,
                session,
                target,
                passphrase=passphrase,
                open_ledger=sqlite_ledger(here),
                now=5.0,
            )
    with pytest.raises(TransferFailed, match="cannot write"):
        moved(here, tmp_path / "missing" / "sales.session")
    target.touch()
    with pytest.raises(UsageError, match="exists already"):
        moved(here, target)
    wanted = here.wanted("sales")
    assert wanted is not None
    assert (wanted.run, wanted.generation) == ("run", 1)
    assert not list(here.data_dir.glob(".export-*"))


def test_an_id_in_use_is_refused_and_another_name_works(
    here: Sessions, there: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    moved(here, target)
    there.create("sales", network="sandbox", now=1.0)
    with pytest.raises(RecordExists):
        taken(there, target)
    assert taken(there, target, name="support").session == "support"
    state = there.state("support")
    assert state is not None and state.sentence.endswith("whatsapp-worker start support")
    ledger = sqlite_ledger(there)("support")
    assert ledger.counts() == {"failed": 599, "sending": 1}
    ledger.close()
    with pytest.raises(UsageError):
        taken(there, target, name="../x")


def test_a_deleted_id_may_be_imported_on_purpose(
    here: Sessions, there: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    moved(here, target)
    there.prepare()
    there.tombstones.add("sales", None, "operator", 1.0)
    taken(there, target)
    assert there.tombstones.find("sales") is None


def test_the_ledger_moves_into_postgresql_and_out_of_it(
    here: Sessions, there: Sessions, tmp_path: Path, postgres_url: str
) -> None:
    first, second = tmp_path / "first.session", tmp_path / "second.session"
    moved(here, first)
    with postgres.fresh_schema(postgres_url, "test_transfer") as url:

        def remote(session: str) -> Ledger:
            return Ledger.open(url, session)

        taken(there, first, open_ledger=remote)
        assert not list(there.folder("sales").glob("ledger.db*"))
        ledger = remote("sales")
        assert ledger.counts() == {"failed": 599, "sending": 1}
        ledger.close()
        exported = export_session(
            there, "sales", second, passphrase=PASSPHRASE, open_ledger=remote, now=700.0
        )
    assert exported.messages == 600
    third = Sessions(tmp_path / "third")
    taken(third, second)
    ledger = sqlite_ledger(third)("sales")
    assert ledger.sending()[0].message_id == "m0"
    ledger.close()


def test_an_export_killed_at_any_step_never_leaves_two_that_run(
    here: Sessions, tmp_path: Path
) -> None:
    step = 0
    while True:
        target = tmp_path / f"{step}.session"
        here.want("sales", lambda w: dataclasses.replace(w, run="run", exported_at=None))
        was_killed = faults.killed_at(step, lambda target=target: moved(here, target))
        wanted = here.wanted("sales")
        assert wanted is not None
        if target.exists():
            assert wanted.exported_at is not None
        if not was_killed:
            break
        step += 7
    assert step > 20


def test_an_import_killed_at_any_step_leaves_a_whole_session_or_none(
    here: Sessions, tmp_path: Path
) -> None:
    target = tmp_path / "sales.session"
    moved(here, target)
    step = 0
    while True:
        there = Sessions(tmp_path / f"there{step}")
        was_killed = faults.killed_at(step, lambda there=there: taken(there, target))
        if there.ids():
            assert there.wanted("sales") is not None
            assert there.state("sales") is not None
            assert device_store.identity(there.folder("sales") / "device.db") is not None
        if not was_killed:
            break
        step += 5
    assert step > 10


def test_errors_of_a_transfer_are_ours() -> None:
    assert issubclass(TransferFailed, WorkerError)
    assert issubclass(RecordExported, StorageError)
