"""`whatsapp-worker messages`: what the ledger knows, and an operator's word on a message."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from storage.ledger import Ledger, Row, Settlement
from whatsapp_worker import recovery
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import columns, emit, moment, paint, printable, talk
from whatsapp_worker.errors import CommandFailed, RedisUnavailable, UsageError
from whatsapp_worker.event_names import Status
from whatsapp_worker.rq_job import Outcome
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

if TYPE_CHECKING:
    from redis import Redis

_COLOURS = {
    Status.SENT: "green",
    Status.DELIVERED: "green",
    Status.READ: "green",
    Status.PLAYED: "green",
    Status.QUEUED: "yellow",
    Status.SENDING: "yellow",
    Status.UNKNOWN: "yellow",
}
_WAITING = "whatsapp-worker queue {} list"
_TIMES = ("claimed_at", "sent_at", "delivered_at", "read_at", "played_at", "settled_at")


def list_messages(options: Options, settings: Settings) -> int:
    """Serve `messages list SESSION`."""
    if options.status and options.status not in set(Status):
        raise UsageError(f"--status: one of {', '.join(Status)}, not {options.status}")
    with open_ledger(Host(settings), options.session) as ledger:
        rows = _recent(ledger, options) if ledger else []
    if options.status == Status.QUEUED:
        where = _WAITING.format(options.session)
        talk(f"One that was never tried is not in the ledger. All that waits: {where}")
    if options.json:
        for row in rows:
            emit(facts(row))
        return 0
    shown = [
        [
            printable(row.message_id),
            paint(_status(row), _COLOURS.get(_status(row), "red")),
            moment(row.claimed_at),
            printable(row.wa_message_id or "-"),
            printable(row.error or ""),
        ]
        for row in rows
    ]
    head = ["MESSAGE", "STATUS", "CLAIMED", "WHATSAPP ID", "ERROR"]
    print("\n".join(columns(shown, head=head)) if shown else "No message.")
    return 0


def _recent(ledger: Ledger, options: Options) -> list[Row]:
    """The newest messages, of one status where one is asked for."""
    if not options.status:
        return ledger.recent(options.limit)
    kept_as = Status.FAILED if options.status == Status.QUEUED else options.status
    rows = ledger.recent(options.limit, status=kept_as)
    return [row for row in rows if _status(row) == options.status]


def _status(row: Row) -> Status:
    """What became of a message: an attempt that failed is not its end where it is sent again."""
    return Status.QUEUED if recovery.is_released(row) else Status(row.status)


def show_message(options: Options, settings: Settings) -> int:
    """Serve `messages show SESSION MESSAGE_ID`."""
    with open_ledger(Host(settings), options.session) as ledger:
        row = ledger.find(options.message) if ledger else None
    if row is None:
        raise CommandFailed(
            f"session {options.session} has claimed no message {options.message!r:.210}; one that"
            f" still waits in its queue is not in the ledger: {_WAITING.format(options.session)}"
        )
    found = facts(row)
    if options.json:
        emit(found)
        return 0
    shown = [
        (name.replace("_", " "), moment(value) if name in _TIMES else printable(value))
        for name, value in found.items()
        if value is not None
    ]
    print("\n".join(columns(shown)))
    return 0


def cancel_message(options: Options, settings: Settings) -> int:
    """Serve `messages cancel SESSION MESSAGE_ID`; 1 when it was too late."""
    from whatsapp_worker import cancelling
    from whatsapp_worker.outbox import Outbox

    host = Host(settings)
    with open_ledger(host, options.session, make=True) as ledger, _stream(host) as (redis, stream):
        assert ledger is not None
        outbox = Outbox(redis, options.session, stream=stream, result_ttl_s=settings.result_ttl_s)
        key = host.sessions.install_key()
        found = cancelling.cancel({options.message}, outbox=outbox, ledger=ledger, install_key=key)
    outcome = found[options.message]
    if outcome is None:
        raise CommandFailed(f"session {options.session} has no message {options.message!r:.210}")
    _tell(options, outcome)
    return 0 if outcome.status == Status.CANCELLED else CommandFailed.exit_code


def resolve_message(options: Options, settings: Settings) -> int:
    """Serve `messages resolve SESSION MESSAGE_ID sent|failed`: an operator looked at the phone."""
    from whatsapp_worker import outbox

    host = Host(settings)
    status, now = Status(options.status), time.time()
    with open_ledger(host, options.session) as ledger, _stream(host) as (redis, stream):
        row = ledger.find(options.message) if ledger else None
        # Repeated after a Redis that was away, it tells what it could not tell then.
        if ledger is None or row is None or row.status not in (Status.UNKNOWN, status):
            raise CommandFailed(
                f"message {options.message!r:.210} is {row.status if row else 'not known'}:"
                " only one that is unknown can be resolved"
            )
        error = "an operator found that it was not sent" if status == Status.FAILED else None
        row = ledger.resolve(Settlement(options.message, status, error=error, at=now)) or row
        item = recovery.finished(row)
        outbox.amend(redis, options.session, item, stream=stream)
    _tell(options, item.outcome)
    return 0


def _tell(options: Options, outcome: Outcome) -> None:
    if options.json:
        emit({"message_id": options.message, **outcome.as_dict()})
        return
    why = f" ({printable(outcome.error)})" if outcome.error else ""
    print(f"{options.message}: {paint(outcome.status, _COLOURS.get(outcome.status, 'red'))}{why}")


@contextlib.contextmanager
def _stream(host: Host) -> Iterator[tuple["Redis", EventStream]]:
    """Redis and the stream on it.

    Raises:
        RedisUnavailable: It does not answer (transient).
    """
    import redis

    try:
        with contextlib.closing(host.redis()) as client:
            yield client, EventStream(client, events_max=host.settings.events_max)
    except redis.RedisError as error:
        raise RedisUnavailable("Redis did not answer; call it again") from error


def facts(row: Row) -> dict[str, Any]:
    """One message for programs; times are UTC seconds."""
    hidden = ("secret", "content_hash", "recipient_hash")
    found = {name: value for name, value in row._asdict().items() if name not in hidden}
    found["status"] = _status(row).value
    return {**found, "metadata": json.loads(row.metadata) if row.metadata else None}


@contextlib.contextmanager
def open_ledger(host: Host, session: str, *, make: bool = False) -> Iterator[Ledger | None]:
    """The session's ledger; None while there is none, unless it is to be made."""
    host.wanted(session)
    path = host.sessions.folder(session) / "ledger.db"
    url = host.settings.database_url
    if url is None and not make and not path.exists():
        yield None
        return
    with contextlib.closing(
        Ledger.open(url or path, session, timeout_s=host.settings.db_timeout_s)
    ) as ledger:
        yield ledger
