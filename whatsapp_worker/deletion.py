"""Removes a session for good: tombstone first, credentials, queued messages, record last.

Every step may be repeated, so a crash at any point is finished by the next call, and nothing that
was deleted comes back. Supervisor and purge both delete by this code; logging out at WhatsApp is
the supervisor's, before.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StorageError
from storage.locks import FileLock
from storage.sessions import Sessions, StateRecord
from whatsapp_worker import device_store
from whatsapp_worker.device_store import DeviceStoreBroken
from whatsapp_worker.keys import number_hash

log = logging.getLogger(__name__)

LOCK_WAIT_S = 1.0  # a device process that was told to leave needs a moment
_CREDENTIALS = ("device.db", "pairing.db")
_SECRETS = ("link.json",)


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion did.

    Attributes:
        jobs_failed: Queued messages that were told "session deleted".
        bytes_freed: Size of the files removed.
    """

    jobs_failed: int
    bytes_freed: int


def delete_session(
    sessions: Sessions,
    session: str,
    *,
    why: str,
    now: float,
    fail_queue: Callable[[str], int] | None = None,
    forget: Callable[[str], object] | None = None,
    lock: FileLock | None = None,
) -> Deleted:
    """Remove a session that is wanted deleted and that no process runs.

    Args:
        why: For the tombstone, in a few words.
        now: Unix seconds.
        fail_queue: Fails every job that waits for the session with "session deleted" and returns
            how many; raises when it cannot, and the record stays until it could. None leaves the
            jobs to the queue keeper.
        forget: Removes the session's ledger rows where they are not in its folder (PostgreSQL).
        lock: The session's lock if the caller holds it; else it is taken here.

    Raises:
        LockHeld: A process runs the session still (transient).
        StorageError: A step failed; what was done stays done (mostly transient).
        RedisError: From `fail_queue` (transient).
    """
    if lock is None:
        folder = sessions.folder(session)
        if not folder.is_dir():
            return Deleted(0, 0)
        held = sessions.session_lock(session)
        held.acquire(LOCK_WAIT_S)
        with held:
            return delete_session(
                sessions, session, why=why, now=now, fail_queue=fail_queue, forget=forget, lock=held
            )
    _bury(sessions, session, why=why, now=now)
    bytes_freed = _size(sessions.folder(session))
    _remove_credentials(sessions.folder(session))
    jobs_failed = fail_queue(session) if fail_queue else 0
    if forget is not None:
        forget(session)
    sessions.remove(session)
    log.info("session.removed", extra={"session": session, "why": why, "jobs": jobs_failed})
    return Deleted(jobs_failed, bytes_freed)


def _bury(sessions: Sessions, session: str, *, why: str, now: float) -> None:
    """Leave a tombstone, unless the session was never linked."""
    if sessions.tombstones.find(session):
        return
    state = _state(sessions, session)
    credentials = sessions.folder(session) / "device.db"  # only a finished pairing makes it
    if not credentials.exists() and not (state and state.jid):
        return
    number = (state and state.phone) or _paired_number(credentials)
    hashed = number_hash(sessions.install_key(), number.lstrip("+")) if number else None
    sessions.tombstones.add(session, hashed, why, now)


def _paired_number(credentials: Path) -> str | None:
    try:
        who = device_store.identity(credentials)
    except DeviceStoreBroken:
        return None
    return who.phone if who else None


def _state(sessions: Sessions, session: str) -> StateRecord | None:
    try:
        return sessions.state(session)
    except StorageError:  # a broken record must not keep a session from being deleted
        return None


def _remove_credentials(folder: Path) -> None:
    for name in _CREDENTIALS:
        device_store.remove(folder / name)
    for name in _SECRETS:
        (folder / name).unlink(missing_ok=True)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # others clean up too
            size += path.lstat().st_size
    return size
