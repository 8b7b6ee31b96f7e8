"""Ledgers that are damaged, newer, older, locked, full, frozen or gone."""

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import postgres
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from support import locked

import storage
from storage import ledger_schema, sqlite_files
from storage.database import Database, Statement
from storage.errors import LedgerBroken, LedgerNewer, LedgerUnavailable
from storage.ledger import RANK, Claim, Claimed, Ledger, Settlement
from storage.ledger_schema import VERSION_TABLE, held_path
from storage.ledger_tables import HEAD, KNOWN_REVISIONS, metadata
from whatsapp_worker import event_names


def secret(attempt: int) -> bytes:
    return bytes([attempt]) * 32


def claim(ledger: Ledger, id: str = "m1") -> None:
    wanted = Claim(id, "hash", "j1", "recipient", 1.0, metadata='{"deal": 7}')
    assert isinstance(ledger.claim(wanted, secret=secret), Claimed)


def test_the_ledger_ranks_statuses_as_the_contract_does() -> None:
    words = {status.value: rank for status, rank in event_names.RANK.items()}
    assert words == {**RANK, "queued": 0}


# Versions


def run_sql(location: str | Path, *lines: str) -> None:
    database = Database(location, timeout_s=5)
    with database.core() as connection:
        for line in lines:
            connection.exec_driver_sql(line)
    database.close()


def test_migrations_make_the_same_tables_as_a_new_ledger_has(location: str | Path) -> None:
    run_sql(location, f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL)")
    ledger = Ledger.open(location, "sales")  # upgraded from before the first revision
    claim(ledger)
    ledger.close()
    database = Database(location, timeout_s=5)
    with database.core() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD
    database.close()


@pytest.fixture
def older(location: str | Path) -> str | Path:
    """A ledger of the first revision, with the message `m0` in it."""
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "migrations"))
    database = Database(location, timeout_s=5)
    with database.core() as connection:
        connection.exec_driver_sql("BEGIN")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql("COMMIT")
    database.close()
    row = "('sales', 'm0', 'sent', 1, 'hash', 'j0', 'recipient', 1.0)"
    names = "session, message_id, status, attempt, content_hash, job_id, recipient_hash, claimed_at"
    run_sql(location, f"INSERT INTO ledger_messages ({names}) VALUES {row}")
    return location


def test_an_older_ledger_keeps_its_rows_and_takes_new_ones(older: str | Path) -> None:
    ledger = Ledger.open(older, "sales")
    claim(ledger)
    old, new = ledger.find("m0"), ledger.find("m1")
    ledger.close()
    assert old and (old.status, old.metadata) == ("sent", None)
    assert new and (new.status, new.metadata) == ("sending", '{"deal": 7}')


