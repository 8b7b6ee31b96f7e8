"""The process that links a device: shows codes until a phone accepts, and can be killed.

neonize's pairing cannot be cancelled and its client survives its own failures in silence. What it
says is heard here: codes, and the one word with which whatsmeow's wait for a scan ends.
"""

import logging
import os
import queue
import time
from typing import Any, Literal, NoReturn

from storage.errors import LockHeld
from storage.sessions import Sessions
from whatsapp_worker import child, device_store, facts
from whatsapp_worker.child import Departure, Leash
from whatsapp_worker.device import Device, SendFailed, redacted
from whatsapp_worker.endings import Ending, EndingKind, of_fact, refused
from whatsapp_worker.errors import SandboxUnsafe
from whatsapp_worker.reports import Channel, Exit
from whatsapp_worker.session import Reason
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

FIRST_CODE_S = 60.0  # how long whatsmeow shows the first code; five more follow
NEXT_CODE_S = 20.0
PAIRING_CODE_S = 160.0  # the whole wait of whatsmeow
LOGIN_S = 15.0  # paired to logged in; the server closes once in between, and that may fail
LOCK_WAIT_S = 1.0
BEAT_S = 5.0

Method = Literal["qr", "phone"]


def main(
    session: str,
    channel: Channel,
    settings: Settings,
    *,
    method: Method,
    phone: str | None = None,
) -> NoReturn:
    """Pair into the session's pairing.db, then `os._exit` with one of `reports.Exit`.

    Called in a child just forked from the fork helper. Says `started`, `qr` for each code or
    `code` once, `paired`, and, last, `ended` with kind `linked` (adopt the credentials with
    `device_store.adopt`) or another. pairing.db is removed first if one lies there.

    Args:
        method: `qr` shows QR codes; `phone` asks for a pairing code.
        phone: Digits of the number, for `phone`.
    """
    child.begin("link", session)
    attempt = Pairing(session, channel, settings, phone=phone if method == "phone" else None)
    child.live(channel, attempt.run)


