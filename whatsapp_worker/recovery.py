"""What an earlier process left behind is settled, before its successor connects, or by the queue
keeper where none will follow soon.

A row of the ledger that is `sending` was claimed and not settled. The outcome that its job's meta
holds is the stronger word; else the device database tells whether it was ever handed over.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from storage.errors import LockHeld
from storage.ledger import Ledger, Row, Settlement, honest
from storage.sessions import Sessions
from whatsapp_worker import device_store
from whatsapp_worker.device_store import DeviceStoreBroken, DeviceStoreUnavailable
from whatsapp_worker.event_names import Status
from whatsapp_worker.keys import number_hash
from whatsapp_worker.outbox import Finished, Outbox
from whatsapp_worker.rq_job import NOT_HANDED_OVER, RELEASED, RESTING, Job, Outcome, TextWiped

log = logging.getLogger(__name__)

HandedOver = Callable[[Iterable[bytes]], Mapping[bytes, str]]

MAX_RELEASES = 10  # a message that ends its process before it is handed over, again and again
MAX_RESENDS = 2  # of a message that says on_unknown="resend"

HANDED_OVER = "it was handed over, and WhatsApp's answer never came; a receipt settles it"
TOO_LATE = "its time was over before it could be sent"
UNLINKED = "the device was unlinked before WhatsApp's answer came; nobody knows whether it was sent"


def witness(sessions: Sessions, session: str, jid: str | None) -> HandedOver:
    """Who tells what the session's last process handed over.

    Args:
        jid: Of the credentials that there are now; None where there are none. What others handed
            over went with theirs, so that nothing found means nothing.

    Raises:
        DocumentError: The session's `queue.json` cannot be used.
    """
    sent_last = sessions.hold(session).device()
    if jid is None or sent_last not in (None, device_key(sessions, jid)):
        return _nobody_can_tell
    return functools.partial(device_store.handed_over, sessions.folder(session) / "device.db")


def device_key(sessions: Sessions, jid: str) -> str:
    """What is kept of whose credentials claim messages."""
    return number_hash(sessions.install_key(), jid)


def _nobody_can_tell(secrets: Iterable[bytes]) -> Mapping[bytes, str]:
    return dict.fromkeys(secrets, "")


def settle_abandoned(sessions: Sessions, *, ledger: Ledger, outbox: Outbox) -> None:
    """Recover for a session that no process runs. Nothing is done where one does, or where the
    device database cannot be read now.

    Raises:
        RedisError, StorageError: As their calls do; call it again.
    """
    lock = sessions.session_lock(outbox.session)
    try:
        lock.acquire(0.0)
    except LockHeld:
        return
    with lock:
        try:
            who = device_store.identity(sessions.folder(outbox.session) / "device.db")
            handed_over = witness(sessions, outbox.session, who.jid if who else None)
            recover(ledger=ledger, outbox=outbox, handed_over=handed_over)
        except DeviceStoreUnavailable:
            return
        except DeviceStoreBroken:  # damaged: nobody will ever know
            recover(ledger=ledger, outbox=outbox, handed_over=_nobody_can_tell)


def recover(*, ledger: Ledger, outbox: Outbox, handed_over: HandedOver) -> None:
    """Settle every row and job. Every step can be repeated: a process killed here leaves the
    rest to the next.

    Raises:
        RedisError, StorageError: As their calls do; call it again.
    """
    rows = ledger.sending()
    jobs = [_named(job, rows) for job in outbox.limbo()]
    found = handed_over([row.secret for row in rows if row.secret])
    released = []
    for row in rows:
        settlement = _judge(row, jobs, found, ledger)
        if settlement is None and not outbox.job_exists(row.job_id):
            error = "its job is gone"
            settlement = Settlement(row.message_id, Status.FAILED, error=error, at=time.time())
        if settlement is None:
            released.append(row)
        else:
            ledger.settle(honest(settlement, ledger.doubtful(row.message_id)))
    settled = list(_settled_among(jobs, ledger))
    outbox.exchange(settled, pop=False)
    outbox.resync()
    _look_again(settled, ledger, outbox)
    # Only now: a row that is `failed` while its job is in limbo would count as its outcome.
    for row in released:
        at = time.time()
        ledger.settle(Settlement(row.message_id, Status.FAILED, error=NOT_HANDED_OVER, at=at))
    if rows or jobs:
        counts = {"rows": len(rows), "released": len(released), "jobs": len(jobs)}
        log.info("consumer.recovered", extra={"session": outbox.session, **counts})


def _named(job: Job, rows: Iterable[Row]) -> Job:
    """A job whose record is gone tells the message of its row."""
    row = next((row for row in rows if row.job_id == job.id and not job.exists), None)
    if row is None:
        return job
    return replace(job, message_id=row.message_id, metadata=_metadata(row))


def _look_again(settled: Iterable[Finished], ledger: Ledger, outbox: Outbox) -> None:
    """A receipt may have settled an unknown message before its job said that it is unknown; then
    who read the receipt found nothing to correct."""
    for job, told, *_ in settled:
        row = ledger.find(job.message_id or "") if told.status == Status.UNKNOWN else None
        if row is not None and row.status != Status.UNKNOWN:
            outbox.amend(finished(row))


def _judge(
    row: Row, jobs: Iterable[Job], found: Mapping[bytes, str], ledger: Ledger
) -> Settlement | None:
    """What became of a row that was left `sending`; None when it was never handed over."""
    for job in jobs:
        noted = job.outcome
        if job.id == row.job_id and noted and noted.claimed_at == row.claimed_at:
            return settlement(row.message_id, noted)
    now = time.time()
    wa_message_id = found.get(row.secret) if row.secret else None
    if wa_message_id is not None:
        return Settlement(
            row.message_id,
            Status.UNKNOWN,
            wa_message_id=wa_message_id or None,
            error=HANDED_OVER if wa_message_id else UNLINKED,
            at=now,
        )
    former = ledger.attempts(row.message_id)
    if sum(attempt.error == NOT_HANDED_OVER for attempt in former) < MAX_RELEASES:
        return None
    error = f"its process ended {MAX_RELEASES + 1} times before it was handed over"
    return Settlement(row.message_id, Status.FAILED, error=error, at=now)


def _settled_among(jobs: Iterable[Job], ledger: Ledger) -> Iterable[Finished]:
    """Those of the jobs left in limbo whose outcome the ledger knows."""
    for job in jobs:
        row = ledger.find(job.message_id) if job.message_id else None
        if row is None or row.job_id != job.id or row.status == Status.SENDING:
            continue
        if not is_released(row) and not may_resend(job, row, ledger):
            yield Finished(job, outcome(row), row.attempt)


def is_released(row: Row) -> bool:
    """Whether a failed row stands for an attempt only: its job waits, and it is sent again."""
    return row.status == Status.FAILED and row.error in RELEASED


def first_outcome(job: Job, ledger: Ledger) -> Finished | None:
    """How a job ended whose text was wiped then, and that somebody queued again, or cancelled."""
    if not isinstance(job.problem, TextWiped):
        return None
    row = ledger.find(job.message_id) if job.message_id else None
    if row is None or row.content_hash != job.content_hash or row.status == Status.SENDING:
        return None
    return Finished(job, outcome(row), row.attempt)


def may_resend(job: Job, row: Row | None, ledger: Ledger) -> bool:
    """Whether the message's outcome is unknown and its CRM wants it sent again all the same."""
    if row is None or row.status != Status.UNKNOWN:
        return False
    if job.order is None or job.order.on_unknown != "resend":
        return False
    former = ledger.attempts(row.message_id)
    return sum(attempt.status == Status.UNKNOWN for attempt in former) < MAX_RESENDS


