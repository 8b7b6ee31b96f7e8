"""Names that are keys, paths or identities: validated here before they become any of those."""

import hmac
import re
from typing import NewType

from whatsapp_worker.errors import UsageError

SessionId = NewType("SessionId", str)

EVENTS_STREAM = "wa:events"
OUTBOUND_PREFIX = "wa:out:"
HIGH_SUFFIX = ":high"
CANCEL_REQUESTS = "wa:cancel"  # a list; each is answered in a list of its own
LEDGER_GROUP = "ledger"  # the consumer group of the `events` process
SEND_MESSAGE = "jobs.outbound.send_message"
PURGE_SESSIONS = "jobs.purge.purge_sessions"

_SESSION_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


def session_id(text: object) -> SessionId:
    """Check a session id: `[a-z0-9][a-z0-9_-]{0,63}`.

    Raises:
        UsageError: It is not one; nothing was touched.
    """
    if not isinstance(text, str) or not _SESSION_ID.match(text):
        raise UsageError(
            f"session: {text!r:.80} is not a session id: 1 to 64 characters of a-z, 0-9, - and _,"
            " the first a letter or digit"
        )
    return SessionId(text)


def outbound_queue(session: SessionId, *, high: bool = False) -> str:
    """The RQ queue name that holds what this session is to send."""
    return f"{OUTBOUND_PREFIX}{session}{HIGH_SUFFIX if high else ''}"


def session_of_queue(queue: str) -> tuple[SessionId, bool] | None:
    """The session id and whether it is the high queue; None for a name that is no queue of ours."""
    if not queue.startswith(OUTBOUND_PREFIX):
        return None
    name = queue.removeprefix(OUTBOUND_PREFIX)
    high = name.endswith(HIGH_SUFFIX)
    name = name.removesuffix(HIGH_SUFFIX)
    return (SessionId(name), high) if _SESSION_ID.match(name) else None


def breakers_key(session: str) -> str:
    """The Redis hash that shows the breakers of a session."""
    return f"wa:breakers:{session}"


def maintenance_queue(host: str) -> str:
    """The RQ queue of a host's periodic jobs."""
    return f"wa:maintenance:{host}"


def message_secret(install_key: bytes, session: str, message_id: str, attempt: int) -> bytes:
    """The 32-byte messageContextInfo.messageSecret of one attempt (design decision 7)."""
    text = f"secret\0{session}\0{message_id}\0{attempt}".encode()
    return hmac.digest(install_key, text, "sha256")


def number_hash(install_key: bytes, number: str) -> str:
    """What is kept of a phone number where the number itself must not be: HMAC, hex."""
    return hmac.digest(install_key, f"number\0{number}".encode(), "sha256").hex()
