"""The keys that make a client trust this sandbox, and only this one.

In the state folder (0700): `ca.pem` (the TLS authority, for `SSL_CERT_FILE`), `root.pub` (the
32-byte key that replaces WhatsApp's root in a sandbox client's memory), `keys.json` (all private
keys, 0600). Made once; a folder whose `keys.json` cannot be read is refused, since new keys would
cut off every client that trusts the old ones.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import secrets
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.signal import KeyPair, sign

HOSTS = ("web.whatsapp.com", "*.whatsapp.com", "*.whatsapp.net", "*.cdn.whatsapp.net")
CA_FILE = "ca.pem"
ROOT_FILE = "root.pub"
_KEYS_FILE = "keys.json"
_VERSION = 1
_YEAR_S = 365 * 86400

_cert = protobufs.load("waCert.WACert_pb2")


@dataclass(frozen=True)
class Keys:
    """Everything secret; X25519 private keys have 32 bytes."""

    ca_key: ec.EllipticCurvePrivateKey
    ca: x509.Certificate
    noise_root: bytes
    noise_static: bytes


def load_or_make(state_dir: Path) -> Keys:
    """Read the keys of a state folder, or make them.

    Raises:
        ValueError: `keys.json` is there and not readable as this version wrote it.
    """
    path = state_dir / _KEYS_FILE
    if path.exists():
        return _parse(path)
    keys = _make()
    write_private(path, json.dumps(_fields(keys)).encode())
    write_public(state_dir, keys)
    return keys


def write_public(state_dir: Path, keys: Keys) -> None:
    """Write the two files that clients read."""
    write_private(state_dir / CA_FILE, keys.ca.public_bytes(serialization.Encoding.PEM))
    write_private(state_dir / ROOT_FILE, KeyPair.of(keys.noise_root).public)


def server_context(keys: Keys, state_dir: Path) -> ssl.SSLContext:
    """A TLS context for every host that a client may ask for, with a leaf made now (1 year)."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        _builder("sandbox", keys.ca.subject, key, _YEAR_S)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in HOSTS]), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .sign(keys.ca_key, hashes.SHA256())
    )
    path = state_dir / "tls.pem"
    write_private(path, _pem(key) + leaf.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["http/1.1"])
    return context


def noise_certificate(keys: Keys) -> bytes:
    """A serialized `waCert.CertChain` for the noise key, valid for a year from yesterday."""
    intermediate = secrets.token_bytes(32)
    chain = _cert.CertChain()
    _fill(chain.intermediate, 1, 0, KeyPair.of(intermediate).public, signer=keys.noise_root)
    _fill(chain.leaf, 2, 1, KeyPair.of(keys.noise_static).public, signer=intermediate)
    return bytes(chain.SerializeToString())


def _fill(target: Any, serial: int, issuer: int, key: bytes, *, signer: bytes) -> None:
    now = int(time.time())
    details = _cert.CertChain.NoiseCertificate.Details(
        serial=serial, issuerSerial=issuer, key=key, notBefore=now - 86400, notAfter=now + _YEAR_S
    ).SerializeToString()
    target.details = details
    target.signature = sign(signer, details)


def _make() -> Keys:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "WhatsApp sandbox authority")])
    certificate = (
        _builder("WhatsApp sandbox authority", name, key, 10 * _YEAR_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Keys(key, certificate, secrets.token_bytes(32), secrets.token_bytes(32))


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime_s: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(seconds=lifetime_s))
    )


def _fields(keys: Keys) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "ca_key": _pem(keys.ca_key).decode(),
        "ca": keys.ca.public_bytes(serialization.Encoding.PEM).decode(),
        "noise_root": base64.b64encode(keys.noise_root).decode(),
        "noise_static": base64.b64encode(keys.noise_static).decode(),
    }


def _parse(path: Path) -> Keys:
    try:
        fields = json.loads(path.read_bytes())
        ca_key = serialization.load_pem_private_key(fields["ca_key"].encode(), None)
        if fields["version"] != _VERSION or not isinstance(ca_key, ec.EllipticCurvePrivateKey):
            raise ValueError("written by another version")
        return Keys(
            ca_key,
            x509.load_pem_x509_certificate(fields["ca"].encode()),
            base64.b64decode(fields["noise_root"], validate=True),
            base64.b64decode(fields["noise_static"], validate=True),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); use another state folder") from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def write_private(path: Path, content: bytes) -> None:
    """Write a 0600 file whole: beside it first, then renamed over it."""
    temporary = path.with_name(path.name + ".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
