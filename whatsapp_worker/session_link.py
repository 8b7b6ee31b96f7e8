"""The link request of one session, from the asking to the answer: codes, a phone, credentials.

Where the stored credentials may still be good they are tried; else a pairing process shows codes,
and what it paired is adopted. The answer goes into state.json, the code that a phone is to take
into link.json for the operator, and nowhere else.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.errors import StorageError
from storage.sessions import Sessions
from whatsapp_worker import device_store
from whatsapp_worker.device_store import DeviceStoreBroken
from whatsapp_worker.endings import Ending, EndingKind
from whatsapp_worker.event_names import Event
from whatsapp_worker.session import Reason, State, Trigger, sentence
from whatsapp_worker.session_process import DRAIN_S, SessionProcess
from whatsapp_worker.session_status import SessionStatus
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

LOCK_WAIT_S = 1.0  # others look at the lock for an instant
PAIRED_TO_ENDED_S = 20.0  # a pairing process that paired, until its end; and the login after it

# Where a link attempt that failed goes back to, and by which trigger.
_BACK = {
    State.LOGGED_OUT: Trigger.LOGGED_OUT,
    State.REPLACED: Trigger.REPLACED,
    State.BANNED: Trigger.BANNED,
    State.OUTDATED: Trigger.OUTDATED,
}


class LinkHost(Protocol):
    """What a link attempt needs of its supervisor."""

    settings: Settings
    sessions: Sessions

    def wall(self) -> float:
        """UTC seconds."""

    def told(self, event: Event, session: str, payload: Mapping[str, Any]) -> None:
        """Put an event on the stream, sooner or later."""


@dataclass
class _Attempt:
    """One link request under way."""

    request: str
    method: str
    phone: str | None
    deadline: float
    pairs: bool  # a pairing process is needed; else the stored credentials may do
    back: State  # where a failure leads
    back_reason: Reason | None
    paired_at: float | None = None


class SessionLink:
    """At most one attempt at a time. Times called `now` are monotonic seconds."""

    def __init__(
        self, id: str, *, host: LinkHost, status: SessionStatus, dial: Callable[[float], None]
    ) -> None:
        """
        Args:
            dial: Called with `now` when the session is to dial with the credentials that it has:
                the new ones, or the old ones again.
        """
        self._id = id
        self._host = host
        self._status = status
        self._dial = dial
        self._folder: Path = host.sessions.folder(id)
        self._attempt: _Attempt | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request is under way."""
        return self._attempt is not None

    @property
    def is_pairing(self) -> bool:
        """Whether it needs a pairing process."""
        return self._attempt is not None and self._attempt.pairs

    def is_new(self, link: Mapping[str, Any] | None) -> bool:
        """Whether this request (`wanted.link`) is neither answered nor under way."""
        request = (link or {}).get("request")
        answered = (self._status.record.link or {}).get("request")
        return bool(request) and request != answered and not self.is_of(link)

    def is_of(self, link: Mapping[str, Any] | None) -> bool:
        """Whether this request is the one under way."""
        return self._attempt is not None and self._attempt.request == (link or {}).get("request")

    # From the asking to the answer

    def begin(self, link: Mapping[str, Any], *, age_s: float, pairs: bool, now: float) -> None:
        """Take up a request; the one before it is given up.

        Args:
            age_s: Seconds since somebody asked.
            pairs: The stored credentials will not do.
        """
        self.give_up(Reason.OPERATOR, now)
        self._attempt = _Attempt(
            request=str(link.get("request")),
            method=str(link.get("method") or "qr"),
            phone=link.get("phone"),
            deadline=now + self._host.settings.link_attempt_s - age_s,
            pairs=pairs,
            back=self._status.state,
            back_reason=self._status.reason,
        )

    def give_up(self, reason: Reason | None, now: float) -> None:
        """It failed, if it is under way."""
        if self._attempt is not None:
            self._finish(self._attempt, "failed", reason, now)

    def refuse(self, link: Mapping[str, Any] | None, reason: Reason, now: float) -> None:
        """Give up what is under way, and answer this request in case it is new."""
        self.give_up(reason, now)
        if link is not None and self.is_new(link):
            self.begin(link, age_s=0.0, pairs=False, now=now)
            self.give_up(reason, now)

    def succeed(self, now: float) -> None:
        """The session is logged in, which answers an attempt that does not pair."""
        if self._attempt is not None and not self._attempt.pairs:
            self._finish(self._attempt, "linked", None, now)

    def is_late(self, now: float) -> bool:
        """Whether its time is over."""
        return self._attempt is not None and now > self._attempt.deadline

    def pair_instead(self, reason: Reason | None) -> None:
        """WhatsApp logged the stored credentials out."""
        if self._attempt is not None:
            self._attempt.pairs = True
            self._attempt.back, self._attempt.back_reason = State.LOGGED_OUT, reason

    # While it pairs

    def pursue(self, process: SessionProcess | None, now: float) -> dict[str, Any] | None:
        """Take the next step of a pairing.

        Args:
            process: The session's, whatever it is.

        Returns:
            Arguments of the pairing process that is to be started; None for none.
        """
        link = self._attempt
        if link is None or not link.pairs:
            return None
        if process is None and now > link.deadline:
            self.give_up(Reason.QR_EXPIRED, now)
        elif process is None:
            return {"method": link.method, "phone": link.phone}
        elif process.kind == "device":
            process.ask(now, drain_s=DRAIN_S)
        elif process.request != link.request:
            process.kill(now)
        elif now > link.deadline and link.paired_at is None:
            process.kill(now, Ending(EndingKind.LINK_FAILED, Reason.QR_EXPIRED))
        elif link.paired_at is not None and now - link.paired_at > PAIRED_TO_ENDED_S:
            process.kill(now)
        return None

    def started(self, process: SessionProcess) -> None:
        """The pairing process that `pursue` asked for."""
        assert self._attempt is not None
        process.request = self._attempt.request
        self._status.move(Trigger.LINK, None, attempt=0, next_attempt_at=None)

    def show(self, report: Mapping[str, Any]) -> None:
        """A code for the phone: it goes into a file for the operator, never anywhere else."""
        if self._attempt is None:
            return
        facts = {
            "request": self._attempt.request,
            "event": report["report"],
            "code": report.get("code"),
            "number": report.get("number"),
            "expires_at": self._host.wall() + float(report.get("expires_in_s") or 0),
        }
        try:
            _write_private(self._file, json.dumps(facts))
        except OSError as error:
            log.error("link.code_not_shown", extra={"session": self._id, "problem": str(error)})
            return
        self._status.note(Event.QR, number=report.get("number"))
        self._host.told(Event.QR, self._id, {"number": report.get("number")})

    def hide(self) -> None:
        """No code is to be taken any more."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def accepted(self, now: float) -> None:
        """A phone took the code."""
        if self._attempt is not None:
            self._attempt.paired_at = now

    def on_ended(self, process: SessionProcess, ending: Ending, now: float) -> None:
        """A pairing process is reaped."""
        self.hide()
        link = self._attempt
        if link is None or link.request != process.request:
            return  # given up, or another attempt follows at once
        if ending.kind is EndingKind.LINKED or link.paired_at is not None:
            self._adopt(link, now)
        elif now <= link.deadline or ending.kind is EndingKind.LINK_FAILED:
            self.give_up(ending.reason or Reason.CONNECTION_FAILED, now)

    def _adopt(self, link: _Attempt, now: float) -> None:
        """Make the new credentials the session's own, and log in with them."""
        lock = self._host.sessions.session_lock(self._id)
        try:
            lock.acquire(LOCK_WAIT_S)
            with lock:
                who = device_store.adopt(self._folder / "pairing.db", self._folder / "device.db")
        except (DeviceStoreBroken, StorageError, OSError) as error:
            log.error("link.not_adopted", extra={"session": self._id, "problem": str(error)})
            self.give_up(Reason.CONNECTION_FAILED, now)
            return
        self._status.set(jid=who.jid, lid=who.lid, phone=who.phone, push_name=who.push_name)
        link.pairs = False
        link.deadline = max(link.deadline, now + PAIRED_TO_ENDED_S)  # it may have been late
        self._dial(now)

    def _finish(self, link: _Attempt, result: str, reason: Reason | None, now: float) -> None:
        """Answer the request, and leave the state where it belongs."""
        self._attempt = None
        answer = {"request": link.request, "result": result, "reason": reason}
        phone = link.phone if link.method == "phone" else None
        said = sentence(reason, self._id, linking=True, phone=phone)
        if reason is Reason.CANNOT_RUN and self._status.reason is reason:
            said = self._status.record.sentence  # which says more
        self._status.set(link={**answer, "sentence": said})
        self.hide()
        self._status.note(f"link.{result}", reason=reason)
        log.info(f"link.{result}", extra={"session": self._id, "reason": reason})
        if self._status.state is not State.LINKING:
            return
        if link.back in _BACK:
            self._status.move(_BACK[link.back], link.back_reason)
        elif link.back is State.UNLINKED:
            self._status.move(Trigger.UNPAIRED, reason, said=said or None)
        else:  # the old credentials are as good as before
            self._dial(now)

    @property
    def _file(self) -> Path:
        return self._folder / "link.json"


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, for this user's eyes only; gone with the code's usefulness."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)
