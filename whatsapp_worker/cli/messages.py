"""`whatsapp-worker messages`: what the ledger knows."""

import contextlib
from collections.abc import Iterator
from typing import Any

from storage.ledger import Ledger, Row
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import columns, emit, moment, paint, printable
from whatsapp_worker.errors import CommandFailed, UsageError
from whatsapp_worker.event_names import Status
from whatsapp_worker.settings import Settings

_COLOURS = {
    Status.SENT: "green",
    Status.DELIVERED: "green",
    Status.READ: "green",
    Status.PLAYED: "green",
    Status.SENDING: "yellow",
    Status.UNKNOWN: "yellow",
}
_TIMES = ("claimed_at", "sent_at", "delivered_at", "read_at", "played_at", "settled_at")


def list_messages(options: Options, settings: Settings) -> int:
    """Serve `messages list SESSION`."""
    if options.status and options.status not in set(Status):
        raise UsageError(f"--status: one of {', '.join(Status)}, not {options.status}")
    with _ledger(Host(settings), options.session) as ledger:
        rows = ledger.recent(options.limit, status=options.status) if ledger else []
    if options.json:
        for row in rows:
            emit(facts(row))
        return 0
    shown = [
        [
            printable(row.message_id),
            paint(row.status, _COLOURS.get(Status(row.status), "red")),
            moment(row.claimed_at),
            printable(row.wa_message_id or "-"),
            printable(row.error or ""),
        ]
        for row in rows
    ]
    head = ["MESSAGE", "STATUS", "CLAIMED", "WHATSAPP ID", "ERROR"]
    print("\n".join(columns(shown, head=head)) if shown else "No message.")
    return 0


def show_message(options: Options, settings: Settings) -> int:
    """Serve `messages show SESSION MESSAGE_ID`."""
    with _ledger(Host(settings), options.session) as ledger:
        row = ledger.find(options.message) if ledger else None
    if row is None:
        raise CommandFailed(
            f"session {options.session} has claimed no message {options.message!r:.210}; one that"
            " still waits in its queue is not in the ledger"
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


def facts(row: Row) -> dict[str, Any]:
    """One message for programs; times are UTC seconds."""
    hidden = ("secret", "content_hash", "recipient_hash")
    return {name: value for name, value in row._asdict().items() if name not in hidden}


@contextlib.contextmanager
def _ledger(host: Host, session: str) -> Iterator[Ledger | None]:
    """The session's ledger; None while there is none, which is not made."""
    host.wanted(session)
    path = host.sessions.folder(session) / "ledger.db"
    url = host.settings.database_url
    if url is None and not path.exists():
        yield None
        return
    with contextlib.closing(
        Ledger.open(url or path, session, timeout_s=host.settings.db_timeout_s)
    ) as ledger:
        yield ledger
