"""The content of messages: WhatsApp Cloud API message objects, checked field by field.

Where the Cloud API has a type its object is taken as it is; `poll`, `edit`, `revoke` and `read`
are the nearest shape (docs/messages.md). A new type is one more model in `TYPES`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TEXT = 65_536  # characters; WhatsApp's own limit
MAX_CAPTION = 4096
MAX_MENTIONS = 1024  # as many as a group has members
MAX_CARDS = 50
MAX_URL = 4096

_PERSON = r"\+?[0-9]{7,15}|[0-9]{7,15}@(s\.whatsapp\.net|c\.us)|[0-9]{1,20}@lid"
ADDRESS = rf"{_PERSON}|[0-9]{{10,25}}(-[0-9]{{9,11}})?@g\.us"  # what `recipient.parse` takes
# Without a user name: no @ before the path.
_URL = r'[Hh][Tt][Tt][Pp][Ss]?://[!"$-.0->A-~]+([/?#][!-~]*)?'
_STEP = r"(?!\.{1,2}(/|$))[^\x00-\x1f\x7f\\/]+"
_PATH = rf"{_STEP}(/{_STEP})*"
_DEGREES = r"-?[0-9]{1,3}(\.[0-9]{1,20})?"
_FIRST_URL = re.compile(r"https?://[^\s<>\"]+", re.IGNORECASE)
_MEDIA = frozenset({"image", "video", "audio", "document", "sticker"})


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


def _person(text: str) -> str:
    if not re.fullmatch(_PERSON, text):
        raise PydanticCustomError("person", "must be a phone number or a JID of one person")
    return text


def is_link(text: str) -> bool:
    """Whether it is a URL that may be fetched, as far as its form goes."""
    try:
        parts = urlsplit(text)
        is_whole = bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError:
        return False
    return is_whole and bool(re.fullmatch(_URL, text)) and len(text) <= MAX_URL


def _link(text: str) -> str:
    if not is_link(text):
        words = "must be an http or https URL without a user name in it"
        raise PydanticCustomError("link", words)
    return text


def is_inside(path: str) -> bool:
    """Whether a path leads below the folder that it is joined to, links aside."""
    steps = path.split("/")
    return not any(step in ("", ".", "..") or len(step.encode()) > 255 for step in steps)


def _inside(text: str) -> str:
    if not is_inside(text):
        raise PydanticCustomError("path", "must be a path inside MEDIA_DIR, such as offers/may.pdf")
    return text


def _number(value: Any) -> Any:
    """Meta's examples give coordinates as strings."""
    if isinstance(value, str) and re.fullmatch(_DEGREES, value):
        return float(value)
    return value


