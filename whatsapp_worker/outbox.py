"""One session's RQ queues: the only file that touches RQ's keys.

A job lives in exactly one of: its queue, the queue's limbo list (`...:intermediate`: popped and
not yet settled), or the finished and failed registries. Two lanes, high and normal, each with a
limbo list of its own; FIFO within each.

A CRM reads what became of its job with plain RQ: `Job.fetch(id, connection=redis,
serializer=JSONSerializer)`, then `get_status()`, `meta["outcome"]`, `latest_result()`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis

from whatsapp_worker.errors import WorkerError
from whatsapp_worker.event_names import Status
from whatsapp_worker.message import Outgoing
from whatsapp_worker.stream import EventStream


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a CRM reads in `meta["outcome"]`; times are UTC seconds."""

    status: Status
    wa_message_id: str | None = None
    wa_id: str | None = None  # the number that WhatsApp resolved
    error: str | None = None
    claimed_at: float | None = None
    sent_at: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the design."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One popped job: `order` says what to send, or `problem` why it can never be sent."""

    id: str
    lane: int  # index into Outbox.lanes
    order: Outgoing | None
    problem: WorkerError | None
    enqueued_at: float  # UTC seconds
    meta: Mapping[str, Any]  # the producer's, kept beside ours
    outcome: Outcome | None  # noted by an earlier attempt


class Outbox:
    """The queues of one session, for the one process that consumes them. Not thread-safe."""

    def __init__(
        self, redis: Redis, session: str, *, stream: EventStream, result_ttl_s: float
    ) -> None:
        """Nothing is sent yet.

        Args:
            redis: From `redis_client.connect`; not to be shared with another thread.
            session: Whose queues.
            stream: Where outcomes are told, in the same transaction that finishes a job.
            result_ttl_s: `RESULT_TTL_S`.
        """
        raise NotImplementedError

    def take(self, *, wait_s: float = 0) -> Job | None:
        """Pop the next job, high lane first; None when none came within `wait_s`.

        Raises:
            redis.RedisError: Nothing is known about a popped job: call `resync`.
        """
        raise NotImplementedError

    def note(self, job: Job, outcome: Outcome) -> None:
        """Write the outcome into the job's meta, before the ledger has it."""
        raise NotImplementedError

    def finish(self, job: Job, outcome: Outcome, *, attempt: int = 0) -> None:
        """End a job in one transaction: status, result, limbo list, event; its text is wiped."""
        raise NotImplementedError

    def resync(self) -> None:
        """Put every popped job that was not finished back to the head of its queue, in order.

        For the start, after lost connections, and before leaving. Also empties RQ's started
        registry, should a stock worker have run here.
        """
        raise NotImplementedError

    def depth(self) -> int:
        """Jobs that wait or are in hand."""
        raise NotImplementedError


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
    raise NotImplementedError
