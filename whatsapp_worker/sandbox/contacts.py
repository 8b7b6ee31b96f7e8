"""The simulated contacts of the sandbox: they decrypt what arrives and write back.

Every phone number that is no paired device is a contact, made on demand. Its keys derive from a
seed, its sessions lie beside that seed in `contacts.db`, so that a restarted sandbox still
understands what a client encrypts with yesterday's session.

Not thread-safe: all calls come from one thread (the server's event loop).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.signal import (
    Bundle,
    KeyPair,
    Party,
    SenderKeys,
    Session,
    UndecryptableMessage,
    sign,
)

e2e = protobufs.load("waE2E.WAWebProtobufsE2E_pb2")

DATABASE = "contacts.db"
MAX_CACHED = 10_000  # sessions in memory; the others wait in the database
MAX_STORED = 200_000  # sessions in the database; the oldest are dropped when it is opened
MAX_WRAPPERS = 8

_SCHEMA_VERSION = 1
_LID_PREFIX = "2"  # keeps a LID apart from its number, and leading zeros alive


class ContactsUnreadable(Exception):
    """`contacts.db` is damaged or of another version; removing it makes new contacts."""


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """One linked device as Signal names it: phone digits and device number (0 is the phone).

    Always the phone number, never the LID, so that a device has one session per contact.
    """

    phone: str
    device: int

    def __str__(self) -> str:
        return f"{self.phone}:{self.device}"


@dataclass(frozen=True)
class Received:
    """One decrypted message, as the contact reads it.

    Attributes:
        type: text, extended_text, image, video, audio, document, sticker, location,
            live_location, contact, contacts, reaction, poll, poll_vote, edit, revoke,
            sender_key (only a group key, nothing to show), protocol, empty, or else the name of
            the protobuf field in snake case without `message`.
        text: What a person reads first: body, caption, emoji, question, name; None if nothing.
        content: The serialized `waE2E.Message` itself, wrappers taken off.
        message_secret: `messageContextInfo.messageSecret`, None when the sender gave none.
        sent_to: The chat that it went to, for a copy to the sender's own other devices
            (DeviceSentMessage); None for a message to this contact.
    """

    type: str
    text: str | None
    content: bytes
    message_secret: bytes | None
    sent_to: str | None = None

    @cached_property
    def message(self) -> dict[str, Any]:
        """The message in protobuf's JSON form, bytes as base64; made when first asked for."""
        message: dict[str, Any] = MessageToDict(e2e.Message.FromString(self.content))
        return message


