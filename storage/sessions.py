"""The records of sessions: what operators want and what is, two documents in a folder each.

    <data>/install.key                     32 random bytes
    <data>/tombstones.json
    <data>/sessions/<id>/wanted.json       written by anybody, under its lock, generation rising
    <data>/sessions/<id>/state.json        written by one process alone

Every reader is told of a tombstone before anything else: a record with one is being deleted,
whatever it says itself. States, reasons and networks are words of the callers.
"""

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.documents import Document, Fields, sync_folder, write_synced
from storage.errors import (
    DocumentBroken,
    DocumentUnwritable,
    RecordBeingDeleted,
    RecordExists,
    RecordExported,
    RecordLost,
    RecordMissing,
    StorageError,
    reason,
)
from storage.hold import Hold
from storage.locks import FileLock, check_locking
from storage.tombstones import Tombstone, Tombstones

log = logging.getLogger(__name__)

WANTED_VERSION = 1
STATE_VERSION = 1
KEY_BYTES = 32
RUN_WORDS = ("run", "stop", "delete")

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
_GRAVE_PREFIX = ".deleted-"  # folders on their way out; no id can start so
_INCOMING_PREFIX = ".incoming-"  # folders on their way in
_INCOMING_S = 3600.0  # older ones were given up


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What operators want of one session.

    Attributes:
        generation: Rises with every change; a state names the one that it acts on.
        network: The network that the session lives on; it runs on no other.
        run: `run`, `stop` or `delete`.
        link: The last link request: request (uuid), method (qr or phone), phone, again; or None.
        logout: The last logout request (uuid); None also where a later command took it back.
        restart: The last restart request (uuid); None likewise.
        created_at: Unix seconds; jobs from before it were meant for an earlier session.
        touched_at: Unix seconds of the last operator command.
        why: Who or what asked for the last change, for people.
        exported_at: Unix seconds when it was moved to another host; it is not wanted to run again
            unless the same change sets this to None.
        more: Fields that this version does not know; kept.
    """

    generation: int
    network: str
    run: str
    created_at: float
    touched_at: float
    link: Fields | None = None
    logout: str | None = None
    restart: str | None = None
    why: str = ""
    exported_at: float | None = None
    version: int = WANTED_VERSION
    more: Fields = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StateRecord:
    """What is the matter with one session; written by its supervisor alone.

    Attributes:
        generation: Of the wanted record that this state acts on.
        since: Unix seconds since when it is in this state.
        attempt: Number of the reconnect attempt; 0 outside a series.
        link: How the last link request ended: request, result, reason, sentence; or None.
        fields: The supervisor's own facts (breakers, series, cool-down).
        more: Fields that this version does not know; kept.
    """

    generation: int
    state: str
    since: float
    reason: str | None = None
    sentence: str = ""
    degraded: bool = False
    jid: str | None = None
    lid: str | None = None
    phone: str | None = None
    push_name: str | None = None
    pid: int | None = None
    attempt: int = 0
    next_attempt_at: float | None = None
    touched_at: float = 0.0
    proof_of_life_at: float | None = None
    rss_mib: float | None = None
    queue: Fields | None = None
    link: Fields | None = None
    banned_until: float | None = None
    fields: Fields = field(default_factory=dict)
    version: int = STATE_VERSION
    more: Fields = field(default_factory=dict)


class Sessions:
    """The records of one data folder. Cheap to make; every process makes its own.

    Args:
        data_dir: The folder. `prepare` makes it; reading an absent one finds nothing.
        max_tombstones: How many deletions are remembered.
    """

    def __init__(self, data_dir: Path, *, max_tombstones: int = 1000) -> None:
        self.data_dir = data_dir
        self.tombstones = Tombstones(data_dir / "tombstones.json", max_tombstones)
        self._folders = data_dir / "sessions"
        self._seen: dict[str, tuple[int, int, int] | None] = {}

    def prepare(self) -> None:
        """Make the folders, mode 0700, and make sure that locks work there. May be repeated.

        Raises:
            LockUnusable: Locks do not exclude anybody on this filesystem.
            DocumentUnwritable: The folders cannot be made (transient).
        """
        try:
            for folder in (self.data_dir, self._folders):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folders.chmod(0o700)
        except OSError as error:
            raise DocumentUnwritable(self.data_dir, f"cannot be made: {reason(error)}") from error
        check_locking(self.data_dir)

    def clean(self) -> list[str]:
        """Remove leftovers of killed processes: temporary files, folders half removed.

        Meant for the start of a supervisor and for the purge; safe at any time.

        Returns:
            The names of what was removed from the sessions folder.
        """
        self.tombstones.clean()
        for id in self.ids():
            self._wanted_document(id).clean()
            self._state_document(id).clean()
        graves = [path for path in _entries(self._folders) if _is_leftover(path)]
        for grave in graves:
            shutil.rmtree(grave, ignore_errors=True)
        return [grave.name for grave in graves]

    def install_key(self) -> bytes:
        """The 32 random bytes of this data folder; made at the first call, never replaced.

        Raises:
            DocumentBroken: The file is there and has another length.
            DocumentUnwritable: It cannot be made (transient).
        """
        path = self.data_dir / "install.key"
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = self._make_install_key(path)
        except OSError as error:
            raise DocumentBroken(path, f"cannot be read: {reason(error)}") from error
        if len(key) != KEY_BYTES:
            raise DocumentBroken(
                path, f"holds {len(key)} bytes, not {KEY_BYTES}: restore it from a backup"
            )
        return key

    def folder(self, id: str) -> Path:
        """Where a session's files lie, whether it exists or not.

        Raises:
            ValueError: It is no session id.
        """
        if not _ID.match(id):
            raise ValueError(f"{id!r:.80} is no session id")
        return self._folders / id

    def session_lock(self, id: str) -> FileLock:
        """The lock that the process which runs this session holds for life."""
        return FileLock(self.folder(id) / "session.lock")

    def hold(self, id: str) -> Hold:
        """What keeps a session's queue from going out from another number."""
        return Hold(self.folder(id))

    def ids(self) -> list[str]:
        """Every session that has a folder, sorted; those being deleted and broken ones too.

        Raises:
            DocumentBroken: The folder cannot be read, which does not mean that it is empty.
        """
        try:
            with os.scandir(self._folders) as entries:
                return sorted(e.name for e in entries if _ID.match(e.name) and e.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DocumentBroken(self._folders, f"cannot be read: {reason(error)}") from error

    def create(self, id: str, *, network: str, now: float, why: str = "") -> Wanted:
        """Make a new record, wanted to run and never linked; removes the id's tombstone.

        Where there was one, what was enqueued until now is held (`Sessions.hold`); also when an
        earlier creation failed half-way.

        Raises:
            RecordExists: There is one already.
            RecordBeingDeleted: Its deletion is not finished (transient).
            DocumentUnwritable, LockHeld: Not made (transient).
        """
        folder = self.folder(id)
        is_used_again = self._require_free(id)
        self.prepare()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)  # a killed create left it
            sync_folder(self._folders)
        except OSError as error:
            raise DocumentUnwritable(folder, f"cannot be made: {reason(error)}") from error
        wanted = Wanted(
            generation=1, network=network, run="run", created_at=now, touched_at=now, why=why
        )

        if is_used_again:
            self.hold(id).put(now)

        def change(fields: Fields | None) -> Fields:
            if fields is not None:
                raise RecordExists(id, f"session {id} exists already")
            return _to_fields(wanted)

        self._wanted_document(id).update(change)
        self._is_made(id, is_used_again)
        return wanted

    def wanted(self, id: str) -> Wanted | None:
        """What operators want; None without a record.

        A session with a tombstone is wanted `delete`, whatever its record says.

        Raises:
            RecordLost: Only the record is gone; `restore` brings it back.
            DocumentBroken, DocumentNewer: This one record cannot be used; others can.
        """
        stone = self.tombstones.find(id)
        fields = self._wanted_document(id).read()
        if fields is None:
            if not stone:
                self._require_not_lost(id)
            return None
        wanted = _wanted(fields)
        return _buried(wanted, stone) if stone else wanted

    def want(
        self,
        id: str,
        change: Callable[[Wanted], Wanted],
        *,
        now: float | None = None,
        timeout_s: float = 5.0,
    ) -> Wanted:
        """Change what is wanted, under the lock, and raise the generation.

        Args:
            change: Gets the record and returns the new one; the generation is counted here.
            now: Becomes `touched_at` when given.

        Raises:
            RecordMissing: There is no session.
            RecordLost: As `wanted`.
            RecordBeingDeleted: A deletion is never taken back.
            RecordExported: It was moved to another host, and the change does not say otherwise.
            DocumentBroken, DocumentNewer: The record cannot be used.
            DocumentUnwritable, LockHeld: Not saved (transient).
        """
        self._require_folder(id)
        result: list[Wanted] = []

        def update(fields: Fields | None) -> Fields:
            if fields is None:
                self._require_not_lost(id)
                raise RecordMissing(id, f"there is no session {id}")
            before = _wanted(fields)
            after = change(before)
            if (before.run == "delete" or self.tombstones.find(id)) and after.run != "delete":
                raise RecordBeingDeleted(id, f"session {id} is being deleted")
            if after.exported_at is not None and after.run == "run":
                raise RecordExported(
                    id,
                    f"session {id} was exported to another host. Running it here as well would end"
                    " it there: force this only if it never ran there",
                )
            touched_at = after.touched_at if now is None else now
            after = dataclasses.replace(
                after, generation=before.generation + 1, touched_at=touched_at
            )
            result.append(after)
            return _to_fields(after)

        self._wanted_document(id).update(update, timeout_s=timeout_s)
        return result[0]

    def restore(self, id: str, wanted: Wanted) -> None:
        """Write the record of a session that has lost it; one that is there stays.

        Args:
            wanted: Its generation must be above that of any state from before, or be the same
                record: else such a state would pass for an answer.

        Raises:
            RecordMissing: The session's folder is gone.
            DocumentBroken, DocumentNewer: There is one, and it cannot be used.
            DocumentUnwritable, LockHeld: Not saved (transient).
        """
        self._require_folder(id)
        self._wanted_document(id).update(
            lambda fields: _to_fields(wanted) if fields is None else None
        )

    def state(self, id: str) -> StateRecord | None:
        """What is; None before the first was written.

        Raises:
            DocumentBroken, DocumentNewer: This one record cannot be used; others can.
        """
        fields = self._state_document(id).read()
        return None if fields is None else _state(fields)

    def put_state(self, id: str, state: StateRecord) -> None:
        """Replace the state; for the supervisor alone. A broken one is set aside.

        Raises:
            RecordMissing: The session's folder is gone.
            DocumentNewer: A newer version wrote what is there.
            DocumentUnwritable, LockHeld: Not saved, the old one is intact (transient).
        """
        try:
            self._require_folder(id)
            self._state_document(id).write(_to_fields(state))
        except DocumentUnwritable:
            self._require_folder(id)  # it was removed meanwhile
            raise

    def remove(self, id: str) -> None:
        """Take the record and all that lies in its folder away, at once and last of all.

        The folder is renamed first: a crash leaves a whole session or none, and `clean` sweeps.

        Raises:
            DocumentUnwritable: It is still there (transient).
        """
        folder = self.folder(id)
        grave = self._folders / f"{_GRAVE_PREFIX}{id}-{secrets.token_hex(8)}"
        try:
            folder.rename(grave)
            sync_folder(self._folders)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DocumentUnwritable(folder, f"cannot be removed: {reason(error)}") from error
        self._seen.pop(id, None)
        shutil.rmtree(grave, ignore_errors=True)

    def incoming(self) -> Path:
        """A new folder, mode 0700, in which a session can be prepared for `adopt`."""
        self.prepare()
        folder = self._folders / f"{_INCOMING_PREFIX}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        return folder

    def adopt(self, id: str, folder: Path, wanted: Wanted, state: StateRecord) -> None:
        """Make a folder from `incoming` a session, at once; removes the id's tombstone.

        Raises:
            RecordExists, RecordBeingDeleted: There is such a session; the folder is left.
            DocumentUnwritable: Not made (transient).
        """
        is_used_again = self._require_free(id)
        if is_used_again:
            Hold(folder).put(wanted.touched_at)
        _document(folder, "wanted.json").write(_to_fields(wanted))
        _document(folder, "state.json").write(_to_fields(state))
        try:
            sync_folder(folder)
            folder.rename(self.folder(id))  # fails when somebody else made it meanwhile
            sync_folder(self._folders)
        except OSError as error:
            raise DocumentUnwritable(self.folder(id), f"cannot be made: {reason(error)}") from error
        self._is_made(id, is_used_again)

    def _require_folder(self, id: str) -> None:
        if not self.folder(id).is_dir():
            raise RecordMissing(id, f"there is no session {id}")

    def _require_not_lost(self, id: str) -> None:
        """For a session without a record: that nothing else of it is left either."""
        folder = self.folder(id)
        if any((folder / name).exists() for name in ("state.json", "device.db")):
            raise RecordLost(
                id,
                f"session {id} has lost its record, wanted.json; its messages wait, and nothing"
                f" else is lost. Make it anew: whatsapp-worker start {id}",
            )

    def _require_free(self, id: str) -> bool:
        """An id that is not in use; whether it was once: its tombstone is removed, since it is
        created on purpose. Before there is a record: one with a tombstone would be deleted."""
        exists = self.folder(id).exists()
        if exists and self.tombstones.find(id):
            raise RecordBeingDeleted(id, f"session {id} is still being deleted; try again")
        if exists and self._wanted_document(id).read() is not None:
            raise RecordExists(id, f"session {id} exists already")
        return self.tombstones.unbury(id)

    def _is_made(self, id: str, is_used_again: bool) -> None:
        """Its hold is on disk, so nobody else needs to remember that the id was used before."""
        if is_used_again:
            with contextlib.suppress(StorageError):  # a later creation holds once too often
                self.tombstones.forget(id)

    def changed(self) -> set[str]:
        """The ids whose wanted record changed since the last call: new and vanished ones too.

        The first call names every session. One `stat` a session, so it may be asked often.

        Raises:
            DocumentBroken: As `ids`; nothing is forgotten.
        """
        root = str(self._folders)
        now = {id: _signature(f"{root}/{id}/wanted.json") for id in self.ids()}
        before, self._seen = self._seen, now
        return {id for id in before.keys() | now.keys() if before.get(id, 0) != now.get(id, 0)}

    def _wanted_document(self, id: str) -> Document:
        return _document(self.folder(id), "wanted.json")

    def _state_document(self, id: str) -> Document:
        return _document(self.folder(id), "state.json")

    def _make_install_key(self, path: Path) -> bytes:
        if self.ids():
            log.warning("install_key.made_anew", extra={"path": str(path)})
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            write_synced(temporary, secrets.token_bytes(KEY_BYTES), 0o600)
            try:
                with contextlib.suppress(FileExistsError):  # another process was first: take its
                    os.link(temporary, path)
                sync_folder(path.parent)
            finally:
                temporary.unlink()
            return path.read_bytes()
        except OSError as error:
            raise DocumentUnwritable(path, f"cannot be made: {reason(error)}") from error


