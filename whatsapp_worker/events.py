"""The `events` process: receipts on `wa:events` into the ledgers.

A member of the stream's consumer group `ledger`: an entry is acknowledged when its ledger has
committed, so a process killed in between reads it again, and the ledger only moves forward. Any
number of these processes may run.
"""

import json
import logging
import signal
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from storage.errors import StorageError
from storage.ledger import Change, Ledger, Receipt, Row
from storage.sessions import Sessions
from whatsapp_worker import outbox, redis_client, redis_server
from whatsapp_worker.errors import RedisUnavailable
from whatsapp_worker.event_names import RANK, Event, Status
from whatsapp_worker.keys import EVENTS_STREAM, LEDGER_GROUP
from whatsapp_worker.recovery import finished, outcome
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

_BATCH = 500  # entries
_BLOCK_MS = 500
_GATHER_S = 0.05  # after a read: one commit for many receipts, where each costs an fsync
_OPEN_LEDGERS = 64
_CLAIM_IDLE_MS = 60_000  # entries of a consumer that has been silent so long are taken over
_CLAIM_EVERY_S = 30.0
_APPLY_EVERY_S = 1.0
_TRIM_EVERY_S = 5.0
_FIRST_REST_S, _LONGEST_REST_S = 0.1, 5.0
_RECEIPTS = {
    Event.DELIVERED: Status.DELIVERED,
    Event.READ: Status.READ,
    Event.PLAYED: Status.PLAYED,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One receipt on the stream."""

    id: bytes
    session: str
    receipt: Receipt


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    rest_s = _FIRST_REST_S
    while not stop.is_set():
        try:
            redis = redis_client.connect(redis_server.resolve_url(settings))
            ReceiptWriter(redis, settings, stop=stop).run()
            rest_s = _FIRST_REST_S
        except (RedisError, RedisUnavailable) as error:
            log.warning("events.redis_lost", extra={"error": repr(error), "wait_s": rest_s})
            stop.wait(rest_s)
            rest_s = min(rest_s * 2, _LONGEST_REST_S)
    return 0


class ReceiptWriter:
    """Reads the stream as one consumer of the group, until `stop`."""

    def __init__(self, redis: Redis, settings: Settings, *, stop: threading.Event) -> None:
        self._redis: Any = redis
        self._settings = settings
        self._stop = stop
        self._stream = EventStream(redis, events_max=settings.events_max)
        self._ledgers = _Ledgers(settings)
        self._name = settings.host  # the same after a restart: what was left is found at once
        self._due = {"claim": 0.0, "apply": 0.0, "trim": 0.0}
        self._has_leftovers = True  # read but not acknowledged, by us

    def run(self) -> None:
        """Serve until `stop` is set.

        Raises:
            RedisError: Redis is gone; make a new one of these when it is back.
        """
        self._join()
        self._apply_everywhere()
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._ledgers.close()

    def _turn(self) -> None:
        if self._is_due("claim", _CLAIM_EVERY_S):
            self._take_over()
        if self._has_leftovers:
            self._has_leftovers = not self._write(self._read("0"), again=True)
            if self._has_leftovers:
                self._stop.wait(1.0)
        found = self._read(">")
        self._has_leftovers |= not self._write(found, again=False)
        if 0 < len(found) < _BATCH:
            self._stop.wait(_GATHER_S)
        if self._is_due("apply", _APPLY_EVERY_S):
            for session, ledger in self._ledgers.opened():
                self._apply_pending(session, ledger)
        if self._is_due("trim", _TRIM_EVERY_S):
            self._stream.trim()

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        is_due = now >= self._due[what]
        if is_due:
            self._due[what] = now + every_s
        return is_due

    def _join(self) -> None:
        try:
            self._redis.xgroup_create(EVENTS_STREAM, LEDGER_GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _take_over(self) -> None:
        """Make the entries ours that another host's process read and never acknowledged."""
        reply = self._redis.xautoclaim(
            EVENTS_STREAM, LEDGER_GROUP, self._name, _CLAIM_IDLE_MS, count=_BATCH
        )
        self._has_leftovers |= bool(reply[1])  # Redis 7 adds a third part

    def _read(self, start: str) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        """Entries that nobody has read (`>`), or those that we have not acknowledged (`0`)."""
        block = _BLOCK_MS if start == ">" else None
        answer = self._redis.xreadgroup(
            LEDGER_GROUP, self._name, {EVENTS_STREAM: start}, count=_BATCH, block=block
        )
        return list(answer[0][1]) if answer else []

    def _write(self, found: Iterable[tuple[bytes, Mapping[bytes, bytes]]], *, again: bool) -> bool:
        """Bring receipts into their ledgers; whether all could be acknowledged."""
        done: list[bytes] = []
        by_session: dict[str, list[_Entry]] = defaultdict(list)
        for id, fields in found:
            entry = _receipt(id, fields)
            if entry is None:
                done.append(id)
            else:
                by_session[entry.session].append(entry)
        is_complete = True
        for session, entries in by_session.items():
            if self._write_session(session, entries, again=again):
                done.extend(entry.id for entry in entries)
            else:
                is_complete = False
        if done:
            self._redis.xack(EVENTS_STREAM, LEDGER_GROUP, *done)
        return is_complete

    def _write_session(self, session: str, entries: list[_Entry], *, again: bool) -> bool:
        receipts = [entry.receipt for entry in entries]
        try:
            ledger = self._ledgers.get(session)
            if ledger is None:
                return True
            changes = ledger.receipts(receipts, now=time.time())
            # A process killed after the commit may not have come to its jobs.
            proven = self._left_untold(ledger, receipts) if again else _proven(changes)
        except StorageError as error:
            return self._excuse(session, error)
        self._tell(session, proven)
        return True

    def _left_untold(self, ledger: Ledger, receipts: Iterable[Receipt]) -> list[Row]:
        """The messages of these receipts whose job says that they were not sent."""
        found = (ledger.find_by_wa_id(receipt.wa_message_id) for receipt in receipts)
        rows = [row for row in found if row is not None and outcome(row).is_success]
        failed = outbox.failed_jobs(self._redis, [row.job_id for row in rows])
        return [row for row in rows if row.job_id in failed]

    def _apply_pending(self, session: str, ledger: Ledger) -> None:
        try:
            receipts, changes = ledger.apply_pending(now=time.time())
            if receipts:
                told = {row.message_id: row for row in _proven(changes)}
                told |= {row.message_id: row for row in self._left_untold(ledger, receipts)}
                self._tell(session, told.values())
                ledger.drop_pending(receipts)
        except StorageError as error:
            self._excuse(session, error)

    def _apply_everywhere(self) -> None:
        """Once at the start: receipts that were kept when the last process ended."""
        for session in Sessions(self._settings.data_dir).ids():
            if self._stop.is_set():
                return
            try:
                ledger = self._ledgers.get(session)
            except StorageError as error:
                self._excuse(session, error)
                continue
            if ledger is not None:
                self._apply_pending(session, ledger)

    def _excuse(self, session: str, error: StorageError) -> bool:
        """Whether to go on without: a ledger that is broken must not hold up the stream."""
        level = logging.WARNING if error.transient else logging.ERROR
        log.log(level, "events.ledger_failed", extra={"session": session, "error": str(error)})
        return not error.transient

    def _tell(self, session: str, rows: Iterable[Row]) -> None:
        """A receipt proved that these were sent: their jobs and the CRM hear of it."""
        for row in rows:
            outbox.amend(self._redis, session, finished(row), stream=self._stream)


def _proven(changes: Iterable[Change]) -> list[Row]:
    """Messages that nobody knew to be sent, until a receipt told."""
    return [row for row, was in changes if RANK[Status(was)] < RANK[Status.SENT]]


def _receipt(id: bytes, fields: Mapping[bytes, bytes]) -> _Entry | None:
    """The receipt that an entry tells of; None for all other entries."""
    try:
        status = _RECEIPTS.get(Event(fields[b"event"].decode()))
        if status is None:
            return None
        payload = json.loads(fields[b"payload"])
        receipt = Receipt(str(payload["wa_message_id"]), status, float(payload["at"]))
        return _Entry(id, fields[b"session"].decode(), receipt)
    except (KeyError, ValueError, TypeError):
        return None


class _Ledgers:
    """The ledgers in use: a few SQLite files, or one PostgreSQL connection."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions = Sessions(settings.data_dir)
        self._open: OrderedDict[str, tuple[int, Ledger]] = OrderedDict()  # by inode
        self._shared: Ledger | None = None

    def get(self, session: str) -> Ledger | None:
        """The ledger of a session; None when there is none.

        Raises:
            StorageError: It cannot be used, now or at all (see `transient`).
        """
        if session not in self._open:
            inode = self._inode(session)
            if inode is None:
                return None
            self._open[session] = inode, self._make(session)
        self._open.move_to_end(session)
        if len(self._open) > _OPEN_LEDGERS:
            self._drop(next(iter(self._open)))
        return self._open[session][1]

    def opened(self) -> list[tuple[str, Ledger]]:
        """Those in use; of a session that was deleted, or made anew since, none is."""
        for session, (inode, _) in list(self._open.items()):
            if self._inode(session) != inode:
                self._drop(session)
        return [(session, ledger) for session, (_, ledger) in self._open.items()]

    def close(self) -> None:
        for session in list(self._open):
            self._drop(session)
        if self._shared is not None:
            self._shared.close()

    def _make(self, session: str) -> Ledger:
        url, timeout_s = self._settings.database_url, self._settings.db_timeout_s
        if url is None:
            return Ledger.open(self._path(session), session, timeout_s=timeout_s)
        if self._shared is None:
            self._shared = Ledger.open(url, session, timeout_s=timeout_s)
        return self._shared.of(session)

    def _path(self, session: str) -> Path:
        """What is there as long as the session has a ledger."""
        folder = self._sessions.folder(session)
        return folder if self._settings.database_url else folder / "ledger.db"

    def _inode(self, session: str) -> int | None:
        try:
            return self._path(session).stat().st_ino
        except (OSError, ValueError):  # no file; no session id
            return None

    def _drop(self, session: str) -> None:
        _, ledger = self._open.pop(session)
        if self._settings.database_url is None:
            ledger.close()
