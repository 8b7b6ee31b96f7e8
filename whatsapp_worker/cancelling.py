"""Cancels a message that still waits. Its ledger row decides who was first, we or its consumer."""

import time

from storage.ledger import Claim, Ledger, Settlement
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import number_hash
from whatsapp_worker.outbox import Finished, Outbox
from whatsapp_worker.recovery import outcome
from whatsapp_worker.rq_job import Outcome


def cancel(
    message_id: str, *, outbox: Outbox, ledger: Ledger, install_key: bytes
) -> Outcome | None:
    """Cancel by message id; from any process, whether the session runs or not.

    Args:
        outbox: The session's queues, on a connection of the caller's.
        ledger: The session's.
        install_key: `Sessions.install_key()`.

    Returns:
        What became of the message: `cancelled` when it was in time, else the outcome that it has,
        `sending` while that is open. None when no such message waits or was ever sent.

    Raises:
        RedisError, StorageError: As their calls do; call it again.
    """
    job = outbox.find(message_id)
    if job is None or job.order is None:
        row = ledger.find(message_id)
        return None if row is None else outcome(row)
    now = time.time()
    claim = Claim(
        message_id=message_id,
        content_hash=job.order.content_hash,
        job_id=job.id,
        recipient_hash=number_hash(install_key, job.order.recipient.user),
        now=now,
    )
    word = Settlement(message_id, Status.CANCELLED, error="it was cancelled", at=now)
    [row] = ledger.record([(claim, word)])
    if row.status == Status.CANCELLED and row.job_id == job.id:
        outbox.withdraw(Finished(job, outcome(row), row.attempt))
    return outcome(row)
