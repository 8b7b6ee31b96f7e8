"""The Signal protocol of one simulated party, in the wire format that whatsmeow speaks.

X3DH, the double ratchet and sender keys as libsignal's protocol version 3 has them. Not built on
the PyPI packages DoubleRatchet and X3DH: their ratchet trusts the header's `previousCounter`,
which whatsmeow's libsignal lets underflow to 2**32 - 1, and deep-copies its state per message.

Whatever is refused leaves a session as it was: state changes only after the MAC was right.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import xeddsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAX_SKIPPED = 2000  # message keys kept, and how far a counter may jump ahead, per chain
MAX_CHAINS = 5  # receiving chains kept per session state, as libsignal
MAX_STATES = 8  # session states kept per peer: older ones answer what was sent before a renewal

_VERSION = b"\x33"  # this version 3, oldest version 3
_KEY_TYPE = b"\x05"  # Curve25519, in front of every public key on the wire
_MAC_BYTES = 8
_SIGNATURE_BYTES = 64


class SignalError(Exception):
    """Anything that the protocol refuses; state is as it was before the call."""


class UndecryptableMessage(SignalError):
    """No session, wrong key or damaged bytes."""


class DuplicateMessage(UndecryptableMessage):
    """That message key was used before, or is too old to be kept."""


class NoSession(UndecryptableMessage):
    """There is no session, and nothing to make one from."""


class UntrustedBundle(SignalError):
    """The signed prekey of a bundle is not signed by its identity key."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a server hands out so that someone can write first; public keys have 32 bytes."""

    registration_id: int
    identity: bytes
    signed_prekey_id: int
    signed_prekey: bytes
    signature: bytes  # XEdDSA by the identity over 05 + signed_prekey, 64 bytes
    prekey_id: int | None = None
    prekey: bytes | None = None


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A Curve25519 key pair, 32 bytes each."""

    private: bytes
    public: bytes

    @classmethod
    def of(cls, private: bytes) -> Self:
        """The pair that belongs to a private key."""
        key = X25519PrivateKey.from_private_bytes(private)
        return cls(private, key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Self:
        """A fresh pair."""
        return cls.of(os.urandom(32))


@dataclass(frozen=True, slots=True)
class Party:
    """The long-lived keys of one party.

    Attributes:
        prekey: Finds the one-time prekey with that id; None if it was never handed out.
    """

    registration_id: int
    identity: KeyPair
    signed_prekey_id: int
    signed_prekey: KeyPair
    signature: bytes
    prekey: Callable[[int], KeyPair | None]


def sign(private: bytes, message: bytes) -> bytes:
    """An XEdDSA signature (64 bytes) by a Curve25519 private key."""
    positive = xeddsa.priv_force_sign(private, False)
    return bytes(xeddsa.ed25519_priv_sign(positive, message, os.urandom(64)))


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether an XEdDSA signature by a Curve25519 public key is right.

    libsignal keeps the sign of the Edwards point in the signature's top bit.
    """
    if len(signature) != _SIGNATURE_BYTES:
        return False
    is_negative = bool(signature[-1] & 0x80)
    plain = signature[:-1] + bytes([signature[-1] & 0x7F])
    edwards = xeddsa.curve25519_pub_to_ed25519_pub(public, is_negative)
    return bool(xeddsa.ed25519_verify(plain, edwards, message))


