"""The event words of `wa:events` and the status words of a message: a contract with the CRM."""

from enum import StrEnum


class Event(StrEnum):
    """Names on the stream `wa:events`."""

    STATE_CHANGED = "session.state_changed"
    QR = "session.qr"  # one waits; the code itself never leaves the host
    SENT = "message.sent"
    DELIVERED = "message.delivered"
    READ = "message.read"
    PLAYED = "message.played"
    FAILED = "message.failed"
    UNKNOWN = "message.unknown"
    EXPIRED = "message.expired"
    CANCELLED = "message.cancelled"
    RECEIVED = "message.received"
    BREAKER_OPENED = "breaker.opened"
    BREAKER_CLOSED = "breaker.closed"
    PURGE_COMPLETED = "purge.completed"


class Status(StrEnum):
    """What became of a message; it only moves forward (see `RANK`)."""

    QUEUED = "queued"
    SENDING = "sending"  # claimed; the call may be under way
    SENT = "sent"  # WhatsApp acknowledged it
    DELIVERED = "delivered"
    READ = "read"
    PLAYED = "played"
    FAILED = "failed"  # certainly not sent
    UNKNOWN = "unknown"  # handed over, never acknowledged
    EXPIRED = "expired"
    CANCELLED = "cancelled"


# A status may be replaced only by one of higher rank. A receipt proves that an unknown message
# was sent, so unknown ranks below sent; certain ends that a claim may reopen rank lowest.
RANK = {
    Status.QUEUED: 0,
    Status.FAILED: 1,
    Status.EXPIRED: 1,
    Status.CANCELLED: 1,
    Status.SENDING: 2,
    Status.UNKNOWN: 3,
    Status.SENT: 4,
    Status.DELIVERED: 5,
    Status.READ: 6,
    Status.PLAYED: 7,
}
