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

import contextlib
import json
import logging
import select
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from rq.defaults import RQ_KEY_PREFIX
from rq.job import JOB_ID_PATTERN, JobStatus
from rq.results import Result

from whatsapp_worker.event_names import Event, Status
from whatsapp_worker.keys import (
    EVENTS_STREAM,
    HIGH_SUFFIX,
    OUTBOUND_PREFIX,
    SessionId,
    outbound_queue,
)
from whatsapp_worker.rq_job import (
    MAX_HASH,
    RELEASED,
    Job,
    JobRefused,
    Outcome,
    decode,
    fresh_fields,
    message_id_of,
    noted_meta,
    rq_time,
    settled_fields,
)
from whatsapp_worker.stream import EventStream, event_id
from whatsapp_worker.wire import Command, Wire

log = logging.getLogger(__name__)

_BLOCK_S = 0.5  # of one BLMOVE: bounds how long leaving takes
_LATE_S = 5.0  # after which an answer to it does not come any more
_SILENT_S = 1.0  # the same for one that is about to leave
_BATCH = 1000
_PAGE = 200  # jobs that are read whole in one round trip

# Scripts: one command and one answer, where MULTI takes a dozen and costs a millisecond of Python.
# The fields of a job that RQ reads, and how long the limbo list is; a hash too large to be ours is
# not fetched at all, and no type of key is an error.
_READ = f"""
local function read(id, limbo)
  local found = {{id, redis.call('LLEN', limbo)}}
  local fields = redis.pcall('HGETALL', ARGV[1] .. id)
  if fields.err then found[3] = 'not a hash' return found end
  local size = 0
  for i = 2, #fields, 2 do
    size = size + #fields[i]
    local name = fields[i - 1]
    if #fields[i] > 0 or name == 'enqueue_at_front' or name:find('_timeout$') then
      found[#found + 1] = name
      found[#found + 1] = fields[i]
    end
  end
  if size > {MAX_HASH} then return {{id, found[2], 'too large'}} end
  return found
end
"""
# KEYS: limbo list. ARGV: prefix of job keys, id.
_LOAD = _READ + "return read(ARGV[2], KEYS[1])"
# ARGV: prefix of job keys, ids. The arguments alone, packed, for who looks for a message.
_ARGUMENTS = f"""
local found = {{}}
for i = 2, #ARGV do
  local size = redis.pcall('HSTRLEN', ARGV[1] .. ARGV[i], 'data')
  local is_ours = type(size) == 'number' and size <= {MAX_HASH}
  found[i - 1] = is_ours and redis.call('HGET', ARGV[1] .. ARGV[i], 'data')
end
return found
"""
# KEYS: queue and limbo list of each lane. ARGV: prefix of job keys.
_POP = (
    _READ
    + """
local found = {}
for i = 1, #KEYS, 2 do
  local id = redis.call('LMOVE', KEYS[i], KEYS[i + 1], 'LEFT', 'RIGHT')
  found[#found + 1] = id and read(id, KEYS[i + 1]) or false
end
return found
"""
)
# HSET on a record that is gone would make one up; on one that was cancelled or has ended meanwhile,
# it would revive it. ARGV: prefix of job keys, id, and whatever else.
_IF_LIVE = """
local key = ARGV[1] .. ARGV[2]
local status = redis.pcall('HGET', key, 'status') or (redis.call('EXISTS', key) == 1 and 'queued')
local is_live = status == 'queued' or status == 'started' or status == 'scheduled'
"""
# KEYS: limbo list, scheduled registry. ARGV: prefix, id, time.
_LAY_ASIDE = (
    _IF_LIVE
    + """
redis.call('LREM', KEYS[1], 1, ARGV[2])
if is_live then
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
  redis.call('HSET', key, 'status', 'scheduled')
end
"""
)
# KEYS: limbo list, queue. ARGV: prefix, id.
_PUT_BACK = (
    _IF_LIVE
    + """
redis.call('LREM', KEYS[1], -1, ARGV[2])
redis.call('LPUSH', KEYS[2], ARGV[2])
if is_live then redis.call('HSET', key, 'status', 'queued') end
"""
)
# KEYS: started registry, queue. ARGV: prefix, id, entry of the registry.
_PUT_BACK_STARTED = (
    _IF_LIVE
    + """
redis.call('ZREM', KEYS[1], ARGV[3])
if is_live then
  redis.call('HSET', key, 'status', 'queued')
  redis.call('LREM', KEYS[2], 1, ARGV[2])
  redis.call('LPUSH', KEYS[2], ARGV[2])
end
"""
)
# KEYS: scheduled registry, queue. ARGV: prefix, id. Before the first job that was enqueued later;
# RQ's times sort as text, and a queue is in their order but for what a producer put at its front.
_TAKE_PLACE = (
    _IF_LIVE
    + """
if redis.call('ZREM', KEYS[1], ARGV[2]) == 0 or not is_live then return end
redis.call('HSET', key, 'status', 'queued')
local function time(id)
  local found = redis.pcall('HMGET', ARGV[1] .. id, 'enqueued_at', 'created_at')
  if found.err then return '' end
  return (found[1] and #found[1] > 0 and found[1]) or found[2] or ''
end
local mine = time(ARGV[2])
local low, high = 0, redis.call('LLEN', KEYS[2])
while low < high do
  local middle = math.floor((low + high) / 2)
  if time(redis.call('LINDEX', KEYS[2], middle)) > mine then high = middle else low = middle + 1 end
end
local after = redis.call('LINDEX', KEYS[2], low)
if after then redis.call('LINSERT', KEYS[2], 'BEFORE', after, ARGV[2])
else redis.call('RPUSH', KEYS[2], ARGV[2]) end
"""
)
# KEYS: job, results, registry, limbo list, events.
# ARGV: 1 raw id, 2 ttl, 3 score, 4 whether to write the hash anew, 5 ceiling of the stream,
# 6 number of arguments of the result, those, 7 number of arguments of the event, those, hash.
# What RQ keeps for show may have been tampered with: it must not keep a job from being finished.
_FINISH = """
local at = 6
local function take()
  local count = tonumber(ARGV[at])
  local taken = {unpack(ARGV, at + 1, at + count)}
  at = at + count + 1
  return taken
end
local result, event, hash = take(), take(), take()
if #hash > 0 then
  if ARGV[4] == '1' then redis.call('DEL', KEYS[1]) end
  redis.call('HSET', KEYS[1], unpack(hash))
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.pcall('XADD', KEYS[2], 'MAXLEN', 10, '*', unpack(result))
  redis.pcall('EXPIRE', KEYS[2], ARGV[2])
  redis.pcall('ZADD', KEYS[3], ARGV[3], ARGV[1])
end
redis.call('LREM', KEYS[4], 1, ARGV[1])
if #event > 0 then redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[5], '*', unpack(event)) end
"""


