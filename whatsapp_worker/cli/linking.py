"""One link attempt as a command sees it: codes that rotate, then linked or failed."""

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from storage.errors import StorageError
from storage.sessions import StateRecord, Wanted
from whatsapp_worker.cli.host import POLL_S, Host, SupervisorPatience
from whatsapp_worker.errors import CapacityReached, CommandTimeout, LinkFailed
from whatsapp_worker.keys import session_id
from whatsapp_worker.session import Reason, State

# Beside the attempt itself: a supervisor that is starting, and the end of the attempt.
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Code:
    """A code for the phone. `kind` is `qr` (to scan) or `code` (to type); times are UTC seconds."""

    kind: str
    code: str
    expires_at: float

    @property
    def expires_in_s(self) -> float:
        """Seconds for which it still holds."""
        return max(0.0, self.expires_at - time.time())


@dataclass(frozen=True, slots=True)
class Moved:
    """The session is in another state than before."""

    state: str


@dataclass(frozen=True, slots=True)
class Linked:
    """The device is linked and logged in; by this attempt, or long before it (`is_new` false)."""

    phone: str | None
    jid: str | None
    is_new: bool = True


class Attempt:
    """Asks for a link and follows what comes of it.

    Args:
        host: Where.
        session: Its id; the session is created when there is none.
        phone: Digits of the number to get a pairing code for; a QR code without it.
        again: Link anew though the session is linked.

    Raises:
        UsageError: That is no session id.
    """

    def __init__(
        self, host: Host, session: str, *, phone: str | None = None, again: bool = False
    ) -> None:
        self._host = host
        self._session = session_id(session)
        self._request = str(uuid.uuid4())
        self._asked: Wanted | None = None
        self._has_shown = False  # a code: what is linked now was linked by it
        self._phone = phone
        self._link = {
            "request": self._request,
            "method": "phone" if phone else "qr",
            "phone": phone,
            "again": again,
        }

    def follow(self) -> Iterator[Code | Moved | Linked]:
        """Ask, then tell what happens until it is linked; blocks between two words.

        Raises:
            LinkFailed: It did not link, or is linked as another number; carries reason code
                and sentence.
            CapacityReached: MAX_SESSIONS sessions exist, or run, already.
            SupervisorUnavailable: None runs; the request stays recorded (transient).
            CommandTimeout: Neither linked nor failed in time (transient).
        """
        connected = self._connected_already()
        if connected:
            yield connected
            return
        self._asked = self._ask()
        settings = self._host.settings
        deadline = time.monotonic() + settings.link_attempt_s + _GRACE_S
        patience = SupervisorPatience(self._host)
        shown: object = None
        state_shown: str | None = None
        while True:
            state = self._state()
            if state and state.state != state_shown:
                state_shown = state.state
                yield Moved(state.state)
            if state and (ended := self._ended(state)):
                yield ended
                return
            if (code := self._code()) and code != shown and code.expires_in_s > 0:
                shown, self._has_shown = code, True
                yield code
            self._require_record()
            patience.check()
            if time.monotonic() > deadline:
                raise CommandTimeout(
                    f"session {self._session} neither linked nor failed in time; see:"
                    f" whatsapp-worker status {self._session}"
                )
            time.sleep(POLL_S)

    def withdraw(self) -> None:
        """Take the request back, so that no code goes on being shown; for an impatient person."""
        if self._asked is None:
            return

        def change(wanted: Wanted) -> Wanted:
            mine = wanted.link is not None and wanted.link.get("request") == self._request
            return dataclasses.replace(wanted, link=None) if mine else wanted

        with contextlib.suppress(StorageError):
            self._host.sessions.want(self._session, change, now=time.time())

    def _connected_already(self) -> Linked | None:
        if self._link["again"] or not self._host.supervisor().alive:
            return None
        wanted, state = None, self._host.read_state(self._session)
        with contextlib.suppress(StorageError):  # asking will tell
            wanted = self._host.sessions.wanted(self._session)
        if wanted is None or state is None or state.generation < wanted.generation:
            return None  # what the state says was so before
        return self._linked(state) if state.state == State.CONNECTED else None

    def _ask(self) -> Wanted:
        sessions = self._host.sessions
        self._host.restore(self._session, why="link")
        if sessions.wanted(self._session) is None:
            self._create()

        def change(wanted: Wanted) -> Wanted:
            # The last command counts: a logout that nobody has begun is taken back.
            return dataclasses.replace(wanted, run="run", link=self._link, logout=None, why="link")

        return sessions.want(self._session, change, now=time.time())

    def _create(self) -> None:
        host, limit = self._host, self._host.settings.max_sessions
        if len(host.sessions.ids()) >= limit:
            raise CapacityReached(
                f"MAX_SESSIONS={limit} sessions exist already: delete one, or raise it"
            )
        host.sessions.prepare()
        host.sessions.install_key()  # made before the first session, it is not missed later
        network = host.supervisor().network
        host.sessions.create(self._session, network=network, now=time.time(), why="link")

    def _state(self) -> StateRecord | None:
        """The state, once the supervisor acts on our request."""
        state = self._host.read_state(self._session)
        assert self._asked is not None
        return state if state and state.generation >= self._asked.generation else None

    def _require_record(self) -> None:
        with contextlib.suppress(StorageError):  # unreadable is not gone
            wanted = self._host.sessions.wanted(self._session)
            if wanted is None or wanted.run == "delete":
                raise LinkFailed("session-deleted", f"Session {self._session} was deleted.")

    def _ended(self, state: StateRecord) -> Linked | None:
        link = state.link or {}
        if link.get("request") != self._request:
            return None
        if link.get("result") == "linked":
            return self._linked(state)
        reason = str(link.get("reason") or state.reason or "link-failed")
        said = str(link.get("sentence") or state.sentence or "The link attempt did not succeed.")
        raise CapacityReached(said) if reason == Reason.CAPACITY else LinkFailed(reason, said)

    def _code(self) -> Code | None:
        path = self._host.sessions.folder(self._session) / "link.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            if found["request"] != self._request:
                return None
            return Code(str(found["event"]), str(found["code"]), float(found["expires_at"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _linked(self, state: StateRecord) -> Linked:
        """Raises LinkFailed where an earlier attempt linked another number than is asked for."""
        is_new, phone = self._has_shown or bool(self._link["again"]), self._phone
        if not is_new and phone and state.phone and not _is_same_number(phone, state.phone):
            raise LinkFailed(
                "already-linked",
                f"Session {self._session} is already linked to +{state.phone}. To link another"
                f" number: whatsapp-worker link {self._session} --again --phone +{phone}",
            )
        return Linked(phone=state.phone, jid=state.jid, is_new=is_new)


def _is_same_number(dialled: str, known: str) -> bool:
    """WhatsApp knows some numbers with a digit more or less than is dialled (Brazil's ninth)."""
    short, long = sorted((dialled, known), key=len)
    return short == long or any(long[:n] + long[n + 1 :] == short for n in range(len(long)))
