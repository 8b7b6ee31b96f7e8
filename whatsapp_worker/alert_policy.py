"""Which happenings a person is told of, in what words, and how often. Pure: the clock is an
argument, nothing is sent.

Only what stays broken until somebody acts, or what somebody must know: what heals by itself
never alerts.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from whatsapp_worker.session import State

Level = Literal["error", "warning", "info"]
Fields = dict[str, Any]

MAX_REMEMBERED = 1000  # keys; the oldest are forgotten
MAX_WAITING = 1000
MAX_TEXT = 500  # characters of one value
MAX_LIST = 20  # entries of a list
RESEND_S = 60.0  # after Sentry did not take an alert

_ENDED = frozenset({State.LOGGED_OUT, State.REPLACED, State.OUTDATED, State.BANNED, State.FAILED})
_HEALED = frozenset({State.CONNECTED, State.STOPPED, State.DELETED, State.UNLINKED})


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One thing to tell.

    Attributes:
        event: The tag `event`.
        level: None tells nobody: such an alert only ends what `closes` names.
        text: For people; no message text, no phone number.
        key: What makes two alerts the same; repeated at most every ALERT_REPEAT_S.
        session: Empty for an alert of the host.
        tags: Short words to search by.
        context: JSON data to read.
        is_lasting: Stays true, until a closing alert if there is one. Held back, it is told when
            its time has come; of several the last.
        closes: The key of the lasting alert that this one ends; told only if that one was.
        at: UTC seconds.
    """

    event: str
    level: Level | None
    text: str
    key: str
    session: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    is_lasting: bool = False
    closes: str = ""
    at: float = 0.0


def breaker_opened(
    breaker: Literal["message", "database"],
    *,
    session: str,
    failure: str,
    failures: Sequence[Mapping[str, Any]],
    retry_after_s: float,
) -> Alert:
    """A breaker tripped, or its probe failed again.

    Args:
        breaker: `database` is one alert a host, whichever process notices first.
        session: Whose device process reports it.
        failure: The class of the last failure.
        failures: The last ones, oldest first, without message text.
        retry_after_s: Until the probe.
    """
    what = f"Session {session} cannot send" if breaker == "message" else "The ledger's database"
    does = f"{what}: {failure}" if breaker == "message" else f"{what} does not answer: {failure}"
    return Alert(
        event="breaker.opened",
        level="error",
        text=f"{does}. Nothing is sent; a probe follows every {retry_after_s:g} s.",
        key=_breaker_key(breaker, session),
        session=session,
        tags={"breaker": breaker, "failure": failure},
        context={"failures": list(failures)},
        is_lasting=True,
    )


def breaker_closed(
    breaker: Literal["message", "database"], *, session: str, open_s: float | None = None
) -> Alert:
    """A breaker recovered; `open_s` is how long it was open, if known."""
    key = _breaker_key(breaker, session)
    who = f"Session {session} sends" if breaker == "message" else "The ledger's database answers"
    return Alert(
        event="breaker.closed",
        level="info",
        text=f"{who} again.",
        key=f"{key} closed",
        session=session,
        tags={"breaker": breaker},
        context={} if open_s is None else {"open_s": round(open_s, 1)},
        closes=key,
    )


def session_changed(
    session: str, *, state: str, reason: str | None, sentence: str, heals: bool
) -> Alert | None:
    """A session entered a state: the alert that it ended, or that an earlier end is over.

    Args:
        state: One of `session.State`.
        sentence: What a person can do about it.
        heals: It goes on by itself (a cool-down or a temporary ban that ends): no alert.
    """
    key = f"session.ended {session}"
    if state in _HEALED:
        return Alert(event="session.healed", level=None, text="", key=f"{key} healed", closes=key)
    if state not in _ENDED or heals or reason == "operator":
        return None
    return Alert(
        event="session.ended",
        level="error",
        text=f"Session {session} is {state.replace('_', ' ')}. {sentence}",
        key=key,
        session=session,
        tags={"state": str(state), "reason": str(reason or "unknown")},
        is_lasting=True,
    )


def message_unknown(session: str, *, message_ids: Sequence[str], older_than_s: float) -> Alert:
    """Messages whose outcome no receipt settled in time."""
    return Alert(
        event="message.unknown",
        level="warning",
        text=f"Session {session}: no receipt told within {older_than_s:g} s whether"
        " messages arrived. Decide about each: whatsapp-worker messages resolve",
        key=f"message.unknown {session}",
        session=session,
        context={"count": len(message_ids), "message_ids": list(message_ids)},
        is_lasting=True,
    )


def job_poisoned(session: str, *, job_id: str, problem: str) -> Alert:
    """A job that no worker can ever run was taken out of its queue."""
    return Alert(
        event="job.poisoned",
        level="warning",
        text=f"Session {session}: a job could not be read and was failed. Look at the program"
        " that enqueued it.",
        key=f"job.poisoned {session}",
        session=session,
        context={"job_id": job_id, "problem": problem},
        is_lasting=True,
    )


def stream_filling(*, full: float, slowest_group: str | None) -> Alert:
    """The event stream nears its ceiling; say it again for as long as it does.

    Args:
        full: 0 to 1 of EVENTS_MAX; at 1 the oldest events are dropped unread.
    """
    who = f" The consumer group {slowest_group} lags behind." if slowest_group else ""
    return Alert(
        event="stream.filling",
        level="error",
        text="The event stream is nearly full, events will be lost."
        f"{who} Start the consumers again or remove a group that nobody reads.",
        key="stream.filling",
        context={"full": round(full, 3), "slowest_group": slowest_group},
    )