class Finished(NamedTuple):
    """A job and how it ended."""

    job: Job
    outcome: Outcome
    attempt: int = 0  # of the ledger row; part of the event's id
    is_duplicate: bool = False  # its message id is that of another message, with other content


class LimboMismatch(RedisError):
    """The limbo lists do not hold what was popped: a reply was lost, or Redis lost its tail."""


@dataclass(slots=True, eq=False)
class _Lane:
    """One queue: what was popped from it, and a connection that may be waiting for more."""

    name: str
    wire: Wire
    held: Job | None = None  # popped and read, its turn has not come
    in_hand: set[Job] = field(default_factory=set)  # given out by `next` and not finished
    asked_at: float | None = None  # monotonic; since when its BLMOVE has not been answered

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
    def scheduled(self) -> str:
        return f"{RQ_KEY_PREFIX}:scheduled:{self.name}"

    @property
    def cancelled(self) -> str:
        return f"{RQ_KEY_PREFIX}:canceled:{self.name}"

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
        self._lanes = [_Lane(name, Wire(redis)) for name in names]
        self._wire = Wire(redis)  # of what is done for each message

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
            finished: Each in one transaction; finishing the same again is harmless.
            started: Its RQ status becomes `started`.
            pop: Take the next job of each lane that has none popped.
        """
        commands: list[Command] = [self._finish_command(item) for item in finished]
        if started is not None and started.exists:
            now = rq_time(time.time())
            key = _job_key(started.id)
            commands.append(("HSET", key, "status", "started", "started_at", now))
        lanes = [lane for lane in self._lanes if pop and self._may_pop(lane)]
        if lanes:
            keys = [key for lane in lanes for key in (lane.queue, lane.limbo)]
            commands.append(("EVAL", _POP, len(keys), *keys, _job_key("")))
        answers = self._wire.ask(*commands) if commands else []
        for item in finished:
            self._lane_of(item.job).in_hand.discard(item.job)
        if lanes:
            self._hold(zip(lanes, answers[-1], strict=True))

    def wait(self, timeout_s: float, *, wake: int) -> None:
        """Wait for a job on any lane; Redis pops what is pushed meanwhile at once.

        Args:
            timeout_s: At most so long.
            wake: A file descriptor; returns when it becomes readable.
        """
        for lane in self._lanes:
            if lane.held is None and lane.asked_at is None:
                lane.asked_at = time.monotonic()
                lane.wire.send(("BLMOVE", lane.queue, lane.limbo, "LEFT", "RIGHT", _BLOCK_S))
        self._collect(timeout_s, wake)

    def _may_pop(self, lane: _Lane) -> bool:
        # A BLMOVE still under way may have popped already: its answer comes first.
        if lane.asked_at is not None:
            self._collect(0)
        return lane.held is None and lane.asked_at is None

    def _collect(self, timeout_s: float, *wake: int) -> None:
        """Take the answers of BLMOVEs that arrive within the time."""
        waiting = {lane.wire.fileno(): lane for lane in self._lanes if lane.asked_at is not None}
        poll = select.poll()
        for fd in (*waiting, *wake):
            poll.register(fd, select.POLLIN)
        ready = [waiting[fd] for fd, _ in poll.poll(timeout_s * 1000) if fd in waiting]
        popped = [(lane, self._answer(lane)) for lane in ready]
        self._hold([(lane, self._load(lane, raw_id)) for lane, raw_id in popped if raw_id])
        overdue = time.monotonic() - _BLOCK_S - _LATE_S
        if any(lane.asked_at is not None and lane.asked_at < overdue for lane in self._lanes):
            raise RedisTimeout("a BLMOVE was not answered in time: its connection is dead")

    def _answer(self, lane: _Lane) -> bytes | None:
        lane.asked_at = None
        [raw_id] = lane.wire.read()
        return raw_id  # type: ignore[no-any-return]

    def _load(self, lane: _Lane, raw_id: bytes) -> list[Any]:
        [found] = self._wire.ask(("EVAL", _LOAD, 1, lane.limbo, _job_key(""), raw_id))
        return found  # type: ignore[no-any-return]

    def _hold(self, popped: Iterable[tuple[_Lane, list[Any] | None]]) -> None:
        """Keep the jobs just popped until their turn comes."""
        mismatch = None
        for lane, found in popped:
            if found is not None:
                lane.held = self._job(lane, found)
                if found[1] != lane.expected:
                    mismatch = f"{lane.limbo} has {found[1]} entries, not {lane.expected}"
        if mismatch:
            raise LimboMismatch(mismatch)

    def _job(self, lane: _Lane, found: Sequence[Any]) -> Job:
        """Decode the answer of a script: id, length of the limbo list, fields and values."""
        raw_id, _, *flat = found
        if len(flat) == 1:  # not a hash, too large
            return Job(
                raw_id.decode("ascii", "backslashreplace"),
                raw_id,
                lane.name,
                problem=JobRefused(f"its record is {flat[0].decode()}"),
                exists=_is_job_id(raw_id),
            )
        names = (name.decode("ascii", "replace") for name in flat[::2])
        fields = dict(zip(names, flat[1::2], strict=True))
        return decode(raw_id, fields, session=self.session, queue=lane.name)

    # Settling

    def note(self, job: Job, outcome: Outcome) -> None:
        """Write the outcome into the job's meta, before the ledger has it.

        Redis has it when this returns, but has not answered: the next `exchange` looks.
        """
        self._wire.send(("HSET", _job_key(job.id), "meta", noted_meta(job, outcome)))

    def withdraw(self, items: Sequence[Finished]) -> None:
        """Finish jobs that `waiting` and its like found; for others than their consumer.

        The entries go last: a process killed before leaves some that are dropped as settled.
        """
        if items:
            self._wire.ask(*(self._finish_command(item) for item in items))
        pipeline = self._redis.pipeline(transaction=True)
        for item in items:
            lane = self._lane_of(item.job)
            pipeline.lrem(lane.queue, 1, item.job.raw_id)
            for registry in (lane.scheduled, lane.cancelled):
                pipeline.zrem(registry, item.job.raw_id)
        pipeline.execute()

    def _finish_command(self, item: Finished) -> Command:
        job, outcome = item.job, item.outcome
        result: Mapping[str, Any] = {}
        event: Mapping[str, Any] = {}
        fields: Mapping[str, Any] = {}
        if not job.is_settled:
            name, payload, id = _event(self.session, item)
            event = self._stream.entry(name, self.session, payload, id=id)
            if job.exists:
                result = _result(outcome)
                write = settled_fields if job.problem is None else fresh_fields
                fields = write(job, self.session, outcome)
        lane = self._lane_of(job)
        registry = "finished" if outcome.is_success else "failed"
        keys = (
            _job_key(job.id),
            f"{RQ_KEY_PREFIX}:results:{job.id}",
            f"{RQ_KEY_PREFIX}:{registry}:{lane.name}",
            lane.limbo,
            EVENTS_STREAM,
        )
        return (
            "EVAL",
            _FINISH,
            len(keys),
            *keys,
            job.raw_id,
            self._ttl_s,
            int(time.time()) + self._ttl_s,
            int(job.problem is not None),
            self._stream.events_max,
            *_counted(result),
            *_counted(event),
            *_counted(fields),
        )

    def _lane_of(self, job: Job) -> _Lane:
        return self._lane(job.queue)

    def _lane(self, queue: str) -> _Lane:
        return next(lane for lane in self._lanes if lane.name == queue)

    def amend(self, item: Finished) -> None:
        """See the function of this name."""
        amend(self._redis, self.session, item, stream=self._stream)

    # Later

    def defer(self, job: Job, at: float) -> None:
        """Lay a popped job aside until `at` (UTC seconds): into RQ's scheduled registry. One that
        was cancelled meanwhile is dropped: who cancelled it ends it."""
        lane = self._lane_of(job)
        keys = (lane.limbo, lane.scheduled)
        self._wire.ask(("EVAL", _LAY_ASIDE, len(keys), *keys, _job_key(""), job.raw_id, at))
        lane.in_hand.discard(job)

    def survey(self, *, until: float | None = None) -> int:
        """How many jobs wait or are in hand. On the way, laid-aside jobs whose time has come go
        back to their places, by the time of enqueueing; RQ's own `enqueue_at` and `enqueue_in` lay
        theirs into the same registry.

        Args:
            until: UTC seconds up to which a time has come; now without it.
        """
        now = time.time() if until is None else until
        commands: list[Command] = []
        for lane in self._lanes:
            commands.append(("ZRANGEBYSCORE", lane.scheduled, 0, now, "LIMIT", 0, _BATCH))
            commands.append(("LLEN", lane.queue))
            commands.append(("LLEN", lane.limbo))
        answers = self._wire.ask(*commands)
        for lane, due in zip(self._lanes, answers[::3], strict=True):
            if due:
                self._move(lane, due)
        return int(sum(answers[1::3]) + sum(answers[2::3]))

    def _move(self, lane: _Lane, due: Sequence[bytes]) -> None:
        keys = (lane.scheduled, lane.queue)
        self._wire.ask(*(("EVAL", _TAKE_PLACE, 2, *keys, _job_key(""), id) for id in due))

    # Waiting jobs, for others than their consumer

    @property
    def queues(self) -> list[str]:
        """RQ's names, the first to be taken first."""
        return [lane.name for lane in self._lanes]

    def find(self, message_ids: Set[str]) -> list[Job]:
        """Every job of these messages that is not settled. Reads a little of all that waits."""
        found: list[Job] = []
        for lane in self._lanes:
            waiting = self.waiting(lane.name)
            for start in range(0, len(waiting), _PAGE):
                ids = self._naming(message_ids, waiting[start : start + _PAGE])
                jobs = self._load_all(lane, ids)
                found += [job for job in jobs if job.order and job.message_id in message_ids]
        return found

    def _naming(self, message_ids: Set[str], raw_ids: Sequence[bytes]) -> list[bytes]:
        """Those of the jobs whose arguments name one of these messages."""
        [found] = self._wire.ask(("EVAL", _ARGUMENTS, 0, _job_key(""), *raw_ids))
        named = zip(raw_ids, found, strict=True)
        return [id for id, data in named if data and message_id_of(data) in message_ids]

    def places(self, queue: str, *places: int) -> list[bytes | None]:
        """The ids at these places of a queue, 0 the head; None where there is none."""
        key = f"{RQ_KEY_PREFIX}:queue:{queue}"
        found = self._wire.ask(*(("LINDEX", key, place) for place in places))
        return [None if place < 0 else id for place, id in zip(places, found, strict=True)]

    def page(self, queue: str, start: int, count: int) -> list[Job]:
        """The jobs that wait on a queue from this place on; what is in hand is not among them."""
        lane = self._lane(queue)
        return self._load_all(lane, self._redis.lrange(lane.queue, start, start + count - 1))

    def heads(self) -> list[Job]:
        """What comes next of each queue, the first to be taken first. A consumer that may not send
        pops it and puts it back again and again, so it may be in hand, though not yet started."""
        heads: list[Job] = []
        for lane in self._lanes:
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.lrange(lane.limbo, 0, _PAGE - 1).lrange(lane.queue, 0, 0)
            in_hand, queued = pipeline.execute()
            jobs = self._load_all(lane, [*in_hand, *queued])
            waiting = (j for j in jobs if j.status != JobStatus.STARTED and not j.is_settled)
            heads += islice(waiting, 1)
        return heads

    def waiting(self, queue: str, limit: int = 0) -> list[bytes]:
        """The ids of all that is not settled at this moment: in hand, in the queue, for later. One
        moment, since a consumer that may not send what it popped puts it back. With a limit above
        0 only the first so many."""
        lane, last = self._lane(queue), limit - 1
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.lrange(lane.limbo, 0, last).lrange(lane.queue, 0, last)
        pipeline.zrange(lane.scheduled, 0, last)
        in_hand, queued, later = pipeline.execute()
        return [*in_hand, *queued, *later][: limit or None]

    def load(self, queue: str, raw_ids: Sequence[bytes]) -> list[Job]:
        """These jobs, wherever they are now."""
        return self._load_all(self._lane(queue), raw_ids)

    def counts(self) -> dict[str, dict[str, int]]:
        """By RQ name, how many jobs wait (`queued`), are in hand, and wait for later."""
        commands: list[Command] = []
        for lane in self._lanes:
            commands += [("LLEN", lane.queue), ("LLEN", lane.limbo), ("ZCARD", lane.scheduled)]
        answers = self._wire.ask(*commands)
        names = ("queued", "in_hand", "later")
        return {
            lane.name: dict(zip(names, answers[3 * n : 3 * n + 3], strict=True))
            for n, lane in enumerate(self._lanes)
        }

    def cancelled(self) -> list[Job]:
        """Some of the jobs that RQ's own `cancel` took from their queue, to be withdrawn."""
        jobs: list[Job] = []
        for lane in self._lanes:
            ids = self._redis.zrange(lane.cancelled, 0, _PAGE - 1)
            found = self._load_all(lane, ids)
            gone = [job.raw_id for job in found if not job.is_cancelled]
            if gone:  # expired, or put back on the queue by its CRM
                self._redis.zrem(lane.cancelled, *gone)
            jobs += [job for job in found if job.is_cancelled]
        return jobs

    def _load_all(self, lane: _Lane, raw_ids: Sequence[bytes]) -> list[Job]:
        if not raw_ids:
            return []
        key = _job_key("")
        found = self._wire.ask(*(("EVAL", _LOAD, 1, lane.limbo, key, id) for id in raw_ids))
        return [self._job(lane, answer) for answer in found]

    # Putting in order

    def has_limbo(self) -> bool:
        """Whether anything is popped and not settled."""
        return bool(self._redis.exists(*(lane.limbo for lane in self._lanes)))

    def limbo(self) -> list[Job]:
        """What an earlier process left popped, oldest first, the high lane before the other; it
        counts as in hand: `exchange` what is settled, and `resync` puts the rest back."""
        jobs = []
        for lane in self._lanes:
            lane.in_hand.clear()
            for raw_id in self._redis.lrange(lane.limbo, 0, _BATCH - 1):
                job = self._job(lane, self._load(lane, raw_id))
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
            keys = (lane.limbo, lane.queue)
            ids = reversed(back)
            self._wire.ask(*(("EVAL", _PUT_BACK, 2, *keys, _job_key(""), id) for id in ids))

    def _put_back_started(self, lane: _Lane, kept: set[bytes]) -> None:
        while entries := self._redis.zrange(lane.started, -_BATCH, -1):
            commands: list[Command] = []
            for entry in reversed(entries):
                id = entry.partition(b":")[0]  # <job>:<execution>
                if id in kept:
                    commands.append(("ZREM", lane.started, entry))
                    continue
                keys = (lane.started, lane.queue)
                commands.append(("EVAL", _PUT_BACK_STARTED, 2, *keys, _job_key(""), id, entry))
            self._wire.ask(*commands)

    def close(self) -> None:
        """Give its connections back to the client's pool; the next use takes new ones."""
        with contextlib.suppress(RedisTimeout):
            self._hang_up()
        for lane in self._lanes:
            lane.wire.close()

    def _hang_up(self) -> None:
        """End the connections that wait; what their BLMOVE popped is in a limbo list.

        Raises:
            RedisTimeout: Redis is silent.
        """
        self._wire.close()
        # Answered within _BLOCK_S; a connection cut off instead might pop until Redis notices,
        # after we have looked.
        deadline = time.monotonic() + _BLOCK_S + _SILENT_S
        is_silent = False
        for lane in self._lanes:
            if lane.asked_at is None:
                continue
            lane.asked_at = None
            if lane.wire.is_answered(max(0.0, deadline - time.monotonic())):
                with contextlib.suppress(RedisError):
                    lane.wire.read()
            else:
                lane.wire.close()
                is_silent = True
        if is_silent:
            raise RedisTimeout("a BLMOVE was not answered in time")

    # Knowing

    @property
    def is_holding(self) -> bool:
        """Whether jobs were popped, or may be at any moment."""
        return any(lane.held or lane.asked_at or lane.in_hand for lane in self._lanes)

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


