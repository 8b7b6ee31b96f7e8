"""The simulated contacts of the sandbox: they decrypt what arrives and write back.

Every phone number that is no paired device is a contact, made on demand. Its keys derive from a
seed in the state folder, its sessions lie in `contacts.db` there, so that a restarted sandbox
still understands what a client encrypts with yesterday's session.

Not thread-safe: all calls come from one thread (the server's event loop).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from whatsapp_worker.sandbox.signal import Bundle


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
            sender_key (only a group key, nothing to show), protocol or unknown.
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
        raise NotImplementedError


class Contacts:
    """All simulated contacts of one sandbox.

    Args:
        state_dir: Existing private folder; the seed and `contacts.db` lie in it.
    """

    def __init__(self, state_dir: Path) -> None:
        raise NotImplementedError

    def lid_of(self, phone: str) -> str:
        """The LID digits of a phone number: the same for ever, also of paired devices."""
        raise NotImplementedError

    def phone_of(self, lid: str) -> str | None:
        """The phone number behind LID digits; None if `lid_of` never gives that LID."""
        raise NotImplementedError

    def identity(self, phone: str) -> bytes:
        """The public identity key (32 bytes) of a contact."""
        raise NotImplementedError

    def bundle(self, phone: str) -> Bundle:
        """Keys for a first message to a contact, with a fresh one-time prekey each call."""
        raise NotImplementedError

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
            UndecryptableMessage: No session, wrong key, damaged bytes. State is unharmed.
        """
        raise NotImplementedError

    def has_session(self, *, phone: str, to: DeviceAddress) -> bool:
        """Whether the contact can write to that device without a bundle."""
        raise NotImplementedError

    def encrypt_text(
        self, *, phone: str, to: DeviceAddress, bundle: Bundle | None, text: str
    ) -> tuple[str, bytes]:
        """Encrypt a text from a contact to one device.

        Args:
            phone: The contact who writes.
            to: The device that shall read.
            bundle: Keys of that device; used only when there is no session yet.
            text: The body.

        Returns:
            The `type` attribute (`pkmsg` or `msg`) and the content of the `<enc>` node.

        Raises:
            NoSession: No session and no bundle.
            UntrustedBundle: The bundle's signature is wrong.
        """
        raise NotImplementedError

    def encrypt(
        self, *, phone: str, to: DeviceAddress, bundle: Bundle | None, message: bytes
    ) -> tuple[str, bytes]:
        """As `encrypt_text`, for any serialized `waE2E.Message`."""
        raise NotImplementedError

    def save(self) -> None:
        """Write changed sessions to disk; call about once a second.

        A kill between two calls loses nothing that matters: a session that only received can
        catch up from its last saved state, and one that sent is written at once.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Save and close the database."""
        raise NotImplementedError
