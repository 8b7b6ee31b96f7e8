"""Keeps the queues that nobody consumes: jobs of unknown and deleted sessions end within seconds.

A thread of the supervisor, since Redis may be slow or down. It never sends.
"""

import bisect
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Set

from redis import Redis, RedisError, ResponseError
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX

from storage.errors import StorageError
from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import outbox
from whatsapp_worker.keys import CANCEL_REQUESTS, OUTBOUND_PREFIX, session_of_queue
from whatsapp_worker.stream import EventStream
from whatsapp_worker.waiting import Waiting

log = logging.getLogger(__name__)

SWEEP_S = 2.0
REQUESTS_S = 0.25  # between two looks for requests to cancel
JOBS_A_SWEEP = 2000
TRIM_EVERY = 5  # sweeps: a full stream is told of before it drops anything


class Keeper:
    """Sweeps every two seconds, from `start` to `stop`."""

    def __init__(
        self,
        *,
        redis: Redis,
        stream: EventStream,
        sessions: Sessions,
        consumed: Callable[[], Set[str]],
        result_ttl_s: float,
        ledger_of: Callable[[str], Ledger],
        ledgers_are_one: bool = False,
        timetable: Callable[[], object] = lambda: None,
        on_fill: Callable[[float, str | None], None] = lambda full, slowest_group: None,
        on_poisoned: Callable[[str, str, str], None] = lambda session, job_id, problem: None,
    ) -> None:
        """
        Args:
            redis: A connection of its own.
            sessions: An instance of its own.
            consumed: The sessions that have a device process now; their queues are left alone.
            result_ttl_s: `RESULT_TTL_S`.
            ledger_of: Opens a session's ledger.
            ledgers_are_one: All lie in one database: where one is away, all are.
            timetable: Enqueues what is due by the clock; asked at every sweep.
            on_fill: Told now and then how full the stream is: `Alarm.stream_is`.
            on_poisoned: Told of jobs that nobody can read: `Alarm.job_poisoned`.
        """
        self._redis = redis
        self._stream = stream
        self._sessions = sessions
        self._consumed = consumed
        self._result_ttl_s = result_ttl_s
        self._timetable = timetable
        self._untended: set[str] = set()  # queues and sessions that could not be tended lately
        self._tended = ""  # the session tended last
        self._waiting = Waiting(
            redis=redis,
            stream=stream,
            sessions=sessions,
            ledger_of=ledger_of,
            ledgers_are_one=ledgers_are_one,
            result_ttl_s=result_ttl_s,
            is_leaving=lambda: self._leave.is_set(),
        )
        self._on_fill = on_fill
        self._on_poisoned = on_poisoned
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout_s: float) -> bool:
        """End after the batch in hand; whether that was done in time."""
        self._leave.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        sweeps, was_down = 0, False
        sweep_at = time.monotonic() + SWEEP_S
        while not self._leave.wait(REQUESTS_S):
            try:
                self.answer_requests()
                if time.monotonic() < sweep_at:
                    continue
                sweep_at = time.monotonic() + SWEEP_S
                self.sweep()
                self._timetable()
                if sweeps % TRIM_EVERY == 0:
                    self.trim()
                sweeps += 1
                was_down = False
            except RedisError as error:
                if not was_down:
                    log.warning("redis.unavailable", extra={"problem": str(error)})
                was_down = True
            except Exception:
                log.exception("keeper.sweep_failed")

    def sweep(self) -> int:
        """End the jobs that no session will ever send; how many were failed for that.

        Raises:
            RedisError: Redis did not answer (transient).
        """
        failed = 0
        alive: set[str] = set()
        for queue in self._waiting_queues():
            with self._excused(queue):
                error = self._verdict(queue)
                if error is None:
                    alive.add(_session(queue))
                elif failed < JOBS_A_SWEEP and not self._leave.is_set():
                    failed += self._fail(queue, error, JOBS_A_SWEEP - failed)
        self._waiting.forget_all_but(alive)
        self._tend(alive, JOBS_A_SWEEP - failed)
        return failed

    def _tend(self, sessions: Set[str], left: int) -> None:
        """End what is expired or cancelled, within the sweep's measure; the next goes on after
        the session where this one stopped."""
        names = sorted(sessions)
        first = bisect.bisect_right(names, self._tended)
        for session in names[first:] + names[:first]:
            if self._leave.is_set() or left <= 0:
                break
            self._tended = session
            try:
                with self._excused(session):
                    is_consumed = session in self._consumed()
                    left -= self._waiting.tend(session, is_consumed=is_consumed, limit=left)
            except StorageError:  # a database that is away takes its time to say so
                break

    @contextlib.contextmanager
    def _excused(self, name: str) -> Iterator[None]:
        """What is wrong with one queue is told once, and costs the others nothing.

        Raises:
            RedisError: Redis did not answer.
            StorageError: A ledger did not (transient).
        """
        try:
            yield
            self._untended.discard(name)
        except Exception as error:
            if isinstance(error, RedisError) and not isinstance(error, ResponseError):
                raise
            if name not in self._untended:
                log.warning(
                    "queue.not_tended",
                    extra={"session": _session(name) or name, "problem": str(error)},
                    exc_info=not isinstance(error, StorageError | ResponseError),  # a bug
                )
            self._untended.add(name)
            if isinstance(error, StorageError) and error.transient:
                raise

    def answer_requests(self) -> int:
        """Cancel what CRMs asked to be cancelled. Raises as `sweep` does."""
        with self._excused(CANCEL_REQUESTS):
            return self._waiting.answer_requests()
        return 0

    def trim(self) -> None:
        """Trim the stream and tell how full it is. Raises as `sweep` does."""
        full = self._stream.trim()
        self._on_fill(full, self._stream.slowest_group() if full else None)

    def _fail(self, queue: str, error: str, limit: int) -> int:
        failed = outbox.fail_queue(
            self._redis,
            queue,
            error,
            stream=self._stream,
            result_ttl_s=self._result_ttl_s,
            limit=min(500, limit),
            on_poisoned=lambda id, problem: self._on_poisoned(_session(queue), id, problem),
        )
        if failed:
            log.info("queue.failed", extra={"queue": queue, "jobs": failed, "error": error})
        return failed

    def _waiting_queues(self) -> list[str]:
        """Our queues that hold something, popped jobs included."""
        prefix = Queue.redis_queue_namespace_prefix
        # A name that is not UTF-8 is none of ours; as it is read here it names no key.
        found = self._redis.smembers(Queue.redis_queues_keys)
        keys = [key.decode(errors="replace") for key in found]  # type: ignore[union-attr]
        names = sorted(key.removeprefix(prefix) for key in keys)
        names = [name for name in names if name.startswith(OUTBOUND_PREFIX)]
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            others = [f"{RQ_KEY_PREFIX}:{kind}:{name}" for kind in ("scheduled", "canceled")]
            pipeline.exists(f"{prefix}{name}", f"{prefix}{name}:intermediate", *others)
        return [name for name, there in zip(names, pipeline.execute(), strict=True) if there]

    def _verdict(self, queue: str) -> str | None:
        """What to tell the jobs of this queue; None when they may still be sent."""
        found = session_of_queue(queue)
        if found is None:
            return "unknown session"
        session = found[0]
        if session in self._consumed():
            return None
        try:
            if self._sessions.tombstones.find(session):
                return "session deleted"
            wanted = self._sessions.wanted(session)
        except StorageError as error:  # a record that cannot be read is not an unknown session
            log.warning("session.unreadable", extra={"session": session, "problem": str(error)})
            return None
        if wanted is None:
            return "unknown session"
        return "session deleted" if wanted.run == "delete" else None


def _session(queue: str) -> str:
    found = session_of_queue(queue)
    return "" if found is None else found[0]