def _is_job_id(raw_id: bytes) -> bool:
    return JOB_ID_PATTERN.fullmatch(raw_id.decode("ascii", "replace")) is not None


def _job_key(job_id: str) -> str:
    return f"{RQ_KEY_PREFIX}:job:{job_id}"


def _counted(fields: Mapping[str, Any]) -> list[Any]:
    """As arguments of a script: how many follow, then names and values."""
    flat = [part for item in fields.items() for part in item]
    return [len(flat), *flat]


def _result(outcome: Outcome) -> dict[str, Any]:
    """What `Job.latest_result` reads."""
    if outcome.is_success:
        value = b64encode(json.dumps(outcome.as_dict()).encode()).decode()
        return {"type": Result.Type.SUCCESSFUL.value, "worker_name": "", "return_value": value}
    text = f"{outcome.status}: {outcome.error or 'no reason is known'}"
    packed = b64encode(zlib.compress(text.encode())).decode()
    return {"type": Result.Type.FAILED.value, "worker_name": "", "exc_string": packed}


def _event(session: str, item: Finished) -> tuple[Event, dict[str, Any], str]:
    job, outcome, attempt, is_duplicate = item
    event = Event.SENT if outcome.is_success else Event(f"message.{outcome.status}")
    payload = {"message_id": job.message_id, "job_id": job.id, **outcome.as_dict()}
    if job.metadata:
        payload["metadata"] = job.metadata
    if is_duplicate:
        payload["duplicate"] = True
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
    on_poisoned: Callable[[str, str], None] = lambda job_id, problem: None,
) -> int:
    """Fail the next jobs of a queue whose session is unknown or deleted (for the queue keeper).

    Only while no device process consumes the queue. Crash-safe: call it again.

    Args:
        queue: RQ name, `wa:out:<session>` or `wa:out:<session>:high`.
        error: What the CRM reads: "unknown session", "session deleted".
        limit: Most jobs of this call.
        on_poisoned: Told the id of each job that nobody could have read, and why.

    Returns:
        How many were failed; 0 when the queue is empty.
    """
    session = queue.removeprefix(OUTBOUND_PREFIX).removesuffix(HIGH_SUFFIX)
    outbox = Outbox(redis, session, stream=stream, result_ttl_s=result_ttl_s, queues=[queue])
    with contextlib.closing(outbox):
        return _fail_all(outbox, error, limit=limit, on_poisoned=on_poisoned)


