"""The simulated contacts: what they keep, how they read every kind of message, what they write."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.sandbox import contacts as module
from whatsapp_worker.sandbox import signal
from whatsapp_worker.sandbox.contacts import Contacts, ContactsUnreadable, DeviceAddress, e2e
from whatsapp_worker.sandbox.signal import (
    DuplicateMessage,
    KeyPair,
    NoSession,
    Session,
    UndecryptableMessage,
)

ANA = "5511999990001"
SALES = DeviceAddress("5511888880000", 3)
GROUP = "120363000000000001@g.us"


class Device:
    """A linked device's side, as whatsmeow would keep it."""

    def __init__(self) -> None:
        identity, signed = KeyPair.generate(), KeyPair.generate()
        self.party = signal.Party(
            registration_id=77,
            identity=identity,
            signed_prekey_id=5,
            signed_prekey=signed,
            signature=signal.sign(identity.private, b"\x05" + signed.public),
            prekey=lambda _: None,
        )
        self.session = Session()

    def bundle(self) -> signal.Bundle:
        return signal.Bundle(
            registration_id=77,
            identity=self.party.identity.public,
            signed_prekey_id=5,
            signed_prekey=self.party.signed_prekey.public,
            signature=self.party.signature,
        )

    def write(self, message: Any) -> tuple[str, bytes]:
        return self.session.encrypt(self.party, message.SerializeToString() + b"\x03\x03\x03")

    def read(self, encrypted: tuple[str, bytes]) -> Any:
        padded = self.session.decrypt(self.party, *encrypted)
        return e2e.Message.FromString(padded[: -padded[-1]])


@pytest.fixture
def contacts(tmp_path: Path) -> Iterator[Contacts]:
    contacts = Contacts(tmp_path)
    yield contacts
    contacts.close()


@pytest.fixture
def device(contacts: Contacts) -> Device:
    device = Device()
    device.session.begin(device.party, contacts.bundle(ANA))
    return device


def receive(contacts: Contacts, encrypted: tuple[str, bytes], **more: Any) -> module.Received:
    return contacts.receive(
        sender=SALES, phone=ANA, enc_type=encrypted[0], ciphertext=encrypted[1], **more
    )


def text(body: str) -> Any:
    return e2e.Message(conversation=body)


def test_a_text_is_decrypted_with_its_secret(contacts: Contacts, device: Device) -> None:
    message = text("hello")
    message.messageContextInfo.messageSecret = bytes(range(32))
    received = receive(contacts, device.write(message))
    assert (received.type, received.text, received.sent_to) == ("text", "hello", None)
    assert received.message_secret == bytes(range(32))
    assert received.message["conversation"] == "hello"


def test_a_repeated_ciphertext_is_a_duplicate(contacts: Contacts, device: Device) -> None:
    encrypted = device.write(text("once"))
    receive(contacts, encrypted)
    with pytest.raises(DuplicateMessage):
        receive(contacts, encrypted)
    assert receive(contacts, device.write(text("next"))).text == "next"


def test_an_undecryptable_message_of_a_stranger_leaves_no_session(contacts: Contacts) -> None:
    with pytest.raises(NoSession):
        receive(contacts, ("msg", b"\x33" + bytes(80)))
    with pytest.raises(UndecryptableMessage):
        receive(contacts, ("pkmsg", b"\x33garbage"))
    with pytest.raises(UndecryptableMessage):
        receive(contacts, ("frskmsg", b"\x33garbage"))
    assert not contacts.has_session(phone=ANA, to=SALES, identity=b"")


@pytest.mark.parametrize("padding", [b"", b"\x00", b"\x02", b"\x09\x09", b"\xff"])
def test_wrong_padding_is_told(contacts: Contacts, device: Device, padding: bytes) -> None:
    encrypted = device.session.encrypt(device.party, padding)
    with pytest.raises(UndecryptableMessage):
        receive(contacts, encrypted)


def test_a_contact_answers_and_writes_first(contacts: Contacts, device: Device) -> None:
    receive(contacts, device.write(text("hello")))
    identity = device.party.identity.public
    assert contacts.has_session(phone=ANA, to=SALES, identity=identity)
    enc_type, ciphertext = contacts.encrypt_text(phone=ANA, to=SALES, bundle=None, text="hi")
    assert enc_type == "msg"
    assert device.read((enc_type, ciphertext)).conversation == "hi"

    fresh = Device()
    with pytest.raises(NoSession):
        contacts.encrypt_text(phone="491700000001", to=SALES, bundle=None, text="hi")
    first = contacts.encrypt_text(
        phone="491700000001", to=SALES, bundle=fresh.bundle(), text="é" * 300
    )
    assert first[0] == "pkmsg"
    assert fresh.read(first).conversation == "é" * 300


