"""The server's side of Noise_XX_25519_AESGCM_SHA256, as WhatsApp frames it. Pure."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.tokens import DICTIONARY_VERSION

PROLOGUE = bytes((ord("W"), ord("A"), 6, DICTIONARY_VERSION))
_PATTERN = b"Noise_XX_25519_AESGCM_SHA256\0\0\0\0"

_wa6 = protobufs.load("waWa6.WAWebProtobufsWa6_pb2")


class NoiseFailed(Exception):
    """The other side does not speak the protocol, or with other keys."""


class Cipher:
    """One direction of an established connection."""

    __slots__ = ("_aead", "_counter")

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._counter = 0

    def encrypt(self, plaintext: bytes, associated: bytes | None = None) -> bytes:
        """Encrypt the next frame."""
        return self._aead.encrypt(self._nonce(), plaintext, associated)

    def decrypt(self, ciphertext: bytes, associated: bytes | None = None) -> bytes:
        """Decrypt the next frame.

        Raises:
            NoiseFailed: It was not encrypted by the other side as the next one.
        """
        try:
            return self._aead.decrypt(self._nonce(), ciphertext, associated)
        except (InvalidTag, ValueError) as error:
            raise NoiseFailed("a frame that the keys do not open") from error

    def _nonce(self) -> bytes:
        nonce = struct.pack(">QI", 0, self._counter)
        self._counter += 1
        return nonce


class ServerHandshake:
    """Answer `hello`, then read `finish`; afterwards the two ciphers are there.

    Args:
        static: The server's noise key, 32 bytes.
        certificate: Serialized `waCert.CertChain` that vouches for its public half.
    """

    def __init__(self, *, static: bytes, certificate: bytes) -> None:
        self._static = X25519PrivateKey.from_private_bytes(static)
        self._ephemeral = X25519PrivateKey.generate()
        self._certificate = certificate
        self._hash = self._salt = _PATTERN
        self._key = Cipher(_PATTERN)
        self._authenticate(PROLOGUE)

    def hello(self, frame: bytes) -> bytes:
        """Take the client's first frame, give the answer to send.

        Raises:
            NoiseFailed: It is no client hello.
        """
        client = self._message(frame).clientHello.ephemeral
        if len(client) != 32:
            raise NoiseFailed("no client hello")
        self._client_ephemeral = client
        public = self._ephemeral.public_key().public_bytes_raw()
        self._authenticate(client)
        self._authenticate(public)
        self._mix(self._ephemeral, client)
        static = self._encrypt(self._static.public_key().public_bytes_raw())
        self._mix(self._static, client)
        payload = self._encrypt(self._certificate)
        answer = _wa6.HandshakeMessage()
        answer.serverHello.ephemeral = public
        answer.serverHello.static = static
        answer.serverHello.payload = payload
        return bytes(answer.SerializeToString())

    def finish(self, frame: bytes) -> tuple[bytes, bytes, Cipher, Cipher]:
        """Take the client's second frame.

        Returns:
            The client's noise public key, its payload (`waWa6.ClientPayload`), the cipher that
            reads what it sends, and the cipher that writes to it.

        Raises:
            NoiseFailed: It is no client finish, or not under the agreed keys.
        """
        message = self._message(frame).clientFinish
        client = self._decrypt(message.static)
        if len(client) != 32:
            raise NoiseFailed("no client key")
        self._mix(self._ephemeral, client)
        payload = self._decrypt(message.payload)
        read_key, write_key = _expand(self._salt, b"")
        return client, payload, Cipher(read_key), Cipher(write_key)

    def _message(self, frame: bytes) -> Any:
        try:
            return _wa6.HandshakeMessage.FromString(frame)
        except Exception as error:  # protobuf's DecodeError
            raise NoiseFailed("no handshake message") from error

    def _authenticate(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix(self, private: X25519PrivateKey, public: bytes) -> None:
        try:
            secret = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise NoiseFailed("a key of low order") from error
        self._salt, key = _expand(self._salt, secret)
        self._key = Cipher(key)

    def _encrypt(self, plaintext: bytes) -> bytes:
        ciphertext = self._key.encrypt(plaintext, self._hash)
        self._authenticate(ciphertext)
        return ciphertext

    def _decrypt(self, ciphertext: bytes) -> bytes:
        plaintext = self._key.decrypt(ciphertext, self._hash)
        self._authenticate(ciphertext)
        return plaintext


def _expand(salt: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """HKDF-SHA256 without info, 64 bytes as two halves."""
    extracted = hmac.digest(salt, secret, hashlib.sha256)
    first = hmac.digest(extracted, b"\x01", hashlib.sha256)
    return first, hmac.digest(extracted, first + b"\x02", hashlib.sha256)