class Contacts:
    """All simulated contacts of one sandbox.

    Args:
        state_dir: Existing private folder; `contacts.db` lies in it.

    Raises:
        ContactsUnreadable: That file is damaged, or a newer version wrote it.
    """

    def __init__(self, state_dir: Path) -> None:
        self._records = _Records(state_dir / DATABASE)
        self._seed = self._records.seed()
        self._party = lru_cache(maxsize=MAX_CACHED)(self._derive_party)

    @staticmethod
    def lid_of(phone: str) -> str:
        """The LID digits of a phone number: the same for ever, also of paired devices."""
        return _LID_PREFIX + phone[::-1]

    @staticmethod
    def phone_of(lid: str) -> str | None:
        """The phone number behind LID digits; None if `lid_of` never gives that LID."""
        if not re.fullmatch(_LID_PREFIX + "[0-9]+", lid):
            return None
        return lid[len(_LID_PREFIX) :][::-1]

    def identity(self, phone: str) -> bytes:
        """The public identity key (32 bytes) of a contact."""
        return self._party(phone).identity.public

    def identity_pair(self, phone: str) -> KeyPair:
        """The identity key of a number's own phone, which signs the devices that it links."""
        return self._party(phone).identity

    def bundle(self, phone: str) -> Bundle:
        """Keys for a first message to a contact, with a fresh one-time prekey each call."""
        party = self._party(phone)
        prekey_id = 1 + int.from_bytes(os.urandom(3), "big") % 0xFFFFFE
        return Bundle(
            registration_id=party.registration_id,
            identity=party.identity.public,
            signed_prekey_id=party.signed_prekey_id,
            signed_prekey=party.signed_prekey.public,
            signature=party.signature,
            prekey_id=prekey_id,
            prekey=self._derive_pair(f"prekey {prekey_id}", phone).public,
        )

    def receive(
        self,
        *,
        sender: DeviceAddress,
        phone: str,
        enc_type: str,
        ciphertext: bytes,
        group: str | None = None,
    ) -> Received:
        """Decrypt one `<enc>` that a device sent to a contact.

        Args:
            sender: The device that sent it.
            phone: The contact (any number; for copies to the sender's own phone, the sender's).
            enc_type: `pkmsg`, `msg` or `skmsg`.
            ciphertext: Content of the `<enc>` node.
            group: The group's JID, needed for `skmsg`, whose key came in an earlier `pkmsg` or
                `msg` of the same or an older message (hand in `<participants>` first).

        Raises:
            DuplicateMessage: That ciphertext was decrypted before. State is unharmed.
            NoSession: There is no session, or for `skmsg` no sender key.
            UndecryptableMessage: Wrong key, damaged bytes. State is unharmed.
        """
        if enc_type == "skmsg":
            return _read(self._decrypt_group(sender, phone, group or "", ciphertext))
        session = self._records.session(phone, sender)
        padded = session.decrypt(self._party(phone), enc_type, ciphertext)
        self._records.put(phone, sender, "", session)
        message = _unpadded(padded)
        self._learn_group_key(sender, phone, message)
        return _read(message)

    def has_session(self, *, phone: str, to: DeviceAddress, identity: bytes) -> bool:
        """Whether the contact can write to that device without a bundle.

        Args:
            phone: The contact.
            to: The device.
            identity: The device's public identity key as the server knows it: a device that was
                linked again has another, and the old session is of no use.
        """
        return self._records.session(phone, to).peer_identity == identity

    def encrypt_text(
        self, *, phone: str, to: DeviceAddress, bundle: Bundle | None, text: str
    ) -> tuple[str, bytes]:
        """Encrypt a text from a contact to one device.

        Args:
            phone: The contact who writes.
            to: The device that shall read.
            bundle: Keys of that device to start a new session with; None goes on with the old.
            text: The body.

        Returns:
            The `type` attribute (`pkmsg` or `msg`) and the content of the `<enc>` node.

        Raises:
            NoSession: No session and no bundle.
            UntrustedBundle: The bundle's signature is wrong.
        """
        message = e2e.Message(conversation=text).SerializeToString()
        return self.encrypt(phone=phone, to=to, bundle=bundle, message=message)

    def encrypt(
        self, *, phone: str, to: DeviceAddress, bundle: Bundle | None, message: bytes
    ) -> tuple[str, bytes]:
        """As `encrypt_text`, for any serialized `waE2E.Message`."""
        party, session = self._party(phone), self._records.session(phone, to)
        if bundle is not None:
            session.begin(party, bundle)
        encrypted = session.encrypt(party, _padded(message))
        self._records.put(phone, to, "", session)
        # At once: a sending chain that went back in time would use a key twice.
        self._records.save()
        return encrypted

    def save(self) -> None:
        """Write changed sessions to disk; call about once a second.

        A kill between two calls loses nothing that matters: a session that only received can
        catch up from its last saved state, and one that sent is written at once.
        """
        self._records.save()

    def close(self) -> None:
        """Save and close the database."""
        self._records.close()

    def _derive_pair(self, what: str, phone: str) -> KeyPair:
        info = f"{what} of {phone}".encode()
        return KeyPair.of(
            HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._seed)
        )

    def _derive_party(self, phone: str) -> Party:
        identity = self._derive_pair("identity", phone)
        signed_prekey = self._derive_pair("signed prekey", phone)
        registration = hmac.digest(self._seed, phone.encode(), "sha256")
        return Party(
            registration_id=1 + int.from_bytes(registration[:4], "big") % 0x3FFE,
            identity=identity,
            signed_prekey_id=1,
            signed_prekey=signed_prekey,
            signature=sign(identity.private, b"\x05" + signed_prekey.public),
            prekey=lambda prekey_id: self._derive_pair(f"prekey {prekey_id}", phone),
        )

    def _decrypt_group(
        self, sender: DeviceAddress, phone: str, group: str, ciphertext: bytes
    ) -> bytes:
        keys = self._records.sender_keys(phone, sender, group)
        padded = keys.decrypt(ciphertext)
        self._records.put(phone, sender, group, keys)
        return _unpadded(padded)

    def _learn_group_key(self, sender: DeviceAddress, phone: str, message: bytes) -> None:
        found = _parsed(message).senderKeyDistributionMessage
        if not found.axolotlSenderKeyDistributionMessage:
            return
        keys = self._records.sender_keys(phone, sender, found.groupID)
        keys.learn(found.axolotlSenderKeyDistributionMessage)
        self._records.put(phone, sender, found.groupID, keys)


