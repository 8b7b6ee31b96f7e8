"""What a CRM does, and nothing of ours in it; the demo prints `enqueue` and runs it."""

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer


def enqueue(redis: Redis, message_id: str, to: str, text: str) -> Job:
    queue = Queue("wa:out:demo", connection=redis, serializer=JSONSerializer)
    return queue.enqueue(
        "jobs.outbound.send_message",
        description="send_message",
        kwargs={
            "session": "demo",
            "to": to,
            "message_id": message_id,
            "message": {"type": "text", "text": {"body": text}},
        },
    )
