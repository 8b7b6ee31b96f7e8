"""One session's RQ queues: the only file that touches RQ's keys.

    rq:queue:<q>               ids that wait
    rq:queue:<q>:intermediate  limbo: ids popped and not yet settled, oldest first
    rq:wip:<q>                 RQ's started registry; emptied when found, never filled
    rq:finished:<q>, rq:failed:<q>, rq:results:<id>    as RQ keeps them
    rq:job:<id>                the job

Two lanes, high and normal, are two queues with a limbo list each; FIFO within each. A job leaves
its limbo list in the transaction that settles it and tells the stream.

A CRM reads what became of its job with plain RQ: `Job.fetch(id, connection=redis,
serializer=JSONSerializer)`, then `get_status()`, `meta["outcome"]`, `latest_result()`.
"""

import json
import logging
import select
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError
from rq.defaults import RQ_KEY_PREFIX
from rq.results import Result

from whatsapp_worker.event_names import Event, Status
from whatsapp_worker.keys import HIGH_SUFFIX, OUTBOUND_PREFIX, SessionId, outbound_queue
from whatsapp_worker.rq_job import (
    MAX_HASH,
    Job,
    JobRefused,
    Outcome,
    decode,
    fresh_fields,
    rq_time,
    settled_fields,
)
from whatsapp_worker.stream import EventStream, event_id

log = logging.getLogger(__name__)

_BLOCK_S = 0.5  # of one BLMOVE: bounds how long leaving takes
_LOOK_S = 0.1  # between two looks at `until`
_BATCH = 1000

# A hash too large to be ours is not fetched at all, and no type of key is an error.
_LOAD = f"""
local fields = redis.pcall('HGETALL', KEYS[1])
if fields.err then return 'not a hash' end
local size = 0
for _, value in ipairs(fields) do size = size + #value end
if size > {MAX_HASH} then return 'too large' end
return fields
"""


class Finished(NamedTuple):
    """A job and how it ended."""

    job: Job
    outcome: Outcome
    attempt: int = 0  # of the ledger row; part of the event's id


class LimboMismatch(RedisError):
    """The limbo lists do not hold what was popped: a reply was lost, or Redis lost its tail."""


@dataclass(slots=True, eq=False)
class _Lane:
    """One queue: what was popped from it, and a connection that may be waiting for more."""

    name: str
    held: Job | None = None  # popped and read, its turn has not come
    in_hand: set[Job] = field(default_factory=set)  # given out by `next` and not finished
    waiting: Any = None  # the connection whose BLMOVE has not been answered

    @property
    def queue(self) -> str:
        return f"{RQ_KEY_PREFIX}:queue:{self.name}"

    @property
    def limbo(self) -> str:
        return f"{self.queue}:intermediate"

    @property
    def started(self) -> str:
        return f"{RQ_KEY_PREFIX}:wip:{self.name}"

    @property
    def expected(self) -> int:
        """How many entries its limbo list must have."""
        return len(self.in_hand) + (self.held is not None)


