"""The message breaker of one session, and the pause that WhatsApp asked it for: both outlive the
process, since each lost connection ends one."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.documents import Document
from storage.errors import StorageError
from whatsapp_worker.breakers import Breaker, Phase
from whatsapp_worker.event_names import Event

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 900.0

Tell = Callable[[Event, Mapping[str, Any]], None]


class MessageBreaker:
    """Counts transport faults and time-outs of sends. Not thread-safe."""

    def __init__(self, path: Path | None, *, threshold: int, reset_s: float, tell: Tell) -> None:
        """Reads what the process before left.

        Args:
            path: Its file; None keeps it in memory only.
            threshold: `MSG_FAILURE_THRESHOLD`.
            reset_s: `MSG_RESET_S`.
            tell: Called with `breaker.opened` at each trip, and again with `again` true whenever
                a try has failed; with `breaker.closed` once it has recovered.
        """
        self._document = Document(path, version=1) if path else None
        self._threshold = threshold
        self._reset_s = reset_s
        self._tell = tell
        stored = self._read() or {}
        self._breaker = Breaker.read(stored)
        # A clock that was set back must not make it longer than any pause is.
        self.paused_until = min(_number(stored, "paused_until"), time.time() + _LONGEST_PAUSE_S)
        self._pause_s = max(_FIRST_PAUSE_S, min(_number(stored, "pause_s"), _LONGEST_PAUSE_S))

    def phase(self) -> Phase:
        return self._breaker.phase(time.time(), reset_s=self._reset_s)

    @property
    def until(self) -> float | None:
        """UTC seconds of the next try; None while closed."""
        opened_at = self._breaker.opened_at
        return None if opened_at is None else opened_at + self._reset_s

    def failed(self, failure: str) -> None:
        """A send, or a half-open one's probe, met a transport fault or a time-out."""
        before = self._breaker
        self._breaker = before.failed(time.time(), failure, threshold=self._threshold)
        self._write()
        if self._breaker.opened_at is not None:
            self._tell(
                Event.BREAKER_OPENED,
                {
                    "breaker": "message",
                    "failure": failure,
                    "failures": [dict(last) for last in self._breaker.last],
                    "retry_after_s": self._reset_s,
                    "again": before.opened_at is not None,
                },
            )

    def succeeded(self) -> None:
        """A message was sent."""
        if self._breaker.failures == 0 and self._pause_s == _FIRST_PAUSE_S:
            return
        self._pause_s = _FIRST_PAUSE_S
        opened_at = self._breaker.opened_at
        self._breaker = self._breaker.succeeded()
        self._write()
        if opened_at is not None:
            self._tell(Event.BREAKER_CLOSED, {"breaker": "message", "opened_at": opened_at})

    def pause(self) -> float:
        """WhatsApp wants this number to send less: rest, longer each time; until when."""
        self.paused_until = time.time() + self._pause_s
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        self._write()
        return self.paused_until

    def as_dict(self) -> dict[str, Any]:
        """For those who look; empty when it is closed and counts nothing."""
        failures = self._breaker.failures
        return {"failures": failures, "until": self.until} if failures else {}

    def _read(self) -> Mapping[str, Any] | None:
        try:
            return self._document.read() if self._document else None
        except StorageError as error:
            log.warning("breaker.unreadable", extra={"error": str(error)})
            return None

    def _write(self) -> None:
        if self._document is None:
            return
        try:
            pause = {"paused_until": self.paused_until, "pause_s": self._pause_s}
            self._document.write(self._breaker.as_dict() | pause)
        except StorageError as error:
            log.warning("breaker.not_saved", extra={"error": str(error)})


def _number(stored: Mapping[str, Any], name: str) -> float:
    try:
        return float(stored.get(name, 0.0))
    except (TypeError, ValueError, OverflowError):
        return 0.0
