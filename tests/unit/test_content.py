"""Message types: what is accepted, and that every refusal names its field."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatsapp_worker import compose, content
from whatsapp_worker.errors import InvalidMessage
from whatsapp_worker.message import validate
from whatsapp_worker.sandbox import protobufs

E2E = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")
ANA = "5511999990001"
GROUP = "120363000000000001@g.us"
CARD = {
    "name": {"formatted_name": "Ana Silva", "first_name": "Ana", "last_name": "Silva"},
    "phones": [{"phone": "+55 11 99999-0001", "type": "WORK"}],
    "emails": [{"email": "ana@example.org"}],
    "urls": [{"url": "https://example.org"}],
    "addresses": [{"street": "Rua A, 1", "city": "São Paulo", "country": "Brazil"}],
    "org": {"company": "Acme", "title": "Head; of all"},
    "birthday": "1990-12-31",
}

GOOD: list[dict[str, Any]] = [
    {"type": "text", "text": {"body": "x", "preview_url": True, "mentions": [ANA, "1@lid"]}},
    {"type": "text", "text": {"body": "x"}, "context": {"message_id": "3EB0", "from": "+" + ANA}},
    {"type": "image", "image": {"link": "https://example.org/a.jpg?x=1", "caption": "c"}},
    {"type": "video", "video": {"file": "offers/may.mp4", "mentions": [ANA]}},
    {"type": "audio", "audio": {"link": "http://example.org:8080/", "voice": True}},
    {"type": "document", "document": {"file": "a.pdf", "filename": "Ünïcode.pdf"}},
    {"type": "sticker", "sticker": {"link": "https://[2001:db8::1]/a.webp"}},
    {"type": "location", "location": {"latitude": -23, "longitude": "-46.63", "name": "Sé"}},
    {"type": "contacts", "contacts": [CARD, {"name": {"formatted_name": "x"}}]},
    {"type": "reaction", "reaction": {"message_id": "3EB0", "emoji": "👍🏽"}},
    {"type": "reaction", "reaction": {"message_id": "3EB0", "emoji": ""}},
    {"type": "poll", "poll": {"question": "?", "options": ["a", "b"], "selectable_count": 0}},
    {"type": "edit", "edit": {"message_id": "3EB0", "text": {"body": "x", "mentions": [ANA]}}},
    {"type": "revoke", "revoke": {"message_id": "3EB0"}},
    {"type": "read", "read": {"message_id": "3EB0"}},
    {"status": "read", "message_id": "3EB0", "messaging_product": "whatsapp"},
]


def job(message: Any, to: str = ANA) -> dict[str, Any]:
    return {"session": "sales", "to": to, "message_id": "crm-1", "message": message}


def field_of(message: Any, to: str = ANA) -> str:
    """The field that a refusal names."""
    with pytest.raises(InvalidMessage) as refusal:
        validate(job(message, to))
    return refusal.value.field


@pytest.mark.parametrize("message", GOOD)
def test_a_message_of_every_type_is_accepted(message: dict[str, Any]) -> None:
    sent = dict(validate(job(message)).content)
    assert sent["type"] == message.get("type", "read")
    assert validate(job(sent)).content == sent, "what is sent is itself accepted"


def test_a_read_mark_in_both_forms_is_one_message() -> None:
    meta, ours = ({"status": "read", "message_id": "3EB0"}, GOOD[-2])
    assert validate(job(meta)).content_hash == validate(job(ours)).content_hash


def with_(kind: str, **fields: Any) -> dict[str, Any]:
    """A message of a kind whose object has other fields; `...` leaves one out."""
    found = next(message for message in GOOD if message.get("type") == kind)
    changed = {**found[kind], **fields}
    kept = {name: value for name, value in changed.items() if value is not ...}
    return {"type": kind, kind: kept}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"type": "template"}, "message.type"),
        ({"status": "delivered", "message_id": "x"}, "message.status"),
        ({"status": "read"}, "message.message_id"),
        (with_("text", mentions=[GROUP]), "message.text.mentions.0"),
        (with_("text", mentions=["nobody"]), "message.text.mentions.0"),
        ({**with_("text"), "context": {"message_id": "x", "from": "me"}}, "message.context.from"),
        ({**with_("text"), "context": {"message_id": "a b"}}, "message.context.message_id"),
        ({"type": "image"}, "message.image"),
        ({"type": "image", "image": {}}, "message.image"),
        ({"type": "image", "image": {"id": "123"}}, "message.image.id"),
        (with_("image", file="a.jpg"), "message.image"),
        (with_("image", link="ftp://example.org/a"), "message.image.link"),
        (with_("image", link="https://user:secret@example.org/a"), "message.image.link"),
        (with_("image", link="https:///a"), "message.image.link"),
        (with_("image", link="https://example.org:99999/a"), "message.image.link"),
        (with_("image", link="https://[::1/a"), "message.image.link"),
        (with_("image", link="https://example.org/a b"), "message.image.link"),
        (with_("image", link="https://example.org/\r\nHost: x"), "message.image.link"),
        (with_("image", link="https://example.org/" + "a" * 5000), "message.image.link"),
        (with_("image", caption=""), "message.image.caption"),
        (with_("video", file="../a.mp4"), "message.video.file"),
        (with_("video", file="/etc/passwd"), "message.video.file"),
        (with_("video", file="a/./b"), "message.video.file"),
        (with_("video", file="a//b"), "message.video.file"),
        (with_("video", file="a\0b"), "message.video.file"),
        (with_("video", file="ü" * 200), "message.video.file"),
        (with_("video", voice=True), "message.video.voice"),
        (with_("audio", voice="yes"), "message.audio.voice"),
        (with_("audio", caption="c"), "message.audio.caption"),
        (with_("document", filename="a/b"), "message.document.filename"),
        (with_("sticker", caption="c"), "message.sticker.caption"),
        (with_("location", latitude=90.1), "message.location.latitude"),
        (with_("location", latitude=True), "message.location.latitude"),
        (with_("location", latitude="north"), "message.location.latitude"),
        (with_("location", longitude=float("nan")), "message.location.longitude"),
        (with_("location", name="a\nb"), "message.location.name"),
        ({"type": "contacts", "contacts": []}, "message.contacts"),
        ({"type": "contacts", "contacts": [CARD] * 51}, "message.contacts"),
        ({"type": "contacts", "contacts": [{"name": {}}]}, "message.contacts.0.name"),
        (
            {"type": "contacts", "contacts": [{"name": {"formatted_name": "a\nTEL:1"}}]},
            "message.contacts.0.name.formatted_name",
        ),
        (with_("reaction", emoji=...), "message.reaction.emoji"),
        (with_("reaction", emoji="x" * 33), "message.reaction.emoji"),
        (with_("reaction", message_id=...), "message.reaction.message_id"),
        ({**with_("reaction"), "context": {"message_id": "x"}}, "message.context"),
        (with_("poll", options=["a"]), "message.poll.options"),
        (with_("poll", options=["a", "a"]), "message.poll"),
        (with_("poll", selectable_count=3), "message.poll"),
        (with_("poll", question=" "), "message.poll.question"),
        (with_("edit", text={}), "message.edit.text.body"),
        (with_("edit", text={"body": "x", "preview_url": True}), "message.edit.text.preview_url"),
        (with_("revoke", message_id=7), "message.revoke.message_id"),
    ],
)
def test_a_wrong_message_is_refused_with_the_name_of_the_field(
    message: dict[str, Any], field: str
) -> None:
    found = field_of(message)
    assert found == field or found.startswith(f"{field}.")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (with_("reaction"), "message.reaction.from"),
        (with_("read"), "message.read.from"),
        ({"status": "read", "message_id": "x"}, "message.from"),
        ({**with_("poll"), "context": {"message_id": "x"}}, "message.context.from"),
    ],
)
def test_in_a_group_the_author_must_be_named(message: dict[str, Any], field: str) -> None:
    assert field_of(message, GROUP) == field
    validate(job(with_("revoke"), GROUP))


@pytest.mark.parametrize(
    ("body", "url"),
    [
        ("see https://example.org/a.", "https://example.org/a"),
        ("(HTTP://Example.org/a?b=1,2)", "HTTP://Example.org/a?b=1,2"),
        ("two http://a.example, http://b.example", "http://a.example"),
        ("ftp://example.org and www.example.org", None),
        ("https://user@example.org/a", None),
    ],
)
def test_the_link_of_a_preview_is_the_first_one(body: str, url: str | None) -> None:
    sent = {"type": "text", "text": {"body": body, "preview_url": True}}
    assert content.preview_url(sent) == url
    assert content.needs_preparing(sent) is (url is not None)
    assert content.preview_url({"type": "text", "text": {"body": body}}) is None


# Anything at all: it is accepted or refused with a field, and what is accepted can be composed.

_WORDS = sorted(
    {
        word
        for message in [*GOOD, CARD]
        for word in json.dumps(message).split('"')
        if word.isidentifier()
    }
)
_LEAF = st.one_of(
    st.sampled_from([ANA, "https://example.org/a", "a.pdf", "3EB0", "1990-12-31", "\ud800", "\0"]),
    st.sampled_from([None, True, 0, 1, -1.5, 1e400, float("nan"), "", "read", "text"]),
    st.text(st.characters(), max_size=4),
)
_NAME = st.sampled_from(_WORDS) | st.text(max_size=2)
_FLAT = _LEAF | st.lists(_LEAF, max_size=2) | st.dictionaries(_NAME, _LEAF, max_size=2)
_ANY = _FLAT | st.lists(_FLAT, max_size=2) | st.dictionaries(_NAME, _FLAT, max_size=2)


def _paths(value: Any) -> list[list[Any]]:
    """Where something stands in a message."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    paths: list[list[Any]] = []
    for name, inner in items:
        paths.append([name])
        if isinstance(inner, dict | list):
            paths += [[name, *rest] for rest in _paths(inner)]
    return paths


_PLACES = [(message, path) for message in GOOD for path in _paths(message)]


@st.composite
def _messages(draw: st.DrawFn) -> Any:
    """A good message with something else in one place."""
    good, path = draw(st.sampled_from(_PLACES))
    message = inner = json.loads(json.dumps(good))
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = draw(_ANY)
    if isinstance(inner, dict) and draw(st.booleans()):
        inner[draw(_NAME)] = draw(_LEAF)
    return message


@settings(max_examples=10_000, deadline=None)
@given(_messages() | _ANY, st.sampled_from([ANA, GROUP, "77@lid"]))
def test_arbitrary_messages_are_refused_by_field_or_can_be_composed(message: Any, to: str) -> None:
    try:
        order = validate(job(message, to))
    except InvalidMessage as refusal:
        assert refusal.field.startswith("message")
        str(refusal).encode()
        return
    sent = dict(order.content)
    json.dumps(sent, allow_nan=False)
    if sent["type"] != "read":
        prepared = {compose.PREPARED: {}} if content.needs_preparing(sent) else {}
        made = compose.compose(
            {**sent, **prepared}, chat=order.recipient.jid, mine={ANA}, now=1.0, e2e=E2E
        )
        assert made.SerializeToString()