def _fail_all(
    outbox: Outbox, error: str, *, limit: int, on_poisoned: Callable[[str, str], None]
) -> int:
    failed = Outcome(Status.FAILED, error=error)
    # What a device process had in hand when it died may have been sent.
    unknown = Outcome(Status.UNKNOWN, error=f"{error} before WhatsApp's answer came")
    left = [job for job in outbox.limbo() if job.status == "started"]
    outbox.exchange([Finished(job, _noted(job) or unknown) for job in left], pop=False)
    outbox.resync()
    outbox.survey(until=float("inf"))
    count = 0
    outbox.exchange()
    while (job := outbox.next()) is not None:
        count += 1
        if job.poison:
            on_poisoned(job.id if job.is_named else "", job.poison)
        outbox.exchange([Finished(job, failed)], pop=count < limit)
    return count


def _noted(job: Job) -> Outcome | None:
    """How the message ended, as the process noted that had it in hand; not what a CRM wrote there,
    which has no time of a claim, nor the refusal of an attempt that another may have followed."""
    noted = job.outcome
    if noted is None or noted.status in (Status.QUEUED, Status.SENDING) or noted.error in RELEASED:
        return None
    return noted if isinstance(noted.claimed_at, float) else None


def failed_jobs(redis: Redis, job_ids: Sequence[str]) -> set[str]:
    """Those that RQ calls failed; one round trip, to spare `amend` for nearly all."""
    pipeline: Any = redis.pipeline(transaction=False)
    for job_id in job_ids:
        pipeline.hget(_job_key(job_id), "status")
    statuses = pipeline.execute() if job_ids else []
    failed = JobStatus.FAILED.value.encode()
    return {id for id, status in zip(job_ids, statuses, strict=True) if status == failed}


