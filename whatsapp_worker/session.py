"""The states of a session, what moves it between them, and the reason and sentence of each.

`TABLE` is the only place that says what may follow what; `step` applies it, and the diagram in
docs/states.md is generated from it (`python -m whatsapp_worker.session > docs/states.md`).
"""

from enum import StrEnum

from whatsapp_worker.errors import WorkerError


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
    LINK_REFUSED = "link-refused"
    PROCESS_CRASHED = "process-crashed"
    PROCESS_HUNG = "process-hung"
    MEMORY_LIMIT = "memory-limit"
    CAPACITY = "capacity"
    FLAPPING = "flapping"
    OPERATOR = "operator"
    WRONG_NETWORK = "wrong-network"
    CANNOT_RUN = "cannot-run"


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
    Reason.LINK_REFUSED: "The link was refused by the phone or by WhatsApp. Try again:"
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
    Reason.WRONG_NETWORK: "This session was made on the other network (WhatsApp or the sandbox)."
    " Set WHATSAPP_NETWORK as it was, or delete it: whatsapp-worker delete {session}",
    Reason.CANNOT_RUN: "This host cannot run the session; its log says why:"
    " whatsapp-worker logs {session}",
    Reason.OPERATOR: "An operator asked for it. To run it: whatsapp-worker start {session}",
}


# Where there are no credentials, or a link attempt failed, nothing goes on by itself.
_LINK_SENTENCES = {
    Reason.KEEPALIVE_TIMEOUT: "WhatsApp stopped answering. Try again:"
    " whatsapp-worker link {session}",
    Reason.STREAM_REPLACED: "Another WhatsApp client took this session over. Stop the other one,"
    " then run: whatsapp-worker link {session}",
    Reason.STREAM_ERROR: "WhatsApp ended the stream. Try again: whatsapp-worker link {session}",
    Reason.CLIENT_OUTDATED: "WhatsApp refuses this client version. Upgrade neonize, then run:"
    " whatsapp-worker link {session}",
    Reason.TEMPORARY_BAN: "WhatsApp banned this number for a time. When that is over, run:"
    " whatsapp-worker link {session}",
    Reason.CONNECTION_FAILED: "WhatsApp could not be reached. Check this host's network, then run:"
    " whatsapp-worker link {session}",
    Reason.PROCESS_CRASHED: "The pairing process crashed; its log is in whatsapp-worker logs"
    " {session}. Try again: whatsapp-worker link {session}",
    Reason.PROCESS_HUNG: "The pairing process made no progress and was ended. Try again:"
    " whatsapp-worker link {session}",
    Reason.MEMORY_LIMIT: "The process used too much memory and was ended. Try again:"
    " whatsapp-worker link {session}",
    Reason.FLAPPING: "The connection was lost again and again right after logging in. Look for a"
    " second client of this number, then run: whatsapp-worker link {session}",
    Reason.OPERATOR: "An operator ended the link attempt. Try again:"
    " whatsapp-worker link {session}",
}
_CODE_EXPIRED = (
    "Nobody typed the pairing code into the phone in time. Try again:"
    " whatsapp-worker link {session}"
)
_NOT_LINKED = "No phone is linked to it. Link one: whatsapp-worker link {session}"


def sentence(
    reason: Reason | None, session: str, *, linking: bool = False, phone: str | None = None
) -> str:
    """The sentence that tells a person what to do; empty without a reason.

    Args:
        linking: It is about a link attempt, or a session without credentials.
        phone: Digits of the number that a pairing code was asked for; None for QR codes.
    """
    if reason is None:
        return ""
    template = (linking and _LINK_SENTENCES.get(reason)) or _SENTENCES[reason]
    if phone is None:
        return template.format(session=session)
    said = (_CODE_EXPIRED if reason is Reason.QR_EXPIRED else template).format(session=session)
    command = f"whatsapp-worker link {session}"
    return said.replace(command, f"{command} --phone +{phone}")


def state_sentence(state: State, reason: Reason | None, session: str) -> str:
    """The same for a session that is in a state for a reason."""
    if state is State.UNLINKED and reason is None:
        return _NOT_LINKED.format(session=session)
    return sentence(reason, session, linking=state is State.UNLINKED)


