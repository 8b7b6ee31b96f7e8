"""Ends, for the queue keeper, what waits in vain: expired and cancelled messages.

    cancelled by RQ's own `cancel`    any session
    cancelled by a request            any session; `wa:cancel`, answered in a list of its own
    expired                           sessions whose queue nobody consumes, or that are paused
    due                               moved in, where nobody consumes
    in hand when its process ended    sessions that will not connect by themselves

The ledger row decides each, so a device process may begin to consume at any moment.
"""

import contextlib
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from redis import Redis, ResponseError

from storage.errors import LedgerUnavailable, StorageError
from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import cancelling, recovery
from whatsapp_worker.errors import UsageError
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import CANCEL_REQUESTS, session_id, session_of_queue
from whatsapp_worker.message import check_message_id
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.rq_job import Job
from whatsapp_worker.session import State
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

_REQUESTS_AT_ONCE = 100
_ANSWER_TTL_S = 60
_ENDED_AT_ONCE = 200  # jobs
_OVER = frozenset(
    {
        *(State.UNLINKED, State.FAILED, State.LOGGED_OUT, State.REPLACED),
        *(State.BANNED, State.OUTDATED, State.STOPPED),
    }
)
_LEAVING = "the supervisor is stopping: nothing was cancelled; ask again"
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}\Z")


@dataclass(slots=True)
class _Watch:
    """Which jobs of one queue have a deadline, so that each job is read once.

    A queue that nobody consumes grows at its tail; where its head or the job read last is another
    than it was, everything is read anew.
    """

    read: int = 0  # jobs from the head on that were read
    ends: list[bytes | None] = field(default_factory=lambda: [None, None])  # first and last read
    deadlines: dict[bytes, float] = field(default_factory=dict)  # UTC seconds

    def look(self, outbox: Outbox, queue: str, limit: int) -> int:
        """Read the jobs that are new, at most `limit`; how many."""
        if outbox.places(queue, 0, self.read - 1) != self.ends:
            self.read = 0
        jobs = outbox.page(queue, self.read, limit)
        for job in jobs:
            deadline = job.order.deadline(job.enqueued_at) if job.order else None
            if deadline is not None:
                self.deadlines[job.raw_id] = deadline
        self.read += len(jobs)
        self.ends = outbox.places(queue, 0, self.read - 1)
        return len(jobs)

    def due(self, now: float) -> list[bytes]:
        """Some of those whose time is over."""
        due = (id for id, deadline in self.deadlines.items() if deadline <= now)
        return list(islice(due, _ENDED_AT_ONCE))

    def forget(self, outbox: Outbox, queue: str, due: Sequence[bytes], ended: int) -> None:
        """These were looked after, and so many of them are gone."""
        for id in due:
            del self.deadlines[id]
        self.read = max(0, self.read - ended)
        self.ends = outbox.places(queue, 0, self.read - 1)