def _described(pattern: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$", **more})


# No control characters and no other ends of lines: some of it becomes lines of a vCard.
_UNPRINTED = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_LINE = rf"^[^{_UNPRINTED}]*[^\s{_UNPRINTED}][^{_UNPRINTED}]*$"  # not blank
Line = Annotated[str, Field(min_length=1, max_length=1000, pattern=_LINE)]
Body = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S")]
Caption = Annotated[str, Field(min_length=1, max_length=MAX_CAPTION)]
MessageId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+$")]
Person = Annotated[str, AfterValidator(_person), _described(_PERSON)]
Mentions = Annotated[list[Person], Field(max_length=MAX_MENTIONS)]
Link = Annotated[str, AfterValidator(_link), _described(_URL, maxLength=MAX_URL)]
FilePath = Annotated[
    str,
    Field(max_length=1024, pattern=r"^[^\x00-\x1f\x7f\\]+$"),
    AfterValidator(_inside),
    _described(_PATH, maxLength=1024),
]


def _degrees(limit: int) -> Any:
    number = {"type": "number", "minimum": -limit, "maximum": limit}
    text = {"type": "string", "pattern": f"^({_DEGREES})$"}
    return Annotated[
        float,
        BeforeValidator(_number),
        Field(ge=-limit, le=limit),
        WithJsonSchema({"anyOf": [number, text]}),
    ]


class Reference(_Strict):
    """A message by its WhatsApp id.

    `from` says who wrote it, our own number included. In a chat with one person the recipient is
    meant without it; in a group it must be given.
    """

    message_id: MessageId
    from_: Annotated[Person | None, Field(alias="from")] = None


class Context(Reference):
    """The message that this one answers; `text` is what the quotation shows."""

    text: Body | None = None


class Message(_Strict):
    """The fields that every message object may have beside `type` and its object."""

    # Said by Meta's clients; nothing of what is sent depends on them.
    envelope: ClassVar[frozenset[str]] = frozenset(
        {"messaging_product", "recipient_type", "to", "biz_opaque_callback_data"}
    )

    messaging_product: Literal["whatsapp"] | None = None
    recipient_type: Literal["individual", "group"] | None = None
    to: Annotated[str, _described(ADDRESS)] | None = None
    biz_opaque_callback_data: Annotated[str, Field(max_length=512)] | None = None

    def content(self) -> dict[str, Any]:
        """What is sent, as plain JSON data without envelope and absent fields."""
        return self.model_dump(exclude_none=True, exclude=set(self.envelope))

    def references(self) -> Mapping[str, Reference]:
        """The messages that this one needs the author of, by the path of the field."""
        return {}


class Reply(Message):
    """A message that may answer another one."""

    context: Context | None = None

    def references(self) -> Mapping[str, Reference]:
        return {"context": self.context} if self.context else {}


class EditedText(_Strict):
    """`text` of an edit."""

    body: Body
    mentions: Mentions | None = None


class TextBody(EditedText):
    """`text` of a text message. `mentions` are those whose `@number` stands in the body."""

    preview_url: bool | None = None


class TextMessage(Reply):
    """`{"type": "text", "text": {"body": ...}}`."""

    type: Literal["text"]
    text: TextBody


class Media(_Strict):
    """A file: `link` is a URL, `file` a path inside MEDIA_DIR."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": "string"}}}
                for name in ("link", "file")
            ]
        }
    )

    link: Link | None = None
    file: FilePath | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "Media":
        if (self.link is None) == (self.file is None):
            raise PydanticCustomError("media", "needs either link or file")
        return self


class CaptionedMedia(Media):
    """A picture or a video; `mentions` are those whose `@number` stands in the caption."""

    caption: Caption | None = None
    mentions: Mentions | None = None


class Audio(Media):
    """`voice` shows it as a voice note: OGG with Opus, anything else is converted by ffmpeg."""

    voice: bool | None = None


class Document(CaptionedMedia):
    """Any file; `filename` is what the recipient sees."""

    filename: Annotated[str, Field(max_length=240, pattern=r"^[^\x00-\x1f\x7f/\\]+$")] | None = None


class ImageMessage(Reply):
    type: Literal["image"]
    image: CaptionedMedia


class VideoMessage(Reply):
    type: Literal["video"]
    video: CaptionedMedia


class AudioMessage(Reply):
    type: Literal["audio"]
    audio: Audio


class DocumentMessage(Reply):
    type: Literal["document"]
    document: Document


class StickerMessage(Reply):
    type: Literal["sticker"]
    sticker: Media


class Location(_Strict):
    """A place, in degrees."""

    latitude: _degrees(90)  # type: ignore[valid-type]
    longitude: _degrees(180)  # type: ignore[valid-type]
    name: Line | None = None
    address: Line | None = None


class LocationMessage(Reply):
    type: Literal["location"]
    location: Location


Label = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z -]{0,19}$")]


class Name(_Strict):
    formatted_name: Line
    first_name: Line | None = None
    middle_name: Line | None = None
    last_name: Line | None = None
    prefix: Line | None = None
    suffix: Line | None = None


class Phone(_Strict):
    """`wa_id` is its WhatsApp number in digits; taken from `phone` when that has 7 to 15."""

    phone: Annotated[str, Field(pattern=r"^[0-9+() ./-]{1,40}$")]
    type: Label | None = None
    wa_id: Annotated[str, Field(pattern=r"^[0-9]{7,15}$")] | None = None


class Email(_Strict):
    email: Line
    type: Label | None = None


class Url(_Strict):
    url: Line
    type: Label | None = None


class Address(_Strict):
    street: Line | None = None
    city: Line | None = None
    state: Line | None = None
    zip: Line | None = None
    country: Line | None = None
    country_code: Line | None = None
    type: Label | None = None


class Organization(_Strict):
    company: Line | None = None
    department: Line | None = None
    title: Line | None = None


Few = Field(max_length=20)


class Card(_Strict):
    """A contact as Meta's API has it."""

    name: Name
    phones: Annotated[list[Phone], Few] | None = None
    emails: Annotated[list[Email], Few] | None = None
    urls: Annotated[list[Url], Few] | None = None
    addresses: Annotated[list[Address], Few] | None = None
    org: Organization | None = None
    birthday: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] | None = None


