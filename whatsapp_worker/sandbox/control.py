"""The control API's client: what a test or a user can make a running sandbox do.

Synchronous, without dependencies, safe to use from several threads. Phone numbers are digits with
or without `+`. Without `phone` a fault concerns everybody.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from whatsapp_worker.sandbox.endpoints import ENDPOINTS_FILE, read_endpoints

TIMEOUT_S = 30.0

Receipts = Literal["none", "delivered", "read", "played"]
SendHow = Literal["refuse", "no_ack", "drop_after", "drop_before", "slow"]

T = TypeVar("T")


class ControlError(Exception):
    """The sandbox refused a request, or does not answer. `status` is None when it did not."""

    def __init__(self, status: int | None, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Rows(list[T], Generic[T]):
    """A list, and how many older rows the sandbox had to drop (it keeps the last 20,000)."""

    def __init__(self, rows: Iterable[T], dropped: int) -> None:
        super().__init__(rows)
        self.dropped = dropped


class Scanned(TypedDict):
    """The device that a scan linked; `outcome` is `paired`, `refused: ...`, `connection lost`
    or `no answer`."""

    phone: str
    jid: str
    lid: str
    outcome: str


class LinkedDevice(TypedDict):
    """One linked device; `waiting` counts stanzas that it has not got yet."""

    jid: str
    lid: str
    phone: str
    device: int
    online: bool
    logins: int
    connected_since: float | None
    prekeys: int
    waiting: int


class Attempt(TypedDict):
    """One connection that a client opened.

    `reached` is accepted, proxied, encrypted, handshaken, pairing or connected; `ended` is None
    while it is open. Times are seconds; `monotonic` is the clock of this machine.
    """

    seq: int
    at: float
    monotonic: float
    phone: str | None
    reached: str
    ended: str | None
    ended_at: float | None


# A message: `times` counts how often a client handed it over under this id, `acked` says whether
# the sandbox acknowledged it, `refused` is the error code when it was not taken,
# `bot` whether the client marked it as a bot's.
Message = TypedDict(
    "Message",
    {
        "seq": int,
        "from": str,
        "from_device": int,
        "to": str,
        "id": str,
        "type": str | None,
        "text": str | None,
        "message": dict[str, Any] | None,
        "at": float,
        "times": int,
        "acked": bool,
        "refused": int | None,
        "undecryptable": str | None,
        "bot": bool,
        "receipts": list[str],
    },
)

# A receipt that a client sent for messages of a contact or of another device; `author` wrote them,
# where `to` is a group.
ClientReceipt = TypedDict(
    "ClientReceipt",
    {
        "seq": int,
        "from": str,
        "to": str,
        "author": str | None,
        "ids": list[str],
        "type": str,
        "at": float,
    },
)

# What a client shows in a chat; `state` is `composing` or `paused`.
ChatState = TypedDict("ChatState", {"seq": int, "from": str, "to": str, "state": str, "at": float})

# A client's question whether a number is a contact; `phone` as it was dialled.
Lookup = TypedDict("Lookup", {"seq": int, "from": str, "phone": str, "at": float})


class Control:
    """A running sandbox.

    Every method raises ControlError when the sandbox refuses or does not answer.

    Args:
        control_url: As in `sandbox.json`, such as `http://127.0.0.1:4321`.
        api_key: As in `sandbox.json`.
    """

    def __init__(self, control_url: str, api_key: str) -> None:
        parts = urlsplit(control_url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 80
        self._api_key = api_key

    @classmethod
    def from_state_dir(cls, state_dir: Path) -> Control:
        """The sandbox that runs, or last ran, on that state folder.

        Raises:
            FileNotFoundError: None ever did.
        """
        endpoints = read_endpoints(state_dir)
        if endpoints is None:
            raise FileNotFoundError(f"{state_dir / ENDPOINTS_FILE}: no sandbox ran there yet")
        return cls(endpoints.control_url, endpoints.api_key)

    def health(self) -> None:
        """Return when the sandbox answers; needs no key."""
        self._call("GET", "/health")

    # Linking

    def scan(
        self, code: str, phone: str | None = None, *, hmac: Literal["right", "wrong"] = "right"
    ) -> Scanned:
        """A phone scans a QR code; waits up to 20 s for what the client makes of it.

        Args:
            code: Exactly as neonize gives it.
            phone: Its number; None takes a fresh one.
            hmac: `wrong` signs the new credentials with a wrong secret.
        """
        scanned: Scanned = self._call("POST", "/scan", code=code, phone=phone, hmac=hmac)
        return scanned

    def enter_code(self, code: str, phone: str) -> Scanned:
        """A phone's owner types the pairing code that a client shows for that phone."""
        scanned: Scanned = self._call("POST", "/enter-code", code=code, phone=phone)
        return scanned

    def expire_qr(self, *, codes: int | None = None, close: bool = True) -> int:
        """Make all codes that are being shown void; returns how many clients were waiting.

        Args:
            codes: How many codes clients get from now on, 1 to 6; a client with less than six
                shows each for 20 s.
            close: Close the waiting connections, as WhatsApp does after the last code.
        """
        return int(self._call("POST", "/expire-qr", codes=codes, close=close)["expired"])

    def logout_device(self, phone: str) -> int:
        """The phone removes its linked devices; their credentials are dead. Returns how many."""
        return int(self._call("POST", "/logout-device", phone=phone)["removed"])

    def devices(self, phone: str | None = None) -> Rows[LinkedDevice]:
        """The linked devices."""
        return self._rows("/devices", phone=phone)

    # Connections

    def connections(self, phone: str | None = None, *, since: int = 0) -> Rows[Attempt]:
        """Every connection that clients opened, oldest first, after that `seq`."""
        return self._rows("/connections", phone=phone, since=since)

    def drop(self, phone: str | None = None, how: Literal["reset", "close"] = "reset") -> int:
        """End connections by TCP reset or clean close; returns how many."""
        return int(self._call("POST", "/drop", phone=phone, how=how)["dropped"])

    def refuse(
        self, phone: str | None = None, *, seconds: float | None = None, count: int | None = None
    ) -> None:
        """Reset new connections, for so long or so often, else until `remove_fault`.

        For everybody: at once. For one phone: after the handshake, when its number is known.
        """
        self._call("POST", "/refuse", phone=phone, seconds=seconds, count=count)

    def stall(self, phone: str | None = None, *, seconds: float | None = None) -> None:
        """Be silent with the socket open, also to new connections, until `unstall`."""
        self._call("POST", "/stall", phone=phone, seconds=seconds)

    def unstall(self, phone: str | None = None) -> None:
        """End silence; what was held back is exchanged."""
        self._call("POST", "/unstall", phone=phone)

    def stream_error(
        self,
        phone: str,
        code: str | None = None,
        *,
        conflict: Literal["replaced", "device_removed"] | None = None,
    ) -> None:
        """End a phone's connections with a stream error such as 515 or 503."""
        self._call("POST", "/stream-error", phone=phone, code=code, conflict=conflict)

    def connect_failure(
        self,
        reason: int,
        phone: str | None = None,
        *,
        expire: int | None = None,
        count: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Answer the next login, or so many, or those of so many seconds, with a failure.

        Args:
            reason: 401, 402, 403, 405, 406, 409, 413, 500, 503 ...
            expire: With 402: seconds that the ban still lasts.
        """
        fields = {"reason": reason, "expire": expire, "count": count, "seconds": seconds}
        self._call("POST", "/connect-failure", phone=phone, **fields)

    # Messages

    def send_fault(
        self,
        how: SendHow,
        phone: str | None = None,
        *,
        to: str | None = None,
        code: int | None = None,
        delay_s: float | None = None,
        count: int | None = None,
        seconds: float | None = None,
        after: int | None = None,
    ) -> None:
        """Treat messages badly: the next one, or so many, or those of so many seconds.

        Args:
            how: `refuse` (with error `code`, not taken), `no_ack` (taken), `drop_after` (taken,
                then the connection is reset), `drop_before` (not taken, reset), `slow` (taken,
                acknowledged after `delay_s`).
            phone: The sender.
            after: So many messages that match pass first.
        """
        fields = {"code": code, "delay_s": delay_s, "count": count, "seconds": seconds}
        self._call("POST", "/send-fault", how=how, phone=phone, to=to, after=after, **fields)

    def query_fault(
        self,
        phone: str | None = None,
        *,
        code: int | None = None,
        count: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Refuse a client's next question that comes before a message (about a number, or where a
        file is uploaded to), or so many, or those of so many seconds.

        Args:
            phone: Who asks.
            code: 429 without it.
        """
        self._call("POST", "/query-fault", phone=phone, code=code, count=count, seconds=seconds)

    def remove_fault(self) -> None:
        """Remove every fault: refusals, stalls, failures, send and query faults, short QR lists."""
        self._call("POST", "/remove-fault")

    def unknown_number(self, phone: str) -> None:
        """That number is not on WhatsApp from now on."""
        self._call("POST", "/unknown-number", phone=phone)

    def known_number(self, phone: str) -> None:
        """Undo `unknown_number`."""
        self._call("DELETE", "/unknown-number", phone=phone)

    def number_alias(self, dialled: str, phone: str) -> None:
        """WhatsApp knows a number by another than is dialled, as with Brazil's ninth digit.

        Who asks whether the contact exists is told the other number; a message to the number as
        it is dialled finds nobody.
        """
        self._call("POST", "/number-alias", dialled=dialled, phone=phone)

    def contacts(
        self, phone: str, *, receipts: Receipts = "delivered", receipt_delay_s: float = 0.0
    ) -> None:
        """How a simulated contact answers; the delay lies before each of its receipts."""
        self._call(
            "POST", "/contacts", phone=phone, receipts=receipts, receipt_delay_s=receipt_delay_s
        )

    def group(self, subject: str, members: list[str]) -> str:
        """Make a group of contacts and devices, by phone number; returns its JID.

        `to` of a message in it is that JID; `text` is what its members decrypted.
        """
        return str(self._call("POST", "/groups", subject=subject, members=members)["jid"])

    def inbound(self, *, sender: str, to: str, text: str) -> str:
        """A contact writes to all devices of a number; returns the WhatsApp message id."""
        return str(self._call("POST", "/inbound", **{"from": sender, "to": to, "text": text})["id"])

    def messages(
        self,
        *,
        sender: str | None = None,
        to: str | None = None,
        id: str | None = None,
        since: int = 0,
        refused: bool = False,
        decode: bool = True,
    ) -> Rows[Message]:
        """What arrived, in order, each id once.

        Args:
            since: Only rows after that `seq`.
            refused: Also those that were refused, and so did not arrive.
            decode: With the whole message as JSON in `message`.
        """
        fields = {"to": to, "id": id, "since": since, "refused": refused, "decode": decode}
        return self._rows("/messages", **{"from": sender}, **fields)

    def media(self, message_id: str) -> bytes:
        """The decrypted file that a message points at."""
        return self._request("GET", f"/media/{quote(message_id, safe='')}", None)

    def receipts(self, wa_message_id: str, type: Receipts = "delivered") -> None:
        """The contact that a message went to sends a receipt now."""
        self._call("POST", "/receipts", wa_message_id=wa_message_id, type=type)

    def client_receipts(self, *, since: int = 0) -> Rows[ClientReceipt]:
        """Receipts that clients sent."""
        return self._rows("/receipts", since=since)

    def chat_states(self, *, since: int = 0) -> Rows[ChatState]:
        """Typing indicators that contacts were shown."""
        return self._rows("/chat-states", since=since)

    def lookups(self, *, since: int = 0) -> Rows[Lookup]:
        """Numbers about which clients asked whether they are on WhatsApp."""
        return self._rows("/lookups", since=since)

    def reset(self) -> None:
        """Remove faults and manners, empty the lists; linked devices stay."""
        self._call("POST", "/reset")

    def _rows(self, path: str, **fields: Any) -> Rows[Any]:
        answer = self._call("GET", path, **fields)
        return Rows(answer["rows"], answer["dropped"])

    def _call(self, method: str, path: str, **fields: Any) -> Any:
        given = {name: value for name, value in fields.items() if value is not None}
        if method != "GET":
            return json.loads(self._request(method, path, json.dumps(given).encode()))
        query = {n: json.dumps(v) if isinstance(v, bool) else v for n, v in given.items()}
        return json.loads(self._request("GET", f"{path}?{urlencode(query)}", None))

    def _request(self, method: str, target: str, body: bytes | None) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, target, body, {"X-Api-Key": self._api_key})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ControlError(None, f"the sandbox does not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ControlError(response.status, _sentence(content))
        return content


def _sentence(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:200]
