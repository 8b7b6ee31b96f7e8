"""`whatsapp-worker send`: plain RQ, none of our code between the CRM's call and the queue."""

import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from whatsapp_worker import keys, message
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import emit, paint
from whatsapp_worker.errors import CommandFailed, CommandTimeout, RedisUnavailable
from whatsapp_worker.settings import Settings

if TYPE_CHECKING:
    from redis import Redis
    from rq.job import Job

_POLL_S = 0.05
_SENT = {"sent", "delivered", "read", "played"}


def send(options: Options, settings: Settings) -> int:
    """Serve `send SESSION TO TEXT`."""
    import redis

    host = Host(settings)
    host.wanted(options.session)
    text = sys.stdin.read() if options.text == "-" else options.text
    kwargs = {
        "session": options.session,
        "to": options.to,
        "message_id": options.id or f"cli-{uuid.uuid4()}",
        "message": {"type": "text", "text": {"body": text}},
    }
    message.validate(kwargs)
    try:
        client = host.redis()
        job = enqueue(client, kwargs)
        if not options.wait:
            return _queued(options, kwargs["message_id"])
        outcome = _await(client, job.id, options.timeout)
    except redis.RedisError as error:
        raise RedisUnavailable("Redis did not answer") from error
    return _tell(options, kwargs["message_id"], outcome)


def enqueue(client: "Redis", kwargs: dict[str, Any]) -> "Job":
    """Put one message into its session's queue.

    Raises:
        redis.RedisError: Not enqueued, or not known to be (transient).
    """
    from rq import Queue
    from rq.serializers import JSONSerializer

    name = keys.outbound_queue(kwargs["session"])
    queue = Queue(name, connection=client, serializer=JSONSerializer)
    return queue.enqueue(keys.SEND_MESSAGE, kwargs=kwargs, description="send_message")


def _queued(options: Options, message_id: str) -> int:
    if options.json:
        emit({"message_id": message_id, "status": "queued", "wa_message_id": None, "error": None})
    else:
        print(f"{message_id}: queued")
    return 0


def _await(client: "Redis", job_id: str, timeout_s: float) -> dict[str, Any]:
    """The outcome of a job; status `queued` or `sending` when it has none in time."""
    from rq.exceptions import NoSuchJobError
    from rq.job import Job, JobStatus
    from rq.serializers import JSONSerializer

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            job = Job.fetch(job_id, connection=client, serializer=JSONSerializer)
        except NoSuchJobError:
            raise CommandFailed(f"job {job_id} is gone from Redis") from None
        outcome: dict[str, Any] = job.meta.get("outcome") or {}
        if job.get_status(refresh=False) in (JobStatus.FINISHED, JobStatus.FAILED):
            return {"status": "failed"} | outcome
        if time.monotonic() > deadline:
            return {"status": "queued"} | outcome
        time.sleep(_POLL_S)


def _tell(options: Options, message_id: str, outcome: dict[str, Any]) -> int:
    status, error = outcome["status"], outcome.get("error")
    facts = {
        "message_id": message_id,
        "status": status,
        "wa_message_id": outcome.get("wa_message_id"),
        "error": error,
    }
    if options.json:
        emit(facts)
    else:
        colour = "green" if status in _SENT else "red"
        print(f"{message_id}: {paint(status, colour)}" + (f" ({error})" if error else ""))
    if status in ("queued", "sending"):
        raise CommandTimeout(
            f"no outcome within {options.timeout:g} s; the message stays queued. See:"
            f" whatsapp-worker status {options.session}"
        )
    return 0 if status in _SENT else CommandFailed.exit_code