def _document(folder: Path, name: str) -> Document:
    if name == "wanted.json":
        afresh = f"and run: whatsapp-worker start {folder.name}"
        return Document(folder / name, version=WANTED_VERSION, check=_wanted, afresh=afresh)
    return Document(folder / name, version=STATE_VERSION, check=_state)


def _buried(wanted: Wanted, stone: Tombstone) -> Wanted:
    return dataclasses.replace(wanted, run="delete", why=stone.why)


def _wanted(fields: Fields) -> Wanted:
    """Raises ValueError, TypeError or KeyError when it is none."""
    wanted = Wanted(**_known(Wanted, fields))
    _require(type(wanted.generation) is int and wanted.generation >= 1, "generation")
    _require(isinstance(wanted.network, str), "network")
    _require(wanted.run in RUN_WORDS, "run")
    _require(_is_number(wanted.created_at) and _is_number(wanted.touched_at), "created_at")
    _require(wanted.link is None or isinstance(wanted.link, dict), "link")
    _require(all(isinstance(w, str | None) for w in (wanted.logout, wanted.restart)), "logout")
    _require(isinstance(wanted.why, str), "why")
    _require(wanted.exported_at is None or _is_number(wanted.exported_at), "exported_at")
    return wanted


def _state(fields: Fields) -> StateRecord:
    """Raises ValueError, TypeError or KeyError when it is none."""
    state = StateRecord(**_known(StateRecord, fields))
    texts = (state.reason, state.jid, state.lid, state.phone, state.push_name)
    times = (state.next_attempt_at, state.proof_of_life_at, state.rss_mib, state.banned_until)
    _require(type(state.generation) is int and type(state.attempt) is int, "generation")
    _require(isinstance(state.state, str) and isinstance(state.sentence, str), "state")
    _require(all(isinstance(text, str | None) for text in texts), "texts")
    _require(all(time is None or _is_number(time) for time in times), "times")
    _require(_is_number(state.since) and _is_number(state.touched_at), "since")
    _require(isinstance(state.degraded, bool), "degraded")
    _require(state.pid is None or type(state.pid) is int, "pid")
    _require(all(isinstance(part, dict | None) for part in (state.queue, state.link)), "queue")
    _require(isinstance(state.fields, dict), "fields")
    return state


def _known(record: type[Wanted | StateRecord], fields: Fields) -> Fields:
    """A record's arguments: fields that it does not have go into `more`."""
    names = {item.name for item in dataclasses.fields(record)} - {"more"}
    known: dict[str, Any] = {name: fields[name] for name in names & fields.keys()}
    known["more"] = {name: fields[name] for name in fields.keys() - names}
    return known


def _to_fields(record: Wanted | StateRecord) -> Fields:
    fields = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return {**fields.pop("more"), **fields}


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not what it should be")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_leftover(path: Path) -> bool:
    if not path.name.startswith(_INCOMING_PREFIX):
        return path.name.startswith(_GRAVE_PREFIX)
    with contextlib.suppress(OSError):  # adopted just now
        return time.time() - path.stat().st_mtime > _INCOMING_S
    return False


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
