"""Puts the supervisor's events on the stream from a thread of its own, so that Redis never
holds up the loop. While Redis is down the latest wait here, bounded."""

import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

from redis import RedisError

from whatsapp_worker.event_names import Event
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

WAITING_MAX = 1000
RETRY_S = 1.0


class Announcer:
    """A bounded queue and the thread that empties it into the stream."""

    def __init__(self, stream: EventStream, *, limit: int = WAITING_MAX) -> None:
        self._stream = stream
        self._waiting: queue.Queue[dict[str, str | int] | None] = queue.Queue(limit)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def announce(self, event: Event, session: str, payload: Mapping[str, Any]) -> None:
        """Say it when Redis can hear; never blocks. The oldest is dropped when too many wait."""
        # Made once: where the answer is lost it is told again under its id, with its own time.
        entry = self._stream.entry(event, session, payload)
        while True:
            try:
                self._waiting.put_nowait(entry)
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            dropped = self._waiting.get_nowait()
        except queue.Empty:
            return
        if dropped:
            facts = {"event_name": dropped["event"], "session": dropped["session"]}
            log.warning("event.dropped", extra=facts)

    def stop(self, *, timeout_s: float) -> bool:
        """Flush what waits; whether that was done in time."""
        self._announce_end()
        self._thread.join(timeout_s)
        self._leave.set()
        return not self._thread.is_alive()

    def _announce_end(self) -> None:
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._leave.set()

    def _run(self) -> None:
        while not self._leave.is_set() and (entry := self._waiting.get()) is not None:
            self._say(entry)

    def _say(self, entry: Mapping[str, str | int]) -> None:
        was_down = False
        while not self._leave.is_set():
            try:
                self._stream.add_many([entry])
                return
            except RedisError as error:
                if not was_down:
                    log.warning("event.delayed", extra={"problem": str(error)})
                was_down = True
                self._leave.wait(RETRY_S)
