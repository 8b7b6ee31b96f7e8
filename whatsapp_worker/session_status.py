"""What is the matter with one session, as the world is told: state.json, history, events."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from storage.errors import RecordMissing, StorageError
from storage.sessions import Sessions, StateRecord
from whatsapp_worker.event_names import Event
from whatsapp_worker.history import History
from whatsapp_worker.session import Reason, State, Trigger, state_sentence, step

log = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0  # for what changes all the time, or longer where the disk is slow
SAVE_RARELY_S = 120.0
SAVING_SHARE = 0.1  # of the supervisor's time, at most, for what changes all the time
# Facts that change all the time and are not worth a write each.
_FLEETING = ("proof_of_life_at", "rss_mib", "queue", "touched_at")


class SessionStatus:
    """The state record of one session; the supervisor's loop alone changes it."""

    def __init__(
        self,
        id: str,
        *,
        sessions: Sessions,
        record: StateRecord | None,
        touched_at: float,
        history: History,
        max_sessions: int,
        tell: Callable[[Event, str, Mapping[str, Any]], None],
        wall: Callable[[], float],
    ) -> None:
        """
        Args:
            record: What lies on disk; None for a session that has none yet.
            touched_at: For a new record.
            max_sessions: MAX_SESSIONS, which share the disk and the supervisor's loop.
            tell: Puts an event on the stream, sooner or later.
            wall: UTC seconds.
        """
        self._id = id
        self._sessions = sessions
        self._history = history
        self._max_sessions = max_sessions
        self._tell = tell
        self._wall = wall
        self._saved = record
        self._save_at = 0.0
        self._retry_save_at = 0.0
        self.record = record or StateRecord(
            generation=0,
            state=State.UNLINKED,
            since=wall(),
            sentence=state_sentence(State.UNLINKED, None, id),
            touched_at=touched_at,
        )

    @property
    def state(self) -> State:
        return State(self.record.state)

    @property
    def reason(self) -> Reason | None:
        return Reason(self.record.reason) if self.record.reason else None

    def move(
        self, trigger: Trigger, reason: Reason | None, *, said: str | None = None, **facts: Any
    ) -> bool:
        """Step to the next state; whether the trigger meant anything.

        Args:
            said: The sentence, where the reason's own does not fit.
        """
        before = self.record
        following = step(self.state, trigger)
        if following is None:
            log.info("session.surprise", extra={"session": self._id, "trigger": trigger})
            return False
        is_same = (following, reason) == (before.state, before.reason)
        since = before.since if following == before.state else round(self._wall(), 3)
        if said is None:
            said = state_sentence(following, reason, self._id)
        self.set(state=following, reason=reason, sentence=said, since=since, **facts)
        if not is_same:
            self._tell_change(before)
        return True

    def _tell_change(self, before: StateRecord) -> None:
        record = self.record
        change = {
            "state": record.state,
            "reason": record.reason,
            "sentence": record.sentence,
            "previous": before.state,
            "attempt": record.attempt,
            "next_attempt_at": record.next_attempt_at,
            "banned_until": record.banned_until,
        }
        log.info(
            Event.STATE_CHANGED,
            extra={
                "session": self._id,
                "state": record.state,
                "previous": before.state,
                "reason": record.reason,
            },
        )
        self.note(Event.STATE_CHANGED, **change)
        self._tell(Event.STATE_CHANGED, self._id, change)

    def note(self, event: str, **facts: Any) -> None:
        self._history.add({"event": event, **facts}, now=self._wall())

    def set(self, **facts: Any) -> None:
        record = self.record
        if any(getattr(record, name) != value for name, value in facts.items()):
            self.record = dataclasses.replace(record, **facts)

    def save(self, now: float, *, at_last: bool = False) -> None:
        """Write state.json when it says something new; soon for states, later for the rest.

        Args:
            at_last: It is the last chance.
        """
        if self.record == self._saved or (now < self._retry_save_at and not at_last):
            return
        if now < self._save_at and self._saved and _lasting(self.record) == _lasting(self._saved):
            return
        began = time.monotonic()
        try:
            self._sessions.put_state(self._id, self.record)
        except RecordMissing:
            return
        except StorageError as error:
            self._retry_save_at = now + SAVE_EVERY_S
            log.error("session.not_saved", extra={"session": self._id, "problem": str(error)})
            return
        fair_s = (time.monotonic() - began) * self._max_sessions / SAVING_SHARE
        self._saved = self.record
        self._save_at = now + min(max(SAVE_EVERY_S, fair_s), SAVE_RARELY_S)


def _lasting(record: StateRecord) -> StateRecord:
    nothing: dict[str, Any] = dict.fromkeys(_FLEETING)
    return dataclasses.replace(record, **nothing)
