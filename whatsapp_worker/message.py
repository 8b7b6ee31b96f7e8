"""What a CRM may ask to be sent: a job's arguments, checked field by field.

`content.py` has the message types.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from whatsapp_worker import content, recipient
from whatsapp_worker.content import Message
from whatsapp_worker.errors import InvalidMessage, UsageError
from whatsapp_worker.keys import session_id
from whatsapp_worker.recipient import Recipient

MAX_METADATA = 4096  # bytes of JSON, since every event of the message repeats it
_LATEST = 253_402_300_799.0  # the last second of the year 9999


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Options(_Strict):
    """The arguments of a job beside session, to and message."""

    # Printable, and without the NUL that PostgreSQL refuses.
    message_id: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
    expires_at: Annotated[float, Field(gt=0, le=_LATEST)] | None = None
    ttl_s: Annotated[float, Field(gt=0, le=_LATEST)] | None = None
    send_at: Annotated[float, Field(gt=0, le=_LATEST)] | None = None
    priority: Literal["normal", "high"] = "normal"
    on_unknown: Literal["keep", "resend"] = "keep"
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message that may be sent: every field checked."""

    session: str
    recipient: Recipient
    message_id: str
    content: Mapping[str, Any]  # see `Message.content`
    content_hash: str  # SHA-256 of recipient and content, hex; equal for equal messages
    expires_at: float | None = None  # UTC seconds; not sent afterwards
    ttl_s: float | None = None  # the same, counted from enqueueing
    send_at: float | None = None  # UTC seconds; not sent before
    priority: str = "normal"
    on_unknown: str = "keep"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metadata_text(self) -> str | None:
        """As the ledger keeps it: JSON; None where there is none."""
        return json.dumps(self.metadata) if self.metadata else None

    def deadline(self, enqueued_at: float) -> float | None:
        """UTC seconds after which it must not be sent: the earlier of expires_at and ttl_s."""
        ends = [] if self.expires_at is None else [self.expires_at]
        if self.ttl_s is not None:
            ends.append(enqueued_at + self.ttl_s)
        return min(ends, default=None)


def validate(kwargs: Mapping[str, Any], *, session: str | None = None) -> Outgoing:
    """Check a job's keyword arguments.

    Args:
        kwargs: As they came out of JSON: nothing about them is trusted.
        session: The session whose queue the job was on; the job must name the same.

    Raises:
        InvalidMessage: Names the first wrong field; never repeats text or numbers.
    """
    given = dict(kwargs)
    name = _session(given.pop("session", None), session)
    to = recipient.parse(given.pop("to", None))
    message = _message(given.pop("message", None))
    if message.to is not None and recipient.parse(message.to, field="message.to") != to:
        raise InvalidMessage("message.to", "does not agree with to")
    options = _options(given)
    _check_metadata(options.metadata)
    if (missing := content.unknown_author(message, is_group=to.is_group)) is not None:
        raise InvalidMessage(f"message.{missing}", "is missing: in a group, say who wrote it")
    sent = message.content()
    return Outgoing(
        session=name,
        recipient=to,
        message_id=options.message_id,
        content=sent,
        content_hash=_hash(to, sent),
        expires_at=options.expires_at,
        ttl_s=options.ttl_s,
        send_at=options.send_at,
        priority=options.priority,
        on_unknown=options.on_unknown,
        metadata=options.metadata or {},
    )


def check_message_id(given: object) -> str:
    """A message id as a job may have it.

    Raises:
        InvalidMessage: It is none.
    """
    return _options({"message_id": given}).message_id


def readable_metadata(given: object) -> Mapping[str, Any]:
    """The metadata of arguments in which something else is wrong; empty where it is itself."""
    with contextlib.suppress(InvalidMessage):
        if isinstance(given, dict):
            _check_metadata(given)
            return given
    return {}


def _options(given: Mapping[str, Any]) -> Options:
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise _refusal("", error) from None


def _session(given: object, expected: str | None) -> str:
    try:
        name = session_id(given)
    except UsageError as error:
        raise InvalidMessage("session", str(error).removeprefix("session: ")) from None
    if expected is not None and name != expected:
        raise InvalidMessage("session", f"is not the session of this queue ({expected})")
    return name


def _message(given: object) -> Message:
    if not isinstance(given, dict):
        raise InvalidMessage("message", "must be a Cloud API message object")
    model = content.model_of(given)
    if model is None:
        problem = f"must be one of {', '.join(content.TYPES)}"
        raise InvalidMessage("message.type", problem if "type" in given else "is missing")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _refusal("message", error) from None


def _refusal(prefix: str, error: ValidationError) -> InvalidMessage:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [prefix, *(_printable(str(part)) for part in first["loc"])]
    return InvalidMessage(".".join(filter(None, path)) or "kwargs", _problem(first))


def _problem(error: ErrorDetails) -> str:
    words = {
        "missing": "is missing",
        "extra_forbidden": "is not a known field",
        "string_too_short": "is empty",
        "string_pattern_mismatch": "is blank, or holds characters that it must not hold",
    }
    return words.get(error["type"], error["msg"])


def _printable(text: str) -> str:
    """A field name that a producer made up, fit for an error."""
    return text.encode("ascii", "backslashreplace").decode()[:80]


def _check_metadata(metadata: Mapping[str, Any] | None) -> None:
    if metadata is None:
        return
    try:
        size = len(json.dumps(metadata, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise InvalidMessage("metadata", "is not JSON") from None
    if size > MAX_METADATA:
        raise InvalidMessage("metadata", f"is longer than {MAX_METADATA} bytes of JSON")


def _hash(to: Recipient, content: Mapping[str, Any]) -> str:
    text = json.dumps([to.jid, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
