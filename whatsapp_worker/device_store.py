"""neonize's database file, read while no process has it open.

Hold the session's `session.lock` around every call here: what a killed process left in the log is
folded in by whoever opens the file next, and a reader beside neonize could make its write fail.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from whatsapp_worker.errors import WorkerError
from whatsapp_worker.facts import Identity

_BATCH = 500  # secrets looked up in one query; SQLite takes at most 32,766 parameters
_SIDE_FILES = ("-journal", "-wal", "-shm")
_PASSING = (
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM),
)


class DeviceStoreBroken(WorkerError):
    """The credentials file cannot be read; linking again makes a new one."""


class DeviceStoreUnavailable(DeviceStoreBroken):
    """Not now: the disk is full, or another process holds it. The credentials may be well."""

    transient = True


def identity(path: Path) -> Identity | None:
    """Whose credentials the file holds; None when there is no file or no credentials in it.

    Raises:
        DeviceStoreBroken: It is not a device database, or damaged.
        DeviceStoreUnavailable: Not now (transient).
    """
    if not path.exists():
        return None
    with _open(path) as database:
        if not _has_table(database, "whatsmeow_device"):
            return None
        row = database.execute(
            "SELECT jid, lid, push_name, platform FROM whatsmeow_device ORDER BY rowid LIMIT 1"
        ).fetchone()
    return Identity(*(value or "" for value in row)) if row else None


def handed_over(path: Path, secrets: Iterable[bytes]) -> dict[bytes, str]:
    """The WhatsApp message ids of those secrets that neonize ever took: absent means never sent.

    whatsmeow stores the secret with its message id before it encrypts (tried with 0.5.2), so a
    message without a row never left this process.

    Raises:
        DeviceStoreBroken: It is not a device database, or damaged.
        DeviceStoreUnavailable: Not now (transient).
    """
    wanted = list(secrets)
    if not wanted or not path.exists():
        return {}
    found: dict[bytes, str] = {}
    with _open(path) as database:
        if not _has_table(database, "whatsmeow_message_secrets"):
            return {}
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            marks = ",".join("?" * len(batch))
            query = f"SELECT key, message_id FROM whatsmeow_message_secrets WHERE key IN ({marks})"
            found.update((bytes(key), str(name)) for key, name in database.execute(query, batch))
    return found


def adopt(pairing: Path, device: Path) -> Identity:
    """Make a finished pairing.db the session's device.db, whole or not at all.

    Raises:
        DeviceStoreBroken: It holds no usable credentials; nothing was changed.
    """
    who = identity(pairing)
    if who is None:
        raise DeviceStoreBroken(f"{pairing.name} holds no credentials")
    if problems := check(pairing):
        raise DeviceStoreBroken(f"{pairing.name}: {problems[0]}")
    _fold(pairing)
    pairing.chmod(0o600)
    _sync(pairing)
    # A log of the old credentials would be replayed into the new file.
    with suppress(DeviceStoreBroken):
        identity(device)
    _remove_side_files(device)
    pairing.rename(device)
    _remove_side_files(pairing)
    _sync(device.parent)
    return who


def remove(path: Path) -> None:
    """Delete a database file and what SQLite left beside it; missing ones are fine."""
    path.unlink(missing_ok=True)
    _remove_side_files(path)


def check(path: Path) -> list[str]:
    """SQLite's own integrity check: problems found, empty when sound. Slow on a large file."""
    try:
        with _open(path) as database:
            rows = database.execute("PRAGMA integrity_check(10)").fetchall()
    except DeviceStoreBroken as broken:
        return [str(broken)]
    return [str(row[0]) for row in rows if row[0] != "ok"]


def _fold(path: Path) -> None:
    """Bring everything into the one file: a log does not follow its database through a rename."""
    with _open(path) as database:
        is_busy, *_ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_busy:
        raise DeviceStoreBroken(f"{path.name}: another process has it open")


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """Open for writing, since what a killed process left in a journal or log is settled by the
    first reader that may write; a read-only connection would see half a transaction or fail."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as database:
            yield database
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
        kind = DeviceStoreUnavailable if code in _PASSING else DeviceStoreBroken
        raise kind(f"{path.name}: {error}") from error


def _has_table(database: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return database.execute(query, (name,)).fetchone() is not None


def _remove_side_files(path: Path) -> None:
    for suffix in _SIDE_FILES:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
