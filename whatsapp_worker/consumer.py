"""The loop that sends: takes jobs in order, claims, sends, settles, finishes.

    recover() once, before connecting: what an earlier process left behind is settled
    run()     while connected, in the main thread, until asked to stop or a send goes astray

One message, step by step; a process killed between any two of them loses nothing:

    pop       Redis    queue to limbo list; while the message before is under way
    claim     ledger   row `sending` with the attempt's secret; one commit with settling the last
    send      WhatsApp
    note      Redis    the outcome into the job's meta
    settle    ledger   the row's outcome; one commit with claiming the next
    finish    Redis    status, result, limbo list, event; while the next is under way
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from redis.exceptions import RedisError

from storage.errors import StorageError
from storage.ledger import (
    Answer,
    Claim,
    Claimed,
    Conflict,
    Ledger,
    Row,
    Settled,
    Settlement,
    Unsettled,
)
from whatsapp_worker.device import SendAck, SendFailed
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import message_secret, number_hash
from whatsapp_worker.message import Outgoing
from whatsapp_worker.outbox import Finished, Outbox
from whatsapp_worker.rq_job import Job, Outcome
from whatsapp_worker.send_errors import Kind, classify
from whatsapp_worker.settings import Settings

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_IDLE_WAIT_S = 1.0  # between two turns of an idle loop
_LOOK_S = 0.25  # between two looks at `stop` while a send is under way
_FIRST_REST_S, _LONGEST_REST_S = 0.1, 2.0  # between two tries to reach Redis or the database
_TIDY_S = 60.0
_DEPTH_S = 2.0
MAX_RELEASES = 10  # a message that ends its process before it is handed over, again and again

# A row `failed` with one of these was certainly never sent, and its job waits at the head.
NOT_HANDED_OVER = "the process ended before it was handed over; it is sent again"
NOT_CONNECTED = "the connection was lost before it was handed over; it is sent again"
_RELEASED = (NOT_HANDED_OVER, NOT_CONNECTED)
HANDED_OVER = "it was handed over, and WhatsApp's answer never came; a receipt settles it"


class Send(Protocol):
    """`Device.send`: blocks; raises SendFailed."""

    def __call__(self, recipient: str, content: Mapping[str, Any], secret: bytes, /) -> SendAck: ...


class Ending(StrEnum):
    """Why `Consumer.run` returned. After all but `stopped` the process must leave at once by
    `os._exit`: a send may still be under way, and the next process's recovery settles it."""

    STOPPED = "stopped"  # asked to; nothing is in hand
    NOT_DRAINED = "not-drained"  # asked to; the send in hand did not return in time
    SEND_HUNG = "send-hung"  # a send got no answer within SEND_TIMEOUT_S
    SEND_UNSURE = "send-unsure"  # a send failed and may have reached WhatsApp: recovery looks
    NOT_CONNECTED = "not-connected"  # neonize refused to send: this connection is gone
    LOGGED_OUT = "logged-out"  # neonize has no credentials any more


class _Stopping(Exception):
    """Asked to stop while waiting for Redis or the database."""


