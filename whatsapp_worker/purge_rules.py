"""Whom the purge removes: a pure function of one session's facts and the clock.

Credentials that may still be good are never removed by time alone, or a week without an uplink
would cost every number. All times are unix seconds; a clock that went back makes everything
younger, so nothing is removed that would not have been anyway.
"""

from dataclasses import dataclass
from enum import StrEnum

from whatsapp_worker.session import State

_ACTIVE = frozenset({State.CONNECTED, State.LINKING, State.CONNECTING, State.RECONNECTING})


class Kind(StrEnum):
    """Why a session is removed; counted by these words."""

    DELETED = "deleted"  # somebody asked for it; what a crash left is finished
    NEVER_LINKED = "never_linked"  # no touch for LINK_TIMEOUT_S
    LOGGED_OUT = "logged_out"  # no touch for STALE_AFTER_S; its credentials are worthless
    LINKED = "linked"  # not connected for PURGE_LINKED_AFTER_S, where that is set
    NO_RECORD = "no_record"  # a folder that no record belongs to


class Record(StrEnum):
    """What was found of the wanted record."""

    WHOLE = "whole"
    MISSING = "missing"
    BROKEN = "broken"  # or of a newer version


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """LINK_TIMEOUT_S, STALE_AFTER_S and PURGE_LINKED_AFTER_S, in seconds."""

    link_timeout_s: float
    stale_after_s: float
    purge_linked_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one session.

    Attributes:
        state: From its state record; None without one.
        is_wanted_deleted: The record says so, or there is a tombstone.
        was_linked: It has, or once had, credentials.
        is_leased: A process runs it at this moment.
        is_link_pending: Somebody asked for it to be linked and was not answered.
        is_supervised: A supervisor runs, so that `state` is the truth and not history.
        touched_at: Last link attempt, login, operator command or accepted job; without a record
            the last change of the folder.
        alive_at: Last proof of life of its connection; 0 when there was none.
        waiting: Messages that wait for it; None when Redis did not say.
    """

    session: str
    record: Record
    state: State | None
    is_wanted_deleted: bool
    was_linked: bool
    is_leased: bool
    is_link_pending: bool
    is_supervised: bool
    touched_at: float
    alive_at: float
    waiting: int | None


@dataclass(frozen=True, slots=True)
class Remove:
    """It goes."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Keep:
    """It stays; `why` is worth telling, None where nothing is out of the ordinary."""

    why: str | None = None


def judge(facts: Facts, limits: Limits, now: float) -> Remove | Keep:
    """Whether the purge removes a session."""
    if facts.is_wanted_deleted:
        return Keep("its process still runs") if facts.is_leased else Remove(Kind.DELETED)
    is_active = facts.state in _ACTIVE or facts.is_link_pending
    if facts.is_leased or (facts.is_supervised and is_active):
        return Keep()
    if facts.record is Record.BROKEN:
        return Keep("its record cannot be read")
    kind = _kind(facts)
    limit_s = _limit_s(kind, facts, limits)
    idle_s = now - max(facts.touched_at, facts.alive_at)
    if limit_s is None or idle_s < limit_s:
        return _stay(kind, idle_s, limits)
    if facts.waiting is None:
        return Keep("Redis does not say whether messages wait for it")
    if facts.waiting:
        words = "1 message waits" if facts.waiting == 1 else f"{facts.waiting} messages wait"
        return Keep(f"{words} for it")
    return Remove(kind)


def _kind(facts: Facts) -> Kind:
    if facts.record is Record.MISSING:
        return Kind.NO_RECORD
    if facts.state is State.LOGGED_OUT:
        return Kind.LOGGED_OUT
    return Kind.LINKED if facts.was_linked else Kind.NEVER_LINKED


def _limit_s(kind: Kind, facts: Facts, limits: Limits) -> float | None:
    if kind is Kind.LINKED:
        return limits.purge_linked_after_s
    if kind is Kind.LOGGED_OUT or facts.was_linked:
        return limits.stale_after_s
    return limits.link_timeout_s


def _stay(kind: Kind, idle_s: float, limits: Limits) -> Keep:
    if kind is Kind.LINKED and idle_s >= limits.stale_after_s:
        return Keep(f"stale: linked, and not connected for {idle_s / 86_400:.0f} days")
    return Keep()