class Outbox:
    """The queues of one session, for the one process that consumes them. Not thread-safe.

    After any RedisError call `resync` before anything else.
    """

    def __init__(
        self,
        redis: Redis,
        session: str,
        *,
        stream: EventStream,
        result_ttl_s: float,
        queues: Sequence[str] = (),
    ) -> None:
        """Nothing is sent yet.

        Args:
            redis: From `redis_client.connect`; not to be shared with another thread.
            session: Whose queues.
            stream: Where outcomes are told, in the same transaction that finishes a job.
            result_ttl_s: `RESULT_TTL_S`.
            queues: RQ names instead of the session's two, the first to be taken first.
        """
        id = SessionId(session)
        self.session = session
        self._redis: Any = redis  # its types know no ids that are bytes
        self._stream = stream
        self._ttl_s = int(result_ttl_s) or 1
        names = queues or (outbound_queue(id, high=True), outbound_queue(id))
        self._lanes = [_Lane(name) for name in names]

    # Taking

    def next(self) -> Job | None:
        """The next job that was popped, high lane first; None: call `exchange` or `wait`."""
        for lane in self._lanes:
            job = lane.held
            if job is not None:
                lane.held = None
                lane.in_hand.add(job)
                return job
        return None

    def exchange(
        self, finished: Sequence[Finished] = (), *, started: Job | None = None, pop: bool = True
    ) -> None:
        """One round trip: finish jobs, mark one as started, pop what comes next.

        Args:
            finished: Each is finished in the same transaction, or none is.
            started: Its RQ status becomes `started`.
            pop: Take the next job of each lane that has none popped.
        """
        pipeline = self._redis.pipeline(transaction=True)
        for item in finished:
            self._queue_finish(pipeline, self._lane_of(item.job), item)
        if started is not None and started.exists:
            fields = {"status": "started", "started_at": rq_time(time.time())}
            pipeline.hset(_job_key(started.id), mapping=fields)
        lanes = [lane for lane in self._lanes if pop and self._may_pop(lane)]
        for lane in lanes:
            pipeline.lmove(lane.queue, lane.limbo, "LEFT", "RIGHT")
        if pipeline.command_stack:
            replies = pipeline.execute()
        for item in finished:
            self._lane_of(item.job).in_hand.discard(item.job)
        if lanes:
            self._hold(zip(lanes, replies[-len(lanes) :], strict=True))

    def wait(self, *, until: Callable[[], bool], timeout_s: float) -> None:
        """Wait for a job on any lane; returns when one was popped, at the time-out, or soon
        after `until` says so. A job pushed meanwhile is popped by Redis at once."""
        deadline = time.monotonic() + timeout_s
        for lane in self._lanes:
            if lane.held is None and lane.waiting is None:
                self._ask(lane)
        while not until() and (left := deadline - time.monotonic()) > 0:
            if self._collect(min(left, _LOOK_S)):
                return

    def _may_pop(self, lane: _Lane) -> bool:
        # A BLMOVE still under way may have popped already: its answer comes first.
        if lane.waiting is not None:
            self._collect(0)
        return lane.held is None and lane.waiting is None

    def _ask(self, lane: _Lane) -> None:
        connection = self._redis.connection_pool.get_connection()
        lane.waiting = connection
        connection.send_command("BLMOVE", lane.queue, lane.limbo, "LEFT", "RIGHT", _BLOCK_S)

    def _collect(self, timeout_s: float) -> bool:
        """Take the answers of BLMOVEs that arrive within the time; whether any arrived."""
        waiting = {lane.waiting._sock.fileno(): lane for lane in self._lanes if lane.waiting}
        poll = select.poll()
        for fd in waiting:
            poll.register(fd, select.POLLIN)
        ready = [waiting[fd] for fd, _ in poll.poll(timeout_s * 1000)]
        answers = [(lane, self._answer(lane)) for lane in ready]
        self._hold(answers)
        return bool(ready)

    def _answer(self, lane: _Lane) -> bytes | None:
        connection, lane.waiting = lane.waiting, None
        try:
            answer: bytes | None = connection.read_response()
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._redis.connection_pool.release(connection)
        return answer

    def _hold(self, popped: Iterable[tuple[_Lane, bytes | None]]) -> None:
        """Read the jobs just popped, and check that the limbo lists hold nothing else."""
        found = [(lane, raw_id) for lane, raw_id in popped if raw_id is not None]
        if not found:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for _, raw_id in found:
            pipeline.eval(_LOAD, 1, _job_key_of(raw_id))
        for lane, _ in found:
            pipeline.llen(lane.limbo)
        replies = pipeline.execute()
        for (lane, raw_id), fields in zip(found, replies, strict=False):
            lane.held = _read(raw_id, fields, self.session, lane.name)
        for (lane, _), length in zip(found, replies[len(found) :], strict=True):
            if length != lane.expected:
                raise LimboMismatch(f"{lane.limbo} has {length} entries, not {lane.expected}")

    # Settling

    def note(self, job: Job, outcome: Outcome) -> None:
        """Write the outcome into the job's meta, before the ledger has it."""
        meta = {**job.meta, "outcome": outcome.as_dict()}
        self._redis.hset(_job_key(job.id), "meta", json.dumps(meta))

    def _queue_finish(self, pipeline: Any, lane: _Lane, item: Finished) -> None:
        job, outcome, _ = item
        pipeline.lrem(lane.limbo, 1, job.raw_id)
        if job.is_settled:
            return
        if job.exists:
            self._queue_result(pipeline, lane, job, outcome)
        event, payload, id = _event(self.session, item)
        self._stream.queue(pipeline, event, self.session, payload, id=id)

    def _queue_result(self, pipeline: Any, lane: _Lane, job: Job, outcome: Outcome) -> None:
        key = _job_key(job.id)
        if job.problem is None:
            pipeline.hset(key, mapping=settled_fields(job, self.session, outcome))
        else:
            pipeline.delete(key)
            pipeline.hset(key, mapping=fresh_fields(job, self.session, outcome))
        pipeline.expire(key, self._ttl_s)
        results = f"{RQ_KEY_PREFIX}:results:{job.id}"
        pipeline.xadd(results, _result(outcome), maxlen=10)
        pipeline.expire(results, self._ttl_s)
        registry = "finished" if outcome.is_success else "failed"
        score = int(time.time()) + self._ttl_s
        pipeline.zadd(f"{RQ_KEY_PREFIX}:{registry}:{lane.name}", {job.id: score})

    def _lane_of(self, job: Job) -> _Lane:
        return next(lane for lane in self._lanes if lane.name == job.queue)

    # Putting in order

    def limbo(self) -> list[Job]:
        """What an earlier process left popped, oldest first, the high lane before the other; it
        counts as in hand: `exchange` what is settled, and `resync` puts the rest back."""
        jobs = []
        for lane in self._lanes:
            lane.in_hand.clear()
            for raw_id in self._redis.lrange(lane.limbo, 0, _BATCH - 1):
                fields = self._redis.eval(_LOAD, 1, _job_key_of(raw_id))
                job = _read(raw_id, fields, self.session, lane.name)
                lane.in_hand.add(job)
                jobs.append(job)
        return jobs

    def resync(self, *, keep: Sequence[Job] = ()) -> None:
        """Put every popped job back to the head of its queue, in order.

        For the start, after a RedisError, and before leaving. Also empties RQ's started
        registry, should a stock worker have run here.

        Args:
            keep: Jobs in hand that stay where they are: a send is under way, or its outcome is
                known and not yet finished.
        """
        self._hang_up()
        kept = {job.raw_id for job in keep}
        for lane in self._lanes:
            lane.held = None
            self._put_back(lane, kept)
            self._put_back_started(lane, kept)
            present = self._redis.lrange(lane.limbo, 0, _BATCH)
            lane.in_hand = {job for job in lane.in_hand if job in keep and job.raw_id in present}

    def _put_back(self, lane: _Lane, kept: set[bytes]) -> None:
        while True:
            ids = self._redis.lrange(lane.limbo, -_BATCH, -1)
            back = [raw_id for raw_id in ids if raw_id not in kept]
            if not back:
                return
            existing = self._existing(back)
            pipeline = self._redis.pipeline(transaction=True)
            for raw_id in reversed(back):
                pipeline.lrem(lane.limbo, -1, raw_id)
                pipeline.lpush(lane.queue, raw_id)
                if raw_id in existing:
                    pipeline.hset(_job_key_of(raw_id), "status", "queued")
            pipeline.execute()

    def _put_back_started(self, lane: _Lane, kept: set[bytes]) -> None:
        while entries := self._redis.zrange(lane.started, -_BATCH, -1):
            ids = [entry.partition(b":")[0] for entry in entries]  # <job>:<execution>
            existing = self._existing(ids)
            pipeline = self._redis.pipeline(transaction=True)
            for entry, raw_id in zip(reversed(entries), reversed(ids), strict=True):
                pipeline.zrem(lane.started, entry)
                if raw_id in existing and raw_id not in kept:
                    pipeline.hset(_job_key_of(raw_id), "status", "queued")
                    pipeline.lrem(lane.queue, 1, raw_id)
                    pipeline.lpush(lane.queue, raw_id)
            pipeline.execute()

    def _existing(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those whose record is a live job: HSET on the others would make one up."""
        pipeline = self._redis.pipeline(transaction=False)
        for raw_id in ids:
            pipeline.eval(_STATUS, 1, _job_key_of(raw_id))
        statuses = pipeline.execute()
        live = (b"queued", b"started")
        return {raw_id for raw_id, status in zip(ids, statuses, strict=True) if status in live}

    def _hang_up(self) -> None:
        """End the connections that wait; what their BLMOVE popped is in a limbo list."""
        for lane in self._lanes:
            connection, lane.waiting = lane.waiting, None
            if connection is None:
                continue
            try:
                connection.read_response()
            except (RedisError, OSError):
                connection.disconnect()
            self._redis.connection_pool.release(connection)

    # Knowing

    def depth(self) -> int:
        """Jobs that wait or are in hand."""
        pipeline = self._redis.pipeline(transaction=False)
        for lane in self._lanes:
            pipeline.llen(lane.queue)
            pipeline.llen(lane.limbo)
        return sum(pipeline.execute())

    def ping(self) -> None:
        """Nothing but whether Redis answers; RedisError when it does not."""
        self._redis.ping()

    def job_exists(self, job_id: str) -> bool:
        """Whether RQ still has the record of a job."""
        return bool(self._redis.exists(_job_key(job_id)))

    def tidy(self) -> None:
        """Drop the registries' entries of jobs that have expired."""
        now = int(time.time())
        pipeline = self._redis.pipeline(transaction=False)
        for lane in self._lanes:
            pipeline.zremrangebyscore(f"{RQ_KEY_PREFIX}:finished:{lane.name}", 0, now)
            pipeline.zremrangebyscore(f"{RQ_KEY_PREFIX}:failed:{lane.name}", 0, now)
        pipeline.execute()


_STATUS = """
local status = redis.pcall('HGET', KEYS[1], 'status')
if type(status) ~= 'string' then return '' end
return status
"""


def _job_key(job_id: str) -> str:
    return f"{RQ_KEY_PREFIX}:job:{job_id}"


def _job_key_of(raw_id: bytes) -> bytes:
    return _job_key("").encode() + raw_id


def _read(raw_id: bytes, flat: Sequence[bytes] | bytes, session: str, queue: str) -> Job:
    if isinstance(flat, bytes):
        job = decode(raw_id, {"data": b""}, session=session, queue=queue)
        return replace(job, problem=JobRefused(f"its record is {flat.decode()}"))
    fields = {
        name.decode("ascii", "replace"): value
        for name, value in zip(flat[::2], flat[1::2], strict=True)
    }
    return decode(raw_id, fields, session=session, queue=queue)


def _result(outcome: Outcome) -> dict[str, Any]:
    """What `Job.latest_result` reads."""
    if outcome.is_success:
        value = b64encode(json.dumps(outcome.as_dict()).encode()).decode()
        return {"type": Result.Type.SUCCESSFUL.value, "worker_name": "", "return_value": value}
    text = f"{outcome.status}: {outcome.error or 'no reason is known'}"
    packed = b64encode(zlib.compress(text.encode())).decode()
    return {"type": Result.Type.FAILED.value, "worker_name": "", "exc_string": packed}


def _event(session: str, item: Finished) -> tuple[Event, dict[str, Any], str]:
    job, outcome, attempt = item
    event = Event.SENT if outcome.is_success else Event(f"message.{outcome.status}")
    payload = {"message_id": job.message_id, "job_id": job.id, **outcome.as_dict()}
    if job.order is not None and job.order.metadata:
        payload["metadata"] = job.order.metadata
    what = ("message", job.message_id) if attempt else ("job", job.id, job.enqueued_at)
    return event, payload, event_id(session, *what, attempt, event)


def fail_queue(
    redis: Redis,
    queue: str,
    error: str,
    *,
    stream: EventStream,
    result_ttl_s: float,
    limit: int = 500,
) -> int:
    """Fail the next jobs of a queue whose session is unknown or deleted (for the queue keeper).

    Only while no device process consumes the queue. Crash-safe: call it again.

    Args:
        queue: RQ name, `wa:out:<session>` or `wa:out:<session>:high`.
        error: What the CRM reads: "unknown session", "session deleted".
        limit: Most jobs of this call.

    Returns:
        How many were failed; 0 when the queue is empty.
    """
    session = queue.removeprefix(OUTBOUND_PREFIX).removesuffix(HIGH_SUFFIX)
    outbox = Outbox(redis, session, stream=stream, result_ttl_s=result_ttl_s, queues=[queue])
    failed = Outcome(Status.FAILED, error=error)
    # What a device process had in hand when it died may have been sent.
    left = [(job, job.outcome) for job in outbox.limbo() if job.status == "started"]
    outbox.exchange([Finished(job, known) for job, known in left if known], pop=False)
    outbox.resync()
    count = 0
    outbox.exchange()
    while (job := outbox.next()) is not None:
        count += 1
        outbox.exchange([Finished(job, failed)], pop=count < limit)
    return count