# --- what a message says ------------------------------------------------------------------------

_TYPES = {
    "conversation": "text",
    "extendedTextMessage": "extended_text",
    "contactsArrayMessage": "contacts",
    "encReactionMessage": "reaction",
    "ptvMessage": "video",
    "pollCreationMessage": "poll",
    "pollCreationMessageV2": "poll",
    "pollCreationMessageV3": "poll",
    "pollCreationMessageV5": "poll",
    "pollCreationMessageV6": "poll",
    "pollUpdateMessage": "poll_vote",
}
_TEXTS = ("text", "caption", "title", "fileName", "name", "displayName", "address")
_BESIDE_THE_CONTENT = ("messageContextInfo", "senderKeyDistributionMessage")


def _read(message: bytes) -> Received:
    content = outer = _parsed(message)
    sent_to = None
    if outer.HasField("deviceSentMessage"):
        sent_to = outer.deviceSentMessage.destinationJID
        content = outer.deviceSentMessage.message
    secret = content.messageContextInfo.messageSecret or outer.messageContextInfo.messageSecret
    for _ in range(MAX_WRAPPERS):
        inner = next(_wrapped(content), None)
        if inner is None:
            break
        content = inner
        secret = content.messageContextInfo.messageSecret or secret
    kind, text = _kind_and_text(content)
    return Received(kind, text, content.SerializeToString(), secret or None, sent_to)


def _wrapped(content: Any) -> Iterator[Any]:
    """What lies in the wrappers: view once, ephemeral, document with caption, edited ..."""
    for field, value in content.ListFields():
        if field.message_type is e2e.FutureProofMessage.DESCRIPTOR and value.HasField("message"):
            yield value.message


def _kind_and_text(content: Any) -> tuple[str, str | None]:
    fields = [(f.name, v) for f, v in content.ListFields() if f.name not in _BESIDE_THE_CONTENT]
    if not fields:
        has_key = content.HasField("senderKeyDistributionMessage")
        return ("sender_key" if has_key else "empty"), None
    name, value = fields[0]
    if name == "protocolMessage":
        return _protocol(value)
    kind = _TYPES.get(name) or re.sub("([A-Z])", r"_\1", name.removesuffix("Message")).lower()
    return kind, value if isinstance(value, str) else _text_of(value)


def _protocol(value: Any) -> tuple[str, str | None]:
    types = e2e.ProtocolMessage
    if value.type == types.MESSAGE_EDIT:
        return "edit", _kind_and_text(value.editedMessage)[1]
    if value.type == types.REVOKE and value.HasField("key"):
        return "revoke", None
    return "protocol", None


def _text_of(value: Any) -> str | None:
    names = value.DESCRIPTOR.fields_by_name
    texts = (getattr(value, name) for name in _TEXTS if name in names)
    return next((text for text in texts if isinstance(text, str) and text), None)


