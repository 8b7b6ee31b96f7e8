"""What the fork helper does once, so that no child has to: the pages stay shared.

A child that compiles a statement or builds a protobuf class owns a copy of every page that it
touched; measured, that is 6 MB of 33 for each session.
"""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from storage.ledger import Claim, Ledger, Settlement
from whatsapp_worker import message, redis_client
from whatsapp_worker.keys import number_hash


def warm_up() -> None:
    """Go through the motions of one message, in a folder that is gone afterwards. Leaves no
    thread, no connection and no descriptor behind."""
    with tempfile.TemporaryDirectory(prefix="whatsapp-worker-") as folder:
        _rehearse(Path(folder))


def _rehearse(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "device.db")) as database:
        database.execute("CREATE TABLE rehearsal (key BLOB)")
        database.execute("SELECT key FROM rehearsal WHERE key IN (?)", [b""]).fetchall()
    ledger = Ledger.open(folder / "ledger.db", "rehearsal")
    try:
        for number in range(2):
            _rehearse_message(ledger, str(number))
    finally:
        ledger.close()
    number_hash(bytes(32), "5511999990001")
    for url in ("redis://127.0.0.1:1/0", "unix:///nowhere"):
        with redis_client.connect(url) as redis:
            redis.connection_pool.make_connection()  # not connected yet


def _rehearse_message(ledger: Ledger, message_id: str) -> None:
    content = {"type": "text", "text": {"body": "rehearsal"}}
    order = message.validate(
        {
            "session": "rehearsal",
            "to": "+5511999990001",
            "message_id": message_id,
            "message": content,
        }
    )
    claim = Claim(order.message_id, order.content_hash, "job", "recipient", now=1.0)
    ledger.sending()
    ledger.find(message_id)
    ledger.claim(claim, secret=lambda attempt: bytes(32))
    ledger.settle(Settlement(message_id, "sent", wa_message_id=f"wa{message_id}", at=1.0))
    ledger.find_by_wa_id(f"wa{message_id}")
    ledger.attempts(message_id)
