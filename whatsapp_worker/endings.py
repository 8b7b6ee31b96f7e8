"""How a device process ended, judged: what it means, and whether it may heal by itself. Pure.

`of_fact` judges what the client told (every row of "How a session ends" in docs), `of_exit` what
the operating system told of a process that said nothing. The supervisor acts on `Ending` alone.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from whatsapp_worker import facts
from whatsapp_worker.reports import Exit
from whatsapp_worker.session import Reason

# A ban whose end WhatsApp did not tell is tried again after so long (s).
BAN_WITHOUT_END_S = 3600.0


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
    raise NotImplementedError


def of_exit(returncode: int, said: Ending | None) -> Ending:
    """What the end of a process means.

    Args:
        returncode: As `os.waitstatus_to_exitcode` gives it: negative for a signal.
        said: The last word of the process (`ended`), if it had one.
    """
    raise NotImplementedError
