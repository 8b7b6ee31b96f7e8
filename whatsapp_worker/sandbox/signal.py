"""The Signal protocol of one simulated party, in the wire format that whatsmeow speaks."""

from __future__ import annotations

from dataclasses import dataclass


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
