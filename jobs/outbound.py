"""The job functions that a CRM names to send messages.

They are names and signatures: a device process looks them up in an allow-list and does the work
itself, claimed and settled step by step, which a function that a stock RQ worker calls cannot do.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from whatsapp_worker.errors import UsageError
from whatsapp_worker.message import validate


def send_message(
    session: str,
    to: str,
    message: Mapping[str, Any],
    message_id: str,
    *,
    expires_at: float | None = None,
    ttl_s: float | None = None,
    send_at: float | None = None,
    priority: str = "normal",
    on_unknown: str = "keep",
    metadata: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Send one WhatsApp message; enqueue it, JSON-serialized, on `wa:out:<session>`.

    Args:
        session: Session id, the same as in the queue's name.
        to: 7 to 15 digits with or without `+`, or `...@s.whatsapp.net`, `@c.us`, `@lid`, `@g.us`.
        message: A WhatsApp Cloud API message object.
        message_id: The CRM's own id, sent once however often it is enqueued.
        expires_at: UTC seconds; not sent afterwards.
        ttl_s: The same, in seconds from enqueueing.
        send_at: UTC seconds; not sent before.
        priority: `high` is for jobs on `wa:out:<session>:high`.
        on_unknown: `resend` sends an unknown message again, at most twice.
        metadata: JSON that every event of the message repeats.

    Raises:
        InvalidMessage: Names the wrong field.
        UsageError: Always, where a stock RQ worker calls it: nothing was sent.
    """
    validate(
        {
            "session": session,
            "to": to,
            "message": message,
            "message_id": message_id,
            "expires_at": expires_at,
            "ttl_s": ttl_s,
            "send_at": send_at,
            "priority": priority,
            "on_unknown": on_unknown,
            "metadata": metadata,
        }
    )
    raise UsageError(
        "An RQ worker cannot send this: device processes consume wa:out:* queues by themselves."
        " Start them with `whatsapp-worker run`, and no RQ worker on these queues"
    )
