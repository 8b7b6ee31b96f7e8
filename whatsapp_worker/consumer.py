"""The loop that sends: takes jobs in order, claims, sends, settles, finishes.

    recover() once, before connecting: what an earlier process left behind is settled
    run()     while connected, until asked to stop or a send goes astray

The caller of `run` watches. The loop, which also sends, has a thread of its own that can be left
behind in a send, and another exchanges with Redis while a send is under way: so nothing is handed
from thread to thread between the end of one send and the start of the next.

One message, step by step; a process killed between any two of them loses nothing:

    pop       Redis    queue to limbo list; while the message before is under way
    prepare   Internet a file is fetched and uploaded; text and most other types need none of it
    claim     ledger   row `sending` with the attempt's secret; one commit with settling the last
    send      WhatsApp
    note      Redis    the outcome into the job's meta
    settle    ledger   the row's outcome; one commit with claiming the next
    finish    Redis    status, result, limbo list, event; while the next is under way
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import tenacity
from redis.exceptions import RedisError

from storage.errors import StorageError
from storage.hold import Standing
from storage.ledger import (
    Answer,
    Claim,
    Claimed,
    Conflict,
    Ledger,
    Settled,
    Settlement,
    Unsettled,
    honest,
)
from whatsapp_worker import recovery
from whatsapp_worker.breakers import Phase
from whatsapp_worker.calls import CallThread, Limit
from whatsapp_worker.content import needs_preparing
from whatsapp_worker.device import SendAck, SendFailed, redacted
from whatsapp_worker.errors import MediaFailed
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import message_secret, number_hash
from whatsapp_worker.message import Outgoing
from whatsapp_worker.outbox import Finished, Outbox
from whatsapp_worker.pacer import LIMITED, Pacer, pace_of
from whatsapp_worker.rq_job import NOT_CONNECTED, PAUSED, RESTING, Job, Outcome
from whatsapp_worker.send_errors import Kind, classify, in_words, upload_in_words
from whatsapp_worker.settings import Settings
from whatsapp_worker.stored_breakers import DATABASE_AWAY, SENDS_FAILED, Breakers

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_IDLE_WAIT_S = 1.0  # between two turns of an idle loop
_LOOK_S = 0.25  # between two looks at `stop` while a file is prepared
_FIRST_REST_S, _LONGEST_REST_S = 0.1, 2.0  # between two tries to reach Redis or the database
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.25, 5.0  # between two tries to send
_TIDY_S = 60.0
HELD = "enqueued before this session was linked to its number; an operator decides about it"
_DEPTH_S = 1.0
_RESUME = "whatsapp-worker queue {} resume"
_QUIET_WORDS = ("running", "idle")  # of `queue_state`: nobody waits to hear them
_MAX_KNOWN_CONTACTS = 10_000


class Send(Protocol):
    """`Device.send`: blocks; raises SendFailed."""

    def __call__(self, recipient: str, content: Mapping[str, Any], secret: bytes, /) -> SendAck: ...


Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # `Device.prepare`


class Ending(StrEnum):
    """Why `Consumer.run` returned. After all but `stopped` the process must leave at once by
    `os._exit`: a send may still be under way, and the next process's recovery settles it."""

    STOPPED = "stopped"  # asked to; nothing is in hand
    NOT_DRAINED = "not-drained"  # asked to; the send in hand did not return in time
    SEND_HUNG = "send-hung"  # a send got no answer within SEND_TIMEOUT_S
    SEND_UNSURE = "send-unsure"  # a send failed and may have reached WhatsApp: recovery looks
    NOT_CONNECTED = "not-connected"  # neonize refused to send: this connection is gone
    LOGGED_OUT = "logged-out"  # neonize has no credentials any more


# Failures after which nothing can be sent on this connection.
_ENDINGS = {
    Kind.UNSURE: Ending.SEND_UNSURE,
    Kind.NOT_CONNECTED: Ending.NOT_CONNECTED,
    Kind.LOGGED_OUT: Ending.LOGGED_OUT,
}


class _Stopping(Exception):
    """Asked to stop while waiting for Redis or the database."""