def test_a_device_linked_again_needs_its_new_bundle(contacts: Contacts, device: Device) -> None:
    receive(contacts, device.write(text("hello")))
    again = Device()
    assert not contacts.has_session(phone=ANA, to=SALES, identity=again.party.identity.public)
    encrypted = contacts.encrypt_text(phone=ANA, to=SALES, bundle=again.bundle(), text="hi")
    assert again.read(encrypted).conversation == "hi"


@pytest.mark.parametrize("closed", [True, False])
def test_sessions_survive_a_restart(tmp_path: Path, closed: bool) -> None:
    first, device = Contacts(tmp_path), Device()
    bundle = first.bundle(ANA)
    device.session.begin(device.party, bundle)
    receive(first, device.write(text("before")))
    first.save()
    receive(first, device.write(text("not saved, if killed")))
    if closed:
        first.close()
    second = Contacts(tmp_path)
    assert second.identity(ANA) == bundle.identity
    assert receive(second, device.write(text("after"))).text == "after"
    encrypted = second.encrypt_text(phone=ANA, to=SALES, bundle=None, text="hi")
    assert device.read(encrypted).conversation == "hi"
    second.close()


def test_a_bundle_handed_out_before_a_restart_still_works(tmp_path: Path) -> None:
    first, device = Contacts(tmp_path), Device()
    device.session.begin(device.party, first.bundle(ANA))
    first.close()
    second = Contacts(tmp_path)
    assert receive(second, device.write(text("hello"))).text == "hello"
    second.close()


def test_what_was_sent_is_on_disk_at_once(tmp_path: Path) -> None:
    first, device = Contacts(tmp_path), Device()
    device.read(first.encrypt_text(phone=ANA, to=SALES, bundle=device.bundle(), text="one"))
    second = Contacts(tmp_path)
    again = second.encrypt_text(phone=ANA, to=SALES, bundle=None, text="two")
    assert device.read(again).conversation == "two"
    first.close()
    second.close()


def test_more_sessions_than_fit_into_memory_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    contacts = Contacts(tmp_path)
    devices = {str(phone): Device() for phone in range(49170, 49176)}
    for round_ in ("one", "two"):
        for phone, device in devices.items():
            if not device.session.states:
                device.session.begin(device.party, contacts.bundle(phone))
            enc_type, ciphertext = device.write(text(round_))
            received = contacts.receive(
                sender=SALES, phone=phone, enc_type=enc_type, ciphertext=ciphertext
            )
            assert received.text == round_
    contacts.close()


def test_the_oldest_sessions_are_dropped_when_the_database_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_STORED", 2)
    contacts = Contacts(tmp_path)
    for phone in ("491", "492", "493"):
        contacts.encrypt_text(phone=phone, to=SALES, bundle=Device().bundle(), text="hi")
    contacts.close()
    Contacts(tmp_path).close()
    with sqlite3.connect(tmp_path / module.DATABASE) as database:
        left = [row[0] for row in database.execute("SELECT contact FROM records ORDER BY rowid")]
    assert left == ["492", "493"]


