"""One database connection for statements written with SQLAlchemy Core: SQLite or PostgreSQL.

Statements are compiled once and run on the driver's own connection: Core's execution costs four
times what the statements themselves cost. Every call is bounded in time, and every driver error
leaves as one of storage's own.
"""

import contextlib
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement

from storage.errors import LedgerBroken, LedgerUnavailable

log = logging.getLogger(__name__)

Parameters = Mapping[str, Any]
Rows = list[tuple[Any, ...]]

_KEPT_PAGES = 256  # empty pages that a SQLite file keeps for rows to come
_SQLITE_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Statement:
    """A Core statement, compiled once for each dialect."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._compiled: dict[str, tuple[str, list[str] | None, dict[str, Any]]] = {}

    def on(self, dialect: Dialect, parameters: Parameters) -> tuple[str, Any]:
        """The text and the parameters as this dialect's driver wants them."""
        found = self._compiled.get(dialect.name)
        if found is None:
            made = cast(SQLCompiler, self._statement.compile(dialect=dialect))
            constants = dict(made.params)
            order = list(made.positiontup or ()) if made.positional else None
            found = self._compiled[dialect.name] = (str(made), order, constants)
        text, order, constants = found
        values = {**constants, **parameters}
        return text, values if order is None else [values[name] for name in order]


class Database:
    """A lazily made connection that is made anew after a failure. Threads take turns.

    Args:
        location: Path of a SQLite file, or a URL (`postgresql://...`).
        timeout_s: The most that one transaction may take, connecting included.
    """

    def __init__(self, location: str | Path, *, timeout_s: float) -> None:
        self.location = location
        self.timeout_s = timeout_s
        self.is_sqlite = isinstance(location, Path) or "://" not in location
        # No pool: one connection a Database, and it is ours to end.
        if self.is_sqlite:
            url = sa.URL.create("sqlite", database=str(location))
            arguments = _sqlite_arguments(timeout_s)
        else:
            url = sa.make_url(_psycopg_url(str(location)))
            arguments = _postgresql_arguments(url, timeout_s)
        self.engine = sa.create_engine(url, poolclass=NullPool, connect_args=arguments)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
        self._turn = threading.RLock()
        self._connection: Any = None
        self._pooled: Any = None
        self._watchdog: _Watchdog | None = None

    def close(self) -> None:
        """End the connection; a later call makes a new one."""
        with self._turn:
            self._drop()
            if self._watchdog is not None:
                self._watchdog.stop()
                self._watchdog = None
            self.engine.dispose()

    @contextlib.contextmanager
    def transaction(self) -> Iterator["Transaction"]:
        """Everything inside is committed together, or nothing is.

        Raises:
            LedgerUnavailable: Not done in time, or refused (transient). When the commit was under
                way it may have been done all the same.
            LedgerBroken: SQLite says that the file is damaged.
        """
        with self._call() as transaction:
            transaction.say("BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
            yield transaction
            transaction.say("COMMIT")

    def run(self, statement: Statement, parameters: Parameters) -> Rows:
        """One statement that only reads, in no transaction of its own."""
        with self._call() as transaction:
            return transaction.fetch(statement, parameters)

    def change(self, statement: Statement, parameters: Parameters) -> int:
        """One statement that is a transaction by itself; the number of rows that it changed."""
        with self._call() as transaction:
            return transaction.execute(statement, parameters)

    @contextlib.contextmanager
    def _call(self) -> Iterator["Transaction"]:
        """One thread's turn on a connection that works, bounded in time."""
        if not self._turn.acquire(timeout=self.timeout_s):
            raise LedgerUnavailable(f"{self}: another call of this process takes too long")
        try:
            with self._errors_named(), self._watched():
                cursor = self._connect().cursor()
                try:
                    yield Transaction(cursor, self.engine.dialect)
                except BaseException:
                    self._roll_back()
                    raise
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def core(self) -> Iterator[sa.Connection]:
        """A SQLAlchemy connection of its own, without a transaction, for work on the schema."""
        with self._errors_named():
            if self.is_sqlite:
                _make_private(Path(self.location))
            with self.engine.connect() as connection:
                yield connection

    def shrink(self) -> None:
        """Give space that removed rows left back to the filesystem, in small commits."""
        if not self.is_sqlite:
            return
        deadline = time.monotonic() + self.timeout_s
        with self._turn, self._errors_named():
            connection = self._connect()
            while connection.execute("PRAGMA freelist_count").fetchone()[0] > _KEPT_PAGES:
                connection.execute(f"PRAGMA incremental_vacuum({_KEPT_PAGES})").fetchall()
                if time.monotonic() > deadline:
                    break  # the next purge goes on

    def __str__(self) -> str:
        return str(self.location) if self.is_sqlite else self.engine.url.render_as_string()

    def _connect(self) -> Any:
        if self._connection is None:
            if self.is_sqlite:
                _make_private(Path(self.location))
            self._pooled = self.engine.raw_connection()
            self._connection = self._pooled.driver_connection
        if self._watchdog is not None:
            self._watchdog.guard(self._connection.fileno())
        return self._connection

    def _roll_back(self) -> None:
        """Leave the connection fit for the next call, or drop it."""
        try:
            self._connection.cursor().execute("ROLLBACK")
        except Exception:
            # SQLite says "no transaction is active" where the failure ended it already.
            if not (self.is_sqlite and self._connection and not self._connection.in_transaction):
                self._drop()

    def _drop(self) -> None:
        pooled, self._pooled, self._connection = self._pooled, None, None
        if pooled is not None:
            with contextlib.suppress(Exception):
                pooled.invalidate()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """PostgreSQL only: a server that stopped answering is cut off from this side."""
        if self.is_sqlite:
            yield
            return
        if self._watchdog is None:
            self._watchdog = _Watchdog(self.timeout_s)
        with self._watchdog:
            yield

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) or 0
            if code & 0xFF in _SQLITE_BROKEN:
                raise LedgerBroken(f"{self} is damaged: {error}") from error
            raise LedgerUnavailable(f"{self}: {error}") from error
        except (sa.exc.DBAPIError, self.engine.dialect.loaded_dbapi.Error, OSError) as error:
            raise LedgerUnavailable(f"{self}: {_first_line(error)}") from error