class Pairing:
    """One link attempt; `phone` (digits) asks for a pairing code instead of QR codes."""

    def __init__(
        self, session: str, channel: Channel, settings: Settings, *, phone: str | None
    ) -> None:
        self._session = session
        self._channel = channel
        self._settings = settings
        self._phone = phone
        self._sessions = Sessions(settings.data_dir)
        self._database = self._sessions.folder(session) / "pairing.db"
        self._departure = Departure()
        self._facts: queue.SimpleQueue[facts.Fact | None] = queue.SimpleQueue()
        self._codes = 0
        self._paired: facts.Paired | None = None
        self._deadline = time.monotonic() + settings.link_attempt_s
        self._beat_due_at = 0.0

    def run(self) -> tuple[Ending, int]:
        """The whole attempt; returns the last word and the exit code."""
        try:
            self._sessions.session_lock(self._session).acquire(LOCK_WAIT_S, note={"role": "link"})
        except LockHeld as held:
            detail = f"another process holds this session: {held.holder}"
            return Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, detail), Exit.LOCKED
        self._channel.send(report="started", pid=os.getpid())
        Leash(
            self._channel,
            on_order=self._obey,
            on_stop=self._stop,
            on_orphaned=self._stop,
            on_tick=self._tick,
        ).start()
        try:
            return self._pair()
        except SandboxUnsafe as unsafe:
            return refused(str(unsafe)), Exit.UNSAFE

    def _pair(self) -> tuple[Ending, int]:
        device_store.remove(self._database)
        device = Device(
            self._database,
            session=self._session,
            network=self._settings.network,
            on_fact=self._facts.put,
        )
        device.load()
        os.close(os.open(self._database, os.O_CREAT | os.O_WRONLY, 0o600))  # SQLite keeps the mode
        device.connect_in_thread()
        ending = None
        while ending is None:
            ending = self._on_fact(device, self._next())
        if ending.kind is EndingKind.LINKED:
            device.disconnect()
        return ending, Exit.OK if ending.kind is EndingKind.LINKED else Exit.CONNECTION_ENDED

    def _next(self) -> facts.Fact | None:
        """The next fact; None when the time for it is over or the process is asked to leave."""
        try:
            return self._facts.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            return None

    def _on_fact(self, device: Device, fact: facts.Fact | None) -> Ending | None:
        """What a fact does to the attempt: an ending, or None while it goes on."""
        match fact:
            case None:
                return self._out_of_time()
            case facts.QrCode():
                return self._show(device, fact.code)
            case facts.LinkStatus():
                return self._scan_over(fact.status)
            case facts.Paired():
                self._accepted(fact)
                return None
            case facts.PairFailed():
                return _refused_link(fact.error)
            case facts.Connected():
                return Ending(EndingKind.LINKED)
        if self._paired is not None:
            # whatsmeow dials once more after a pairing. If that fails, the credentials are stored
            # all the same, and the next process logs in.
            return Ending(EndingKind.LINKED) if of_fact(fact, now=time.time()) else None
        return of_fact(fact, now=time.time())

    def _out_of_time(self) -> Ending:
        if self._departure.is_due.is_set():
            return self._departure.verdict()[0]
        if self._paired is not None:
            return Ending(EndingKind.LINKED, detail="paired, and not logged in yet")
        return Ending(EndingKind.LINK_FAILED, Reason.QR_EXPIRED, "the link attempt took too long")

    def _show(self, device: Device, code: str) -> Ending | None:
        self._codes += 1
        lasts_s = FIRST_CODE_S if self._codes == 1 else NEXT_CODE_S
        if self._phone is None:
            self._channel.send(report="qr", code=code, expires_in_s=lasts_s, number=self._codes)
        elif self._codes == 1:  # whatsmeow is ready for a pairing code once it has a QR code
            try:
                pairing_code = device.pair_phone(self._phone)
            except SendFailed as failed:
                return _refused_link(str(failed))
            self._channel.send(report="code", code=pairing_code, expires_in_s=PAIRING_CODE_S)
        return None

    def _scan_over(self, status: str) -> Ending | None:
        """The word with which whatsmeow's wait for a scan ended."""
        log.info("pairing.scan_over", extra={"session": self._session, "status": status})
        if status == "success":
            self._deadline = min(self._deadline, time.monotonic() + LOGIN_S)
            return None
        if status == "err-client-outdated":
            return Ending(EndingKind.OUTDATED, Reason.CLIENT_OUTDATED)
        if status == "timeout":  # of a lost socket, too: the remedy is the same
            return Ending(EndingKind.LINK_FAILED, Reason.QR_EXPIRED, "no code was scanned")
        return _refused_link(status)

    def _accepted(self, paired: facts.Paired) -> None:
        self._paired = paired
        self._deadline = time.monotonic() + LOGIN_S
        who = facts.Identity(paired.jid, "", "", paired.platform)
        self._channel.send(report="paired", jid=who.jid, phone=who.phone, platform=who.platform)

    # The leash

    def _obey(self, order: dict[str, Any]) -> None:
        if order.get("order") == "stop":
            self._stop()

    def _stop(self) -> None:
        self._departure.announce(Ending(EndingKind.STOPPED), Exit.OK, within_s=1.0)
        self._deadline = 0.0
        self._facts.put(None)

    def _tick(self) -> float:
        if self._departure.left_s() == 0:
            child.leave(self._channel, *self._departure.verdict())
        now = time.monotonic()
        if now >= self._beat_due_at:
            self._beat_due_at = now + BEAT_S
            self._channel.send(report="heartbeat")
        return min(self._departure.left_s(), self._beat_due_at - now)


def _refused_link(why: str) -> Ending:
    return Ending(EndingKind.LINK_FAILED, Reason.LINK_REFUSED, redacted(why))
