"""The two breakers of one session, and the pause that WhatsApp asked it for. They outlive the
process, since each lost connection ends one, in a small file each: neither the database nor Redis,
which may be what is down."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redis import RedisError

from storage.documents import Document
from storage.errors import StorageError
from whatsapp_worker.breaker_board import BreakerBoard
from whatsapp_worker.breakers import Breaker, Phase
from whatsapp_worker.event_names import Event
from whatsapp_worker.rq_job import PAUSED
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream, event_id

log = logging.getLogger(__name__)

DATABASE_AWAY = "the ledger's database does not answer"
SENDS_FAILED = "sends failed again and again"

MAX_UNTOLD = 20  # events of one breaker that wait for Redis; even: openings and their closings
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 900.0

Tell = Callable[[Event, Mapping[str, Any]], None]


class StoredBreaker:
    """A breaker and its file. Not thread-safe."""

    def __init__(
        self,
        name: str,
        path: Path | None,
        *,
        session: str,
        threshold: int,
        reset_s: float,
        stream: EventStream,
        tell: Tell,
    ) -> None:
        """Reads what the process before left; a file that cannot be read counts as closed.

        Args:
            name: `message` or `database`.
            path: Its file; None keeps it in memory only.
            threshold: Consecutive failures that open it.
            reset_s: How long it stays open.
            stream: Told of each trip and each recovery, by `tell_stream`.
            tell: Called with `breaker.opened` at each trip, and again with `again` true whenever
                a try has failed; with `breaker.closed` once it has recovered.
        """
        self._name = name
        self._document = Document(path, version=1) if path else None
        self._session = session
        self._threshold = threshold
        self._reset_s = reset_s
        self._stream = stream
        self._tell = tell
        self._stored = self._read()
        self._breaker = Breaker.read(self._stored)
        self._untold = _entries(self._stored.get("untold"))

    def phase(self) -> Phase:
        return self._breaker.phase(time.time(), reset_s=self._reset_s)

    @property
    def until(self) -> float | None:
        """UTC seconds of the next try; None while closed."""
        opened_at = self._breaker.opened_at
        return None if opened_at is None else opened_at + self._reset_s

    def rest_s(self) -> float:
        """Seconds until the next try; 0 when nothing is in its way."""
        if self.until is None or self.phase() is not Phase.OPEN:
            return 0.0
        return max(0.0, self.until - time.time())

    def failed(self, failure: str) -> None:
        """What it guards failed, or its probe did."""
        before = self._breaker
        self._breaker = before.failed(time.time(), failure, threshold=self._threshold)
        facts = {
            "breaker": self._name,
            "failure": failure,
            "failures": [dict(last) for last in self._breaker.last],
            "retry_after_s": self._reset_s,
        }
        is_open, again = self._breaker.opened_at is not None, before.opened_at is not None
        if is_open and not again:
            self._note(Event.BREAKER_OPENED, facts, self._breaker.opened_at)
        self._write()
        if is_open:
            self._tell(Event.BREAKER_OPENED, {**facts, "again": again})

    def succeeded(self) -> None:
        """What it guards did what it should: closed, nothing counted."""
        if self._breaker.failures == 0:
            return
        opened_at = self._breaker.opened_at
        self._breaker = self._breaker.succeeded()
        facts = {"breaker": self._name, "opened_at": opened_at}
        if opened_at is not None:
            self._note(Event.BREAKER_CLOSED, facts, opened_at)
        self._write()
        if opened_at is not None:
            self._tell(Event.BREAKER_CLOSED, facts)

    def tell_stream(self) -> None:
        """Tell the stream what it does not know yet; where its answer is lost, under the same
        ids again.

        Raises:
            RedisError: Later, then; it is kept.
        """
        if self._untold:
            self._stream.add_many(self._untold)
            self._untold = []
            self._write()

    def as_dict(self) -> dict[str, Any]:
        """For those who look; empty when it is closed and counts nothing."""
        failures = self._breaker.failures
        return {"failures": failures, "until": self.until} if failures else {}

    def _note(self, event: Event, facts: Mapping[str, Any], at: float | None) -> None:
        """Keep an event with the time at which it happened until the stream has it."""
        id = event_id(self._session, "breaker", self._name, at, event)
        self._untold.append(self._stream.entry(event, self._session, facts, id=id))
        if len(self._untold) > MAX_UNTOLD:
            del self._untold[:2]

    def _fields(self) -> dict[str, Any]:
        return self._breaker.as_dict() | ({"untold": self._untold} if self._untold else {})

    def _read(self) -> Mapping[str, Any]:
        try:
            return (self._document.read() if self._document else None) or {}
        except StorageError as error:
            log.warning("breaker.unreadable", extra={"error": str(error)})
            return {}

    def _write(self) -> None:
        if self._document is None:
            return
        try:
            self._document.write(self._fields())
        except StorageError as error:
            log.warning("breaker.not_saved", extra={"error": str(error)})


class MessageBreaker(StoredBreaker):
    """Counts transport faults and time-outs of sends; and keeps WhatsApp's wish for a pause."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # A clock that was set back must not make it longer than any pause is.
        latest = time.time() + _LONGEST_PAUSE_S
        self.paused_until = min(_number(self._stored, "paused_until"), latest)
        pause_s = _number(self._stored, "pause_s")
        self._pause_s = max(_FIRST_PAUSE_S, min(pause_s, _LONGEST_PAUSE_S))

    def succeeded(self) -> None:
        """A message was sent."""
        if self._pause_s != _FIRST_PAUSE_S:
            self._pause_s = _FIRST_PAUSE_S
            self._write()
        super().succeeded()

    def pause(self) -> float:
        """WhatsApp wants this number to send less: rest, longer each time; until when."""
        self.paused_until = time.time() + self._pause_s
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        self._write()
        return self.paused_until

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {"paused_until": self.paused_until, "pause_s": self._pause_s}


