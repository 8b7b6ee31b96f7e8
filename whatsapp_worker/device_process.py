"""The process that owns one session: one neonize client, one connection, one queue.

    lock, credentials, ledger, Redis
      └─ recover: settle what the last process left, while nothing has device.db open
           └─ dial, log in (neonize on a side thread)
                └─ consume the queue until the first thing that ends it
                     └─ the send in hand, the last word to the supervisor, os._exit

Threads: `main` watches the consumer's; `leash` hears the supervisor and SIGTERM, beats and forces
the end; `probe` asks neonize whether the socket is up, and may hang with it; neonize's event
thread translates and hands over; `consumer` sends, `exchange` talks to Redis meanwhile, `facts`
writes receipts.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from redis import Redis, RedisError

from storage.errors import LedgerUnavailable, LockHeld, StorageError
from storage.ledger import Claim, Ledger
from storage.sessions import Sessions
from whatsapp_worker import (
    child,
    device_store,
    facts,
    pacer,
    recovery,
    redis_client,
    redis_server,
)
from whatsapp_worker.breaker_board import BreakerBoard
from whatsapp_worker.child import Departure, Leash
from whatsapp_worker.consumer import Consumer
from whatsapp_worker.consumer import Ending as Consumed
from whatsapp_worker.device import Device, SendAck, SendFailed, redacted
from whatsapp_worker.device_store import DeviceStoreBroken, DeviceStoreUnavailable
from whatsapp_worker.endings import Ending, EndingKind, of_fact, refused
from whatsapp_worker.errors import SandboxUnsafe, WorkerError
from whatsapp_worker.event_names import Event
from whatsapp_worker.keys import number_hash
from whatsapp_worker.liveness import Liveness, client_ports, footprint
from whatsapp_worker.media import Media
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.receipts import FactWriter
from whatsapp_worker.reports import Channel, Exit
from whatsapp_worker.session import Reason
from whatsapp_worker.settings import Settings
from whatsapp_worker.stored_breakers import Breakers
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_EVERY_S = 2.0
SOCKET_DOWN_S = 5.0  # down for so long without an event: lost
LOSS_GRACE_S = 0.6  # what the send in hand gets when the connection is lost
LAST_WORD_S = 0.3  # how long a loss waits for an event that says more
ORPHAN_GRACE_S = 1.0
LAST_CHANCE_S = 0.6  # before a forced end: for receipts, should the main thread hang
DRAIN_S = 8.0  # what the send in hand gets when an operator stops the session
LOGOUT_S = 10.0
GOODBYE_S = 1.0  # writing what is left, closing the socket
LOCK_WAIT_S = 1.0  # others probe the lock for an instant
RETRY_EVERY_S = 1.0  # a ledger or Redis that did not answer


def main(session: str, channel: Channel, settings: Settings, *, dial_at: float = 0.0) -> NoReturn:
    """Run a session until its connection ends, then `os._exit` with one of `reports.Exit`.

    Called in a child just forked from the fork helper (single-threaded, neonize not loaded).
    Says `started`, `connecting`, `connected`, `heartbeat`s and, last, `ended` on the channel;
    obeys `stop` and `logout`, SIGTERM, and the end of the channel's file.

    Args:
        dial_at: Monotonic seconds: get ready, but do not dial before.
    """
    child.begin("device", session)
    child.live(channel, lambda: DeviceProcess(session, channel, settings, dial_at=dial_at).run())


class DeviceProcess:
    """One run of one session."""

    def __init__(
        self, session: str, channel: Channel, settings: Settings, *, dial_at: float = 0.0
    ) -> None:
        self._session = session
        self._channel = channel
        self._settings = settings
        self._dial_at = dial_at
        # Often enough that the supervisor never takes the silence between two beats for a hang.
        self._beat_every_s = min(settings.health_check_interval_s, settings.hang_timeout_s / 4)
        self._sessions = Sessions(settings.data_dir)
        self._database = self._sessions.folder(session) / "device.db"
        self._departure = Departure()
        self._liveness = Liveness(
            silence_limit_s=settings.hang_timeout_s, ports=client_ports(os.environ)
        )
        self._identity = facts.Identity("", "", "", "")
        self._device: Device | None = None
        self._consumer: Consumer | None = None
        self._writer: FactWriter | None = None
        self._logged_in = threading.Event()
        self._news = threading.Event()  # logged in, or time to leave
        self._is_logout_wanted = False
        self._is_drained = True
        self._is_closing = False  # what was heard is being written for the last time
        self._socket_up_at = 0.0  # monotonic; when the probe last found it up
        self._beat_due_at = 0.0

    def run(self) -> tuple[Ending, int]:
        """The whole life; returns the last word and the exit code."""
        lock = self._sessions.session_lock(self._session)
        try:
            lock.acquire(LOCK_WAIT_S, note={"role": "device"})
        except LockHeld as held:
            detail = f"another process holds this session: {held.holder}"
            return Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, detail), Exit.LOCKED
        self._channel.send(report="started", pid=os.getpid())
        self._leash = Leash(
            self._channel,
            on_order=self._obey,
            on_stop=self._stop,
            on_orphaned=self._orphaned,
            on_tick=self._tick,
        )
        self._leash.start()
        try:
            return self._live()
        finally:  # what was heard is written or left to the ledger, whatever ended this life
            self._close_writer()

    def _live(self) -> tuple[Ending, int]:
        try:
            if self._open() and self._recover() and self._connect():
                self._serve()
        except DeviceStoreBroken as broken:
            remedy = f"whatsapp-worker link {self._session} --again"
            said = f"the credentials are damaged ({broken}); link the session again: {remedy}"
            return refused(said), Exit.STORE_BROKEN
        except StorageError as broken:
            return refused(str(broken)), Exit.STORE_BROKEN
        except SandboxUnsafe as unsafe:
            return refused(str(unsafe)), Exit.UNSAFE
        return self._finish()

    # The steps, on the main thread

    def _open(self) -> bool:
        """Everything but the connection; False when it is time to leave instead."""
        who = self._insist(functools.partial(device_store.identity, self._database))
        if self._departure.is_due.is_set():
            return False
        if who is None:
            self._leave(Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, "no credentials"))
            return False
        self._identity = who
        self._insist(functools.partial(self._claim_queue, who.phone))
        url = self._insist(functools.partial(redis_server.resolve_url, self._settings))
        if url is None:
            return False
        redis = redis_client.connect(url)
        breakers = self._make_breakers(redis)
        ledger = self._insist(functools.partial(self._open_ledger, breakers))
        if ledger is None:
            return False
        media = Media(self._database.parent, self._settings)
        media.clean()
        self._device = Device(
            self._database,
            session=self._session,
            network=self._settings.network,
            on_fact=self._on_fact,
            jid=who.jid,
            media=media,
        )
        stream = self._stream(redis_client.connect(url))
        self._writer = FactWriter(self._session, stream, ledger=ledger)
        self._writer.start()
        self._consumer = self._make_consumer(self._device, ledger, redis, breakers)
        return not self._departure.is_due.is_set()

    def _claim_queue(self, number: str) -> None:
        """What was enqueued for another number is held, not sent from this one."""
        hashed = number_hash(self._sessions.install_key(), number.lstrip("+"))
        if self._sessions.hold(self._session).number_is(hashed, time.time()):
            log.warning("queue.held", extra={"session": self._session})

    def _make_breakers(self, redis: Redis) -> Breakers:
        return Breakers(
            self._database.parent,
            session=self._session,
            settings=self._settings,
            stream=self._stream(redis),
            board=BreakerBoard(redis, self._session),
            on_change=self._on_breaker,
        )

    def _open_ledger(self, breakers: Breakers) -> Ledger | None:
        """Open it as soon as its breaker allows; None when it is time to leave."""
        breakers.show()
        if self._departure.is_due.wait(breakers.database.rest_s()):
            return None
        where = self._settings.database_url or self._database.with_name("ledger.db")
        try:
            return Ledger.open(where, self._session, is_owner=True)
        except LedgerUnavailable as error:
            breakers.database.failed(type(error).__name__)
            raise

    def _make_consumer(
        self, device: Device, ledger: Ledger, redis: Redis, breakers: Breakers
    ) -> Consumer:
        outbox = Outbox(
            redis,
            self._session,
            stream=self._stream(redis),
            result_ttl_s=self._settings.result_ttl_s,
        )
        return Consumer(
            session=self._session,
            send=device.send,
            prepare=device.prepare,
            ledger=ledger,
            outbox=outbox,
            breakers=breakers,
            install_key=self._sessions.install_key(),
            settings=self._settings,
            on_sent=self._on_sent,
            probe=device.probe,
            on_poisoned=self._on_poisoned,
            standing=self._sessions.hold(self._session).read,
            pace_file=self._database.with_name(pacer.FILE),
            show_typing=device.show_typing,
            on_rest=self._beat_soon,
        )

    def _on_breaker(self, event: Event, facts: Mapping[str, Any]) -> None:
        self._channel.send(report="failure", kind=event, **facts)
        self._beat_soon()

    def _on_poisoned(self, job_id: str, problem: str) -> None:
        self._channel.send(report="failure", kind="job.poisoned", job_id=job_id, problem=problem)

    def _stream(self, redis: Redis) -> EventStream:
        return EventStream(redis, events_max=self._settings.events_max)

    def _insist(self, get: Callable[[], T]) -> T | None:
        """Ask for a service until it answers; None when it is time to leave."""
        while not self._departure.is_due.is_set():
            try:
                return get()
            except (StorageError, WorkerError, RedisError) as error:
                if not isinstance(error, RedisError) and not error.transient:
                    raise
                log.warning(
                    "device_process.waiting",
                    extra={"session": self._session, "problem": redacted(str(error))},
                )
            self._departure.is_due.wait(RETRY_EVERY_S)
        return None

    def _recover(self) -> bool:
        """Settle what an earlier process left; nothing may have device.db open meanwhile."""
        assert self._consumer is not None
        is_done = self._consumer.recover(self._handed_over)
        if is_done:
            hold = self._sessions.hold(self._session)
            device = recovery.device_key(self._sessions, self._identity.jid)
            self._insist(functools.partial(hold.device_is, device))
        return is_done and not self._departure.is_due.is_set()

    def _handed_over(self, secrets: Iterable[bytes]) -> Mapping[bytes, str]:
        """A disk that takes nothing is waited for as the ledger's is."""
        try:
            return recovery.witness(self._sessions, self._session, self._identity.jid)(secrets)
        except DeviceStoreUnavailable as error:
            raise LedgerUnavailable(str(error)) from error

    def _connect(self) -> bool:
        """Dial and log in; False when it is time to leave instead."""
        assert self._device is not None
        self._device.load()
        if self._departure.is_due.wait(max(0.0, self._dial_at - time.monotonic())):
            return False
        self._channel.send(report="connecting")
        self._device.connect_in_thread()
        if not self._news.wait(self._settings.connect_timeout_s):
            detail = f"no login within {self._settings.connect_timeout_s:g} s"
            self._leave(Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, detail))
        if self._is_logout_wanted:
            self._stop()
        self._socket_up_at = time.monotonic()
        threading.Thread(target=self._probe, name="probe", daemon=True).start()
        return not self._departure.is_due.is_set()

    def _serve(self) -> None:
        """Consume until something ends it; the consumer's own reasons are announced here."""
        assert self._consumer is not None
        outcome = self._consumer.run()
        log.info("device_process.consumed", extra={"session": self._session, "why": outcome})
        self._is_drained = outcome is not Consumed.NOT_DRAINED
        if outcome in _OF_CONSUMED:
            ending, code = _OF_CONSUMED[outcome]
            self._leave(ending, code)

    def _finish(self) -> tuple[Ending, int]:
        """What is left when nothing is in hand any more."""
        ending, code = self._departure.verdict()
        if ending.transient:
            # `Disconnected` may overtake the event that says why.
            self._departure.is_certain.wait(LAST_WORD_S)
            ending, code = self._departure.verdict()
        if ending.kind is EndingKind.STOPPED and self._device is not None:
            if self._is_logout_wanted and self._logged_in.is_set():
                ending = self._log_out(self._device)
            elif self._logged_in.is_set():
                _within(GOODBYE_S, self._device.disconnect)
        return ending, Exit.NOT_DRAINED if code == Exit.OK and not self._is_drained else code

    def _close_writer(self) -> None:
        self._is_closing = True
        if self._writer is not None:
            self._writer.close(timeout_s=min(GOODBYE_S, self._departure.left_s()))

    def _log_out(self, device: Device) -> Ending:
        problem = _within(LOGOUT_S, device.logout)
        if problem is None:
            return Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, "logged out as asked")
        return Ending(EndingKind.STOPPED, None, f"the logout was not confirmed: {problem}")

    # What ends it, from any thread

    def _leave(self, ending: Ending, code: int = Exit.CONNECTION_ENDED) -> None:
        self._announce(ending, code, within_s=LOSS_GRACE_S)

    def _announce(self, ending: Ending, code: int, *, within_s: float, then_s: float = 1.0) -> None:
        """Let the send in hand have `within_s`; force the end `then_s` later."""
        if not self._departure.is_due.is_set():
            self._channel.send(report="leaving")  # the wait for the next dial runs from here
        self._departure.announce(ending, code, within_s=within_s + then_s)
        self._news.set()
        if self._consumer is not None:
            self._consumer.stop(drain_s=within_s)
        self._leash.wake()

    def _stop(self, drain_s: float = DRAIN_S) -> None:
        then_s = LOGOUT_S + GOODBYE_S if self._is_logout_wanted else 2 * GOODBYE_S
        self._announce(Ending(EndingKind.STOPPED), Exit.OK, within_s=drain_s, then_s=then_s)

    def _orphaned(self) -> None:
        ending = Ending(EndingKind.CRASHED, Reason.PROCESS_CRASHED, "its supervisor was gone")
        self._announce(ending, Exit.ORPHANED, within_s=ORPHAN_GRACE_S, then_s=LOSS_GRACE_S)

    def _obey(self, order: dict[str, Any]) -> None:
        match order.get("order"):
            case "stop":
                drain_s = order.get("drain_s")
                self._stop(DRAIN_S if drain_s is None else float(drain_s))
            case "logout":
                self._is_logout_wanted = True
                if self._logged_in.is_set():
                    self._stop()

    # What the client tells, on neonize's event thread

    def _on_fact(self, fact: facts.Fact) -> None:
        """Hand over at once: this thread carries every event of the client."""
        match fact:
            case facts.Receipt() | facts.Inbound() if self._writer is not None:
                self._liveness.alive()
                self._writer.offer(fact)
            case facts.Identity():
                self._identity = fact
            case facts.Connected():
                self._on_connected()
            case facts.KeepAliveTimeout():
                self._liveness.suspect(fact.last_success)
                self._beat_soon()
            case facts.KeepAliveRestored():
                self._liveness.alive()
                self._beat_soon()
        if ending := of_fact(fact, now=time.time()):
            self._leave(ending)

    def _on_connected(self) -> None:
        self._liveness.alive()
        who = self._identity
        self._channel.send(
            report="connected",
            jid=who.jid,
            lid=who.lid,
            phone=who.phone,
            push_name=who.push_name,
        )
        self._socket_up_at = time.monotonic()
        self._logged_in.set()
        self._news.set()
        self._beat_soon()

    def _on_sent(self, ack: SendAck, claim: Claim) -> None:
        self._liveness.alive()
        if self._writer is not None:
            self._writer.sent(ack.wa_message_id, claim.message_id, claim.metadata, wa_id=ack.wa_id)

    # The leash's ticks, and the probe

    def _tick(self) -> float:
        """Beat, look for silence, force the end; returns the seconds to the next thing to do."""
        now = time.monotonic()
        left_s = self._departure.left_s()
        if left_s == 0:
            self._force()
        if left_s <= LAST_CHANCE_S and not self._is_closing:
            self._is_closing = True
            threading.Thread(target=self._close_writer, name="goodbye", daemon=True).start()
        if self._logged_in.is_set() and not self._departure.is_due.is_set():
            self._look_for_silence(now)
        if now >= self._beat_due_at:
            self._beat_due_at = now + self._beat_every_s
            self._channel.send(report="heartbeat", **self._heartbeat(now))
            self._rest()
        if not self._is_closing:
            left_s -= LAST_CHANCE_S
        return min(left_s, self._beat_due_at - now)

    def _rest(self) -> None:
        if self._logged_in.is_set() and self._device and self._consumer and self._consumer.is_idle:
            self._device.rest()

    def _force(self) -> NoReturn:
        """Time is up: whatever hangs is left to the next process's recovery."""
        ending, code = self._departure.verdict()
        code = Exit.NOT_DRAINED if code == Exit.OK else code
        child.leave(self._channel, ending, code)

    def _look_for_silence(self, now: float) -> None:
        down_s = now - self._socket_up_at - PROBE_EVERY_S
        if down_s > SOCKET_DOWN_S:
            self._on_fact(facts.NotConnected())
        elif (age_s := self._liveness.deaf_for_s()) is not None:
            self._on_fact(facts.Silent(age_s))

    def _beat_soon(self) -> None:
        self._beat_due_at = 0.0
        self._leash.wake()

    def _heartbeat(self, now: float) -> dict[str, Any]:
        consumer = self._consumer
        loop_at = consumer.progressed_at if consumer and self._logged_in.is_set() else now
        probed_s = now - self._socket_up_at if self._logged_in.is_set() else 0.0
        return {
            "loop_age_s": round(now - loop_at, 3),
            "consumer_age_s": round(now - loop_at, 3),
            "client_age_s": round(max(probed_s, self._device.handling_s()), 3)
            if self._device
            else 0.0,
            "proof_of_life_age_s": self._liveness.age_s(),
            "degraded": self._liveness.is_degraded,
            "sent": consumer.sent if consumer else 0,
            "idle": consumer.is_idle if consumer else True,
            "queue": consumer.queue_state() if consumer else None,
            **footprint(),
        }

    def _probe(self) -> None:
        """Note when the socket was last seen up, on a thread of its own: the call may hang."""
        assert self._device is not None
        while not self._departure.is_due.wait(PROBE_EVERY_S):
            if self._device.is_connected():
                self._socket_up_at = time.monotonic()


_OF_CONSUMED = {
    Consumed.SEND_HUNG: (
        Ending(EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT, "a send got no answer in time"),
        Exit.SEND_HUNG,
    ),
    Consumed.SEND_UNSURE: (
        Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, "a send ended without a clear answer"),
        Exit.CONNECTION_ENDED,
    ),
    Consumed.NOT_CONNECTED: (
        Ending(EndingKind.LOST, Reason.CONNECTION_FAILED, "neonize was not connected"),
        Exit.CONNECTION_ENDED,
    ),
    Consumed.LOGGED_OUT: (
        Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, "neonize has no credentials any more"),
        Exit.CONNECTION_ENDED,
    ),
}


def _within(timeout_s: float, do: Callable[[], None]) -> str | None:
    """Do it on a thread of its own; None when done, else what went wrong."""
    problem = ["no answer in time"]

    def run() -> None:
        try:
            do()
            problem.clear()
        except SendFailed as failed:
            problem[0] = redacted(str(failed))

    thread = threading.Thread(target=run, name="goodbye", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return problem[0] if problem else None