def amend(redis: Redis, session: str, item: Finished, *, stream: EventStream) -> None:
    """An unknown message turned out to be sent, or not: its job and the stream say so, in one
    transaction. Repeating is harmless.

    A job that is gone, or not finished yet, is left alone, and the stream is told all the same;
    nobody is told what the job says already. Its time to live stays.
    """
    client: Any = redis
    key = _job_key(item.job.id)
    client.transaction(lambda pipeline: _amend(pipeline, session, item, stream), key)


def _amend(pipeline: Any, session: str, item: Finished, stream: EventStream) -> None:
    job, outcome = item.job, item.outcome
    key = _job_key(job.id)
    names = ("data", "meta", "status", "origin")
    found = zip(names, pipeline.hmget(key, names), strict=True)
    fields = {name: value for name, value in found if value}
    queue = fields.get("origin", b"").decode(errors="replace")
    present = decode(job.raw_id, fields, session=session, queue=queue)
    known = present.outcome if present.message_id == job.message_id else None
    left_s = pipeline.ttl(key)
    pipeline.multi()
    if known is not None and (known.is_success or known.status == outcome.status):
        return
    name, payload, id = _event(session, item)
    entry = stream.entry(name, session, payload, id=id)
    pipeline.xadd(EVENTS_STREAM, entry, maxlen=stream.events_max, approximate=False)
    if known is None:
        return
    status = JobStatus.FINISHED if outcome.is_success else JobStatus.FAILED
    meta = noted_meta(present, outcome)
    pipeline.hset(key, mapping={"status": status.value, "meta": meta})
    pipeline.xadd(f"{RQ_KEY_PREFIX}:results:{job.id}", _result(outcome), maxlen=10)
    for registry in ("finished", "failed"):
        pipeline.zrem(f"{RQ_KEY_PREFIX}:{registry}:{queue}", job.id)
    until = int(time.time()) + left_s if left_s > 0 else float("inf")
    pipeline.zadd(f"{RQ_KEY_PREFIX}:{status.value}:{queue}", {job.id: until})
    if left_s > 0:
        pipeline.expire(f"{RQ_KEY_PREFIX}:results:{job.id}", left_s)