@dataclass(slots=True)
class Chain:
    """One symmetric ratchet: its key, the index of the next message, keys kept for late ones."""

    key: bytes
    index: int = 0
    skipped: dict[int, bytes] = field(default_factory=dict)

    def step(self) -> bytes:
        """Advance by one message and give the seed of that message's keys."""
        seed = hmac.digest(self.key, b"\x01", "sha256")
        self.key = hmac.digest(self.key, b"\x02", "sha256")
        self.index += 1
        return seed

    def ahead(self, index: int) -> tuple[bytes, Chain]:
        """The seed of message `index`, and the chain as it will be once that message is read.

        Raises:
            DuplicateMessage: Read before, or its key was dropped.
            UndecryptableMessage: More than MAX_SKIPPED messages ahead.
        """
        skipped = dict(self.skipped)
        after = Chain(self.key, self.index, skipped)
        if index < self.index:
            if index not in skipped:
                raise DuplicateMessage(f"message {index} of this chain was read before")
            return skipped.pop(index), after
        if index - self.index > MAX_SKIPPED:
            raise UndecryptableMessage(f"message {index} is too far ahead of {self.index}")
        while after.index < index:
            late = after.index
            skipped[late] = after.step()
        seed = after.step()
        while len(skipped) > MAX_SKIPPED:
            del skipped[next(iter(skipped))]
        return seed, after

    def to_json(self) -> list[Any]:
        """For the database."""
        return [self.key.hex(), self.index, {str(i): key.hex() for i, key in self.skipped.items()}]

    @classmethod
    def from_json(cls, stored: list[Any]) -> Self:
        """From the database."""
        key, index, skipped = stored
        kept = {int(i): bytes.fromhex(seed) for i, seed in skipped.items()}
        return cls(bytes.fromhex(key), index, kept)


