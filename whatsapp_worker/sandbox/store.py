"""What the sandbox network remembers over a restart: one SQLite file in the state folder.

Accounts, paired devices with their public keys and one-time prekeys, and stanzas that wait for a
device. Every change is committed at once in WAL mode without fsync: it survives the end of this
process in any way, and a power cut may cost the last moments.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from whatsapp_worker.sandbox.binary import Codec, Node
from whatsapp_worker.sandbox.groups import Group
from whatsapp_worker.sandbox.model import Device, PreKey
from whatsapp_worker.sandbox.tokens import Tokens

MAX_WAITING = 20_000  # stanzas for one device
TRIM_EVERY = 500  # stanzas stored between two looks at that limit

_SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (phone TEXT PRIMARY KEY, last_device INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    phone TEXT NOT NULL, number INTEGER NOT NULL, noise_key BLOB NOT NULL, identity BLOB NOT NULL,
    registration_id INTEGER NOT NULL, signed_id INTEGER NOT NULL, signed_key BLOB NOT NULL,
    signature BLOB NOT NULL, logins INTEGER NOT NULL, PRIMARY KEY (phone, number));
CREATE TABLE IF NOT EXISTS prekeys (
    phone TEXT NOT NULL, number INTEGER NOT NULL, id INTEGER NOT NULL, key BLOB NOT NULL,
    PRIMARY KEY (phone, number, id));
CREATE TABLE IF NOT EXISTS waiting (
    seq INTEGER PRIMARY KEY, phone TEXT NOT NULL, number INTEGER NOT NULL, stanza BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    id TEXT PRIMARY KEY, subject TEXT NOT NULL, members TEXT NOT NULL, created_at INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS waiting_for ON waiting (phone, number);
"""
_VERSION = 1


class Store:
    """The file; used from one thread.

    Raises:
        ValueError: The file was written by another version.
    """

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            self._db.close()
            raise ValueError(f"{path} was written by another version; use another state folder")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {_VERSION}")
        self._codec = Codec(Tokens())  # a dictionary belongs to one version of neonize

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def accounts(self) -> dict[str, int]:
        """Every phone number that ever linked a device, with its last device number."""
        return dict(self._db.execute("SELECT phone, last_device FROM accounts"))

    def devices(self) -> Iterator[Device]:
        """Every paired device."""
        for row in self._db.execute("SELECT * FROM devices ORDER BY phone, number"):
            yield Device(*row)

    def save_device(self, device: Device) -> None:
        """Insert or replace a device, and its account."""
        self._db.execute(
            "INSERT INTO accounts VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET last_device = max(last_device, excluded.last_device)",
            (device.phone, device.number),
        )
        self._db.execute(
            "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                device.phone,
                device.number,
                device.noise_key,
                device.identity,
                device.registration_id,
                device.signed_id,
                device.signed_key,
                device.signature,
                device.logins,
            ),
        )

    def delete_device(self, device: Device) -> None:
        """Forget a device and everything kept for it."""
        for table in ("devices", "prekeys", "waiting"):
            self._db.execute(f"DELETE FROM {table} WHERE phone = ? AND number = ?", device.key)

    def add_prekeys(self, device: Device, keys: Iterable[PreKey]) -> None:
        """Keep one-time prekeys; the same id again replaces."""
        rows = [(*device.key, key.id, key.key) for key in keys]
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO prekeys VALUES (?, ?, ?, ?)", rows)

    def count_prekeys(self, device: Device) -> int:
        """How many one-time prekeys are left."""
        rows = self._db.execute(
            "SELECT count(*) FROM prekeys WHERE phone = ? AND number = ?", device.key
        )
        return int(rows.fetchone()[0])

    def take_prekey(self, device: Device) -> PreKey | None:
        """Hand out a one-time prekey, for good; None when none is left."""
        row = self._db.execute(
            "SELECT id, key FROM prekeys WHERE phone = ? AND number = ? ORDER BY id LIMIT 1",
            device.key,
        ).fetchone()
        if row is None:
            return None
        self._db.execute(
            "DELETE FROM prekeys WHERE phone = ? AND number = ? AND id = ?", (*device.key, row[0])
        )
        return PreKey(*row)

    def groups(self) -> Iterator[Group]:
        """Every group."""
        for id, subject, members, created_at in self._db.execute("SELECT * FROM groups"):
            yield Group(id, subject, tuple(members.split()), created_at)

    def save_group(self, group: Group) -> None:
        """Insert a group."""
        self._db.execute(
            "INSERT INTO groups VALUES (?, ?, ?, ?)",
            (group.id, group.subject, " ".join(group.members), group.created_at),
        )

    def add_waiting(self, device: Device, stanzas: Iterable[Node]) -> None:
        """Keep stanzas for a device that is offline; the oldest go when there are too many."""
        rows = [(*device.key, self._codec.encode(stanza)) for stanza in stanzas]
        with self._db:
            self._db.execute("BEGIN")
            for row in rows:
                seq = self._db.execute(
                    "INSERT INTO waiting (phone, number, stanza) VALUES (?, ?, ?)", row
                ).lastrowid
                if seq is not None and seq % TRIM_EVERY == 0:
                    self._trim_waiting(device)

    def _trim_waiting(self, device: Device) -> None:
        self._db.execute(
            "DELETE FROM waiting WHERE phone = ? AND number = ? AND seq <= (SELECT seq FROM waiting"
            " WHERE phone = ? AND number = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
            (*device.key, *device.key, MAX_WAITING),
        )

    def count_waiting(self, device: Device) -> int:
        """How many stanzas are kept for a device."""
        rows = self._db.execute(
            "SELECT count(*) FROM waiting WHERE phone = ? AND number = ?", device.key
        )
        return int(rows.fetchone()[0])

    def take_waiting(self, device: Device) -> list[Node]:
        """Hand out what was kept for a device, oldest first."""
        rows = self._db.execute(
            "DELETE FROM waiting WHERE phone = ? AND number = ? RETURNING seq, stanza", device.key
        ).fetchall()
        return [self._codec.decode(stanza) for _, stanza in sorted(rows)]