class Trigger(StrEnum):
    """What moves a session from one state to another."""

    # Ours: the supervisor does it, and does it only where the table allows.
    LINK = "link"  # a link attempt begins
    UNPAIRED = "unpaired"  # there are no credentials
    DIAL = "dial"  # a device process begins
    SPENT = "spent"  # the policy gives up until the cool-down ends
    STOP = "stop"
    DELETE = "delete"
    # WhatsApp's, or an accident's: may come at any time.
    LOGIN = "login"
    LOSS = "loss"  # the connection, or the attempt to make one, is gone
    LOGGED_OUT = "logged_out"
    REPLACED = "replaced"
    BANNED = "banned"
    OUTDATED = "outdated"


SURPRISES = frozenset(
    {
        Trigger.LOGIN,
        Trigger.LOSS,
        Trigger.LOGGED_OUT,
        Trigger.REPLACED,
        Trigger.BANNED,
        Trigger.OUTDATED,
    }
)

_ANYWHERE = {Trigger.STOP: State.STOPPED, Trigger.DELETE: State.DELETED}
_BEGIN = {Trigger.LINK: State.LINKING, Trigger.DIAL: State.CONNECTING, **_ANYWHERE}
_ENDS = {
    Trigger.LOGGED_OUT: State.LOGGED_OUT,
    Trigger.REPLACED: State.REPLACED,
    Trigger.BANNED: State.BANNED,
    Trigger.OUTDATED: State.OUTDATED,
}
_LOSSES = {Trigger.LOSS: State.RECONNECTING, Trigger.SPENT: State.FAILED}
_UNPAIRED = {Trigger.UNPAIRED: State.UNLINKED}

TABLE: dict[State, dict[Trigger, State]] = {
    State.UNLINKED: {**_BEGIN},
    # A link attempt that fails leaves the session where it was before.
    State.LINKING: {**_BEGIN, **_UNPAIRED, **_ENDS},
    State.CONNECTING: {**_BEGIN, **_UNPAIRED, **_ENDS, **_LOSSES, Trigger.LOGIN: State.CONNECTED},
    State.CONNECTED: {**_BEGIN, **_UNPAIRED, **_ENDS, **_LOSSES},
    State.RECONNECTING: {**_BEGIN, **_UNPAIRED},
    State.FAILED: {**_BEGIN, **_UNPAIRED},
    State.LOGGED_OUT: {**_BEGIN},
    State.REPLACED: {**_BEGIN, **_UNPAIRED},
    State.BANNED: {**_BEGIN, **_UNPAIRED},
    State.OUTDATED: {**_BEGIN, **_UNPAIRED},
    State.STOPPED: {**_BEGIN, **_UNPAIRED},
    State.DELETED: {Trigger.DELETE: State.DELETED},
}


class ImpossibleStep(WorkerError):
    """The supervisor tried what the table does not allow: a bug of ours."""


def step(state: State, trigger: Trigger) -> State | None:
    """The state that follows, or None for a surprise that means nothing here (log and go on).

    Raises:
        ImpossibleStep: One of our own triggers where the table has no place for it.
    """
    following = TABLE[state].get(trigger)
    if following is None and trigger not in SURPRISES:
        raise ImpossibleStep(f"no {trigger} from {state}")
    return following


def diagram() -> str:
    """The table as a Mermaid state diagram; `stop` and `delete`, possible everywhere, left out."""
    lines = ["stateDiagram-v2", "    [*] --> unlinked"]
    for state, row in TABLE.items():
        for trigger, following in row.items():
            if trigger not in _ANYWHERE:
                lines.append(f"    {state} --> {following}: {trigger}")
    return "\n".join([*lines, "    deleted --> [*]"])


def document() -> str:
    """docs/states.md, whole."""
    return (
        "# Session states\n\n"
        "Generated from `whatsapp_worker/session.py`: `python -m whatsapp_worker.session >"
        " docs/states.md`.\nNot drawn: `stop` leads from every state to `stopped`, and `delete`"
        f" to `deleted`.\n\n```mermaid\n{diagram()}\n```\n"
    )


if __name__ == "__main__":
    print(document(), end="")
