"""What it means when `send_message` fails: one table over neonize's words."""

import re
from enum import StrEnum


class Kind(StrEnum):
    """What to do about a send that failed."""

    UNSURE = "unsure"  # WhatsApp may have it: only the device database can tell
    NOT_CONNECTED = "not-connected"  # not sent; this connection is gone
    LOGGED_OUT = "logged-out"  # not sent; there are no credentials any more
    RECIPIENT = "recipient"  # not sent: concerns this recipient or message alone
    TRANSIENT = "transient"  # refused, not sent; the same message may pass soon
    STOP_SENDING = "stop-sending"  # refused, not sent; WhatsApp wants this number to pause

    @property
    def is_transport_fault(self) -> bool:
        """Whether the message breaker counts it."""
        return self in (Kind.UNSURE, Kind.NOT_CONNECTED, Kind.TRANSIENT)


# The first pattern that is found in the text decides. Texts: whatsmeow send.go and errors.go,
# neonize. A server error is `<ack error=...>`; 420 and 429: too many; 463: this number may not
# write to strangers now. An info query is a question that comes before a message is encrypted: who
# is behind a number, which devices it has, who is in a group. Most refusals of one concern all:
# they must not fail a whole queue.
TABLE: tuple[tuple[str, Kind], ...] = (
    *((rf"server returned error {code}\b", Kind.STOP_SENDING) for code in (420, 429, 463)),
    *((rf"server returned error {code}\b", Kind.TRANSIENT) for code in (408, 500, 502, 503, 504)),
    (r"server returned error \d", Kind.RECIPIENT),
    *((rf"info query returned status {code}\b", Kind.STOP_SENDING) for code in (420, 429, 463)),
    *((rf"info query returned status {code}\b", Kind.RECIPIENT) for code in (400, 404, 406)),
    (r"info query returned status \d", Kind.TRANSIENT),
    ("no LID found for", Kind.RECIPIENT),
    ("client is nil", Kind.NOT_CONNECTED),
    ("store doesn't contain a device JID", Kind.LOGGED_OUT),
    ("not logged in", Kind.LOGGED_OUT),
    ("websocket disconnected before", Kind.UNSURE),
    ("timed out waiting for message send response", Kind.UNSURE),
    ("websocket not connected", Kind.NOT_CONNECTED),
    ("recipient must be a user JID", Kind.RECIPIENT),
    ("can't send message to unknown server", Kind.RECIPIENT),
    ("you're not participating in that group", Kind.RECIPIENT),
    ("that group does not exist", Kind.RECIPIENT),
)


def classify(text: str) -> Kind:
    """What neonize's error text says about the message; what nobody knows is `UNSURE`."""
    return next((kind for pattern, kind in TABLE if re.search(pattern, text)), Kind.UNSURE)


# What a CRM is told instead, where the message is `failed`; with WhatsApp's number, if it says one.
_WORDS: tuple[tuple[str, str], ...] = (
    ("no LID found for", "the number is not on WhatsApp"),
    (r"server returned error (\d+)", "WhatsApp refused the message"),
    (r"info query returned status (\d+)", "WhatsApp refused a question about the recipient"),
    ("recipient must be a user JID", "nobody can be written to at this address"),
    ("can't send message to unknown server", "nobody can be written to at this address"),
    ("you're not participating in that group", "this session's number is not in the group"),
    ("that group does not exist", "the group does not exist"),
)


def in_words(text: str) -> str:
    """neonize's error text of a message that was certainly not sent, for people."""
    for pattern, words in _WORDS:
        found = re.search(pattern, text)
        if found:
            return f"{words} (error {found[1]})" if found.re.groups else words
    return text


def upload_in_words(text: str) -> str:
    """neonize's error text of a file that was not uploaded, for people."""
    found = re.search(r"status(?: code)? (\d+)", text)
    return "WhatsApp did not take the file" + (f" (error {found[1]})" if found else "")