def may_rest(message_id: str, ledger: Ledger) -> bool:
    """Whether a message that was refused for the moment may wait for the breaker once more."""
    former = ledger.attempts(message_id)
    return sum(attempt.error == RESTING for attempt in former) < MAX_RELEASES


def resting(refused: Settlement) -> Settlement:
    """Of a message that was refused for the moment and waits at the head to be sent again."""
    error = refused.error if refused.error in RELEASED else RESTING
    return Settlement(refused.message_id, Status.FAILED, error=error, at=refused.at)


def settlement(message_id: str, outcome: Outcome) -> Settlement:
    """An outcome as the ledger takes it."""
    return Settlement(
        message_id,
        outcome.status,
        wa_message_id=outcome.wa_message_id,
        wa_id=outcome.wa_id,
        error=outcome.error,
        at=outcome.sent_at or time.time(),
    )


def finished(row: Row) -> Finished:
    """What the ledger knows, for `outbox.amend`, which looks for the job itself."""
    id, message_id, metadata = row.job_id, row.message_id, _metadata(row)
    job = Job(id, id.encode(), message_id=message_id, metadata=metadata, exists=False)
    return Finished(job, outcome(row), row.attempt)


def _metadata(row: Row) -> Mapping[str, Any]:
    return json.loads(row.metadata) if row.metadata else {}


def outcome(row: Row) -> Outcome:
    """What the ledger knows, as a CRM is told."""
    return Outcome(
        Status(row.status),
        wa_message_id=row.wa_message_id,
        wa_id=row.wa_id,
        error=row.error,
        claimed_at=row.claimed_at,
        sent_at=row.sent_at,
    )
