"""To whom a message goes: the form of an address, never whether it exists (WhatsApp decides)."""

import re
from dataclasses import dataclass

from whatsapp_worker.errors import InvalidMessage

USER = "s.whatsapp.net"
LID = "lid"
GROUP = "g.us"

# Form only, after WhatsApp's own limits: E.164 numbers, hidden ids, and group ids of both ages
# (`120363...` now, `<phone>-<seconds>` before).
_FORMS = {
    USER: re.compile(r"[0-9]{7,15}"),
    LID: re.compile(r"[0-9]{1,20}"),
    GROUP: re.compile(r"[0-9]{10,25}(-[0-9]{9,11})?"),
}
_SERVERS = {USER: USER, "c.us": USER, LID: LID, GROUP: GROUP}


@dataclass(frozen=True, slots=True)
class Recipient:
    """A person or group; two ways of writing the same one compare equal."""

    user: str
    server: str

    @property
    def jid(self) -> str:
        """As WhatsApp writes it: `5511999990001@s.whatsapp.net`."""
        return f"{self.user}@{self.server}"

    @property
    def is_group(self) -> bool:
        return self.server == GROUP


def parse(to: object, *, field: str = "to") -> Recipient:
    """Read a recipient: 7 to 15 digits with or without `+`, or a JID.

    Accepted servers are `@s.whatsapp.net`, `@c.us` (the same), `@lid` and `@g.us`.

    Raises:
        InvalidMessage: Not one of these forms; the address itself is not repeated in the error.
    """
    if not isinstance(to, str):
        raise InvalidMessage(field, "must be a string: a phone number or a JID")
    user, at, domain = to.partition("@")
    if not at:
        user, domain = user.removeprefix("+"), USER
    server = _SERVERS.get(domain)
    if server is None:
        known = ", ".join(f"@{name}" for name in _SERVERS)
        raise InvalidMessage(field, f"must be a phone number or end with one of {known}")
    if not _FORMS[server].fullmatch(user):
        raise InvalidMessage(field, _PROBLEMS[server])
    return Recipient(user, server)


_PROBLEMS = {
    USER: "must be 7 to 15 digits of an international number, with or without +",
    LID: "must be 1 to 20 digits before @lid",
    GROUP: "must be a group id before @g.us",
}
