"""Ends messages that still wait. The ledger row decides who was first, we or their consumer."""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from rq.job import JobStatus

from storage.ledger import Claim, Ledger, Settlement
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import number_hash
from whatsapp_worker.outbox import Finished, Outbox
from whatsapp_worker.recovery import first_outcome, outcome
from whatsapp_worker.rq_job import Job, Outcome

CANCELLED = "it was cancelled"


def cancel(
    message_ids: Set[str], *, outbox: Outbox, ledger: Ledger, install_key: bytes
) -> Mapping[str, Outcome | None]:
    """Cancel by message id; from any process, whether the session runs or not. Every job of an
    id that waits now is ended; one enqueued later may be sent.

    Args:
        outbox: The session's queues, on a connection of the caller's.
        ledger: The session's.
        install_key: `Sessions.install_key()`.

    Returns:
        What became of each: `cancelled` when it was in time, else the outcome that it has,
        `sending` while that is open. None when no such message waits or was ever sent.

    Raises:
        RedisError, StorageError: As their calls do; call it again.
    """
    jobs = outbox.find(message_ids)
    end(jobs, Status.CANCELLED, CANCELLED, outbox=outbox, ledger=ledger, install_key=install_key)
    rows = {id: ledger.find(id) for id in message_ids}
    return {id: None if row is None else outcome(row) for id, row in rows.items()}


def end(
    jobs: Sequence[Job],
    status: Status,
    error: str,
    *,
    outbox: Outbox,
    ledger: Ledger,
    install_key: bytes,
) -> list[Outcome]:
    """End waiting jobs with this word, in one commit; those in hand are left to their consumer.

    A message that the ledger knows as sent or unknown keeps that outcome, and a job that could
    never be sent fails for its own reason.

    Returns:
        What became of those that were ended.
    """
    now = time.time()
    claims = {
        job.id: _claim(job, install_key, now)
        for job in jobs
        if job.order is not None and not job.is_settled
    }
    words = [
        (claim, Settlement(claim.message_id, status, error=error, at=now))
        for claim in claims.values()
    ]
    rows = dict(zip(claims, ledger.record(words), strict=True)) if words else {}
    ended: list[Finished] = []
    told: dict[str, Outcome] = {}
    for job in jobs:
        row = rows.get(job.id)
        if job.id in told:  # a second entry of the same job; nobody is told twice
            ended.append(Finished(_as_settled(job, told[job.id]), told[job.id]))
        elif job.is_settled and job.outcome is not None:
            ended.append(Finished(job, job.outcome))
        elif (first := first_outcome(job, ledger)) is not None:  # it had ended before
            ended.append(first)
        elif row is None:
            problem = f"{type(job.problem).__name__}: {job.problem}"
            ended.append(Finished(job, Outcome(Status.FAILED, error=problem)))
        elif row.content_hash != claims[job.id].content_hash:  # its id was used for another
            ended.append(Finished(job, Outcome(status, error=error), is_duplicate=True))
        elif row.status != Status.SENDING:
            ended.append(Finished(job, outcome(row), row.attempt))
        told |= {item.job.id: item.outcome for item in ended[-1:]}
    outbox.withdraw(ended)
    return [item.outcome for item in ended]


def _as_settled(job: Job, outcome: Outcome) -> Job:
    """The job as it is once the first of its entries was ended."""
    return replace(job, status=JobStatus.FAILED, meta={"outcome": outcome.as_dict()})


def _claim(job: Job, install_key: bytes, now: float) -> Claim:
    assert job.order is not None, "chosen for it"
    return Claim(
        message_id=job.order.message_id,
        content_hash=job.order.content_hash,
        job_id=job.id,
        recipient_hash=number_hash(install_key, job.order.recipient.user),
        now=now,
        metadata=job.order.metadata_text,
    )
