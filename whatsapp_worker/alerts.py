"""Alerts: what a person must know is told to Sentry, and to the log without it.

The supervisor alone tells Sentry of its devices; they report to it. A thread does all of it, so
neither a Sentry that hangs nor a full disk ever holds up the supervisor.
"""

import contextlib
import copy
import dataclasses
import logging
import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.documents import Document
from storage.errors import StorageError
from whatsapp_worker.alert_policy import Alert, Memory, scrub

log = logging.getLogger(__name__)

FLUSH_S = 2.0
VERSION = 1
_WAITING_MAX = 2000  # orders that the thread has not taken up
_SENT_MAX = 1000  # alerts on their way, remembered until Sentry has taken them
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}


class Alerts:
    """Tells Sentry what a person must know, at most once per ALERT_REPEAT_S for the same thing.

    What was told is remembered in a file, so a restarted supervisor does not repeat it. Without a
    DSN alerts are log lines only.
    """

    def __init__(
        self,
        dsn: str | None,
        *,
        host: str,
        memory: Path,
        repeat_s: float,
        release: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is sent yet.

        Args:
            dsn: SENTRY_DSN.
            host: WORKER_HOST; the tag `host`.
            memory: The file that remembers; its folder exists.
            repeat_s: ALERT_REPEAT_S.
            release: Version of this software.
            clock: UTC seconds.

        Raises:
            SettingsError: SENTRY_DSN is no DSN.
        """
        self._clock = clock
        self._host = host
        self._document = Document(memory, version=VERSION, check=_check(repeat_s))
        self._saved: dict[str, Any] = {}
        self._repeat_s = repeat_s
        self._client: Any = None
        if dsn:
            from whatsapp_worker import sentry  # megabytes that hosts without a DSN save

            self._client = sentry.client(dsn, host=host, release=release, on_end=self._on_end)
        self._sent: OrderedDict[str, Alert] = OrderedDict()
        self._orders: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_MAX)
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def raise_alert(self, alert: Alert) -> None:
        """Tell it if it is time to; never blocks and never raises."""
        dated = dataclasses.replace(alert, at=alert.at or self._clock())
        self._order(lambda: self._judge(dated))

    def close(self, *, timeout_s: float = FLUSH_S) -> bool:
        """Tell what waits and end; whether the thread was done within `timeout_s` seconds."""
        if self._thread.ident is None:
            return True  # never started
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._orders.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._client:
            self._client.close(timeout=max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            return False
        self._carry_out()
        for event_id in list(self._sent):  # what Sentry has not taken is for the next process
            self._end(event_id, is_taken=False)
        self._remember()
        return True

    def _order(self, order: Callable[[], None] | None) -> None:
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            log.warning("alert.dropped", extra={"waiting": _WAITING_MAX})

    def _run(self) -> None:
        self._memory = self._recall()
        while self._carry_out(self._patience_s()):
            with self._contained():
                for alert in self._memory.due(self._clock()):
                    self._tell(alert)
            self._remember()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """A bug that one alert meets must not silence the others."""
        try:
            yield
        except Exception:
            log.exception("alert.failed_here")

    def _carry_out(self, patience_s: float | None = 0.0) -> bool:
        """Carry out what was ordered, waiting so long for the first; False when it is to end."""
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(timeout=patience_s)
            for _ in range(_WAITING_MAX):
                if order is None:
                    return False
                with self._contained():
                    order()
                order = self._orders.get_nowait()
        return True

    def _patience_s(self) -> float | None:
        """How long to wait for an order; None when nothing else is to be done."""
        due = self._memory.next_due()
        # At most a minute: the clock may be set forward meanwhile.
        return None if due is None else min(60.0, max(0.0, due - self._clock()))

    def _judge(self, alert: Alert) -> None:
        told = self._memory.judge(alert, alert.at)
        if told:
            self._tell(told)

    def _tell(self, alert: Alert) -> None:
        log.log(
            _LEVELS[alert.level or "info"],
            "alert.raised",
            extra={"alert": alert.event, "session": alert.session, **scrub(alert.tags)},
        )
        if self._client is None:
            return
        event = _event(alert, self._host)
        self._sent[event["event_id"]] = alert
        while len(self._sent) > _SENT_MAX:
            self._sent.popitem(last=False)
        with self._contained():
            self._client.capture_event(event)

    def _on_end(self, event_id: str, is_taken: bool) -> None:
        """Sentry took an event, or did not; called on any thread."""
        self._order(lambda: self._end(event_id, is_taken))

    def _end(self, event_id: str, is_taken: bool) -> None:
        alert = self._sent.pop(event_id, None)
        if alert and not is_taken:
            log.warning("alert.delayed", extra={"alert": alert.event, "session": alert.session})
            self._memory.give_back(alert, self._clock())

    def _recall(self) -> Memory:
        try:
            return Memory(repeat_s=self._repeat_s, fields=self._document.read())
        except StorageError as error:
            log.warning("alerts.memory_unreadable", extra={"problem": str(error)})
            return Memory(repeat_s=self._repeat_s)

    def _remember(self) -> None:
        fields = self._memory.as_fields()
        if fields == self._saved:
            return
        try:
            self._document.write(fields)
            self._saved = copy.deepcopy(fields)
        except (StorageError, TypeError, ValueError) as error:  # or one that is no JSON
            log.warning("alerts.memory_not_saved", extra={"problem": str(error)})


def _event(alert: Alert, host: str) -> dict[str, Any]:
    tags = {"event": alert.event, "host": host, **alert.tags}
    if alert.session:
        tags["session"] = alert.session
    return {
        "event_id": uuid.uuid4().hex,
        "timestamp": datetime.fromtimestamp(alert.at, UTC),
        "level": alert.level or "info",
        "logger": "whatsapp_worker",
        "message": alert.text,
        "fingerprint": alert.key.split(),
        "tags": tags,
        "contexts": {"alert": dict(alert.context)} if alert.context else {},
    }


def _check(repeat_s: float) -> Callable[[dict[str, Any]], object]:
    return lambda fields: Memory(repeat_s=repeat_s, fields=fields)