class Waiting:
    """Not thread-safe; remembers what it has read."""

    def __init__(
        self,
        *,
        redis: Redis,
        stream: EventStream,
        sessions: Sessions,
        ledger_of: Callable[[str], Ledger],
        result_ttl_s: float,
        ledgers_are_one: bool = False,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            redis: Not shared with another thread.
            ledger_of: Opens a session's ledger.
            result_ttl_s: `RESULT_TTL_S`.
            ledgers_are_one: All lie in one database.
            is_leaving: Whether to begin nothing that may take long.
        """
        self._redis: Any = redis
        self._stream = stream
        self._sessions = sessions
        self._ledger_of = ledger_of
        self._result_ttl_s = result_ttl_s
        self._ledgers_are_one = ledgers_are_one
        self._is_leaving = is_leaving
        self._watches: dict[str, _Watch] = defaultdict(_Watch)

    def tend(self, session: str, *, is_consumed: bool, limit: int) -> int:
        """End what waits in vain for one session.

        Args:
            is_consumed: A device process takes its jobs now.
            limit: Most jobs to read.

        Returns:
            How many jobs were read or ended.

        Raises:
            RedisError, StorageError: Nothing is lost; call it again.
        """
        with self._outbox(session) as outbox:
            done = self._end(outbox, outbox.cancelled(), Status.CANCELLED, cancelling.CANCELLED)
            if not is_consumed:
                if outbox.has_limbo() and self._is_over(session):
                    self._settle(outbox)
                outbox.survey()  # moves in what is due
            elif self._sessions.hold(session).read().paused_at is None:
                for queue in outbox.queues:
                    self._watches.pop(queue, None)
                return done
            for queue in outbox.queues:
                done += self._expire(outbox, queue, limit - done)
        return done

    def _is_over(self, session: str) -> bool:
        """Whether no process will recover what the last one had in hand, unless a person acts or
        a long time passes."""
        record = self._sessions.state(session)
        return record is not None and record.state in _OVER

    def _settle(self, outbox: Outbox) -> None:
        with contextlib.closing(self._ledger_of(outbox.session)) as ledger:
            recovery.settle_abandoned(self._sessions, ledger=ledger, outbox=outbox)

    def _expire(self, outbox: Outbox, queue: str, limit: int) -> int:
        watch = self._watches[queue]
        done = watch.look(outbox, queue, limit) if limit > 0 else 0
        if due := watch.due(time.time()):
            jobs = [job for job in outbox.load(queue, due) if job.status == "queued"]
            ended = self._end(outbox, jobs, Status.EXPIRED, recovery.TOO_LATE)
            watch.forget(outbox, queue, due, ended)
            done += ended
        return done

    def _end(self, outbox: Outbox, jobs: list[Job], status: Status, error: str) -> int:
        if not jobs:
            return 0
        key = self._sessions.install_key()
        with contextlib.closing(self._ledger_of(outbox.session)) as ledger:
            ended = cancelling.end(
                jobs, status, error, outbox=outbox, ledger=ledger, install_key=key
            )
        log.info("queue.ended", extra={"session": outbox.session, "jobs": len(ended), "as": status})
        return len(ended)

    def forget_all_but(self, sessions: Set[str]) -> None:
        """Forget what was read of the queues of all others: they are empty, or gone."""
        for queue in list(self._watches):
            found = session_of_queue(queue)
            if found is None or found[0] not in sessions:
                del self._watches[queue]

    def answer_requests(self) -> int:
        """Cancel what CRMs asked for; how many requests that were.

        Raises:
            RedisError: Redis did not answer; who asked is not answered (transient).
        """
        asked: dict[str, dict[str, str]] = defaultdict(dict)  # session: request id: message id
        refused: dict[str, dict[str, str]] = {}
        raw_requests = self._redis.lpop(CANCEL_REQUESTS, _REQUESTS_AT_ONCE) or []
        for id, request in filter(None, map(_read, raw_requests)):
            try:
                message_id = check_message_id(request.get("message_id"))
                asked[session_id(request.get("session"))][id] = message_id
            except UsageError as error:
                refused[id] = {"error": str(error)}
        self._answer(refused)
        with contextlib.closing(_Ledgers(self._ledger_of, self._ledgers_are_one)) as ledgers:
            for session, requests in asked.items():
                try:
                    answers = self._cancel(session, requests, ledgers)
                except (StorageError, ResponseError) as error:
                    answers = {id: {"error": str(error)} for id in requests}
                self._answer(answers)
        return len(raw_requests)

    def _cancel(
        self, session: str, requests: Mapping[str, str], ledgers: "_Ledgers"
    ) -> dict[str, dict[str, Any]]:
        if self._sessions.wanted(session) is None:
            return {id: {"outcome": None} for id in requests}
        if self._is_leaving():
            return {id: {"error": _LEAVING} for id in requests}
        key = self._sessions.install_key()
        with self._outbox(session) as outbox, ledgers.of(session) as ledger:
            wanted = frozenset(requests.values())
            found = cancelling.cancel(wanted, outbox=outbox, ledger=ledger, install_key=key)
        told = {id: outcome and outcome.as_dict() for id, outcome in found.items()}
        return {id: {"outcome": told[message_id]} for id, message_id in requests.items()}

    def _answer(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        pipeline = self._redis.pipeline(transaction=True)
        for id, answer in answers.items():
            pipeline.rpush(f"{CANCEL_REQUESTS}:{id}", json.dumps(answer))
            pipeline.expire(f"{CANCEL_REQUESTS}:{id}", _ANSWER_TTL_S)
        pipeline.execute()

    @contextlib.contextmanager
    def _outbox(self, session: str) -> Iterator[Outbox]:
        outbox = Outbox(self._redis, session, stream=self._stream, result_ttl_s=self._result_ttl_s)
        try:
            yield outbox
        finally:
            outbox.close()


class _Ledgers:
    """Of one reading of the requests. Where they are one database it is connected to once, and
    waited for once when it is away."""

    def __init__(self, ledger_of: Callable[[str], Ledger], are_one: bool) -> None:
        self._ledger_of = ledger_of
        self._are_one = are_one
        self._shared: Ledger | None = None
        self._away: LedgerUnavailable | None = None

    @contextlib.contextmanager
    def of(self, session: str) -> Iterator[Ledger]:
        if self._away is not None:
            raise self._away
        try:
            if not self._are_one:
                with contextlib.closing(self._ledger_of(session)) as ledger:
                    yield ledger
                return
            if self._shared is None:
                self._shared = self._ledger_of(session)
            yield self._shared.of(session)
        except LedgerUnavailable as error:
            self._away = error if self._are_one else None
            raise

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


def _read(raw: bytes) -> tuple[str, dict[str, Any]] | None:
    """Request id, and all that the request says; None where it names no list for an answer."""
    try:
        found = json.loads(raw)
        if _REQUEST_ID.match(found["id"]):
            return found["id"], found
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    log.warning("cancel.request_refused")
    return None