def purge_failed(*, problem: str) -> Alert:
    """A purge did not finish; the next one tries again what is left."""
    return Alert(
        event="purge.failed",
        level="error",
        text="The purge failed; the next one tries again.",
        key="purge.failed",
        context={"problem": problem},
    )


def _breaker_key(breaker: str, session: str) -> str:
    # One database serves every session of the host: its outage is one alert, not one a process.
    return f"breaker {breaker} {session}" if breaker == "message" else f"breaker {breaker}"


class Memory:
    """What was told when, so that nothing repeats sooner than allowed and nothing is lost.

    Lasting alerts that came too soon wait here until they may be told, and alerts that Sentry did
    not take until it is tried again. Bounded.
    """

    def __init__(self, *, repeat_s: float, fields: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            repeat_s: ALERT_REPEAT_S.
            fields: From `as_fields`, of an earlier process.

        Raises:
            ValueError, TypeError, KeyError: `fields` are none.
        """
        self._repeat_s = repeat_s
        found = fields or {}
        self._told: dict[str, float] = {str(k): float(v) for k, v in found.get("told", {}).items()}
        self._open: set[str] = set(found.get("open", []))
        self._waiting = [
            _Waiting(Alert(**w["alert"]), float(w["due"]), bool(w["is_unsent"]))
            for w in found.get("waiting", [])
        ]

    def judge(self, alert: Alert, now: float) -> Alert | None:
        """The alert if it is to be told now.

        Args:
            now: UTC seconds.
        """
        if alert.closes:
            return self._close(alert)
        elapsed_s = now - self._told.get(alert.key, -self._repeat_s)
        # A clock that was set back must not silence an alert for longer.
        if 0 <= elapsed_s < self._repeat_s:
            if alert.is_lasting:
                self._wait(alert, now - elapsed_s + self._repeat_s)
            return None
        self._note(alert, now)
        return alert

    def due(self, now: float) -> list[Alert]:
        """Those that waited and are to be told now."""
        due = [waiting.alert for waiting in self._waiting if waiting.due <= now]
        self._waiting = [waiting for waiting in self._waiting if waiting.due > now]
        for alert in due:
            if not alert.closes:
                self._note(alert, now)
        return due

    def next_due(self) -> float | None:
        """When `due` has something; None when nothing waits."""
        return min((waiting.due for waiting in self._waiting), default=None)

    def give_back(self, alert: Alert, now: float) -> None:
        """Sentry did not take it: it is told again after RESEND_S."""
        self._wait(alert, now + RESEND_S, is_unsent=True)

    def as_fields(self) -> Fields:
        """JSON data, for the next process."""
        return {
            "told": self._told,
            "open": sorted(self._open),
            "waiting": [dataclasses.asdict(waiting) for waiting in self._waiting],
        }

    def _close(self, alert: Alert) -> Alert | None:
        # What Sentry has not taken yet is told all the same: it was true, and its end follows it.
        self._waiting = [w for w in self._waiting if w.alert.key != alert.closes or w.is_unsent]
        was_told = alert.closes in self._open
        self._open.discard(alert.closes)
        return alert if was_told and alert.level else None

    def _note(self, alert: Alert, now: float) -> None:
        self._told.pop(alert.key, None)
        self._told[alert.key] = now
        if alert.is_lasting:
            self._open.add(alert.key)
        self._waiting = [w for w in self._waiting if w.alert.key != alert.key]
        while len(self._told) > MAX_REMEMBERED:
            oldest = next(iter(self._told))
            del self._told[oldest]
            self._open.discard(oldest)

    def _wait(self, alert: Alert, due: float, *, is_unsent: bool = False) -> None:
        before = [w for w in self._waiting if w.alert.key == alert.key]
        if not is_unsent and any(w.is_unsent for w in before):
            return  # the same is on its way already, and sooner
        self._waiting = [w for w in self._waiting if w.alert.key != alert.key]
        self._waiting.append(_Waiting(alert, due, is_unsent))
        del self._waiting[:-MAX_WAITING]


@dataclass(frozen=True, slots=True)
class _Waiting:
    alert: Alert
    due: float  # UTC seconds
    is_unsent: bool = False


_DIGITS = re.compile(
    # A UUID is no phone number, whatever digits it holds.
    r"(?P<uuid>\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b)"
    r"|\+?\d[\d ()-]{4,}\d",
    re.ASCII | re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d( \d\d)?")


def scrub(value: Any) -> Any:
    """JSON data without full phone numbers, long texts and long lists: the last line of defence.

    Of every run of seven digits and more, written as people write phone numbers, only the last
    two stay.
    """
    if isinstance(value, str):
        return _DIGITS.sub(_mask, value)[:MAX_TEXT]
    if isinstance(value, Mapping):
        return {scrub(str(key)): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value[-MAX_LIST:]]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**6:
        return _DIGITS.sub(_mask, str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    return scrub(str(value))


def _mask(found: re.Match[str]) -> str:
    text = found[0]
    digits = re.sub(r"\D", "", text)
    if found["uuid"] or len(digits) < 7 or _DATE.fullmatch(text):
        return text
    return f"…{digits[-2:]}"
