"""The nouns of the sandbox network."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from whatsapp_worker.sandbox.binary import Jid, Node, phone_jid
from whatsapp_worker.sandbox.contacts import DeviceAddress, Received

MAX_ROWS = 20_000
MAX_IN_FLIGHT = 20_000  # stanzas that a connected device has not acknowledged

Later = Callable[[float, Callable[[], None]], object]
T = TypeVar("T")


class UnknownTarget(Exception):
    """A control request names a device, contact or message that is not there."""


def unix_time() -> str:
    """Now, as stanzas carry it: whole seconds."""
    return str(int(time.time()))


class Session(Protocol):
    """What the network does with one connection after the handshake."""

    def handle(self, node: Node) -> None:
        """Take a stanza that the client sent."""

    def lost(self) -> None:
        """The connection is gone."""


class Link(Protocol):
    """An established connection to one client, as the network sees it."""

    attempt: Attempt

    def send(self, node: Node) -> None:
        """Send a stanza; nothing happens when the connection is gone."""

    def close(self, why: str) -> None:
        """End it as a server does on purpose."""

    def reset(self, why: str) -> None:
        """End it as a broken network does: TCP reset."""

    def stall(self, on: bool) -> None:
        """Begin or end silence; what is held back is exchanged when it ends."""


class PreKey(NamedTuple):
    """A one-time prekey that a device uploaded: its id and public half (32 bytes)."""

    id: int
    key: bytes


@dataclass
class Device:
    """One linked device of an account; keys are public halves of 32 bytes."""

    phone: str
    number: int
    noise_key: bytes
    identity: bytes
    registration_id: int
    signed_id: int
    signed_key: bytes
    signature: bytes
    logins: int = 0
    link: Link | None = None
    connected_at: float | None = None
    in_flight: dict[tuple[str, str, str, str], Node] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What names a device: phone digits and device number."""
        return self.phone, self.number

    @property
    def jid(self) -> Jid:
        """Its address by phone number."""
        return phone_jid(self.phone, self.number)

    @property
    def address(self) -> DeviceAddress:
        """Its name in Signal sessions."""
        return DeviceAddress(self.phone, self.number)


@dataclass
class Attempt:
    """One connection that a client opened, and how it ended.

    Attributes:
        reached: accepted, proxied, encrypted, handshaken, pairing or connected.
        ended: None while it is open.
    """

    seq: int
    at: float = field(default_factory=time.time)
    monotonic: float = field(default_factory=time.monotonic)
    phone: str | None = None
    reached: str = "accepted"
    ended: str | None = None
    ended_at: float | None = None

    def end(self, why: str) -> None:
        """Note the end; the first word stays."""
        if self.ended is None:
            self.ended, self.ended_at = why, time.time()


@dataclass
class Row:
    """One message that a client handed over, under one id.

    Attributes:
        times: How many times it was handed over under this id.
        acked: Whether an acknowledgement without an error was sent.
        refused: Error code, when it was answered with one and not taken.
        received: What the contact decrypted; None when refused or not for a contact.
        bot: Whether the client marked it as a bot's.
    """

    seq: int
    sender: Device
    to: str
    to_lid: Jid
    id: str
    at: float
    times: int = 1
    acked: bool = False
    refused: int | None = None
    undecryptable: str | None = None
    bot: bool = False
    received: Received | None = None
    receipts: list[str] = field(default_factory=list)

    def facts(self, *, decode: bool) -> dict[str, Any]:
        """For the control API."""
        received = self.received
        return {
            "seq": self.seq,
            "from": self.sender.phone,
            "from_device": self.sender.number,
            "to": self.to,
            "id": self.id,
            "type": received.type if received else None,
            "text": received.text if received else None,
            "message": received.message if received and decode else None,
            "at": self.at,
            "times": self.times,
            "acked": self.acked,
            "refused": self.refused,
            "undecryptable": self.undecryptable,
            "bot": self.bot,
            "receipts": list(self.receipts),
        }


class Rows(Generic[T]):
    """The last so many of something, and how many older ones were dropped."""

    def __init__(self, limit: int = MAX_ROWS) -> None:
        self._rows: deque[T] = deque(maxlen=limit)
        self.dropped = 0
        self._last_seq = 0

    def next_seq(self) -> int:
        """The number of the next row; it goes on rising after `clear`."""
        self._last_seq += 1
        return self._last_seq

    def add(self, row: T) -> T | None:
        """Append; returns the row that had to go."""
        oldest = None
        if len(self._rows) == self._rows.maxlen:
            oldest = self._rows[0]
            self.dropped += 1
        self._rows.append(row)
        return oldest

    def clear(self) -> None:
        """Forget them all."""
        self._rows.clear()
        self.dropped = 0

    def __iter__(self) -> Iterator[T]:
        return iter(self._rows)