def test_what_pip_installs_brings_its_migrations_along(older: str | Path, installed: Path) -> None:
    script = (
        "import sys; from storage import ledger_tables; from storage.ledger import Ledger;"
        "ledger = Ledger.open(sys.argv[1], 'sales');"
        "assert ledger.find('m0').metadata is None;"
        "print(ledger_tables.__file__)"
    )
    done = subprocess.run(
        [installed / "bin" / "python", "-P", "-c", script, older],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(installed), done.stderr
    database = Database(older, timeout_s=5)
    assert database.run(Statement(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")), {}) == [
        (HEAD,)
    ]
    database.close()


def test_the_newest_migration_is_the_one_that_the_tables_name() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == HEAD
    assert {script.revision for script in scripts.walk_revisions()} == KNOWN_REVISIONS


def test_a_newer_ledger_is_refused_and_not_touched(location: str | Path) -> None:
    Ledger.open(location, "sales").close()
    run_sql(location, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(LedgerNewer, match="revision 9999"):
        Ledger.open(location, "sales")
    run_sql(location, f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")
    Ledger.open(location, "sales").close()


def test_opening_a_ledger_that_is_up_to_date_loads_no_alembic(tmp_path: Path) -> None:
    script = (
        "import sys; from storage.ledger import Ledger;"
        f"Ledger.open({str(tmp_path / 'ledger.db')!r}, 's').close();"
        "sys.exit('alembic' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


# SQLite files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def filled(path: Path) -> Path:
    ledger = Ledger.open(path, "sales")
    for number in range(400):
        claim(ledger, f"m{number}")
        ledger.settle(Settlement(f"m{number}", "sent", wa_message_id=f"WA{number}", at=2.0))
    ledger.close()
    return path


def test_ledger_files_are_private(path: Path) -> None:
    before = os.umask(0)
    try:
        ledger = Ledger.open(path, "sales")
        claim(ledger)
    finally:
        os.umask(before)
    files = list(path.parent.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    ledger.close()


def test_opening_a_ledger_twice_in_a_process_keeps_its_locks(path: Path) -> None:
    """Closing a descriptor of the file anywhere in the process would drop them."""
    ledger = Ledger.open(path, "sales")
    with ledger._database.transaction():
        with pytest.raises(LedgerUnavailable, match="locked"):
            second = Ledger.open(path, "sales", timeout_s=0.1)
            claim(second, "m2")
        probe = (
            "import sqlite3, sys;sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
        )
        done = subprocess.run([sys.executable, "-c", probe, path], capture_output=True, text=True)
        assert "database is locked" in done.stderr
    ledger.close()


def test_a_damaged_index_is_rebuilt(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(filled) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute(  # what the index holds no longer fits what it should hold
            "UPDATE sqlite_master SET sql = replace(sql, 'claimed_at', 'wa_message_id')"
            " WHERE name = 'ledger_messages_by_time'"
        )
    connection.close()
    ledger = Ledger.open(filled, "sales", is_owner=True)
    assert [record.message for record in caplog.records] == ["sqlite.repaired"]
    assert ledger.counts() == {"sent": 400}
    ledger.close()


@pytest.mark.parametrize("damage", ["header", "pages", "truncated"])
def test_a_ledger_beyond_repair_is_set_aside_and_held_until_an_operator_acts(
    filled: Path, damage: str
) -> None:
    data = bytearray(filled.read_bytes())
    if damage == "header":
        data[:100] = b"x" * 100
    elif damage == "pages":
        for page in range(2, len(data) // 4096 - 2):
            data[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    else:
        del data[len(data) // 2 :]
    filled.write_bytes(data)
    for _ in range(2):
        with pytest.raises(LedgerBroken, match=r"set aside as ledger\.db\.broken-.*queue is held"):
            Ledger.open(filled, "sales", is_owner=True)
    assert not filled.exists()
    (aside,) = filled.parent.glob("ledger.db.broken-*")
    assert aside.read_bytes() == data
    assert stat.S_IMODE(held_path(filled).stat().st_mode) == 0o600
    held_path(filled).unlink()
    ledger = Ledger.open(filled, "sales")
    assert ledger.counts() == {}
    ledger.close()


def test_only_the_process_that_runs_the_session_touches_a_damaged_ledger(filled: Path) -> None:
    owner = Ledger.open(filled, "sales", is_owner=True)
    with filled.open("r+b") as file:
        for page in range(2, filled.stat().st_size // 4096 - 2):
            file.seek(page * 4096)
            file.write(b"\xff" * 200)
    data, names = filled.read_bytes(), sorted(filled.parent.iterdir())
    with pytest.raises(LedgerUnavailable, match="when its session starts next") as raised:
        Ledger.open(filled, "sales")
    assert raised.value.transient
    assert (filled.read_bytes(), sorted(filled.parent.iterdir())) == (data, names)
    owner.close()
    _refused(filled)
    with pytest.raises(LedgerBroken, match="queue is held"):
        Ledger.open(filled, "sales")


def test_a_kill_while_a_ledger_is_set_aside_never_leaves_an_empty_one(filled: Path) -> None:
    data = b"x" * 4096 + filled.read_bytes()[4096:]
    step = 0
    while True:
        filled.write_bytes(data)
        was_killed = faults.killed_at(step, lambda: _refused(filled))
        _refused(filled)
        if not was_killed:
            break
        for path in filled.parent.iterdir():
            path.unlink()
        step += 1
    assert step > 4


def _refused(path: Path) -> None:
    with pytest.raises(LedgerBroken):
        Ledger.open(path, "sales", is_owner=True).close()


def test_damage_found_while_running_is_named(filled: Path) -> None:
    ledger = Ledger.open(filled, "sales")
    ledger.find("m1")
    data = filled.read_bytes()
    with filled.open("r+b") as file:
        for page in range(1, len(data) // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 100)
    with pytest.raises(LedgerBroken, match="is damaged"):
        ledger.recent(1000)
        ledger.counts()
    ledger.close()


def test_the_check_is_bounded_in_time(filled: Path) -> None:
    assert sqlite_files.problems(filled, timeout_s=0) == []
    assert sqlite_files.problems(filled) == []
    assert sqlite_files.problems(filled.parent / "none.db") == []


def test_a_locked_ledger_is_unavailable_within_the_time_and_works_afterwards(path: Path) -> None:
    ledger = Ledger.open(path, "sales", timeout_s=0.3)
    claim(ledger)
    with locked(path):
        began = time.monotonic()
        with pytest.raises(LedgerUnavailable, match="locked") as raised:
            ledger.settle(Settlement("m1", "sent", at=2.0))
        assert 0.25 < time.monotonic() - began < 2
    assert raised.value.transient
    row = ledger.settle(Settlement("m1", "sent", at=2.0))
    assert row is not None
    assert row.status == "sent"
    ledger.close()


def test_a_full_disk_is_unavailable_and_loses_nothing_that_was_committed(path: Path) -> None:
    ledger = Ledger.open(path, "sales")
    claim(ledger)
    ledger.close()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = Ledger.open(path, "sales")
        limit = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(LedgerUnavailable):
            for number in range(1000):
                claim(full, f"more{number}")

    assert in_child(limited) == 0
    ledger = Ledger.open(path, "sales")
    assert ledger.find("m1") is not None
    claim(ledger, "m2")
    ledger.close()


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_ledger_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable):
        Ledger.open(tmp_path / "missing" / "ledger.db", "sales")


def test_threads_take_turns(location: str | Path) -> None:
    ledger = Ledger.open(location, "sales", timeout_s=30)
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(25):
                claim(ledger, f"{name}{number}")
                ledger.settle(Settlement(f"{name}{number}", "sent", at=2.0))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert ledger.counts() == {"sent": 100}
    ledger.close()


# A PostgreSQL that goes away


@pytest.fixture
def server(postgres_server: postgres.Server | None, postgres_url: str) -> postgres.Server:
    """One that may be stopped; there is another at `postgres_url` at least."""
    if postgres_server is None:
        pytest.skip("stopping a PostgreSQL needs its programs here: initdb and postgres")
    return postgres_server


@pytest.fixture
def remote(server: postgres.Server) -> Iterator[Ledger]:
    with postgres.fresh_schema(server.url, f"test_{uuid.uuid4().hex}") as url:
        ledger = Ledger.open(url, "sales", timeout_s=1.5)
        yield ledger
        ledger.close()


def test_a_restarted_postgresql_costs_one_call(remote: Ledger, server: postgres.Server) -> None:
    claim(remote)
    server.stop()
    for _ in range(2):
        with pytest.raises(LedgerUnavailable) as raised:
            remote.settle(Settlement("m1", "sent", at=2.0))
        assert raised.value.transient
    server.start()
    row = remote.settle(Settlement("m1", "sent", at=2.0))
    assert row is not None
    assert row.status == "sent"


def test_a_frozen_postgresql_is_cut_off_in_time(remote: Ledger, server: postgres.Server) -> None:
    claim(remote)
    for _ in range(2):
        began = time.monotonic()
        with server.frozen(), pytest.raises(LedgerUnavailable):
            remote.settle(Settlement("m1", "sent", at=2.0))
        # The second time it is connecting that hangs; libpq waits two seconds at least.
        assert time.monotonic() - began < 4
    row = remote.settle(Settlement("m1", "sent", at=2.0))
    assert row is not None
    assert row.status == "sent"


def test_a_row_locked_by_another_is_unavailable_within_the_time(remote: Ledger) -> None:
    claim(remote)
    other = Ledger.open(remote._database.location, "sales")
    with other._database.transaction() as transaction:
        other._lock(transaction, "m1")
        began = time.monotonic()
        with pytest.raises(LedgerUnavailable, match="timeout"):
            remote.settle(Settlement("m1", "sent", at=2.0))
        assert time.monotonic() - began < 1.5
    assert remote.settle(Settlement("m1", "sent", at=2.0)) is not None
    other.close()


def test_an_ended_connection_is_made_anew(remote: Ledger) -> None:
    claim(remote)
    with sa.create_engine(remote._database.engine.url).connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
        )
    with pytest.raises(LedgerUnavailable):
        remote.find("m1")
    assert remote.find("m1") is not None


def test_a_password_never_shows_in_errors() -> None:
    url = "postgresql://user:geheim@127.0.0.1:1/none"
    with pytest.raises(LedgerUnavailable) as raised:
        Ledger.open(url, "sales")
    assert "geheim" not in str(raised.value)
    assert "127.0.0.1:1" in str(raised.value)
    assert ledger_schema.HEAD