class ContactsMessage(Reply):
    type: Literal["contacts"]
    contacts: Annotated[list[Card], Field(min_length=1, max_length=MAX_CARDS)]


class _Referring(Message):
    """A message about another one, which is what its object names first."""

    def references(self) -> Mapping[str, Reference]:
        name: str = self.type  # type: ignore[attr-defined]
        return {name: getattr(self, name)}


class Reaction(Reference):
    """An empty `emoji` takes the reaction back."""

    emoji: Annotated[str, Field(max_length=32, pattern=r"^[^\x00-\x20\x7f]*$")]


class ReactionMessage(_Referring):
    type: Literal["reaction"]
    reaction: Reaction


Choice = Annotated[str, Field(min_length=1, max_length=100, pattern=r"\S")]


class Poll(_Strict):
    """`selectable_count` is how many options a voter may take; 0 is any number."""

    question: Annotated[str, Field(min_length=1, max_length=255, pattern=r"\S")]
    options: Annotated[
        list[Choice], Field(min_length=2, max_length=12, json_schema_extra={"uniqueItems": True})
    ]
    selectable_count: Annotated[int, Field(ge=0, le=12)] = 1

    @model_validator(mode="after")
    def _is_answerable(self) -> "Poll":
        if len(set(self.options)) < len(self.options):
            raise PydanticCustomError("poll", "offers the same option twice")
        if self.selectable_count > len(self.options):
            raise PydanticCustomError("poll", "lets voters select more options than it has")
        return self


class PollMessage(Reply):
    type: Literal["poll"]
    poll: Poll


class Edit(_Strict):
    """New text for a text of ours."""

    message_id: MessageId
    text: EditedText


class EditMessage(Message):
    type: Literal["edit"]
    edit: Edit


class Revoke(_Strict):
    """Delete a message for everyone: ours, or in a group that we administer that of `from`."""

    message_id: MessageId
    from_: Annotated[Person | None, Field(alias="from")] = None


class RevokeMessage(Message):
    type: Literal["revoke"]
    revoke: Revoke


class ReadMessage(_Referring):
    """Tells the sender of a received message that it was read."""

    type: Literal["read"]
    read: Reference


class ReadStatus(Reference, Message):
    """The same in Meta's words: `{"status": "read", "message_id": ...}`."""

    status: Literal["read"]

    def content(self) -> dict[str, Any]:
        read = super().content()
        read.pop("status")
        return {"type": "read", "read": read}

    def references(self) -> Mapping[str, Reference]:
        return {"": self}


TYPES: dict[str, type[Message]] = {
    "text": TextMessage,
    "image": ImageMessage,
    "video": VideoMessage,
    "audio": AudioMessage,
    "document": DocumentMessage,
    "sticker": StickerMessage,
    "location": LocationMessage,
    "contacts": ContactsMessage,
    "reaction": ReactionMessage,
    "poll": PollMessage,
    "edit": EditMessage,
    "revoke": RevokeMessage,
    "read": ReadMessage,
}
MODELS: tuple[type[Message], ...] = (*TYPES.values(), ReadStatus)


def model_of(given: Mapping[Any, Any]) -> type[Message] | None:
    """The model that checks such a message object; None when there is none of that type."""
    if "type" not in given and "status" in given:
        return ReadStatus
    kind = given.get("type")
    return TYPES.get(kind) if isinstance(kind, str) else None


def unknown_author(message: Message, *, is_group: bool) -> str | None:
    """The path of a `from` that a group needs and that is missing."""
    for path, reference in message.references().items():
        if is_group and reference.from_ is None:
            return f"{path}.from".removeprefix(".")
    return None


def preview_url(content: Mapping[str, Any]) -> str | None:
    """The link whose preview a text asks for: the first one, without the dot of its sentence."""
    text = content.get("text", {})
    found = _FIRST_URL.search(text.get("body", "")) if text.get("preview_url") else None
    if found is None:
        return None
    url = found[0].rstrip(".,;:!?)'*_~")
    return url if is_link(url) else None


def needs_preparing(content: Mapping[str, Any]) -> bool:
    """Whether something must be fetched before it can be sent."""
    return content.get("type") in _MEDIA or preview_url(content) is not None
