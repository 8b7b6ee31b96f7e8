"""The `events` process: receipts on `wa:events` into the ledgers.

A member of the stream's consumer group `ledger`: an entry is acknowledged when its ledger has
committed, so a process killed in between reads it again, and the ledger only moves forward. Any
number of these processes may run.
"""

import json
import logging
import re
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

from storage.errors import LedgerNewer, StorageError
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
_VISIT_EVERY_S = 5.0  # ledgers that could not be used
_TRIM_EVERY_S = 5.0
_FIRST_REST_S, _LONGEST_REST_S = 0.1, 5.0
_WA_MESSAGE_ID = re.compile("[!-~]{1,200}")
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
        self._due = {"claim": 0.0, "apply": 0.0, "visit": 0.0, "trim": 0.0}
        self._has_leftovers = True  # read but not acknowledged, by us
        self._left_after = b"0"  # the next of them come after this entry
        self._unvisited: set[str] = set()  # what was kept for these is not looked at yet
        self._failing: dict[str, str] = {}  # sessions whose ledger cannot be used: why

    def run(self) -> None:
        """Serve until `stop` is set.

        Raises:
            RedisError: Redis is gone; make a new one of these when it is back.
        """
        self._join()
        self._unvisited.update(self._ledgers.sessions())
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._ledgers.close()

    def _turn(self) -> None:
        if self._is_due("claim", _CLAIM_EVERY_S):
            self._take_over()
        if self._has_leftovers:
            self._write_leftovers()
        found = self._read(b">")
        self._has_leftovers |= not self._write(found, again=False)
        if 0 < len(found) < _BATCH:
            self._stop.wait(_GATHER_S)
        if self._is_due("apply", _APPLY_EVERY_S):
            self._apply_kept()
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

    def _write_leftovers(self) -> None:
        """Try the next of them, and after the last the first: what is stuck holds up no other."""
        found = self._read(self._left_after)
        is_complete = self._write(found, again=True)
        if len(found) == _BATCH:
            self._left_after = found[-1][0]
            return
        self._has_leftovers = not is_complete or self._left_after != b"0"
        self._left_after = b"0"
        if self._has_leftovers:
            self._stop.wait(1.0)

    def _read(self, start: bytes) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        """Entries that nobody has read (`>`), or those after an id that we have not
        acknowledged."""
        block = _BLOCK_MS if start == b">" else None
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
            if not self._stop.is_set() and self._write_session(session, entries, again=again):
                done.extend(entry.id for entry in entries)
            else:
                is_complete = False
                if self._ledgers.are_one:  # the others would wait for the same in vain
                    break
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
        self._failing.pop(session, None)
        self._tell(session, proven)
        return True

    def _left_untold(self, ledger: Ledger, receipts: Iterable[Receipt]) -> list[Row]:
        """The messages of these receipts whose job says that they were not sent."""
        found = (ledger.find_by_wa_id(receipt.wa_message_id) for receipt in receipts)
        rows = [row for row in found if row is not None and outcome(row).is_success]
        failed = outbox.failed_jobs(self._redis, [row.job_id for row in rows])
        return [row for row in rows if row.job_id in failed]

    def _apply_kept(self) -> None:
        """Receipts that were kept until their message has its id: of the sessions in use, and once
        of every other, for what the last process left."""
        sessions = set(self._ledgers.in_use())
        if self._is_due("visit", _VISIT_EVERY_S):  # one that is damaged is looked through each time
            sessions |= self._unvisited
        for session in sessions:
            if self._stop.is_set():
                return
            if self._apply_pending(session):
                self._unvisited.discard(session)
            elif self._ledgers.are_one:
                return

    def _apply_pending(self, session: str) -> bool:
        """Whether that was done, or is in vain."""
        try:
            ledger = self._ledgers.get(session)
            if ledger is None:
                return True
            receipts, changes = ledger.apply_pending(now=time.time())
            if receipts:
                told = {row.message_id: row for row in _proven(changes)}
                told |= {row.message_id: row for row in self._left_untold(ledger, receipts)}
                self._tell(session, told.values())
                ledger.drop_pending(receipts)
        except StorageError as error:
            return self._excuse(session, error)
        self._failing.pop(session, None)
        return True

    def _excuse(self, session: str, error: StorageError) -> bool:
        """Whether to go on without: a ledger that is broken must not hold up the stream. Said once
        until it works again."""
        kind = type(error).__name__
        if self._failing.get(session) != kind:
            self._failing[session] = kind
            level = logging.WARNING if error.transient else logging.ERROR
            log.log(level, "events.ledger_failed", extra={"session": session, "error": str(error)})
        return not error.transient and not isinstance(error, LedgerNewer)

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
        if not _WA_MESSAGE_ID.fullmatch(payload["wa_message_id"]):
            return None
        receipt = Receipt(payload["wa_message_id"], status, float(payload["at"]))
        return _Entry(id, fields[b"session"].decode(), receipt)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None


class _Ledgers:
    """The ledgers in use: a few SQLite files, or one PostgreSQL connection."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions = Sessions(settings.data_dir)
        self._open: OrderedDict[str, tuple[int, Ledger]] = OrderedDict()  # by inode
        self._sound: dict[str, int] = {}  # inodes of those that were opened once
        self._shared: Ledger | None = None
        self.are_one = settings.database_url is not None
        # Opening makes two calls, and no signal ends one: a stop is heeded in time all the same.
        self._timeout_s = min(settings.db_timeout_s, settings.shutdown_timeout_s / 3)

    def sessions(self) -> list[str]:
        """All that there are."""
        return self._sessions.ids()

    def in_use(self) -> list[str]:
        """Those whose ledger was asked for lately."""
        return list(self._open)

    def get(self, session: str) -> Ledger | None:
        """The ledger of a session; None when there is none.

        Raises:
            StorageError: It cannot be used, now or at all (see `transient`).
        """
        inode = self._inode(session)
        if session in self._open and self._open[session][0] != inode:
            self._drop(session)  # deleted, and perhaps made anew since
        if inode is None:
            self._sound.pop(session, None)
            return None
        if session not in self._open:
            self._open[session] = inode, self._make(session, inode)
        self._open.move_to_end(session)
        if len(self._open) > _OPEN_LEDGERS:
            self._drop(next(iter(self._open)))
        return self._open[session][1]

    def close(self) -> None:
        for session in list(self._open):
            self._drop(session)
        if self._shared is not None:
            self._shared.close()

    def _make(self, session: str, inode: int) -> Ledger:
        url, timeout_s = self._settings.database_url, self._timeout_s
        if url is None:
            was_sound = self._sound.get(session) == inode
            path = self._path(session)
            ledger = Ledger.open(path, session, timeout_s=timeout_s, was_sound=was_sound)
            self._sound[session] = inode
            return ledger
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