@dataclass(slots=True)
class State:
    """One double ratchet between two identities."""

    ours: bytes  # our public identity key
    theirs: bytes  # their public identity key
    base_key: bytes  # the initiator's; names this state
    root: bytes
    ratchet: KeyPair
    sending: Chain
    previous: int = 0  # messages in our sending chain before this one
    receiving: dict[bytes, Chain] = field(default_factory=dict)  # by their ratchet key
    # What every message repeats until the peer has answered: their registration id is not needed,
    # but their one-time prekey's id (or None) and their signed prekey's id are.
    unanswered: tuple[int | None, int] | None = None

    def turn(self, their_ratchet: bytes) -> None:
        """The Diffie-Hellman step on the peer's new ratchet key."""
        root, key = _ratchet(self.root, self.ratchet.private, their_ratchet)
        self.receiving[their_ratchet] = Chain(key)
        while len(self.receiving) > MAX_CHAINS:
            del self.receiving[next(iter(self.receiving))]
        self.ratchet = KeyPair.generate()
        self.previous = self.sending.index
        self.root, sending = _ratchet(root, self.ratchet.private, their_ratchet)
        self.sending = Chain(sending)

    def copy(self) -> State:
        """A state that can be turned without touching this one."""
        return State(
            self.ours,
            self.theirs,
            self.base_key,
            self.root,
            self.ratchet,
            self.sending,
            self.previous,
            dict(self.receiving),
            self.unanswered,
        )

    def to_json(self) -> dict[str, Any]:
        """For the database."""
        return {
            "ours": self.ours.hex(),
            "theirs": self.theirs.hex(),
            "base_key": self.base_key.hex(),
            "root": self.root.hex(),
            "ratchet": self.ratchet.private.hex(),
            "sending": self.sending.to_json(),
            "previous": self.previous,
            "receiving": {key.hex(): chain.to_json() for key, chain in self.receiving.items()},
            "unanswered": self.unanswered,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """From the database."""
        chains = stored["receiving"].items()
        return cls(
            ours=bytes.fromhex(stored["ours"]),
            theirs=bytes.fromhex(stored["theirs"]),
            base_key=bytes.fromhex(stored["base_key"]),
            root=bytes.fromhex(stored["root"]),
            ratchet=KeyPair.of(bytes.fromhex(stored["ratchet"])),
            sending=Chain.from_json(stored["sending"]),
            previous=stored["previous"],
            receiving={bytes.fromhex(key): Chain.from_json(chain) for key, chain in chains},
            unanswered=tuple(stored["unanswered"]) if stored["unanswered"] else None,
        )


@dataclass(slots=True)
class Session:
    """All that a party knows of one peer device; the newest state comes first."""

    states: list[State] = field(default_factory=list)

    @property
    def peer_identity(self) -> bytes | None:
        """The identity key that the peer was last seen with."""
        return self.states[0].theirs if self.states else None

    def begin(self, party: Party, bundle: Bundle) -> None:
        """Start a new state towards a peer, as the one who writes first.

        Raises:
            UntrustedBundle: The signature in the bundle is wrong.
        """
        signed = _KEY_TYPE + bundle.signed_prekey
        if not verify(bundle.identity, signed, bundle.signature):
            raise UntrustedBundle("the signed prekey is not signed by the identity key")
        base = KeyPair.generate()
        secrets = [
            _agree(party.identity.private, bundle.signed_prekey),
            _agree(base.private, bundle.identity),
            _agree(base.private, bundle.signed_prekey),
        ]
        if bundle.prekey is not None:
            secrets.append(_agree(base.private, bundle.prekey))
        root, receiving = _master(secrets)
        ratchet = KeyPair.generate()
        root, sending = _ratchet(root, ratchet.private, bundle.signed_prekey)
        state = State(
            ours=party.identity.public,
            theirs=bundle.identity,
            base_key=base.public,
            root=root,
            ratchet=ratchet,
            sending=Chain(sending),
            receiving={bundle.signed_prekey: Chain(receiving)},
            unanswered=(bundle.prekey_id, bundle.signed_prekey_id),
        )
        self._put_first(state)

    def encrypt(self, party: Party, plaintext: bytes) -> tuple[str, bytes]:
        """Encrypt with the newest state.

        Returns:
            `pkmsg` until the peer has answered, then `msg`; and the bytes for the wire.

        Raises:
            NoSession: Nothing was begun or received yet.
        """
        if not self.states:
            raise NoSession("no session with this device")
        state = self.states[0]
        counter = state.sending.index
        cipher_key, mac_key, iv = _message_keys(state.sending.step())
        body = _VERSION + _emit(
            (1, _KEY_TYPE + state.ratchet.public),
            (2, counter),
            (3, state.previous),
            (4, _encrypt_cbc(cipher_key, iv, plaintext)),
        )
        message = body + _mac(mac_key, state.ours, state.theirs, body)
        if state.unanswered is None:
            return "msg", message
        prekey_id, signed_prekey_id = state.unanswered
        return "pkmsg", _VERSION + _emit(
            (1, prekey_id),
            (2, _KEY_TYPE + state.base_key),
            (3, _KEY_TYPE + party.identity.public),
            (4, message),
            (5, party.registration_id),
            (6, signed_prekey_id),
        )

    def decrypt(self, party: Party, enc_type: str, ciphertext: bytes) -> bytes:
        """Decrypt a `pkmsg` or a `msg`.

        Raises:
            DuplicateMessage: Read before.
            NoSession: A `msg`, and there is no state at all.
            UndecryptableMessage: Anything else that is wrong with it.
        """
        if enc_type == "pkmsg":
            return self._decrypt_first(party, ciphertext)
        if enc_type == "msg":
            return self._decrypt_any(ciphertext)
        raise UndecryptableMessage(f"unknown encryption type {enc_type!r}")

    def to_json(self) -> list[Any]:
        """For the database."""
        return [state.to_json() for state in self.states]

    @classmethod
    def from_json(cls, stored: list[Any]) -> Self:
        """From the database."""
        return cls([State.from_json(state) for state in stored])

    def _decrypt_first(self, party: Party, ciphertext: bytes) -> bytes:
        fields = _parse(_unversioned(ciphertext))
        base_key, identity = _public_key(fields, 2), _public_key(fields, 3)
        message = _bytes(fields, 4)
        for state in self.states:
            if state.base_key == base_key:
                return self._advance(state, message)
        state = _answer(party, base_key, identity, fields.get(1), fields.get(6))
        return self._advance(state, message)

    def _decrypt_any(self, message: bytes) -> bytes:
        if not self.states:
            raise NoSession("no session with this device")
        for state in self.states:
            try:
                return self._advance(state, message)
            except DuplicateMessage:
                raise
            except UndecryptableMessage as error:
                last = error
        raise last

    def _advance(self, state: State, message: bytes) -> bytes:
        """Read one message with a state; when that works, its successor becomes the newest."""
        body, mac = message[:-_MAC_BYTES], message[-_MAC_BYTES:]
        fields = _parse(_unversioned(body))
        their_ratchet, counter = _public_key(fields, 1), _number(fields, 2)
        after = state.copy()
        if their_ratchet not in after.receiving:
            after.turn(their_ratchet)
        seed, after.receiving[their_ratchet] = after.receiving[their_ratchet].ahead(counter)
        cipher_key, mac_key, iv = _message_keys(seed)
        if not hmac.compare_digest(mac, _mac(mac_key, state.theirs, state.ours, body)):
            raise UndecryptableMessage("the message authentication code is wrong")
        plaintext = _decrypt_cbc(cipher_key, iv, _bytes(fields, 4))
        after.unanswered = None
        self._put_first(after)
        return plaintext

    def _put_first(self, state: State) -> None:
        others = [other for other in self.states if other.base_key != state.base_key]
        self.states = [state, *others[: MAX_STATES - 1]]


@dataclass(slots=True)
class SenderKeys:
    """The group keys of one sender in one group, by key id, newest last."""

    chains: dict[int, tuple[bytes, Chain]] = field(default_factory=dict)

    def learn(self, distribution: bytes) -> None:
        """Take in a SenderKeyDistributionMessage.

        Raises:
            UndecryptableMessage: It is damaged.
        """
        fields = _parse(_unversioned(distribution))
        key_id, index = _number(fields, 1), _number(fields, 2)
        signing, key = _public_key(fields, 4), _bytes(fields, 3)
        known = self.chains.pop(key_id, None)
        if known is not None and known[0] == signing and known[1].index >= index:
            self.chains[key_id] = known  # the same key again, which we have followed further
        else:
            self.chains[key_id] = (signing, Chain(key, index))
        while len(self.chains) > MAX_CHAINS:
            del self.chains[next(iter(self.chains))]

    def decrypt(self, ciphertext: bytes) -> bytes:
        """Decrypt an `skmsg`.

        Raises:
            DuplicateMessage: Read before.
            NoSession: Its sender key is not known.
            UndecryptableMessage: Anything else that is wrong with it.
        """
        signed, signature = ciphertext[:-_SIGNATURE_BYTES], ciphertext[-_SIGNATURE_BYTES:]
        fields = _parse(_unversioned(signed))
        key_id, index = _number(fields, 1), _number(fields, 2)
        if key_id not in self.chains:
            raise NoSession("the sender key of this group message is not known")
        signing, chain = self.chains[key_id]
        if not verify(signing, signed, signature):
            raise UndecryptableMessage("the signature is wrong")
        seed, after = chain.ahead(index)
        keys = _derive(seed, b"WhisperGroup", 48)
        plaintext = _decrypt_cbc(keys[16:], keys[:16], _bytes(fields, 3))
        self.chains[key_id] = (signing, after)
        return plaintext

    def to_json(self) -> list[Any]:
        """For the database."""
        return [[i, signing.hex(), chain.to_json()] for i, (signing, chain) in self.chains.items()]

    @classmethod
    def from_json(cls, stored: list[Any]) -> Self:
        """From the database."""
        return cls({i: (bytes.fromhex(key), Chain.from_json(chain)) for i, key, chain in stored})


def _answer(
    party: Party, base_key: bytes, identity: bytes, prekey_id: Any, signed_prekey_id: Any
) -> State:
    """X3DH as the one who was written to."""
    if signed_prekey_id != party.signed_prekey_id:
        raise UndecryptableMessage(f"signed prekey {signed_prekey_id} is not ours")
    secrets = [
        _agree(party.signed_prekey.private, identity),
        _agree(party.identity.private, base_key),
        _agree(party.signed_prekey.private, base_key),
    ]
    if prekey_id:
        prekey = party.prekey(prekey_id) if isinstance(prekey_id, int) else None
        if prekey is None:
            raise UndecryptableMessage(f"one-time prekey {prekey_id} is not ours")
        secrets.append(_agree(prekey.private, base_key))
    root, sending = _master(secrets)
    return State(
        ours=party.identity.public,
        theirs=identity,
        base_key=base_key,
        root=root,
        ratchet=party.signed_prekey,
        sending=Chain(sending),
    )


def _agree(private: bytes, public: bytes) -> bytes:
    try:
        key = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(key)
    except ValueError as error:  # a point of low order
        raise UndecryptableMessage("a public key is not usable") from error


def _derive(secret: bytes, info: bytes, length: int, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


def _master(secrets: list[bytes]) -> tuple[bytes, bytes]:
    keys = _derive(b"\xff" * 32 + b"".join(secrets), b"WhisperText", 64)
    return keys[:32], keys[32:]


def _ratchet(root: bytes, private: bytes, public: bytes) -> tuple[bytes, bytes]:
    """The next root key and the key of a new chain."""
    keys = _derive(_agree(private, public), b"WhisperRatchet", 64, salt=root)
    return keys[:32], keys[32:]


def _message_keys(seed: bytes) -> tuple[bytes, bytes, bytes]:
    keys = _derive(seed, b"WhisperMessageKeys", 80)
    return keys[:32], keys[32:64], keys[64:]


def _mac(key: bytes, sender: bytes, receiver: bytes, body: bytes) -> bytes:
    signed = _KEY_TYPE + sender + _KEY_TYPE + receiver + body
    return hmac.digest(key, signed, "sha256")[:_MAC_BYTES]


def _encrypt_cbc(key: bytes, iv: bytes, plaintext: bytes) -> bytes:
    fill = 16 - len(plaintext) % 16
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(plaintext + bytes([fill]) * fill) + encryptor.finalize()


def _decrypt_cbc(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    if not ciphertext or len(ciphertext) % 16:
        raise UndecryptableMessage("the ciphertext is not made of whole blocks")
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(ciphertext) + decryptor.finalize()
    fill = padded[-1]
    if not 1 <= fill <= 16 or padded[-fill:] != bytes([fill]) * fill:
        raise UndecryptableMessage("the block padding is wrong")
    return padded[:-fill]


# Four flat messages of numbers and bytes: a codec of two functions, whose field order (by number,
# zeros written) is part of what libsignal puts under its MAC.

_Fields = dict[int, int | bytes]


def _emit(*fields: tuple[int, int | bytes | None]) -> bytes:
    out = bytearray()
    for number, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse(data: bytes) -> _Fields:
    fields: _Fields = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 not in (0, 2):
            raise UndecryptableMessage("a field has an unknown type")
        value, at = _read_varint(data, at)
        if tag & 7 == 0:
            fields[tag >> 3] = value
            continue
        if at + value > len(data):
            raise UndecryptableMessage("the message is cut off")
        fields[tag >> 3] = data[at : at + value]
        at += value
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise UndecryptableMessage("the message is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise UndecryptableMessage("a number is too long")


def _unversioned(data: bytes) -> bytes:
    if not data or data[0] >> 4 != 3:
        raise UndecryptableMessage("the message is not of protocol version 3")
    return data[1:]


def _number(fields: _Fields, number: int) -> int:
    value = fields.get(number, 0)
    if not isinstance(value, int) or value >= 2**32:
        raise UndecryptableMessage(f"field {number} is not a 32-bit number")
    return value


def _bytes(fields: _Fields, number: int) -> bytes:
    value = fields.get(number)
    if not isinstance(value, bytes):
        raise UndecryptableMessage(f"field {number} is missing")
    return value


def _public_key(fields: _Fields, number: int) -> bytes:
    value = _bytes(fields, number)
    if len(value) != 33 or value[:1] != _KEY_TYPE:
        raise UndecryptableMessage(f"field {number} is not a Curve25519 key")
    return value[1:]
