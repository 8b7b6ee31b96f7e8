"""Message validation: what is accepted, and that every refusal names its field."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatsapp_worker.errors import InvalidMessage
from whatsapp_worker.message import validate


def job(**changes: Any) -> dict[str, Any]:
    """The arguments of a good job, with some of them changed; `...` leaves one out."""
    arguments = {
        "session": "sales",
        "to": "+5511999990001",
        "message_id": "crm-4711",
        "message": {"type": "text", "text": {"body": "Hello"}},
    } | changes
    return {name: value for name, value in arguments.items() if value is not ...}


def text(**changes: Any) -> dict[str, Any]:
    return {"type": "text", "text": {"body": "Hello"}} | changes


def test_a_cloud_api_text_message_is_accepted_with_all_its_known_fields() -> None:
    message = text(
        messaging_product="whatsapp",
        recipient_type="individual",
        to="5511999990001",
        context={"message_id": "wamid.1"},
        biz_opaque_callback_data="ticket 7",
    )
    message["text"]["preview_url"] = False
    order = validate(job(message=message, metadata={"lead": 7}))
    assert order.recipient.jid == "5511999990001@s.whatsapp.net"
    assert order.content == {
        "type": "text",
        "text": {"body": "Hello", "preview_url": False},
        "context": {"message_id": "wamid.1"},
    }
    assert order.metadata == {"lead": 7}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (job(session=...), "session"),
        (job(session="Sales!"), "session"),
        (job(session="other"), "session"),
        (job(to=...), "to"),
        (job(to="12"), "to"),
        (job(message=...), "message"),
        (job(message="Hello"), "message"),
        (job(message={}), "message.type"),
        (job(message={"type": "carrier-pigeon"}), "message.type"),
        (job(message={"type": ["text"]}), "message.type"),
        (job(message={"type": "text"}), "message.text"),
        (job(message=text(text={})), "message.text.body"),
        (job(message=text(text={"body": ""})), "message.text.body"),
        (job(message=text(text={"body": " \n\t"})), "message.text.body"),
        (job(message=text(text={"body": "x" * 65_537})), "message.text.body"),
        (job(message=text(text={"body": 7})), "message.text.body"),
        (job(message=text(text={"body": "\ud800"})), "message.text.body"),
        (job(message=text(text={"body": "x", "colour": "red"})), "message.text.colour"),
        (job(message=text(sticker={})), "message.sticker"),
        (job(message=text(to="+5511999990002")), "message.to"),
        (job(message=text(to="nobody")), "message.to"),
        (job(message=text(messaging_product="sms")), "message.messaging_product"),
        (job(message=text(context={})), "message.context.message_id"),
        (job(message_id=...), "message_id"),
        (job(message_id=""), "message_id"),
        (job(message_id="x" * 201), "message_id"),
        (job(message_id="a\0b"), "message_id"),
        (job(message_id=4711), "message_id"),
        (job(expires_at="tomorrow"), "expires_at"),
        (job(expires_at=float("nan")), "expires_at"),
        (job(ttl_s=0), "ttl_s"),
        (job(ttl_s=True), "ttl_s"),
        (job(priority="urgent"), "priority"),
        (job(on_unknown="retry"), "on_unknown"),
        (job(metadata=[1]), "metadata"),
        (job(metadata={"x": "y" * 5000}), "metadata"),
        (job(metadata={"x": float("inf")}), "metadata"),
        (job(metadata={"x": b"bytes"}), "metadata"),
        (job(callback="os.system"), "callback"),
    ],
)
def test_a_wrong_job_is_refused_with_the_name_of_the_field(
    arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidMessage) as caught:
        validate(arguments, session="sales")
    assert caught.value.field == field
    assert "5511999990001" not in str(caught.value)


def test_what_is_as_long_or_as_short_as_it_may_be_is_accepted() -> None:
    assert validate(job(message=text(text={"body": "x" * 65_536})))
    assert validate(job(message_id="x")) and validate(job(message_id="x" * 200))
    longest = {"x": "y" * (4096 - len('{"x": ""}'))}
    assert validate(job(metadata=longest))
    with pytest.raises(InvalidMessage, match="4096"):
        validate(job(metadata={"x": longest["x"] + "y"}))
    assert validate(job(expires_at=0.5, ttl_s=0.5, send_at=0.5)).send_at == 0.5


def test_the_same_message_written_in_two_ways_has_one_hash_and_another_has_another() -> None:
    plain = validate(job())
    assert validate(job(to="5511999990001@c.us")).content_hash == plain.content_hash
    assert validate(job(metadata={"x": 1}, ttl_s=5)).content_hash == plain.content_hash
    assert validate(job(message=text(to="5511999990001"))).content_hash == plain.content_hash
    assert validate(job(to="5511999990002")).content_hash != plain.content_hash
    other = validate(job(message=text(text={"body": "Hullo"})))
    assert other.content_hash != plain.content_hash


def test_the_earlier_of_expiry_and_time_to_live_is_the_deadline() -> None:
    assert validate(job()).deadline(1000.0) is None
    assert validate(job(expires_at=1500)).deadline(1000.0) == 1500.0
    assert validate(job(ttl_s=60)).deadline(1000.0) == 1060.0
    assert validate(job(expires_at=1500, ttl_s=60)).deadline(1000.0) == 1060.0


_LEAF = st.one_of(
    st.sampled_from(
        ["text", "sales", "+5511999990001", "whatsapp", "", "\ud800", "\0", None, True]
    ),
    st.text(st.characters(), max_size=6),  # surrogates included
    st.integers(),
    st.floats(),
)
_NAME = st.sampled_from(["type", "text", "body", "to", "context", "message_id"]) | st.text(
    max_size=3
)
_FLAT = _LEAF | st.lists(_LEAF, max_size=2) | st.dictionaries(_NAME, _LEAF, max_size=3)
_JSON = _FLAT | st.dictionaries(_NAME, _FLAT, max_size=2)
_ARGUMENT = st.sampled_from(
    (
        *("session", "to", "message", "message_id", "expires_at", "ttl_s", "send_at"),
        *("priority", "on_unknown", "metadata", "other"),
    )
)
_ARGUMENTS = st.one_of(
    st.builds(lambda name, value: {**job(), name: value}, _ARGUMENT, _JSON),
    st.builds(lambda value: job(message=text(text=value)), _JSON),
    st.dictionaries(_ARGUMENT, _FLAT, max_size=3),
)


@settings(max_examples=10_000, deadline=None)
@given(_ARGUMENTS)
def test_arbitrary_input_is_accepted_or_refused_naming_a_field(arguments: dict[str, Any]) -> None:
    try:
        order = validate(arguments)
    except InvalidMessage as refusal:
        assert refusal.field
        str(refusal).encode()
    else:
        assert order.content["text"]["body"].strip()
        json.dumps([order.content, dict(order.metadata)])
