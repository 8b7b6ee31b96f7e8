"""What a WhatsApp client tells about itself: plain data that knows nothing of neonize.

`device.py` makes one of these of every event that neonize hands over; `endings.py` judges those
that end a connection. Times are UTC seconds since 1970; JIDs are strings as WhatsApp writes them.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Fact:
    """Root of all facts."""


@dataclass(frozen=True, slots=True)
class Identity(Fact):
    """Who the client is: told once per process, before any other event of a login."""

    jid: str  # with the device number: 5511999990001:3@s.whatsapp.net
    lid: str
    push_name: str
    platform: str

    @property
    def phone(self) -> str:
        """The digits of the phone number."""
        return self.jid.partition("@")[0].partition(":")[0].partition(".")[0]


@dataclass(frozen=True, slots=True)
class Connected(Fact):
    """Logged in; also told again after a reconnect that whatsmeow made by itself."""


@dataclass(frozen=True, slots=True)
class Disconnected(Fact):
    """The connection is lost; whatsmeow starts dialling again by itself."""


@dataclass(frozen=True, slots=True)
class NotConnected(Fact):
    """The socket has been down for longer than a reconnect takes, and no event said so."""


@dataclass(frozen=True, slots=True)
class Silent(Fact):
    """The socket is up, and nothing came through it for `age_s` seconds."""

    age_s: float


@dataclass(frozen=True, slots=True)
class LoggedOut(Fact):
    """The credentials are dead; whatsmeow has deleted them. `reason` is neonize's word."""

    on_connect: bool
    reason: str


@dataclass(frozen=True, slots=True)
class StreamReplaced(Fact):
    """Another client logged in with the same credentials."""


@dataclass(frozen=True, slots=True)
class TemporaryBan(Fact):
    """The number is banned for `expire_s` seconds (0 when WhatsApp did not say)."""

    code: str
    expire_s: float


@dataclass(frozen=True, slots=True)
class ClientOutdated(Fact):
    """WhatsApp refuses this version of the client."""


@dataclass(frozen=True, slots=True)
class ConnectFailure(Fact):
    """The login was refused for another reason; `reason` is neonize's word, or `unknown`."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class StreamError(Fact):
    """The server ended the stream with a code that whatsmeow does not know."""

    code: str


@dataclass(frozen=True, slots=True)
class KeepAliveTimeout(Fact):
    """A ping got no answer within 10 s; told again for each further one."""

    errors: int
    last_success: float


@dataclass(frozen=True, slots=True)
class KeepAliveRestored(Fact):
    """Pings are answered again."""


@dataclass(frozen=True, slots=True)
class ConnectReturned(Fact):
    """neonize's blocking call came back: the first dial failed, or the client is finished."""

    error: str


@dataclass(frozen=True, slots=True)
class QrCode(Fact):
    """A QR code to show, exactly as neonize gave it."""

    code: str


@dataclass(frozen=True, slots=True)
class LinkStatus(Fact):
    """How whatsmeow's wait for a scan ended: success, timeout, error, err-client-outdated ..."""

    status: str


@dataclass(frozen=True, slots=True)
class Paired(Fact):
    """A phone accepted this device; the credentials are stored."""

    jid: str
    platform: str


@dataclass(frozen=True, slots=True)
class PairFailed(Fact):
    """The phone scanned, and the pairing failed."""

    error: str


class ReceiptKind(StrEnum):
    """The receipts that say something about a message of ours."""

    DELIVERED = "delivered"
    READ = "read"
    PLAYED = "played"


@dataclass(frozen=True, slots=True)
class Receipt(Fact):
    """A recipient's device says what became of messages; `phone` is empty when unknown."""

    kind: ReceiptKind
    wa_message_ids: tuple[str, ...]
    chat: str
    sender: str
    phone: str
    at: float


@dataclass(frozen=True, slots=True)
class Inbound(Fact):
    """A message arrived. `text` is empty for other types than text."""

    wa_message_id: str
    chat: str
    sender: str
    phone: str  # of the sender, empty when unknown
    push_name: str
    type: str  # text, image, audio ... as the Cloud API calls it; `unsupported` otherwise
    text: str
    at: float
