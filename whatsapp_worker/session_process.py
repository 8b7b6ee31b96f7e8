"""One device or pairing process, as the supervisor sees it: its words, and how it is ended."""

import contextlib
import os
import re
import select
import signal
import socket
from dataclasses import dataclass, field
from typing import Any

from whatsapp_worker import endings, process
from whatsapp_worker.endings import Ending, EndingKind
from whatsapp_worker.reports import Channel, ChannelGarbage
from whatsapp_worker.session import Reason

DRAIN_S = 8.0  # what the send in hand gets
GRACE_S = 2.0  # from SIGTERM to SIGKILL
UNREAPED_S = 1.0  # what the fork helper gets to tell of a death
_NUMBERS = re.compile(r"(?<![0-9a-fx])\d{6,}")  # not within an address
UNKNOWN_EXIT = 1  # of a process whose exit status nobody could read

# What a process says of these is true whatever else was asked of it meanwhile.
_FINAL = frozenset(
    {EndingKind.LOGGED_OUT, EndingKind.REPLACED, EndingKind.BANNED, EndingKind.OUTDATED}
)


@dataclass(eq=False)
class SessionProcess:
    """A process from the request to fork it until it is reaped. Times are monotonic seconds."""

    run: int
    kind: str  # device or pairing
    session: str
    channel: Channel
    started_at: float
    pid: int | None = None
    request: str | None = None  # the link request that a pairing process serves
    is_canary: bool = False
    output: int | None = None  # the file with what its native libraries wrote
    was_forced: bool = False  # it was asked to drain and had to be killed
    is_orphan: bool = False  # its fork helper is gone; the supervisor reaps it
    heard_at: float = 0.0
    connecting_at: float | None = None
    login_at: float | None = None
    ended_at: float | None = None
    closed_at: float | None = None  # it closed its channel
    heartbeat: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)  # reported, not yet alerted
    said: Ending | None = None
    _verdict: Ending | None = None
    _term_at: float | None = None
    _kill_at: float | None = None
    _pidfd: int | None = None

    def __post_init__(self) -> None:
        self.heard_at = self.started_at

    def forked(self, pid: int) -> None:
        """Learn the process id, and hold on to the process itself: ids are used again."""
        if self.pid is not None:
            return
        self.pid = pid
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(pid)

    def hear(self, now: float) -> list[dict[str, Any]]:
        """Its reports since the last call; notes the end of the channel in `closed_at`."""
        try:
            reports = self.channel.receive()
        except ChannelGarbage as error:
            self.end(now, Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, str(error)))
            reports = None
        if reports is None:
            self.closed_at = self.closed_at or now
            return []
        for report in reports:
            self._note(report, now)
        return reports

    def _note(self, report: dict[str, Any], now: float) -> None:
        self.heard_at = now
        match report.get("report"):
            case "started":
                self.forked(int(report.get("pid") or 0))
            case "connecting":
                self.connecting_at = now
            case "connected":
                self.login_at = now
            case "heartbeat":
                self.heartbeat = report
                if self.output is not None:
                    process.keep_small(self.output)
            case "failure":
                self.failures.append(report)
            case "leaving":
                self.ended_at = now
            case "ended":
                self.said = Ending.from_report(report.get("ending") or {})
                self.ended_at = self.ended_at or now

    def has_vanished(self, now: float) -> bool:
        """Whether it is dead and nobody says so: its parent does not reap."""
        if self.closed_at is None or now - self.closed_at < UNREAPED_S or self._pidfd is None:
            return False
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def is_unanswered(self) -> bool:
        """Whether the fork helper has not said yet that it forked it."""
        return self.pid is None and not self.is_orphan

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end."""
        return self._term_at is not None or self._kill_at is not None

    @property
    def is_dialling(self) -> bool:
        return self.kind == "device" and self.login_at is None and not self.is_ending

    def ask(self, now: float, *, drain_s: float, verdict: Ending | None = None) -> None:
        """Ask it to leave after the send in hand; SIGTERM, then SIGKILL, when it does not."""
        if self.is_ending:
            return
        self._verdict = verdict
        self.channel.send(order="stop", drain_s=drain_s)
        self._term_at = now + drain_s + GRACE_S

    def end(self, now: float, verdict: Ending | None) -> None:
        """SIGTERM now, SIGKILL after the grace."""
        if self._kill_at is not None:
            return
        self._verdict = verdict or self._verdict
        self._term_at = now
        self.escalate(now)

    def kill(self, now: float, verdict: Ending | None = None) -> None:
        """SIGKILL, as soon as the process id is known."""
        self._verdict = self._verdict or verdict
        self._term_at, self._kill_at = None, now
        self.escalate(now)

    def hasten(self, deadline: float) -> None:
        """Bring SIGTERM and SIGKILL forward, so that it is gone by then."""
        if self._term_at is not None:
            self._term_at = min(self._term_at, deadline - 2 * GRACE_S)
        if self._kill_at is not None:
            self._kill_at = min(self._kill_at, deadline)

    def escalate(self, now: float) -> None:
        """Send what is due; call it every tick."""
        if self.pid is None:
            return
        if self._term_at is not None and now >= self._term_at:
            self._term_at, self._kill_at = None, now + GRACE_S
            self._signal(signal.SIGTERM)
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill_at = now + GRACE_S  # again, should it be in an unkillable sleep
            self.was_forced = True
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self.pid:
                os.kill(self.pid, number)

    def ending(self, status: int | None) -> Ending:
        """How it ended, all things considered.

        Args:
            status: As `os.waitpid` gives it; None when nobody could read it.
        """
        code = UNKNOWN_EXIT if status is None else os.waitstatus_to_exitcode(status)
        if self.said is not None and self.said.kind in _FINAL:
            return self.said
        return self._verdict or endings.of_exit(code, self.said)

    def last_words(self) -> str:
        """How the crash of its native libraries began, without phone numbers; else empty."""
        return "" if self.output is None else _NUMBERS.sub("...", process.last_words(self.output))

    def close(self) -> None:
        """Let go of what belongs to it, once it is reaped."""
        self.channel.close()
        if self.output is not None:
            os.close(self.output)
            self.output = None
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def socket_pair() -> tuple[Channel, socket.socket]:
    """Our end of a new channel, and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours, send_timeout_s=0.2), theirs