class _Leave(Exception):
    """The loop ends with this ending."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending


@dataclass(frozen=True, slots=True)
class _Known:
    """An outcome that the ledger does not have yet; `is_passing` while it is tried again."""

    settlement: Settlement
    finished: Finished
    is_passing: bool = False

    @property
    def written(self) -> Settlement:
        """What the ledger gets should nothing follow: what is tried again waits at the head."""
        return recovery.resting(self.settlement) if self.is_passing else self.settlement


class _Released(Exception):
    """The message in hand was put back; the loop goes on."""


class _Again(Exception):
    """WhatsApp refused the message, or its file, for the moment."""


class _Late(Exception):
    """The message's time is over, or will be before it can be tried again."""


class Consumer:
    """Sends what is queued for one session, one message at a time."""

    def __init__(
        self,
        *,
        session: str,
        send: Send,
        ledger: Ledger,
        outbox: Outbox,
        breakers: Breakers,
        install_key: bytes,
        settings: Settings,
        on_sent: Callable[[SendAck, Claim], None] | None = None,
        prepare: Prepare | None = None,
        probe: Callable[[], object] | None = None,
        on_poisoned: Callable[[str, str], None] = lambda job_id, problem: None,
        standing: Callable[[], Standing] = Standing,
        pace_file: Path | None = None,
        show_typing: Callable[[str], object] | None = None,
        on_rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is touched yet.

        Args:
            session: Its id.
            send: `Device.send`; called on the loop's thread, as are probe and show_typing.
            ledger: Open.
            outbox: The session's queues.
            breakers: The session's; another thread must not use them.
            install_key: `Sessions.install_key()`.
            settings: SEND_TIMEOUT_S, SEND_RETRIES ...
            on_sent: Called with every acknowledged message that has a WhatsApp id, on the loop's
                thread: for `FactWriter.sent`.
            prepare: `Device.prepare`, for messages that need it; on a thread of its own.
            probe: Asks WhatsApp something that sends nothing; raises when there is no answer.
            on_poisoned: Told the id of each job that nobody could read, and what is wrong in it.
            standing: `Hold.read`; asked before each message.
            pace_file: Where what was sent lately outlives this process; unused without a pace.
            show_typing: `Device.show_typing`.
            on_rest: Told, on the loop's thread, that `queue_state` has another reason to rest, or
                none any more.
        """
        self.session = session
        self.progressed_at = time.monotonic()  # of the last tick; a ticking wait is progress
        self.sent = 0  # messages acknowledged since the start
        self._ledger = ledger
        self._outbox = outbox
        self._install_key = install_key
        self._settings = settings
        self._on_sent = on_sent
        self._send = send
        self._prepare = prepare
        self._probe = probe
        self._on_poisoned = on_poisoned
        self._ask_standing = standing
        self._standing = Standing()
        self._on_rest = on_rest
        self._rest_told = ""
        pace = pace_of(settings)
        self._pacer = Pacer(pace, pace_file) if pace else None
        self._pacing_until = 0.0  # UTC seconds
        self._known_contacts: set[str] = set()  # hashes of numbers that were written to
        self._show_typing = show_typing
        self._is_held = False  # what is next was enqueued for another number
        self._loop: CallThread[Ending] = CallThread("consumer")
        self._exchanger: CallThread[bool] = CallThread("exchange")
        self._preparer: CallThread[Any] | None = None  # made for the first file
        self._limit = Limit()
        self._stop_at: float | None = None  # monotonic; when the send in hand is given up
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._known: _Known | None = None  # acknowledged, not yet in the ledger
        self._finished: list[Finished] = []  # in the ledger, not yet finished in Redis
        self._in_flight = False
        self._trouble = ""  # "redis" or "database" while one of them does not answer
        self._redis_rest_s = _FIRST_REST_S
        self._breakers = breakers
        self._breaker, self._database = breakers.message, breakers.database
        self._depth = 0
        self._looked_at = self._tidied_at = 0.0

    # From other threads

    def stop(self, *, drain_s: float = 8.0) -> None:
        """Ask `run` or `recover` to return: at once when idle, else when the send in hand
        returns, at the latest after `drain_s`. From any thread and from signal handlers; a
        second call can only shorten the wait."""
        asked = time.monotonic() + drain_s
        self._stop_at = asked if self._stop_at is None else min(self._stop_at, asked)
        with contextlib.suppress(OSError):
            os.write(self._waker, b"!")
        self._loop.nudge()

    @property
    def is_idle(self) -> bool:
        """No send is under way and nothing is waiting to be settled."""
        return not (self._in_flight or self._known or self._finished)

    def queue_state(self) -> dict[str, Any]:
        """For the heartbeat: {"state", "reason", "until", "depth"}; from any thread, no I/O."""
        state, reason, until = self._resting()
        return {"state": state, "reason": reason, "until": until, "depth": self._depth}

    def _resting(self) -> tuple[str, str | None, float | None]:
        if self._trouble == "database" or self._database.until is not None:
            return "database", DATABASE_AWAY, self._database.until
        if self._trouble:
            return "paused", "Redis does not answer", None
        if self._standing.paused_at is not None:
            return "paused", f"an operator paused it: {_RESUME.format(self.session)}", None
        if self._breaker.phase() is Phase.OPEN:
            return "breaker", SENDS_FAILED, self._breaker.until
        if self._breaker.paused_until > time.time():
            return "paused", PAUSED, self._breaker.paused_until
        if self._is_held:
            return "held", HELD, None
        if self._pacing_until > time.time():
            return "pacing", LIMITED, self._pacing_until
        is_busy = bool(self._depth) or not self.is_idle
        return "running" if is_busy else "idle", None, None

    # Before connecting

    def recover(self, handed_over: recovery.HandedOver) -> bool:
        """Settle what an earlier process left. Before connecting, under the session's lock.

        Waits, ticking, for Redis and the database to come back, until `stop` is called.

        Args:
            handed_over: `device_store.handed_over` with its path filled in.

        Returns:
            False when stopped before it was done: do not connect.

        Raises:
            StorageError: The ledger is broken or too new; trying again does not help.
        """
        while True:
            try:
                self._with_ledger(
                    lambda: recovery.recover(
                        ledger=self._ledger, outbox=self._outbox, handed_over=handed_over
                    )
                )
                return True
            except RedisError as error:
                if not self._waited_for_redis(error, self._outbox.ping):
                    return False
            except _Stopping:
                return False

    # While connected

    def run(self) -> Ending:
        """Send until `stop` is called or a send goes astray. Call while connected.

        Raises:
            StorageError: The ledger is broken or too new; trying again does not help.
        """
        self._exchanger.start()
        self._loop.start()
        self._loop.begin(self._send_all)
        while True:
            left_s = self._limit.left_s(self._stop_at)
            wait_s = _IDLE_WAIT_S if left_s is None else min(left_s, _IDLE_WAIT_S)
            ending = self._loop.answer(wait_s)
            if isinstance(ending, Exception):
                raise ending
            if ending is not None:
                log.info("consumer.ended", extra={"session": self.session, "why": ending})
                return ending
            if left_s is not None:
                self._tick()  # a call in hand is progress until its time is over
            if self._limit.give_up(self._stop_at):
                return self._given_up()

    def _given_up(self) -> Ending:
        """The loop's thread is lost to a call, and the process must end."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            return Ending.NOT_DRAINED
        self._breaker.failed("no answer" if self._in_flight else "probe")
        return Ending.SEND_HUNG

    def _send_all(self) -> Ending:
        """The loop, on a thread of its own."""
        while self._stop_at is None:
            self._tick()
            try:
                self._turn()
                self._redis_rest_s = _FIRST_REST_S
            except RedisError as error:
                if not self._waited_for_redis(error, self._resync):
                    break
            except _Stopping:
                break
            except _Released:
                continue  # back at the head of its queue
            except _Leave as leave:
                return leave.ending
        self._put_down()
        return Ending.STOPPED

    def _turn(self) -> None:
        """Bring one message from the queue to WhatsApp, or wait."""
        self._look_around()
        rest_s = self._rest_s()
        if rest_s:
            self._lie_down(rest_s)
            return
        job = self._outbox.next()
        self._is_held = self._is_held and job is not None
        if job is None:
            self._settle()
            if self._finished:
                self._flush()
            else:
                self._outbox.wait(_IDLE_WAIT_S, wake=self._wake)
            return
        finished = self._judge(job)
        if finished is not None:
            self._settle()
            self._finish(finished)
        elif job.order is not None and (job.order.send_at or 0.0) > time.time():
            self._settle()
            self._outbox.defer(job, job.order.send_at or 0.0)
        elif job.enqueued_at < (self._standing.held_before or 0.0):
            self._is_held = True
            self._lie_down(_IDLE_WAIT_S)
        elif self._is_too_soon(job):
            self._is_held = False
            self._lie_down(self._rest_s())
        else:
            self._is_held = False
            self._deliver(job)

    def _rest_s(self) -> float:
        """How long to rest before the next look, since nothing may be sent now; 0 when it may."""
        if self._standing.paused_at is not None or self._breaker.phase() is Phase.OPEN:
            return _IDLE_WAIT_S
        left_s = max(self._breaker.paused_until, self._pacing_until) - time.time()
        return min(max(0.0, left_s), _IDLE_WAIT_S)

    def _is_too_soon(self, job: Job) -> bool:
        """Whether the session's pace says that this message waits."""
        if self._pacer is None:
            return False
        is_new = not self._is_known(self._claim_of(job).recipient_hash)
        self._pacing_until = self._pacer.due_at(is_new_contact=is_new)
        return self._pacing_until > time.time()

    def _is_known(self, contact: str) -> bool:
        if contact in self._known_contacts:
            return True
        is_known = self._with_ledger(lambda: self._ledger.has_written_to(contact))
        if is_known:
            self._know(contact)
        return is_known

    def _know(self, contact: str) -> None:
        if len(self._known_contacts) < _MAX_KNOWN_CONTACTS:
            self._known_contacts.add(contact)

    def _ask_first(self) -> None:
        """A half-open breaker asks WhatsApp something that sends nothing, before it risks a
        message.

        Raises:
            _Released: No answer; the message in hand is back at the head.
        """
        probe = self._probe
        if probe is None or self._breaker.phase() is not Phase.HALF_OPEN:
            return
        answer = self._answer(probe)
        if isinstance(answer, Exception):
            self._put_down()
            if classify(str(answer)) is Kind.STOP_SENDING:
                self._pause()
            self._breaker.failed("probe")
            raise _Released

    def _lie_down(self, rest_s: float) -> None:
        """Wait for so long with every job at the head of its queue; putting them there counts."""
        end = time.monotonic() + rest_s
        self._settle()
        if self._finished:
            self._flush(pop=False)
        if self._outbox.is_holding:
            self._outbox.resync()
        if not self._rested(end - time.monotonic()):
            raise _Stopping

    def _judge(self, job: Job) -> Finished | None:
        """How a job ends that is not to be sent; None when it is."""
        if job.is_settled and job.outcome is not None:
            return Finished(job, job.outcome)
        if job.order is None:
            return self._refuse(job)
        if job.is_cancelled:
            return self._record(job, Status.CANCELLED, "its job was cancelled")
        if _deadline(job) <= time.time():
            return self._record(job, Status.EXPIRED, recovery.TOO_LATE)
        return None

    def _refuse(self, job: Job) -> Finished:
        first = self._with_ledger(lambda: recovery.first_outcome(job, self._ledger))
        if first is not None:
            return first
        log.warning("job.refused", extra={"session": self.session, "job": job.id})
        if job.poison:
            self._on_poisoned(job.id if job.is_named else "", job.poison)
        error = f"{type(job.problem).__name__}: {job.problem}"
        return Finished(job, Outcome(Status.FAILED, error=error))

    def _record(self, job: Job, status: Status, error: str) -> Finished:
        """End a message that was never sent, unless the ledger says that it was."""
        self._settle()  # the message before may be this one
        claim = self._claim_of(job)
        settlement = Settlement(claim.message_id, status, error=error, at=claim.now)
        [row] = self._with_ledger(lambda: self._ledger.record([(claim, settlement)]))
        if row.content_hash != claim.content_hash:  # its id was used for another
            return Finished(job, Outcome(status, error=error), is_duplicate=True)
        if row.status == Status.SENDING:
            raise _Leave(Ending.SEND_UNSURE)
        return Finished(job, recovery.outcome(row), row.attempt)

    def _deliver(self, job: Job) -> None:
        """Send a message; again, after a short rest, where WhatsApp refuses for the moment."""
        self._ask_first()
        try:
            content = self._prepared(job)
            self._type(job)
            try:
                self._attempt(job, content)
            except _Again:
                self._try_again(job, content)
        except MediaFailed as error:
            self._finish(self._record(job, Status.FAILED, str(error)))
        except _Late:
            self._finish(self._record(job, Status.EXPIRED, recovery.TOO_LATE))

    def _prepared(self, job: Job) -> Mapping[str, Any]:
        """The content with what it points at; before the claim, since nothing is sent yet.

        Raises:
            MediaFailed: It cannot be had.
        """
        assert job.order is not None, "judged: it has no problem"
        content = job.order.content
        if self._prepare is None or not needs_preparing(content):
            return content
        self._settle()
        self._flush(pop=False)
        prepare = self._prepare
        retrying = self._retrying(job, 1 + self._settings.send_retries, _FIRST_RETRY_S)
        try:
            return retrying(lambda: self._uploaded(self._await_prepared(prepare, content)))
        except _Again as error:
            raise MediaFailed(str(error)) from None

    def _uploaded(self, prepared: Any) -> Mapping[str, Any]:
        """What a preparation came to.

        Raises:
            MediaFailed: The file cannot be had.
            _Again: It could not be uploaded.
        """
        if isinstance(prepared, SendFailed):
            self._log_error("message.upload_error", prepared)
            kind = classify(str(prepared))
            if kind in (Kind.NOT_CONNECTED, Kind.LOGGED_OUT):
                self._put_down()
                raise _Leave(_ENDINGS[kind])
            if kind is Kind.STOP_SENDING:
                self._put_down()
                self._pause()
            raise _Again(upload_in_words(str(prepared)))
        if isinstance(prepared, Exception):
            raise prepared if isinstance(prepared, MediaFailed) else MediaFailed(repr(prepared))
        found: Mapping[str, Any] = prepared
        return found

    def _type(self, job: Job) -> None:
        """Show for a while that a text is being typed, where a pace says so."""
        order, typing_s, show = job.order, self._settings.pace_typing_s, self._show_typing
        assert order is not None, "judged: it has no problem"
        if self._pacer is None or show is None or not typing_s or order.content["type"] != "text":
            return
        self._settle()
        self._flush(pop=False)
        failure = self._answer(lambda: show(order.recipient.jid))
        if isinstance(failure, Exception):
            self._log_error("message.typing_failed", failure)
        self._sleep(typing_s)

    def _await_prepared(self, prepare: Prepare, content: Mapping[str, Any]) -> Any:
        """What the preparation came to; nothing is claimed, so it can be dropped at any time.

        Raises:
            _Stopping: Asked to.
            MediaFailed: Not within MEDIA_TIMEOUT_S.
        """
        if self._preparer is None:
            self._preparer = CallThread("prepare")
            self._preparer.start()
        self._preparer.begin(lambda: prepare(content))
        deadline = time.monotonic() + self._settings.media_timeout_s + _LOOK_S
        while not self._is_stopping():
            result = self._preparer.answer(_LOOK_S)
            if result is not None:
                return result
            if time.monotonic() >= deadline:
                self._preparer = None  # lost to an upload that hangs; nobody reads what it says
                raise MediaFailed("message: its file was not ready within MEDIA_TIMEOUT_S")
        raise _Stopping

    def _retrying(self, job: Job, attempts: int, wait_s: float) -> tenacity.Retrying:
        """Tries what raises _Again so often, ever later.

        Raises:
            _Again: To the last.
            _Late: The next attempt would not be in time.
        """
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(wait_s, _LONGEST_RETRY_S),
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
            sleep=lambda wait_s: self._rest_in_time(job, wait_s),
        )

    def _rest_in_time(self, job: Job, wait_s: float) -> None:
        if time.time() + wait_s >= _deadline(job):
            raise _Late
        self._sleep(wait_s)

    def _try_again(self, job: Job, content: Mapping[str, Any]) -> None:
        """
        Raises:
            _Late: The next attempt would not be in time.
        """

        def attempt() -> None:
            # Written at once: a process killed in the rest must not call it unknown.
            known = self._known
            if known is not None and self._breaker.phase() is Phase.OPEN:
                self._rest_at_head(known)
            elif known is not None:
                self._with_ledger(lambda: self._ledger.settle(known.settlement))
                self._mark_settled()
                self._attempt(job, content)

        if self._settings.send_retries:
            self._rest_in_time(job, _FIRST_RETRY_S)
            with contextlib.suppress(_Again):  # the last refusal is its outcome
                self._retrying(job, self._settings.send_retries, 2 * _FIRST_RETRY_S)(attempt)
        if self._known is not None:
            self._known = replace(self._known, is_passing=False)

    def _rest_at_head(self, known: _Known) -> None:
        """The breaker opened: what was certainly not sent waits for it to close, and does not fail
        meanwhile; but not for ever, since others wait behind it."""
        id = known.settlement.message_id
        if self._with_ledger(lambda: recovery.may_rest(id, self._ledger)):
            self._settle()
            self._put_down()
            raise _Released

    def _sleep(self, wait_s: float) -> None:
        if not self._rested(wait_s):
            raise _Stopping

    def _attempt(self, job: Job, content: Mapping[str, Any]) -> None:
        """Claim and send once.

        Raises:
            _Again: Certainly refused, for the moment; its outcome so far is known as failed.
            _Late: Not sent.
        """
        claim = self._claim_of(job)
        answer = self._claim(claim, _deadline(job))
        if isinstance(answer, Claimed):
            self._hand_over(job, content, claim, answer)
        elif isinstance(answer, Settled):
            self._finish(Finished(job, recovery.outcome(answer.row), answer.row.attempt))
        elif isinstance(answer, Conflict):
            error = f"message_id: {claim.message_id!r:.80} was used before with other content"
            failed = Outcome(Status.FAILED, error=error)
            self._finish(Finished(job, failed, is_duplicate=True))
        elif isinstance(answer, Unsettled):
            # Recovery left none, and we have none in hand: only it can tell what this is.
            raise _Leave(Ending.SEND_UNSURE)

    def _claim_of(self, job: Job) -> Claim:
        order = job.order
        assert order is not None, "judged: it has no problem"
        return Claim(
            message_id=order.message_id,
            content_hash=order.content_hash,
            job_id=job.id,
            recipient_hash=number_hash(self._install_key, order.recipient.user),
            now=time.time(),
            resend=order.on_unknown == "resend" and self._may_resend(job, order),
            metadata=order.metadata_text,
        )

    def _may_resend(self, job: Job, order: Outgoing) -> bool:
        return self._with_ledger(
            lambda: recovery.may_resend(job, self._ledger.find(order.message_id), self._ledger)
        )

    def _claim(self, claim: Claim, deadline: float) -> Answer:
        """Claim, in one commit with settling the message before."""
        known = self._known

        def call() -> Answer:
            if deadline <= time.time():  # each time: a file, a rest, a database away took long
                raise _Late
            return self._ledger.claim(
                claim,
                secret=lambda attempt: self._secret(claim.message_id, attempt),
                settle=known.settlement if known else None,
            )

        answer = self._with_ledger(call)
        self._database.succeeded()  # whatever it counted before: it takes writes
        self._mark_settled()
        return answer

    def _hand_over(
        self, job: Job, content: Mapping[str, Any], claim: Claim, claimed: Claimed
    ) -> None:
        """Send what was claimed and, while the answer is awaited, do Redis's share of the work
        around it. What it comes to is known afterwards, but not yet settled."""
        assert job.order is not None, "claimed"
        recipient = job.order.recipient.jid
        if self._pacer is not None:
            self._pacer.sending()
        self._in_flight = True
        self._exchanger.begin(lambda: self._exchange(job))
        result = self._answer(lambda: self._send(recipient, content, claimed.secret))
        self._in_flight = False
        trouble = self._exchanger.answer()
        kind: Kind | None = None
        if isinstance(result, SendAck):
            outcome = self._success(claim, result)
        else:
            kind = self._judge_failure(job, claim, result)
            outcome = self._failure(job, claim, claimed, in_words(str(result)))
        self._known = _Known(
            recovery.settlement(claim.message_id, outcome),
            Finished(job, outcome, claimed.attempt),
            is_passing=kind is Kind.TRANSIENT,
        )
        if isinstance(trouble, Exception):
            raise trouble
        if kind is Kind.TRANSIENT:
            passing = Outcome(Status.FAILED, error=RESTING, claimed_at=claim.now)
            self._outbox.note(job, passing)
            raise _Again
        self._outbox.note(job, outcome)

    def _exchange(self, started: Job) -> bool:
        """Finish the message before and pop the next; an error waits until the send is over."""
        self._outbox.exchange(self._finished, started=started)
        self._finished = []
        return True

    def _answer(self, call: Callable[[], _T]) -> _T | Exception:
        """What a call of neonize's returned or raised. Does not return where it takes longer than
        SEND_TIMEOUT_S: then `run` leaves without this thread."""
        try:
            return self._limit.call(call, within_s=self._settings.send_timeout_s)
        except Exception as error:
            return error

    def _success(self, claim: Claim, ack: SendAck) -> Outcome:
        self.sent += 1
        self._breaker.succeeded()
        if self._pacer is not None:
            self._know(claim.recipient_hash)
        if self._on_sent is not None and ack.wa_message_id:
            self._on_sent(ack, claim)
        return Outcome(
            Status.SENT,
            wa_message_id=ack.wa_message_id or None,
            wa_id=ack.wa_id,
            claimed_at=claim.now,
            sent_at=ack.at,
        )

    def _failure(self, job: Job, claim: Claim, claimed: Claimed, error: str) -> Outcome:
        """This attempt was certainly not sent; but one before it may have been."""
        failed = Settlement(claim.message_id, Status.FAILED, error=error)
        if claimed.attempt > 1:
            self._know_unsent(job, claim, RESTING)
            doubtful = self._with_ledger(lambda: self._ledger.doubtful(claim.message_id))
            failed = honest(failed, doubtful)
        return Outcome(
            Status(failed.status),
            wa_message_id=failed.wa_message_id,
            error=failed.error,
            claimed_at=claim.now,
        )

    def _know_unsent(self, job: Job, claim: Claim, error: str) -> None:
        """This attempt was certainly not sent: known, and noted, before the ledger is asked
        anything, which may be away until this process ends.

        Args:
            error: One of `rq_job.RELEASED`: should nothing follow, it is sent again.
        """
        unsent = Outcome(Status.FAILED, error=error, claimed_at=claim.now)
        settlement = recovery.settlement(claim.message_id, unsent)
        self._known = _Known(settlement, Finished(job, unsent), is_passing=True)
        with contextlib.suppress(RedisError):  # then the ledger alone can have it
            self._outbox.note(job, unsent)

    def _judge_failure(self, job: Job, claim: Claim, error: Exception) -> Kind:
        """What kind of failure it is, where the message certainly was not sent.

        Raises:
            _Leave: It cannot be told, or nothing can be sent here any more.
        """
        kind = classify(str(error)) if isinstance(error, SendFailed) else Kind.UNSURE
        log.warning("message.send_failed", extra={"session": self.session, "kind": kind})
        self._log_error("message.send_error", error)
        if kind.is_transport_fault:
            self._breaker.failed(kind.value)
        if kind in (Kind.NOT_CONNECTED, Kind.LOGGED_OUT):
            self._release(job, claim, NOT_CONNECTED)
        if kind in _ENDINGS:
            raise _Leave(_ENDINGS[kind])
        if kind is Kind.STOP_SENDING:
            self._release(job, claim, PAUSED)
            self._pause()
        return kind

    def _pause(self) -> NoReturn:
        """WhatsApp wants this number to send less: rest, longer each time. The message in hand,
        which was not sent, is back at the head."""
        extra = {"session": self.session, "until": self._breaker.pause()}
        log.warning("queue.paused", extra=extra)
        raise _Released

    def _release(self, job: Job, claim: Claim, error: str) -> None:
        """The claimed message was not handed over: back to the head, to be claimed again."""
        self._know_unsent(job, claim, error)
        self._settle()
        self._put_down()

    def _log_error(self, event: str, error: Exception) -> None:
        """neonize's own words."""
        log.debug(event, extra={"session": self.session, "error": redacted(repr(error))})

    # Settling

    def _settle(self) -> None:
        """Write the known outcome into the ledger."""
        known = self._known
        if known is not None:
            self._with_ledger(lambda: self._ledger.settle(known.written))
            self._mark_settled()

    def _mark_settled(self) -> None:
        known, self._known = self._known, None
        if known is not None and not known.is_passing:
            self._finished.append(known.finished)

    def _finish(self, finished: Finished) -> None:
        self._finished.append(finished)
        self._flush()

    def _flush(self, *, pop: bool = True) -> None:
        self._outbox.exchange(self._finished, pop=pop)
        self._finished = []

    def _put_down(self) -> None:
        """Before leaving: settle what is known, put back what was popped. What cannot be done
        now is done by the next process's recovery."""
        try:
            if self._known is not None:
                self._ledger.settle(self._known.written)
                self._mark_settled()
            if self._trouble != "redis":
                self._flush(pop=False)
                self._outbox.resync()
        except (RedisError, StorageError) as error:
            log.warning(
                "consumer.left_untidy", extra={"session": self.session, "error": repr(error)}
            )

    # Trouble

    def _waited_for_redis(self, error: RedisError, attempt: Callable[[], None]) -> bool:
        """Wait until the attempt succeeds; False when asked to stop first."""
        log.warning("consumer.redis_lost", extra={"session": self.session, "error": repr(error)})
        self._trouble = "redis"
        while True:
            # Even the first time: what fails each turn anew must not become a busy loop.
            if not self._rested(self._redis_rest_s):
                return False
            self._redis_rest_s = min(self._redis_rest_s * 2, _LONGEST_REST_S)
            try:
                attempt()
                break
            except RedisError:
                continue
            except _Stopping:
                return False
        self._trouble = ""
        log.info("consumer.redis_back", extra={"session": self.session})
        return True

    def _resync(self) -> None:
        """What was popped and not settled goes back to the head; a known outcome is kept safe."""
        self._settle()
        self._outbox.resync(keep=[item.job for item in self._finished])

    def _with_ledger(self, call: Callable[[], _T]) -> _T:
        """Repeat a ledger call, which is safe, until the database answers; its breaker spares a
        database that is down.

        Raises:
            _Stopping: Asked to stop first.
            StorageError: The ledger is broken or too new.
        """
        rest_s = _FIRST_REST_S
        while True:
            try:
                if self._database.until is not None:
                    self._spare_database()
                    self._ledger.probe()
                result = call()
            except StorageError as error:
                if not error.transient:
                    raise
                extra = {"session": self.session, "error": str(error)}
                log.warning("consumer.database_lost", extra=extra)
                self._trouble = "database"
                self._database.failed(type(error).__name__)
                if not self._rested(rest_s):
                    raise _Stopping from None
                rest_s = min(rest_s * 2, _LONGEST_REST_S)
            else:
                if self._trouble == "database" or self._database.until is not None:
                    self._trouble = ""
                    log.info("consumer.database_back", extra={"session": self.session})
                    self._database.succeeded()
                return result

    def _spare_database(self) -> None:
        """Rest while its breaker is open."""
        while rest_s := self._database.rest_s():
            self._breakers.show()
            if not self._rested(min(rest_s, _IDLE_WAIT_S)):
                raise _Stopping

    def _rested(self, rest_s: float) -> bool:
        """Wait, ticking; False when asked to stop."""
        self._tell_rest()
        end = time.monotonic() + rest_s
        while not self._is_stopping():
            left = end - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, _FIRST_REST_S))
        return False

    def _tick(self) -> None:
        self.progressed_at = time.monotonic()

    def _is_stopping(self) -> bool:
        self._tick()
        return self._stop_at is not None

    def _look_around(self) -> None:
        """What the loop does before each message, so that nothing enqueued after an operator's
        pause is sent, and what it does now and then."""
        with contextlib.suppress(StorageError):  # then what it said last holds
            self._standing = self._ask_standing()
        self._tell_rest()
        now = time.monotonic()
        if now - self._looked_at >= _DEPTH_S:
            self._looked_at = now
            self._depth = self._outbox.survey()
            self._breakers.show()
        if now - self._tidied_at >= _TIDY_S:
            self._tidied_at = now
            self._outbox.tidy()

    def _tell_rest(self) -> None:
        word = self._resting()[0]
        word = "" if word in _QUIET_WORDS else word
        if word != self._rest_told:
            self._rest_told = word
            self._on_rest()

    def _secret(self, message_id: str, attempt: int) -> bytes:
        return message_secret(self._install_key, self.session, message_id, attempt)


def _deadline(job: Job) -> float:
    """UTC seconds after which a message must not be sent; infinite where it says nothing."""
    assert job.order is not None, "judged: it has no problem"
    return job.order.deadline(job.enqueued_at) or float("inf")