class Transaction:
    """Runs statements on one cursor."""

    def __init__(self, cursor: Any, dialect: Dialect) -> None:
        self._cursor = cursor
        self._dialect = dialect

    def say(self, words: str) -> None:
        """Run a command without parameters."""
        self._cursor.execute(words)

    def execute(self, statement: Statement, parameters: Parameters) -> int:
        """Run it; the number of rows that it changed."""
        self._cursor.execute(*statement.on(self._dialect, parameters))
        return int(self._cursor.rowcount)

    def fetch(self, statement: Statement, parameters: Parameters) -> Rows:
        """Run it; the rows that it returned."""
        self._cursor.execute(*statement.on(self._dialect, parameters))
        return list(self._cursor.fetchall())


class _Watchdog:
    """Shuts the socket of a call that outlived its time; looks ten times in that time.

    The server's own limits do not help when it is frozen or the network swallows its answer.
    A thread that sleeps costs less than a timer made for every call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._limit_s = timeout_s * 0.9
        self._deadline: float | None = None
        self._fd: int | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ledger-watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._deadline = time.monotonic() + self._limit_s

    def __exit__(self, *_: object) -> None:
        with self._lock:  # not between the look and the shutting of a socket since reused
            self._deadline = None
            self._fd = None

    def guard(self, fd: int) -> None:
        self._fd = fd

    def stop(self) -> None:
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._limit_s / 10):
            with self._lock:
                fd, deadline = self._fd, self._deadline
                if fd is not None and deadline is not None and time.monotonic() > deadline:
                    log.warning("ledger.call_cut_off", extra={"limit_s": self._limit_s})
                    _shut(fd)


def _shut(fd: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as twin:
        twin.shutdown(socket.SHUT_RDWR)


def _sqlite_arguments(timeout_s: float) -> dict[str, Any]:
    return {"timeout": timeout_s, "check_same_thread": False, "isolation_level": None}


def _postgresql_arguments(url: sa.URL, timeout_s: float) -> dict[str, Any]:
    limit_ms = int(timeout_s * 800)  # the server gives up before the watchdog does
    limits = f"-c statement_timeout={limit_ms} -c lock_timeout={limit_ms}"
    given = url.query.get("options", "")
    return {
        "autocommit": True,  # BEGIN and COMMIT are ours
        "connect_timeout": max(2, int(timeout_s)),
        "options": f"{given if isinstance(given, str) else ' '.join(given)} {limits}",
        "tcp_user_timeout": int(timeout_s * 1000),
    }


def _set_up_sqlite(connection: Any, _: object) -> None:
    for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _make_private(path: Path) -> None:
    """SQLite gives its -wal and -shm the permissions of the file, so those are set first.

    Only a file that was not there is opened: closing any descriptor of a database that this
    process has open drops SQLite's locks on it (POSIX locks belong to the process).
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _psycopg_url(url: str) -> str:
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
