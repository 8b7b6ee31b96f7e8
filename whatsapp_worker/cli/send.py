"""`whatsapp-worker send`: what a CRM does, from a terminal."""

import sys
import uuid
from typing import Any

import redis

from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import emit, paint
from whatsapp_worker.client import JobGone, Outbox
from whatsapp_worker.errors import CommandFailed, CommandTimeout, RedisUnavailable
from whatsapp_worker.event_names import Status
from whatsapp_worker.rq_job import Outcome
from whatsapp_worker.settings import Settings

_SENT = {Status.SENT, Status.DELIVERED, Status.READ, Status.PLAYED}


def send(options: Options, settings: Settings) -> int:
    """Serve `send SESSION TO TEXT`."""
    host = Host(settings)
    host.wanted(options.session)
    text = sys.stdin.read() if options.text == "-" else options.text
    message_id = options.id or f"cli-{uuid.uuid4()}"
    try:
        outbox = Outbox(host.redis())
        job = outbox.send_text(options.session, options.to, text, message_id=message_id)
        if not options.wait:
            _tell(options, message_id, Outcome(Status.QUEUED))
            return 0
        try:
            outcome = outbox.wait(job, timeout_s=options.timeout)
        except CommandTimeout:
            _tell(options, message_id, outbox.outcome(job))
            raise CommandTimeout(
                f"no outcome within {options.timeout:g} s; the message stays queued. See:"
                f" whatsapp-worker status {options.session}"
            ) from None
    except redis.RedisError as error:
        raise RedisUnavailable("Redis did not answer") from error
    except JobGone as error:
        raise CommandFailed("Redis has lost the job") from error
    _tell(options, message_id, outcome)
    return 0 if outcome.status in _SENT else CommandFailed.exit_code


def _tell(options: Options, message_id: str, outcome: Outcome) -> None:
    facts: dict[str, Any] = {
        "message_id": message_id,
        "status": outcome.status,
        "wa_message_id": outcome.wa_message_id,
        "error": outcome.error,
    }
    if options.json:
        emit(facts)
        return
    waits = outcome.status in (Status.QUEUED, Status.SENDING)
    colour = "green" if outcome.status in _SENT else "yellow" if waits else "red"
    why = f" ({outcome.error})" if outcome.error else ""
    print(f"{message_id}: {paint(outcome.status, colour)}{why}")
