"""The ledger's database is away, or was upgraded by newer software, on either kind: receipts are
not lost, nothing is sent, and one sentence says why."""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import postgres
import psycopg
import pytest
from ingest import Ingest
from support import events
from world import World, eventually

from storage.ledger import RANK
from storage.ledger_tables import HEAD

CONTACT = "5521988880001"
NEWER = f"has the ledger of a newer version (revision 9999, this software knows {HEAD})"


class Database(Protocol):
    """The ledger's database as its operator has it."""

    environ: dict[str, str]

    def away(self) -> AbstractContextManager[None]: ...

    def run(self, line: str) -> list[Any]: ...


@dataclass
class Sqlite:
    path: Path
    environ: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Held by somebody else."""
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield

    def run(self, line: str) -> list[Any]:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            return connection.execute(line).fetchall()


@dataclass
class Postgresql:
    server: postgres.Server

    @property
    def environ(self) -> dict[str, str]:
        return {"DATABASE_URL": self.server.url}

    @contextmanager
    def away(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    def run(self, line: str) -> list[Any]:
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            done = connection.execute(line)  # type: ignore[call-overload]
            return list(done.fetchall()) if done.description else []


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Of the one session `sales`."""
    if request.param == "sqlite":
        yield Sqlite(tmp_path / "data" / "sessions" / "sales" / "ledger.db")
        return
    with postgres.own_server() as server:
        if server is None:
            postgres.missing("stopping a PostgreSQL needs its programs here: initdb and postgres")
        yield Postgresql(server)


# Receipts


def test_receipts_reach_ledger_and_crm_though_the_database_was_away(
    tmp_path: Path, database: Database
) -> None:
    with World.running(tmp_path, DB_RESET_S="1", **database.environ) as world:
        world.link("sales")
        world.control.contacts(CONTACT, receipts="none")
        jobs = [world.enqueue("sales", CONTACT, "text", f"m{n}") for n in range(3)]
        ids = [str(outcome["wa_message_id"]) for outcome in world.await_outcomes(jobs)]
        assert_bounded(database)
        # Taken by WhatsApp, which says so only when the database is away.
        world.control.send_fault("slow", to=CONTACT, delay_s=12)
        late = world.enqueue("sales", CONTACT, "late", "late")
        [row] = eventually(lambda: [row for row in world.arrived() if row["text"] == "late"])
        ids.append(row["id"])
        with database.away():
            assert told(world, "message.sent") == {f"m{n}" for n in range(3)}, "a slow machine"
            kill_events(world)
            for id in ids:
                world.control.receipts(id, "read")
            eventually(lambda: set(receipts(world, "message.read")) == set(ids))
            for id in ids:
                world.control.receipts(id, "delivered")  # overtaken by `read`
            world.events = world.spawn("events")
            eventually(lambda: pending(world), what="they are read, and cannot be written")
            kill_events(world)
            world.events = world.spawn("events")
            lost = "consumer.database_lost"
            eventually(lambda: lost in (world.folder / "run.log").read_text(), what=lost)
        await_all_read(world, database, ["m0", "m1", "m2", "late"])
        assert world.await_outcomes([late])[0]["wa_message_id"] == ids[3]
        assert told(world, "message.sent") == {"m0", "m1", "m2", "late"}
        # After a restart of the device process only the ledger knows whose they are.
        again = world.enqueue("sales", CONTACT, "again", "again")
        ids.append(world.await_outcomes([again])[0]["wa_message_id"])
        world.replace_process("sales")
        world.await_state("sales", "connected")
        for step in ("delivered", "read", "read"):
            world.control.receipts(ids[-1], step)
        await_all_read(world, database, ["m0", "m1", "m2", "late", "again"])
        for name in ("message.delivered", "message.read"):
            found = receipts(world, name)
            assert {id: len(set(repeats)) for id, repeats in found.items()} == dict.fromkeys(ids, 1)
        assert told(world, "message.read") >= {"m0", "m1", "m2", "again"}


