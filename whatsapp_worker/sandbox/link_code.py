"""The phone's side of linking by an eight-character code. Pure.

The code keeps the two ephemeral keys from anyone who does not know it; the secret that both sides
then derive authenticates the new device, as the one in a QR code does.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from whatsapp_worker.sandbox.signal import KeyPair

_ITERATIONS = 2 << 16
_SALT_BYTES, _IV_BYTES, _KEY_BYTES, _NONCE_BYTES = 32, 16, 32, 12
_BUNDLE_INFO = b"link_code_pairing_key_bundle_encryption_key"


class WrongCode(Exception):
    """The two sides used different codes, or one of them does not follow the protocol."""


class PhoneSide:
    """One attempt to link by code.

    Args:
        code: Eight characters, without the dash.
        wrapped: The client's ephemeral key, as it came: salt, IV, encrypted key.
        identity: The phone's identity key.

    Raises:
        WrongCode: `wrapped` has the wrong length.
    """

    def __init__(self, *, code: str, wrapped: bytes, identity: KeyPair) -> None:
        if len(wrapped) != _SALT_BYTES + _IV_BYTES + _KEY_BYTES:
            raise WrongCode("the client's key has the wrong length")
        self._identity = identity
        self._ephemeral = KeyPair.generate()
        companion = _crypt(code, wrapped)[-_KEY_BYTES:]
        self._shared = _agree(self._ephemeral.private, companion)
        salt_and_iv = os.urandom(_SALT_BYTES + _IV_BYTES)
        self.wrapped = _crypt(code, salt_and_iv + self._ephemeral.public)

    def secret(self, bundle: bytes) -> tuple[bytes, bytes]:
        """Open the client's key bundle.

        Returns:
            The client's identity key and the ADV secret, 32 bytes each.

        Raises:
            WrongCode: It does not open.
        """
        salt, nonce = bundle[:_SALT_BYTES], bundle[_SALT_BYTES : _SALT_BYTES + _NONCE_BYTES]
        key = _derive(self._shared, salt, _BUNDLE_INFO)
        try:
            opened = AESGCM(key).decrypt(nonce, bundle[_SALT_BYTES + _NONCE_BYTES :], None)
        except (InvalidTag, ValueError) as error:
            raise WrongCode("wrong code") from error
        companion, mine, random = opened[:32], opened[32:64], opened[64:]
        if mine != self._identity.public or len(random) != _KEY_BYTES:
            raise WrongCode("the client answers another phone")
        both = self._shared + _agree(self._identity.private, companion) + random
        return companion, _derive(both, None, b"adv_secret")


def _crypt(code: str, wrapped: bytes) -> bytes:
    """Encrypt or decrypt the key behind salt and IV, which stay."""
    head = wrapped[: _SALT_BYTES + _IV_BYTES]
    salt, iv = head[:_SALT_BYTES], head[_SALT_BYTES:]
    key = hashlib.pbkdf2_hmac("sha256", code.encode(), salt, _ITERATIONS, _KEY_BYTES)
    cipher = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return head + cipher.update(wrapped[len(head) :]) + cipher.finalize()


def _agree(private: bytes, public: bytes) -> bytes:
    try:
        key = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(key)
    except ValueError as error:
        raise WrongCode("a key of low order") from error


def _derive(secret: bytes, salt: bytes | None, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)
