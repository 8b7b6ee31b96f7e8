"""One neonize client: the only file that imports neonize.

neonize is imported by `Device.load`, never at import of this file: the fork helper imports this
file, and a process forked from one that has loaded neonize has no Go runtime.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatsapp_worker.errors import SendError
from whatsapp_worker.facts import Fact
from whatsapp_worker.settings import Network


class SendFailed(SendError):
    """`send_message` raised; the text is neonize's, `send_errors.py` says what it means."""


@dataclass(frozen=True, slots=True)
class SendAck:
    """WhatsApp's server accepted a message. `wa_id` is the digits (or JID) that it resolved;
    `at` is WhatsApp's UTC time in seconds."""

    wa_message_id: str
    wa_id: str
    at: float


class Device:
    """A WhatsApp client over one database file; one per process, never collected."""

    def __init__(
        self,
        database: Path,
        *,
        session: str,
        network: Network,
        on_fact: Callable[[Fact], None],
        jid: str | None = None,
    ) -> None:
        """Prepare; nothing is loaded or opened.

        Args:
            database: neonize's SQLite file.
            session: Session id, for log lines.
            network: `sandbox` loads the sandbox's guards before any client exists.
            on_fact: Called on neonize's event thread with every fact; must return at once.
            jid: Whose credentials to resume; None pairs a new device.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Import neonize and build the client. Raises SandboxUnsafe before anything can dial."""
        raise NotImplementedError

    def connect_in_thread(self) -> None:
        """Dial and log in on a thread of its own; facts tell the rest."""
        raise NotImplementedError

    def is_connected(self) -> bool:
        """Whether the socket is up; safe at any time, true for a deaf connection too."""
        raise NotImplementedError

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> SendAck:
        """Send one message and wait for the server's acknowledgement (blocks up to 75 s).

        Args:
            recipient: A JID (`5511999990001@s.whatsapp.net`, `...@lid`, `...@g.us`).
            content: A validated Cloud API message object (`type` and its object).
            secret: 32 bytes for messageContextInfo.messageSecret.

        Raises:
            SendFailed: neonize's text, for `send_errors.py`.
        """
        raise NotImplementedError

    def pair_phone(self, phone: str) -> str:
        """Ask for a pairing code (ABCD-EFGH) for this phone's digits; after the first QrCode."""
        raise NotImplementedError

    def logout(self) -> None:
        """Tell WhatsApp to forget this device and delete the credentials. Blocks.

        Raises:
            SendFailed: WhatsApp did not confirm it.
        """
        raise NotImplementedError