def test_the_database_is_private(contacts: Contacts, tmp_path: Path) -> None:
    for path in tmp_path.glob(module.DATABASE + "*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_damaged_or_newer_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / module.DATABASE).write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(ContactsUnreadable, match="damaged"):
        Contacts(tmp_path)
    (tmp_path / module.DATABASE).unlink()
    with sqlite3.connect(tmp_path / module.DATABASE) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(ContactsUnreadable, match="version 2"):
        Contacts(tmp_path)


@given(phone=st.from_regex(r"\A[0-9]{1,15}\Z"))
def test_a_lid_leads_back_to_its_number(phone: str) -> None:
    lid = Contacts.lid_of(phone)
    assert lid.isdigit() and lid != phone
    assert Contacts.phone_of(lid) == phone


@pytest.mark.parametrize("lid", ["", "2", "99", "2abc"])
def test_other_lids_have_no_number(lid: str) -> None:
    assert Contacts.phone_of(lid) is None


def test_a_group_message_needs_the_key_from_the_fan_out(contacts: Contacts, device: Device) -> None:
    signing, chain_key = KeyPair.generate(), bytes(range(32))
    key = e2e.Message()
    key.senderKeyDistributionMessage.groupID = GROUP
    key.senderKeyDistributionMessage.axolotlSenderKeyDistributionMessage = b"\x33" + signal._emit(
        (1, 5), (2, 0), (3, chain_key), (4, b"\x05" + signing.public)
    )
    keys = signal._derive(signal.Chain(chain_key).step(), b"WhisperGroup", 48)
    padded = text("to all").SerializeToString() + b"\x01"
    body = signal._encrypt_cbc(keys[16:], keys[:16], padded)
    signed = b"\x33" + signal._emit((1, 5), (2, 0), (3, body))
    encrypted = ("skmsg", signed + signal.sign(signing.private, signed))

    with pytest.raises(NoSession):
        receive(contacts, encrypted, group=GROUP)
    received = receive(contacts, device.write(key))
    assert (received.type, received.text) == ("sender_key", None)
    assert receive(contacts, encrypted, group=GROUP).text == "to all"
    with pytest.raises(DuplicateMessage):
        receive(contacts, encrypted, group=GROUP)


WRAPPED_CAPTION = {"message": {"documentMessage": {"fileName": "a.pdf", "caption": "see"}}}
POLL = {"name": "Lunch?", "options": [{"optionName": "Yes"}]}
EDIT = {"message": {"protocolMessage": {"type": "MESSAGE_EDIT", "editedMessage": {}}}}


@pytest.mark.parametrize(
    ("content", "kind", "shown"),
    [
        ({"conversation": "hi"}, "text", "hi"),
        ({"extendedTextMessage": {"text": "see https://x.y"}}, "extended_text", "see https://x.y"),
        ({"imageMessage": {"caption": "look"}}, "image", "look"),
        ({"imageMessage": {"mimetype": "image/png"}}, "image", None),
        ({"videoMessage": {"caption": "look"}}, "video", "look"),
        ({"ptvMessage": {"seconds": 3}}, "video", None),
        ({"audioMessage": {"PTT": True}}, "audio", None),
        ({"stickerMessage": {"mimetype": "image/webp"}}, "sticker", None),
        ({"documentMessage": {"fileName": "a.pdf"}}, "document", "a.pdf"),
        ({"documentWithCaptionMessage": WRAPPED_CAPTION}, "document", "see"),
        ({"locationMessage": {"degreesLatitude": 1.5, "name": "Here"}}, "location", "Here"),
        ({"liveLocationMessage": {"caption": "on my way"}}, "live_location", "on my way"),
        ({"contactMessage": {"displayName": "Ana", "vcard": "BEGIN"}}, "contact", "Ana"),
        ({"contactsArrayMessage": {"displayName": "2 contacts"}}, "contacts", "2 contacts"),
        ({"reactionMessage": {"text": "👍"}}, "reaction", "👍"),
        ({"reactionMessage": {"text": ""}}, "reaction", None),
        ({"pollCreationMessage": POLL}, "poll", "Lunch?"),
        ({"pollCreationMessageV3": POLL}, "poll", "Lunch?"),
        ({"pollUpdateMessage": {}}, "poll_vote", None),
        ({"protocolMessage": {"type": "REVOKE", "key": {"ID": "3EB0"}}}, "revoke", None),
        ({"protocolMessage": {"type": "APP_STATE_SYNC_KEY_REQUEST"}}, "protocol", None),
        ({"editedMessage": EDIT}, "edit", None),
        ({"viewOnceMessageV2": {"message": {"imageMessage": {"caption": "1x"}}}}, "image", "1x"),
        ({"ephemeralMessage": {"message": {"conversation": "soon gone"}}}, "text", "soon gone"),
        ({"groupInviteMessage": {"caption": "join"}}, "group_invite", "join"),
        ({"eventMessage": {"name": "Party"}}, "event", "Party"),
        ({}, "empty", None),
    ],
)
def test_every_kind_of_message_is_named_and_shown(
    contacts: Contacts, device: Device, content: dict[str, Any], kind: str, shown: str | None
) -> None:
    received = receive(contacts, device.write(ParseDict(content, e2e.Message())))
    assert (received.type, received.text) == (kind, shown)


def test_an_edit_shows_its_new_text(contacts: Contacts, device: Device) -> None:
    edit = e2e.Message()
    inner = edit.editedMessage.message.protocolMessage
    inner.type = e2e.ProtocolMessage.MESSAGE_EDIT
    inner.key.ID = "3EB0AA"
    inner.editedMessage.conversation = "corrected"
    received = receive(contacts, device.write(edit))
    assert (received.type, received.text) == ("edit", "corrected")
    assert received.message["protocolMessage"]["key"]["ID"] == "3EB0AA"


def test_a_copy_for_the_own_phone_names_its_chat(contacts: Contacts, device: Device) -> None:
    copy = e2e.Message()
    copy.deviceSentMessage.destinationJID = f"{ANA}@s.whatsapp.net"
    copy.deviceSentMessage.message.conversation = "hi"
    copy.messageContextInfo.messageSecret = bytes(32)
    received = receive(contacts, device.write(copy))
    assert (received.type, received.text) == ("text", "hi")
    assert received.sent_to == f"{ANA}@s.whatsapp.net"
    assert received.message_secret == bytes(32)


def test_a_tower_of_wrappers_is_not_climbed_for_ever(contacts: Contacts, device: Device) -> None:
    tower = text("inside")
    for _ in range(30):
        outer = e2e.Message()
        outer.ephemeralMessage.message.CopyFrom(tower)
        tower = outer
    assert receive(contacts, device.write(tower)).type == "ephemeral"
