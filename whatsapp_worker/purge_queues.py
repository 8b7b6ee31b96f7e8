"""What the purge asks of Redis: which sessions have messages waiting, and what is left over."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from redis import Redis, ResponseError
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX

from whatsapp_worker import outbox
from whatsapp_worker.event_names import Event
from whatsapp_worker.keys import (
    OUTBOUND_PREFIX,
    SessionId,
    maintenance_queue,
    outbound_queue,
    session_of_queue,
)
from whatsapp_worker.stream import EventStream

log = logging.getLogger(__name__)

WORKER_PREFIX = "wa-maintenance-"  # names of our RQ workers
_BATCH = 500
_WAITING = ("queue", "intermediate", "scheduled", "deferred", "wip")


class PurgeQueues:
    """Every method raises RedisError when Redis does not answer (transient)."""

    def __init__(
        self, redis: Redis, *, stream: EventStream, host: str, result_ttl_s: float
    ) -> None:
        self._redis: Any = redis  # redis-py types every answer as if it might be awaited
        self._host = host
        self._stream = stream
        self._result_ttl_s = result_ttl_s

    def waiting(self, sessions: Collection[str]) -> dict[str, int]:
        """How many jobs wait for each session, or are in hand; one round trip.

        A session whose queues hold something else than jobs is left out.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for session in sessions:
            for queue in _queues(session):
                pipeline.llen(f"{RQ_KEY_PREFIX}:queue:{queue}")
                pipeline.llen(f"{RQ_KEY_PREFIX}:queue:{queue}:intermediate")
                for registry in ("scheduled", "deferred", "wip"):
                    pipeline.zcard(f"{RQ_KEY_PREFIX}:{registry}:{queue}")
        replies = pipeline.execute(raise_on_error=False)
        each = 2 * len(_WAITING)
        counts = [replies[start : start + each] for start in range(0, len(replies), each)]
        return {
            session: sum(found)
            for session, found in zip(sessions, counts, strict=True)
            if not any(isinstance(count, ResponseError) for count in found)
        }

    def fail(self, session: str) -> int:
        """Tell every job that waits for a session that it is deleted; how many."""
        return sum(self._fail_all(queue, "session deleted") for queue in _queues(session))

    def sweep(
        self, known: Collection[str], *, fails_jobs: bool, dry_run: bool
    ) -> Iterator[tuple[str, int]]:
        """Remove what is left of unknown sessions and dead workers; yields kinds and counts.

        Args:
            known: Sessions that have a folder; their queues are left alone.
            fails_jobs: Also end the jobs of unknown sessions.
            dry_run: Only count.
        """
        if dry_run:
            return
        for queue in self._outbound_queues():
            try:
                yield from self._sweep(queue, known, fails_jobs=fails_jobs)
            except ResponseError as error:
                log.warning("queue.not_swept", extra={"queue": queue, "problem": str(error)})
        yield "workers", self._drop_dead_workers()

    def _sweep(
        self, queue: str, known: Collection[str], *, fails_jobs: bool
    ) -> Iterator[tuple[str, int]]:
        self._expire(queue)
        found = session_of_queue(queue)
        if found and found[0] in known:
            return
        if fails_jobs:
            yield "jobs", self._fail_all(queue, "unknown session")
        yield "queues", self._drop_if_empty(queue)

    def tell(self, event: Event, payload: Mapping[str, Any]) -> None:
        self._stream.add(event, "", payload)

    def _fail_all(self, queue: str, error: str) -> int:
        failed = 0
        while batch := outbox.fail_queue(
            self._redis,
            queue,
            error,
            stream=self._stream,
            result_ttl_s=self._result_ttl_s,
            limit=_BATCH,
        ):
            failed += batch
        return failed

    def _outbound_queues(self) -> list[str]:
        prefix = Queue.redis_queue_namespace_prefix
        keys = self._redis.smembers(Queue.redis_queues_keys)
        names = (key.decode(errors="replace").removeprefix(prefix) for key in keys)
        return sorted(name for name in names if name.startswith(OUTBOUND_PREFIX))

    def _expire(self, queue: str) -> None:
        """Drop the registries' entries of jobs whose records have expired."""
        now = int(time.time())
        for registry in ("finished", "failed"):
            self._redis.zremrangebyscore(f"{RQ_KEY_PREFIX}:{registry}:{queue}", 0, now)

    def _drop_if_empty(self, queue: str) -> int:
        """Forget the name of a queue that holds nothing; 1 when that was done.

        A producer that enqueues at this moment adds the name again with its job.
        """
        prefix = f"{RQ_KEY_PREFIX}:queue:{queue}"
        if self._redis.exists(prefix, f"{prefix}:intermediate"):
            return 0
        return int(self._redis.srem(Queue.redis_queues_keys, prefix))

    def _drop_dead_workers(self) -> int:
        """Forget our workers whose own record has expired: they died without a word."""
        prefix = f"{RQ_KEY_PREFIX}:worker:"
        registries = (
            f"{RQ_KEY_PREFIX}:workers",
            f"{RQ_KEY_PREFIX}:workers:{maintenance_queue(self._host)}",
        )
        dead: set[bytes] = set()
        for registry in registries:
            for key in self._redis.smembers(registry):
                is_ours = key.startswith((prefix + WORKER_PREFIX).encode())
                if is_ours and not self._redis.exists(key):
                    self._redis.srem(registry, key)
                    dead.add(key)
        return len(dead)


def _queues(session: str) -> list[str]:
    return [outbound_queue(SessionId(session), high=high) for high in (True, False)]