class _Leave(Exception):
    """The loop ends with this ending."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending


@dataclass(frozen=True, slots=True)
class _Known:
    """An outcome that the ledger does not have yet."""

    settlement: Settlement
    finished: Finished


class Consumer:
    """Sends what is queued for one session, one message at a time."""

    def __init__(
        self,
        *,
        session: str,
        send: Send,
        ledger: Ledger,
        outbox: Outbox,
        install_key: bytes,
        settings: Settings,
        on_sent: Callable[[str, str], None] | None = None,
    ) -> None:
        """Nothing is touched yet.

        Args:
            session: Its id.
            send: `Device.send`; called on a thread of its own.
            ledger: Open.
            outbox: The session's queues.
            install_key: `Sessions.install_key()`.
            settings: SEND_TIMEOUT_S, SEND_RETRIES ...
            on_sent: Called with (WhatsApp's id, message id) of every acknowledged message, on
                the thread that runs `run`: `FactWriter.sent`.
        """
        self.session = session
        self.progressed_at = time.monotonic()  # of the last tick; a ticking wait is progress
        self.sent = 0  # messages acknowledged since the start
        self._ledger = ledger
        self._outbox = outbox
        self._install_key = install_key
        self._settings = settings
        self._on_sent = on_sent
        self._sender = _Sender(send)
        self._stop_at: float | None = None  # monotonic; when the send in hand is given up
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._known: _Known | None = None  # acknowledged, not yet in the ledger
        self._finished: list[Finished] = []  # in the ledger, not yet finished in Redis
        self._in_flight = False
        self._trouble = ""  # "redis" or "database" while one of them does not answer
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

    @property
    def is_idle(self) -> bool:
        """No send is under way and nothing is waiting to be settled."""
        return not (self._in_flight or self._known or self._finished)

    def queue_state(self) -> dict[str, Any]:
        """For the heartbeat: {"state", "reason", "until", "depth"}; from any thread, no I/O."""
        state = "running" if self._depth or not self.is_idle else "idle"
        if self._trouble:
            state = "database" if self._trouble == "database" else "paused"
        reason = f"{self._trouble} does not answer" if self._trouble else None
        return {"state": state, "reason": reason, "until": None, "depth": self._depth}

    # Before connecting

    def recover(self, handed_over: Callable[[Iterable[bytes]], Mapping[bytes, str]]) -> bool:
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
                self._with_ledger(lambda: self._recover(handed_over))
                return True
            except RedisError as error:
                if not self._waited_for_redis(error, self._outbox.ping):
                    return False
            except _Stopping:
                return False

    def _recover(self, handed_over: Callable[[Iterable[bytes]], Mapping[bytes, str]]) -> None:
        """Every step can be repeated: a process killed here leaves the rest to the next."""
        rows = self._ledger.sending()
        jobs = self._outbox.limbo()
        found = handed_over([row.secret for row in rows if row.secret])
        released = []
        for row in rows:
            settlement = self._judge_left(row, jobs, found)
            if settlement is None:
                released.append(row)
            else:
                self._ledger.settle(settlement)
        self._outbox.exchange(list(self._settled_among(jobs)), pop=False)
        self._outbox.resync()
        # Only now: a row that is `failed` while its job is in limbo would count as its outcome.
        for row in released:
            error = NOT_HANDED_OVER if self._outbox.job_exists(row.job_id) else "its job is gone"
            self._ledger.settle(
                Settlement(row.message_id, Status.FAILED, error=error, at=time.time())
            )
        if rows or jobs:
            log.info(
                "consumer.recovered",
                extra={
                    "session": self.session,
                    "rows": len(rows),
                    "released": len(released),
                    "jobs": len(jobs),
                },
            )

    def _judge_left(
        self, row: Row, jobs: Iterable[Job], found: Mapping[bytes, str]
    ) -> Settlement | None:
        """What became of a row that was left `sending`; None when it was never handed over."""
        for job in jobs:
            noted = job.outcome
            if job.id == row.job_id and noted and noted.claimed_at == row.claimed_at:
                return _settlement(row.message_id, noted)
        wa_message_id = found.get(row.secret) if row.secret else None
        if wa_message_id is not None:
            return Settlement(
                row.message_id,
                Status.UNKNOWN,
                wa_message_id=wa_message_id,
                error=HANDED_OVER,
                at=time.time(),
            )
        former = self._ledger.attempts(row.message_id)
        if sum(attempt.error == NOT_HANDED_OVER for attempt in former) < MAX_RELEASES:
            return None
        error = f"its process ended {MAX_RELEASES + 1} times before it was handed over"
        return Settlement(row.message_id, Status.FAILED, error=error, at=time.time())

    def _settled_among(self, jobs: Iterable[Job]) -> Iterable[Finished]:
        """Those of the jobs left in limbo whose outcome the ledger knows."""
        for job in jobs:
            row = self._ledger.find(job.message_id) if job.message_id else None
            if row is None or row.job_id != job.id or row.status == Status.SENDING:
                continue
            if row.status != Status.FAILED or row.error not in _RELEASED:
                yield Finished(job, _outcome(row), row.attempt)

    # While connected

    def run(self) -> Ending:
        """Send until `stop` is called or a send goes astray. Call while connected.

        Raises:
            StorageError: The ledger is broken or too new; trying again does not help.
        """
        self._sender.start()
        while self._stop_at is None:
            self._tick()
            try:
                self._turn()
            except RedisError as error:
                if not self._waited_for_redis(error, self._resync):
                    break
            except _Stopping:
                break
            except _Leave as leave:
                log.info("consumer.ended", extra={"session": self.session, "why": leave.ending})
                return leave.ending
        self._put_down()
        return Ending.STOPPED

    def _turn(self) -> None:
        """Bring one message from the queue to WhatsApp, or wait for one."""
        self._look_around()
        job = self._outbox.next()
        if job is None:
            self._settle()
            if self._finished:
                self._flush()
            else:
                self._outbox.wait(_IDLE_WAIT_S, wake=self._wake)
            return
        outcome = self._judge(job)
        if outcome is not None:
            self._settle()
            self._finish(Finished(job, outcome))
            return
        self._claim_and_send(job)

    def _judge(self, job: Job) -> Outcome | None:
        """How a job ends that is not to be sent; None when it is."""
        if job.is_settled:
            return job.outcome
        if job.problem is not None:
            return self._refuse(job)
        if job.is_cancelled:
            return Outcome(Status.CANCELLED, error="its job was cancelled")
        return None

    def _refuse(self, job: Job) -> Outcome:
        row = self._first_outcome(job) if job.content_hash and job.message_id else None
        if row is not None:
            return _outcome(row)
        log.warning("job.refused", extra={"session": self.session, "job": job.id})
        return Outcome(Status.FAILED, error=f"{type(job.problem).__name__}: {job.problem}")

    def _first_outcome(self, job: Job) -> Row | None:
        """The settled row of a job whose text was wiped: somebody queued it again."""
        row = self._with_ledger(lambda: self._ledger.find(job.message_id or ""))
        is_same = row is not None and row.content_hash == job.content_hash
        return row if is_same and row and row.status != Status.SENDING else None

    def _claim_and_send(self, job: Job) -> None:
        order = job.order
        assert order is not None, "judged: it has no problem"
        claim = Claim(
            message_id=order.message_id,
            content_hash=order.content_hash,
            job_id=job.id,
            recipient_hash=number_hash(self._install_key, order.recipient.user),
            now=time.time(),
        )
        answer = self._claim(claim)
        if isinstance(answer, Claimed):
            self._deliver(job, order, claim, answer)
        elif isinstance(answer, Settled):
            self._finish(Finished(job, _outcome(answer.row), answer.row.attempt))
        elif isinstance(answer, Conflict):
            error = f"message_id: {order.message_id!r:.80} was used before with other content"
            self._finish(Finished(job, Outcome(Status.FAILED, error=error)))
        elif isinstance(answer, Unsettled):
            # Recovery left none, and we have none in hand: only it can tell what this is.
            raise _Leave(Ending.SEND_UNSURE)

    def _claim(self, claim: Claim) -> Answer:
        """Claim, in one commit with settling the message before."""
        known = self._known
        answer = self._with_ledger(
            lambda: self._ledger.claim(
                claim,
                secret=lambda attempt: self._secret(claim.message_id, attempt),
                settle=known.settlement if known else None,
            )
        )
        self._mark_settled()
        return answer

    def _deliver(self, job: Job, order: Outgoing, claim: Claim, claimed: Claimed) -> None:
        """Send what was claimed and, while the answer is awaited, do Redis's share of the work
        around it. What it comes to is known afterwards, but not yet settled."""
        deadline = time.monotonic() + self._settings.send_timeout_s
        self._in_flight = True
        self._sender.begin(order.recipient.jid, order.content, claimed.secret)
        trouble = self._exchange(job)
        result = self._await_answer(deadline)
        self._in_flight = False
        if isinstance(result, SendAck):
            outcome = self._success(claim, result)
        else:
            outcome = self._failure(claim, result)
        self._known = _Known(
            _settlement(order.message_id, outcome), Finished(job, outcome, claimed.attempt)
        )
        if trouble is not None:
            raise trouble
        self._outbox.note(job, outcome)

    def _exchange(self, started: Job) -> RedisError | None:
        """Finish the message before and pop the next; an error can wait until the send is over."""
        try:
            self._outbox.exchange(self._finished, started=started)
        except RedisError as error:
            return error
        self._finished = []
        return None

    def _await_answer(self, deadline: float) -> SendAck | Exception:
        while True:
            self._tick()
            stop_at = self._stop_at
            end = deadline if stop_at is None else min(deadline, stop_at)
            result = self._sender.answer(min(_LOOK_S, max(0.0, end - time.monotonic())))
            if result is not None:
                return result
            if time.monotonic() >= end:
                is_hung = stop_at is None or end < stop_at
                raise _Leave(Ending.SEND_HUNG if is_hung else Ending.NOT_DRAINED)

    def _success(self, claim: Claim, ack: SendAck) -> Outcome:
        self.sent += 1
        if self._on_sent is not None:
            self._on_sent(ack.wa_message_id, claim.message_id)
        return Outcome(
            Status.SENT,
            wa_message_id=ack.wa_message_id,
            wa_id=ack.wa_id,
            claimed_at=claim.now,
            sent_at=ack.at,
        )

    def _failure(self, claim: Claim, error: Exception) -> Outcome:
        """The outcome of a send that certainly failed.

        Raises:
            _Leave: It cannot be told, or nothing can be sent here any more.
        """
        kind = classify(str(error)) if isinstance(error, SendFailed) else Kind.UNSURE
        log.warning("message.send_failed", extra={"session": self.session, "kind": kind})
        log.debug("message.send_error", extra={"session": self.session, "error": str(error)})
        if kind is Kind.UNSURE:
            raise _Leave(Ending.SEND_UNSURE)
        if kind in (Kind.NOT_CONNECTED, Kind.LOGGED_OUT):
            self._release(claim)
            is_lost = kind is Kind.NOT_CONNECTED
            raise _Leave(Ending.NOT_CONNECTED if is_lost else Ending.LOGGED_OUT)
        return Outcome(Status.FAILED, error=str(error), claimed_at=claim.now)

    def _release(self, claim: Claim) -> None:
        """The claimed message was not handed over: back to the head, to be claimed again."""
        settlement = Settlement(
            claim.message_id, Status.FAILED, error=NOT_CONNECTED, at=time.time()
        )
        self._with_ledger(lambda: self._ledger.settle(settlement))
        self._put_down()

    # Settling

    def _settle(self) -> None:
        """Write the known outcome into the ledger."""
        known = self._known
        if known is not None:
            self._with_ledger(lambda: self._ledger.settle(known.settlement))
            self._mark_settled()

    def _mark_settled(self) -> None:
        if self._known is not None:
            self._finished.append(self._known.finished)
            self._known = None

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
                self._ledger.settle(self._known.settlement)
                self._mark_settled()
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
        rest_s = _FIRST_REST_S
        self._trouble = "redis"
        while True:
            try:
                attempt()
                break
            except RedisError:
                if not self._rested(rest_s):
                    return False
                rest_s = min(rest_s * 2, _LONGEST_REST_S)
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
        """Repeat a ledger call, which is safe, until the database answers."""
        rest_s = _FIRST_REST_S
        while True:
            try:
                result = call()
            except StorageError as error:
                if not error.transient:
                    raise
                if not self._trouble:
                    extra = {"session": self.session, "error": str(error)}
                    log.warning("consumer.database_lost", extra=extra)
                self._trouble = "database"
                if not self._rested(rest_s):
                    raise _Stopping from None
                rest_s = min(rest_s * 2, _LONGEST_REST_S)
            else:
                self._trouble = ""
                return result

    def _rested(self, rest_s: float) -> bool:
        """Wait, ticking; False when asked to stop."""
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
        """What the loop does now and then."""
        now = time.monotonic()
        if now - self._looked_at >= _DEPTH_S:
            self._looked_at = now
            self._depth = self._outbox.depth()
        if now - self._tidied_at >= _TIDY_S:
            self._tidied_at = now
            self._outbox.tidy()

    def _secret(self, message_id: str, attempt: int) -> bytes:
        return message_secret(self._install_key, self.session, message_id, attempt)


class _Sender(threading.Thread):
    """Makes the calls that block, so that they can be given up; one at a time."""

    def __init__(self, send: Send) -> None:
        super().__init__(name="sender", daemon=True)
        self._send = send
        self._calls: queue.SimpleQueue[tuple[str, Mapping[str, Any], bytes]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[SendAck | Exception] = queue.SimpleQueue()
        self._taken = threading.Semaphore(0)

    def begin(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> None:
        """Start a call. Waits until the thread has it: else the caller, who has work of its own,
        would keep the interpreter from it for up to a switch interval (5 ms)."""
        self._calls.put((recipient, content, secret))
        self._taken.acquire()

    def answer(self, timeout_s: float) -> SendAck | Exception | None:
        """What the call returned or raised; None while it has not."""
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def run(self) -> None:
        while True:
            call = self._calls.get()
            self._taken.release()
            try:
                self._answers.put(self._send(*call))
            except Exception as error:
                self._answers.put(error)


def _settlement(message_id: str, outcome: Outcome) -> Settlement:
    return Settlement(
        message_id,
        outcome.status,
        wa_message_id=outcome.wa_message_id,
        wa_id=outcome.wa_id,
        error=outcome.error,
        at=outcome.sent_at or time.time(),
    )


def _outcome(row: Row) -> Outcome:
    return Outcome(
        Status(row.status),
        wa_message_id=row.wa_message_id,
        wa_id=row.wa_id,
        error=row.error,
        claimed_at=row.claimed_at,
        sent_at=row.sent_at,
    )
