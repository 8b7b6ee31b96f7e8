"""Integrity of SQLite files: look, repair what SQLite can, set aside what it cannot."""

import contextlib
import logging
import sqlite3
import time
from pathlib import Path

log = logging.getLogger(__name__)

_SIDES = ("", "-wal", "-shm", "-journal")


def problems(path: Path, *, timeout_s: float | None = None) -> list[str]:
    """What SQLite finds wrong with a file; nothing for one that is absent or empty.

    Args:
        timeout_s: Stop looking after so long; what was not looked at counts as sound.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1.0)) as connection:
            if deadline is not None:
                connection.set_progress_handler(lambda: time.monotonic() > deadline, 20_000)
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(10)")]
    except sqlite3.OperationalError as error:
        # Out of time, locked, no permission: no verdict about the file.
        return [str(error)] if _is_damage(error) else []
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def repair(path: Path) -> bool:
    """Rebuild the indexes; True when the file is whole afterwards.

    Damaged indexes are all that can be repaired without guessing at rows. The caller makes sure
    that nobody else has the file open.
    """
    with (
        contextlib.suppress(sqlite3.DatabaseError),
        contextlib.closing(sqlite3.connect(path, timeout=1.0)) as connection,
    ):
        connection.execute("REINDEX")
        connection.commit()
    is_whole = not problems(path)
    if is_whole:
        log.warning("sqlite.repaired", extra={"path": str(path)})
    return is_whole


def name_aside(path: Path) -> Path:
    """A name beside a damaged file: `.broken-<time>`."""
    return path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")


def set_aside(path: Path, aside: Path) -> None:
    """Rename a damaged file and what belongs to it."""
    for side in _SIDES:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + side).rename(aside.with_name(aside.name + side))
    log.error("sqlite.set_aside", extra={"path": str(path), "kept_as": aside.name})


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) or 0
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
