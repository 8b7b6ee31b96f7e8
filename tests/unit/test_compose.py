"""Message objects as WhatsApp's protobuf; what arrives is shown end to end."""

from typing import Any

import pytest

from whatsapp_worker.compose import PREPARED, compose, vcard
from whatsapp_worker.sandbox import protobufs

E2E = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")
ME, MY_LID, ANA, BOB = "5511900000000", "99887766", "5511999990001", "5511999990002"
CHAT, GROUP = f"{ANA}@s.whatsapp.net", "120363000000000001@g.us"


def made(content: dict[str, Any], chat: str = CHAT) -> Any:
    return compose(content, chat=chat, mine={ME, MY_LID}, now=1700000000.5, e2e=E2E)


def test_a_text_is_no_more_than_a_text() -> None:
    message = made({"type": "text", "text": {"body": "x", "preview_url": False}})
    assert message == E2E.Message(conversation="x")
    assert made({"type": "text", "text": {"body": "x"}, PREPARED: {}}) == message


def test_our_own_messages_are_known_by_number_and_by_hidden_id() -> None:
    for author in (f"+{ME}", f"{ME}@c.us", f"{MY_LID}@lid"):
        for chat in (CHAT, GROUP):
            reaction = {"message_id": "A", "emoji": "x", "from": author}
            key = made({"type": "reaction", "reaction": reaction}, chat).reactionMessage.key
            assert (key.fromMe, key.participant, key.remoteJID) == (True, "", chat)


def test_an_administrator_revokes_what_others_wrote() -> None:
    revoke = {"message_id": "A", "from": BOB}
    key = made({"type": "revoke", "revoke": revoke}, GROUP).protocolMessage.key
    assert (key.fromMe, key.participant) == (False, f"{BOB}@s.whatsapp.net")
    key = made({"type": "revoke", "revoke": {"message_id": "A"}}, GROUP).protocolMessage.key
    assert key.fromMe and not key.participant


def test_a_document_with_a_caption_is_wrapped_and_one_without_is_not() -> None:
    fields = {"mimetype": "application/pdf"}
    bare = made({"type": "document", "document": {"file": "a"}, PREPARED: fields})
    assert bare.documentMessage.mimetype == "application/pdf"
    given = {"file": "a", "caption": "c"}
    wrapped = made({"type": "document", "document": given, PREPARED: fields})
    inner = wrapped.documentWithCaptionMessage.message.documentMessage
    assert (inner.mimetype, inner.caption) == ("application/pdf", "c")


def test_a_place_has_its_name_and_address_where_it_has_any() -> None:
    place = {"latitude": -23.5, "longitude": -46.25, "name": "Sé"}
    made_of = made({"type": "location", "location": place}).locationMessage
    assert (made_of.degreesLatitude, made_of.degreesLongitude) == (-23.5, -46.25)
    assert made_of.name == "Sé" and not made_of.HasField("address")


@pytest.mark.parametrize("digits", [6, 7, 15, 16])
def test_a_phone_of_a_card_can_be_written_to_where_it_is_a_number(digits: int) -> None:
    phone = "1" * digits
    card = vcard({"name": {"formatted_name": "x"}, "phones": [{"phone": phone}]})
    assert (f"waid={phone}:{phone}" in card) == (7 <= digits <= 15)


def test_what_was_prepared_is_not_needed_again() -> None:
    content = {"type": "image", "image": {"file": "a"}, PREPARED: {"mimetype": "image/png"}}
    assert made(content) == made(content)
    assert content[PREPARED] == {"mimetype": "image/png"}


def test_a_vcard_has_what_the_contact_has() -> None:
    card = {
        "name": {"formatted_name": "Ana, Silva", "first_name": "Ana", "last_name": "Silva"},
        "phones": [
            {"phone": "+55 11 99999-0001", "type": "WORK"},
            {"phone": "0800 123", "wa_id": BOB},
            {"phone": "190"},
        ],
        "emails": [{"email": "a@example.org", "type": "WORK"}],
        "urls": [{"url": "https://example.org"}],
        "addresses": [{"street": "Rua A; 1", "zip": "01000", "country_code": "br"}],
        "org": {"company": "Acme", "department": "R&D", "title": "Head"},
        "birthday": "1990-12-31",
    }
    assert vcard(card).splitlines() == [
        "BEGIN:VCARD",
        "VERSION:3.0",
        "N:Silva;Ana;;;",
        "FN:Ana\\, Silva",
        "ORG:Acme;R&D",
        "TITLE:Head",
        f"TEL;type=WORK;waid={ANA}:+55 11 99999-0001",
        f"TEL;type=CELL;waid={BOB}:0800 123",
        "TEL;type=CELL:190",
        "EMAIL;type=WORK:a@example.org",
        "URL;type=HOME:https://example.org",
        "ADR;type=HOME:;;Rua A\\; 1;;;01000;br",
        "BDAY:1990-12-31",
        "END:VCARD",
    ]
