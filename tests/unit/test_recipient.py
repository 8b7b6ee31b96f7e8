"""Recipients: forms accepted, and nothing else."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whatsapp_worker import recipient
from whatsapp_worker.errors import InvalidMessage


@pytest.mark.parametrize(
    ("to", "jid"),
    [
        ("5511999990001", "5511999990001@s.whatsapp.net"),
        ("+5511999990001", "5511999990001@s.whatsapp.net"),
        ("1234567", "1234567@s.whatsapp.net"),
        ("123456789012345", "123456789012345@s.whatsapp.net"),
        ("5511999990001@s.whatsapp.net", "5511999990001@s.whatsapp.net"),
        ("5511999990001@c.us", "5511999990001@s.whatsapp.net"),
        ("182736451928@lid", "182736451928@lid"),
        ("120363025246125486@g.us", "120363025246125486@g.us"),
        ("5511999990001-1412345678@g.us", "5511999990001-1412345678@g.us"),
    ],
)
def test_every_form_of_the_design_is_read(to: str, jid: str) -> None:
    assert recipient.parse(to).jid == jid


@pytest.mark.parametrize(
    "to",
    [
        "",
        "123456",
        "1234567890123456",
        "++5511999990001",
        "55 11 99999 0001",
        "5511999990001\n",
        "٥٥١١٩٩٩٩٩٠٠٠١",
        "5511999990001:3@s.whatsapp.net",
        "+5511999990001@s.whatsapp.net",
        "5511999990001@evil.example",
        "@s.whatsapp.net",
        "status@broadcast",
        None,
        5511999990001,
        ["5511999990001"],
    ],
)
def test_other_forms_are_refused_without_repeating_the_number(to: object) -> None:
    with pytest.raises(InvalidMessage) as caught:
        recipient.parse(to)
    assert caught.value.field == "to"
    assert "5511999990001" not in str(caught.value)


_ANYTHING = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A\+?[0-9]{5,17}(@[a-z.]{1,15})?\Z"),
    st.none(),
    st.integers(),
    st.floats(),
    st.lists(st.text(), max_size=3),
)


@settings(max_examples=1000, deadline=None)
@given(_ANYTHING)
@example("5511999990001@c.us")
def test_anything_is_a_recipient_or_refused_naming_the_field(to: object) -> None:
    try:
        found = recipient.parse(to)
    except InvalidMessage as refusal:
        assert refusal.field == "to"
    else:
        assert recipient.parse(found.jid) == found
