"""How a device process ended, judged: what it means, and whether it may heal by itself. Pure.

`of_fact` judges what the client told (every row of "How a session ends" in docs), `of_exit` what
the operating system told of a process that said nothing. The supervisor acts on `Ending` alone.
"""

import signal
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from whatsapp_worker import facts
from whatsapp_worker.reports import Exit
from whatsapp_worker.session import Reason

# A ban whose end WhatsApp did not tell is tried again after so long (s).
BAN_WITHOUT_END_S = 3600.0

MAX_WEIGHT = 2  # of `Ending.weight`


class EndingKind(StrEnum):
    """What the supervisor does next hangs on this word."""

    STOPPED = "stopped"  # it was asked to
    LINKED = "linked"  # pairing succeeded; the credentials lie in pairing.db
    LOST = "lost"  # the connection, or the attempt to make one, failed; the policy decides
    CRASHED = "crashed"  # the process died or hung; the same policy, counted apart
    RECYCLED = "recycled"  # on purpose: start the next one at once
    LOGGED_OUT = "logged_out"
    REPLACED = "replaced"
    BANNED = "banned"  # until `until`
    OUTDATED = "outdated"
    LINK_FAILED = "link_failed"
    REFUSED = "refused"  # this host or environment cannot run it: locked, unsafe, store broken


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a device or pairing process ended.

    `until` is UTC seconds (bans only); `detail` is for logs and people, without phone numbers.
    """

    kind: EndingKind
    reason: Reason | None = None
    detail: str = ""
    until: float | None = None

    @property
    def transient(self) -> bool:
        """Whether a new process may succeed without anybody acting."""
        return self.kind in _TRANSIENT

    @property
    def weight(self) -> int:
        """Which of two endings of one process counts: WhatsApp's last word outweighs an
        operator's wish, and that outweighs an accident."""
        return 0 if self.transient else 1 if self.kind is EndingKind.STOPPED else MAX_WEIGHT

    def report(self) -> dict[str, Any]:
        """As it travels in the `ended` report."""
        return asdict(self)

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> "Ending":
        """The inverse of `report`; unknown words become a crash with the words as its detail."""
        try:
            reason = report.get("reason")
            return cls(
                kind=EndingKind(report["kind"]),
                reason=Reason(reason) if reason else None,
                detail=str(report.get("detail") or ""),
                until=report.get("until"),
            )
        except (KeyError, ValueError):
            return Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, f"said {report!r:.200}")


_TRANSIENT = frozenset({EndingKind.LOST, EndingKind.CRASHED, EndingKind.RECYCLED})


def of_fact(fact: facts.Fact, *, now: float) -> Ending | None:
    """What a fact means for the connection: None when it goes on.

    Args:
        fact: What the client told.
        now: UTC seconds; a ban's end is counted from it.
    """
    match fact:
        case facts.Disconnected():
            return Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, "disconnected")
        case facts.NotConnected():
            return Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, "socket down without a word")
        case facts.Silent():
            return Ending(EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT, f"silent {fact.age_s:.0f} s")
        case facts.StreamError():
            return Ending(EndingKind.LOST, Reason.STREAM_ERROR, f"stream error {fact.code}")
        case facts.LoggedOut():
            return _logged_out(fact.reason)
        case facts.StreamReplaced():
            return Ending(EndingKind.REPLACED, Reason.STREAM_REPLACED)
        case facts.TemporaryBan():
            until = now + (fact.expire_s if fact.expire_s > 0 else BAN_WITHOUT_END_S)
            return Ending(EndingKind.BANNED, Reason.TEMPORARY_BAN, fact.code, until)
        case facts.ClientOutdated():
            return Ending(EndingKind.OUTDATED, Reason.CLIENT_OUTDATED)
        case facts.ConnectFailure():
            return _refused_login(fact)
        case facts.ConnectReturned():
            return _returned(fact.error, now)
    return None


def of_exit(returncode: int, said: Ending | None) -> Ending:
    """What the end of a process means.

    Args:
        returncode: As `os.waitstatus_to_exitcode` gives it: negative for a signal.
        said: The last word of the process (`ended`), if it had one.
    """
    if said is not None:
        return said
    if returncode < 0:
        return _crashed(f"killed by {_signal_name(-returncode)}")
    return _BY_EXIT.get(returncode) or _crashed(f"exit code {returncode}")


def refused(detail: str) -> Ending:
    """This host or environment cannot run the session; a person must act."""
    return Ending(EndingKind.REFUSED, Reason.CANNOT_RUN, detail)


def _logged_out(reason: str) -> Ending:
    gone = reason == "MAIN_DEVICE_GONE"
    why = Reason.MAIN_DEVICE_GONE if gone else Reason.LOGGED_OUT
    return Ending(EndingKind.LOGGED_OUT, why, reason)


def _refused_login(failure: facts.ConnectFailure) -> Ending:
    """409 means that WhatsApp dislikes this client, which only an upgrade changes; the others
    (400, 418, unknown ones) are surprises that may pass."""
    if failure.reason == "BAD_USER_AGENT":
        return Ending(EndingKind.OUTDATED, Reason.CLIENT_OUTDATED, failure.reason)
    return Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, f"login refused: {failure.reason}")


def _returned(error: str, now: float) -> Ending:
    """neonize leaves `connect()` with an error when the first dial fails, and also when an event
    carries an enum value that it cannot encode: then the event's name stands in the text."""
    if "TemporaryBan" in error:
        until = now + BAN_WITHOUT_END_S
        return Ending(EndingKind.BANNED, Reason.TEMPORARY_BAN, "unknown code", until)
    if "LoggedOut" in error:
        return _logged_out("unknown")
    if "ConnectFailure" in error:
        return _refused_login(facts.ConnectFailure("unknown", ""))
    return Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, error[:200] or "connect() returned")


def _crashed(detail: str) -> Ending:
    return Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, detail)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_BY_EXIT = {
    Exit.OK: Ending(EndingKind.STOPPED),
    Exit.NOT_DRAINED: Ending(EndingKind.STOPPED, detail="the send in hand did not end in time"),
    Exit.CONNECTION_ENDED: Ending(EndingKind.LOST, Reason.CONNECTION_FAILED),
    Exit.SEND_HUNG: Ending(EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT, "a send got no answer"),
    Exit.LOCKED: _crashed("another process holds this session"),
    Exit.ORPHANED: _crashed("its supervisor was gone"),
    Exit.UNSAFE: refused("this environment could reach the real network"),
    Exit.STORE_BROKEN: refused("its credentials or ledger are unusable"),
    2: _crashed("the Go runtime ended the process"),  # as 413 does
}