def assert_bounded(database: Database) -> None:
    """What a real run made of its database."""
    if isinstance(database, Sqlite):
        assert database.run("PRAGMA journal_mode") == [("wal",)]
        return

    def connections() -> int:
        [(count,)] = database.run(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid != pg_backend_pid()"
        )
        return int(count)

    eventually(lambda: connections() >= 2, what="the device process and `events` are connected")
    assert connections() <= 5, "and for a moment keeper, alerts and purge"


def kill_events(world: World) -> None:
    world.events.kill()
    world.events.wait()


def told(world: World, name: str) -> set[str | None]:
    """The message ids of such events."""
    return {e["payload"]["message_id"] for e in events(world.redis) if e["event"] == name}


def receipts(world: World, name: str) -> dict[str, list[str]]:
    """The ids of such events, by WhatsApp's id."""
    found: dict[str, list[str]] = {}
    for event in events(world.redis):
        if event["event"] == name:
            found.setdefault(event["payload"]["wa_message_id"], []).append(event["id"])
    return found


def pending(world: World) -> int:
    return int(world.redis.xpending("wa:events", "ledger")["pending"])  # type: ignore[index]


def await_all_read(world: World, database: Database, message_ids: list[str]) -> None:
    """Every message is read and every event is acknowledged; on the way none goes back."""
    ranks: dict[str, int] = {}

    def is_done() -> bool:
        now = dict(database.run("SELECT message_id, status FROM ledger_messages"))
        for id, status in now.items():
            assert RANK[status] >= ranks.get(id, 0), (id, status)
            ranks[id] = RANK[status]
        [group] = world.redis.xinfo_groups("wa:events")  # type: ignore[misc]
        [(last, _)] = world.redis.xrevrange("wa:events", count=1)  # type: ignore[misc]
        is_idle = not group["pending"] and group["last-delivered-id"] == last
        return is_idle and now == dict.fromkeys(message_ids, "read")

    eventually(is_done, within_s=60, what=f"{message_ids} are read")


# Newer software


def test_a_ledger_of_newer_software_stops_its_session_with_one_sentence_until_it_fits_again(
    tmp_path: Path, database: Database
) -> None:
    with (
        closing(Ingest().start()) as ingest,
        World.running(tmp_path, SENTRY_DSN=ingest.dsn, **database.environ) as world,
    ):
        world.link("sales")
        world.await_outcomes([world.enqueue("sales", CONTACT, "before", "m0")])
        assert world.run("stop", "sales").returncode == 0
        database.run("UPDATE ledger_version SET version_num = '9999'")
        job = world.enqueue("sales", CONTACT, "during", "m1")
        started = world.run("start", "sales")
        assert started.returncode == 1
        assert NEWER in started.stderr
        listed = world.run("messages", "list", "sales")
        assert (listed.returncode, len(listed.stderr.splitlines())) == (1, 1)
        assert NEWER in listed.stderr
        assert world.supervisor is not None
        world.supervisor.terminate()
        assert world.supervisor.wait(30) == 0
        world.start_supervisor()
        world.await_state("sales", "failed")
        eventually(lambda: NEWER in world.session("sales")["sentence"], what="status says why")
        logs = world.run("logs", "sales").stdout.splitlines()
        refused = [line for line in logs if "session.refused" in line]
        assert all(NEWER in line for line in refused)
        series = sum("state=failed" in line for line in logs) + 1  # one may be under way
        assert 2 <= len(refused) <= 4 * series, "no more than any other failure is tried"
        eventually(lambda: ingest.events, what="an alert, though it is tried again by itself")
        [alert] = ingest.events
        assert (alert["tags"]["event"], alert["tags"]["reason"]) == ("session.ended", "cannot-run")
        assert world.outcome(job) == {}
        database.run(f"UPDATE ledger_version SET version_num = '{HEAD}'")
        assert world.await_outcomes([job])[0]["status"] in ("sent", "delivered")
        assert [row["text"] for row in world.arrived()] == ["before", "during"]
