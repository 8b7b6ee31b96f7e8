"""Receipts and inbound messages on their way from neonize's event thread to `wa:events`."""

from whatsapp_worker.facts import Inbound, Receipt
from whatsapp_worker.stream import EventStream


class FactWriter:
    """A bounded thread that tells the stream what the client heard. Redis down never blocks
    the caller; 10,000 facts wait for it, later ones are dropped with an ERROR line."""

    def __init__(self, session: str, stream: EventStream) -> None:
        """Starts nothing. `stream` needs a connection of its own."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the (daemon) thread."""
        raise NotImplementedError

    def offer(self, fact: Receipt | Inbound) -> None:
        """Hand over a fact; returns at once. From any thread."""
        raise NotImplementedError

    def sent(self, wa_message_id: str, message_id: str) -> None:
        """Remember which message of the CRM a WhatsApp id belongs to; from any thread."""
        raise NotImplementedError

    def close(self, *, timeout_s: float = 1.0) -> None:
        """Write what waits, at most for `timeout_s`, and end the thread."""
        raise NotImplementedError
