"""Makes a ledger's tables, or brings older ones up to date, or refuses newer ones."""

import contextlib
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from storage import sqlite_files
from storage.database import Database, Statement
from storage.documents import sync_folder, write_synced
from storage.errors import LedgerBroken, LedgerNewer, LedgerUnavailable
from storage.ledger_tables import HEAD, KNOWN_REVISIONS, messages, metadata

VERSION_TABLE = "ledger_version"
CHECK_S = 0.2  # of a SQLite file new to the process, some 20,000 rows; `doctor` looks at all
_CURRENT = Statement(sa.text(f"SELECT version_num FROM {VERSION_TABLE}"))
_ADVISORY_LOCK = 0x1ED6E4  # one process at a time changes the schema


def prepare(database: Database, *, is_owner: bool, was_sound: bool) -> None:
    """Check and upgrade; see `Ledger.open` for what it raises."""
    if database.is_sqlite:
        _check_file(Path(database.location), is_owner=is_owner, was_sound=was_sound)
    with contextlib.suppress(LedgerUnavailable):  # there is no such table yet
        if database.run(_CURRENT, {}) == [(HEAD,)]:
            return
    with database.core() as connection:
        _begin(connection)
        _upgrade(connection, _revision(connection), str(database))
        connection.exec_driver_sql("COMMIT")


def held_path(path: Path) -> Path:
    """The file that says that a damaged ledger was set aside and why; remove it to go on."""
    return path.with_name(path.name + ".held")


def _check_file(path: Path, *, is_owner: bool, was_sound: bool) -> None:
    held = held_path(path)
    if held.exists():
        raise LedgerBroken(held.read_text(errors="replace").strip())
    problems = [] if was_sound else sqlite_files.problems(path, timeout_s=CHECK_S)
    if not problems:
        return
    if not is_owner:  # the process that runs the session may have it open
        raise LedgerUnavailable(
            f"{path} is damaged ({problems[0]}); it is repaired or set aside when its session"
            " starts next"
        )
    if sqlite_files.repair(path):
        return
    aside = sqlite_files.name_aside(path)
    text = (
        f"The ledger {path} was damaged beyond repair and set aside as {aside.name}. Sending on"
        " without it could send messages twice, so this session's queue is held. Look through the"
        f" queue; to go on with an empty ledger remove {held}."
    )
    # Held first: killed between the two, the next opening must not begin an empty ledger.
    try:
        held.unlink(missing_ok=True)
        write_synced(held, f"{text}\nSet aside at {time.time():.0f}.\n".encode(), 0o600)
        sync_folder(path.parent)
    except OSError as error:
        raise LedgerUnavailable(f"{path} is damaged, and cannot be set aside: {error}") from error
    sqlite_files.set_aside(path, aside)
    raise LedgerBroken(text)


def _begin(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")


def _revision(connection: Connection) -> str | None:
    """The revision of the tables; empty when they carry none; None when there are no tables."""
    inspector = sa.inspect(connection)
    if inspector.has_table(VERSION_TABLE):
        found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
        return found or ""
    return "" if inspector.has_table(messages.name) else None


def _upgrade(connection: Connection, revision: str | None, name: str) -> None:
    if revision == HEAD:
        return  # another process was first
    if revision is None:
        _create(connection)
    elif revision and revision not in KNOWN_REVISIONS:
        raise LedgerNewer(
            f"{name} has the ledger of a newer version (revision {revision}, this software knows"
            f" {HEAD}): upgrade it, or use the database that belongs to this version"
        )
    else:
        _migrate(connection)


def _create(connection: Connection) -> None:
    """A new ledger needs no migrations, and most processes never load alembic."""
    metadata.create_all(connection)
    connection.exec_driver_sql(
        f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
    )
    connection.exec_driver_sql(f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')")


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