class Breakers:
    """Both of one session, and all who are told of them. Not thread-safe."""

    def __init__(
        self,
        folder: Path | None,
        *,
        session: str,
        settings: Settings,
        stream: EventStream,
        board: BreakerBoard | None = None,
        on_change: Tell = lambda event, facts: None,
    ) -> None:
        """Reads their files; nothing else is touched yet.

        Args:
            folder: The session's; None keeps them in memory only.
            settings: MSG_FAILURE_THRESHOLD, DB_RESET_S ...
            board: Where other processes see them.
            on_change: Told of `breaker.opened` and `breaker.closed`, for the supervisor's alert;
                and again, with `again` true, when a half-open one has failed.
        """
        self._session = session
        self._board = board
        self._on_change = on_change
        common: dict[str, Any] = {"session": session, "stream": stream, "tell": self._changed}
        self.message = MessageBreaker(
            "message",
            folder and folder / "breaker.json",
            threshold=settings.msg_failure_threshold,
            reset_s=settings.msg_reset_s,
            **common,
        )
        self.database = StoredBreaker(
            "database",
            folder and folder / "breaker-database.json",
            threshold=settings.db_failure_threshold,
            reset_s=settings.db_reset_s,
            **common,
        )

    def show(self) -> None:
        """Tell Redis what it does not know yet; where it is down, the next call does. Cheap when
        there is nothing new: meant to be called about every second."""
        with contextlib.suppress(RedisError):
            self.message.tell_stream()
            self.database.tell_stream()
            if self._board is not None:
                self._board.post(self._shown())

    def _shown(self) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        if facts := self.message.as_dict():
            found["message"] = {**facts, "reason": SENDS_FAILED}
        if facts := self.database.as_dict():
            found["database"] = {**facts, "reason": DATABASE_AWAY}
        if self.message.paused_until > time.time():
            found["pause"] = {"until": self.message.paused_until, "reason": PAUSED}
        return found

    def _changed(self, event: Event, facts: Mapping[str, Any]) -> None:
        log.warning(event, extra={"session": self._session, **facts})
        self._on_change(event, facts)
        self.show()


def _entries(stored: Any) -> list[dict[str, str | int]]:
    """What can be read of the events that an earlier process could not tell."""
    if not isinstance(stored, list):
        return []
    found = [entry for entry in stored if isinstance(entry, dict)]
    return [entry for entry in found if _is_entry(entry)][-MAX_UNTOLD:]


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether it is made of what the stream takes; ours are ASCII."""
    takes = (
        type(value) in (str, int) and f"{name}{value}".isascii() for name, value in entry.items()
    )
    return bool(entry) and all(takes)


def _number(stored: Mapping[str, Any], name: str) -> float:
    try:
        return float(stored.get(name, 0.0))
    except (TypeError, ValueError, OverflowError):
        return 0.0