def _parsed(message: bytes) -> Any:
    try:
        return e2e.Message.FromString(message)
    except DecodeError as error:
        raise UndecryptableMessage("decrypted, but it is no message") from error


def _padded(message: bytes) -> bytes:
    length = 1 + os.urandom(1)[0] % 16
    return message + bytes([length]) * length


def _unpadded(padded: bytes) -> bytes:
    length = padded[-1] if padded else 0
    if not 1 <= length <= len(padded) or padded[-length:] != bytes([length]) * length:
        raise UndecryptableMessage("decrypted, but the padding is wrong")
    return padded[:-length]


# --- what is kept -------------------------------------------------------------------------------

_Record = Session | SenderKeys
_Key = tuple[str, str, str]  # contact, device, group ("" for a session)


class _Records:
    """Sessions and sender keys: the recent ones in memory, all in the database."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise ContactsUnreadable(f"{path} is damaged; remove it to start over") from error
        self._cache: OrderedDict[_Key, _Record] = OrderedDict()
        self._changed: set[_Key] = set()

    def seed(self) -> bytes:
        """The 32 bytes that all contacts' keys derive from; made on first use."""
        self._database.execute("INSERT OR IGNORE INTO seed VALUES (1, ?)", (os.urandom(32),))
        (seed,) = self._database.execute("SELECT seed FROM seed").fetchone()
        return bytes(seed)

    def session(self, phone: str, device: DeviceAddress) -> Session:
        """The session of a contact with a device; an empty one if there is none."""
        found = self._load((phone, str(device), ""))
        return found if isinstance(found, Session) else Session()

    def sender_keys(self, phone: str, device: DeviceAddress, group: str) -> SenderKeys:
        """What a contact knows of a device's keys in a group; empty if nothing."""
        found = self._load((phone, str(device), group))
        return found if isinstance(found, SenderKeys) else SenderKeys()

    def put(self, phone: str, device: DeviceAddress, group: str, record: _Record) -> None:
        """Remember a changed record; it reaches the disk with the next `save`."""
        key = (phone, str(device), group)
        self._changed.add(key)
        self._remember(key, record)

    def save(self) -> None:
        """Write all changed records in one transaction."""
        if not self._changed:
            return
        rows = [(*key, json.dumps(self._cache[key].to_json())) for key in self._changed]
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT INTO records VALUES (?, ?, ?, ?) "
            "ON CONFLICT (contact, device, chat) DO UPDATE SET record = excluded.record",
            rows,
        )
        self._database.execute("COMMIT")
        self._changed.clear()

    def close(self) -> None:
        """Save and close."""
        self.save()
        self._database.close()

    def _prepare(self) -> None:
        execute = self._database.execute
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in (0, _SCHEMA_VERSION):
            raise ContactsUnreadable(f"{DATABASE} has version {version}; remove it to start over")
        execute("CREATE TABLE IF NOT EXISTS seed (id INTEGER PRIMARY KEY, seed BLOB NOT NULL)")
        execute(
            "CREATE TABLE IF NOT EXISTS records (contact TEXT, device TEXT, chat TEXT, "
            "record TEXT NOT NULL, PRIMARY KEY (contact, device, chat))"
        )
        execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        execute(
            "DELETE FROM records WHERE rowid <= (SELECT max(rowid) FROM records) - ?",
            (MAX_STORED,),
        )

    def _load(self, key: _Key) -> _Record | None:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        row = self._database.execute(
            "SELECT record FROM records WHERE contact = ? AND device = ? AND chat = ?", key
        ).fetchone()
        if row is None:
            return None
        stored = json.loads(row[0])
        record = SenderKeys.from_json(stored) if key[2] else Session.from_json(stored)
        self._remember(key, record)
        return record

    def _remember(self, key: _Key, record: _Record) -> None:
        self._cache[key] = record
        self._cache.move_to_end(key)
        if len(self._cache) > MAX_CACHED:
            self.save()
            self._cache.popitem(last=False)
