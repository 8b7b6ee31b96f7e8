"""The states of a session, the reasons that go with them, and the sentence for each reason."""

from enum import StrEnum


class State(StrEnum):
    """A session's state; the words are shared with CRMs and operators."""

    UNLINKED = "unlinked"  # no credentials; waits for a link request
    LINKING = "linking"  # a QR or pairing code is being shown
    CONNECTING = "connecting"  # socket, handshake or login under way
    CONNECTED = "connected"  # logged in; jobs run
    RECONNECTING = "reconnecting"  # connection lost; waiting for attempt n of 3
    FAILED = "failed"  # attempts spent, or flapping; a new series after the cool-down
    LOGGED_OUT = "logged_out"  # credentials revoked; only linking again helps
    REPLACED = "replaced"  # another client took this session over
    BANNED = "banned"  # temporary ban, with its end
    OUTDATED = "outdated"  # WhatsApp refuses this client version
    STOPPED = "stopped"  # an operator stopped it
    DELETED = "deleted"  # being removed; afterwards only a tombstone


class Reason(StrEnum):
    """Why a session is in its state: mautrix's words where it has one, then ours."""

    LOGGED_OUT = "wa-logged-out"
    MAIN_DEVICE_GONE = "wa-main-device-gone"
    KEEPALIVE_TIMEOUT = "wa-keepalive-timeout"
    STREAM_REPLACED = "wa-stream-replaced"
    STREAM_ERROR = "wa-stream-error"
    CLIENT_OUTDATED = "wa-client-outdated"
    TEMPORARY_BAN = "wa-temporary-ban"
    CONNECTION_FAILED = "wa-connection-failed"
    QR_EXPIRED = "qr-expired"
    PROCESS_CRASHED = "process-crashed"
    PROCESS_HUNG = "process-hung"
    MEMORY_LIMIT = "memory-limit"
    CAPACITY = "capacity"
    FLAPPING = "flapping"
    OPERATOR = "operator"


# {session} is filled in by `sentence`. Each says what to do next, or that nothing need be done.
_SENTENCES = {
    Reason.LOGGED_OUT: "WhatsApp logged this device out. Link it again:"
    " whatsapp-worker link {session}",
    Reason.MAIN_DEVICE_GONE: "The phone of this number is gone from WhatsApp. Register the number"
    " on a phone again, then run: whatsapp-worker link {session}",
    Reason.KEEPALIVE_TIMEOUT: "WhatsApp stopped answering. It reconnects by itself.",
    Reason.STREAM_REPLACED: "Another WhatsApp client took this session over. Stop the other one,"
    " then run: whatsapp-worker start {session}",
    Reason.STREAM_ERROR: "WhatsApp ended the stream. It reconnects by itself.",
    Reason.CLIENT_OUTDATED: "WhatsApp refuses this client version. Upgrade neonize, then run:"
    " whatsapp-worker start {session}",
    Reason.TEMPORARY_BAN: "WhatsApp banned this number for a time. Send less and slower; it resumes"
    " by itself when the ban ends.",
    Reason.CONNECTION_FAILED: "WhatsApp could not be reached. It tries again by itself; if every"
    " session says so, check this host's network.",
    Reason.QR_EXPIRED: "Nobody scanned the QR code in time. Try again:"
    " whatsapp-worker link {session}",
    Reason.PROCESS_CRASHED: "The device process crashed. It starts again by itself; its log is in"
    " whatsapp-worker logs {session}",
    Reason.PROCESS_HUNG: "The device process made no progress and was ended. It starts again by"
    " itself.",
    Reason.MEMORY_LIMIT: "The device process used too much memory and was recycled.",
    Reason.CAPACITY: "This host runs MAX_SESSIONS sessions already. Stop or delete one, or raise"
    " MAX_SESSIONS.",
    Reason.FLAPPING: "The connection was lost again and again right after logging in. It tries"
    " again after a cool-down; look for a second client of this number.",
    Reason.OPERATOR: "An operator asked for it. To run it: whatsapp-worker start {session}",
}


def sentence(reason: Reason | None, session: str) -> str:
    """The sentence that tells a person what to do; empty without a reason."""
    return _SENTENCES[reason].format(session=session) if reason else ""
