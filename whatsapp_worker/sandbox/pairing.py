"""Linking a device: QR codes, and the simulated phone that scans them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.binary import SERVER, Attrs, Node
from whatsapp_worker.sandbox.model import Device, Link, UnknownTarget, unix_time
from whatsapp_worker.sandbox.queries import result
from whatsapp_worker.sandbox.signal import sign

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)

QR_CODES = 6
CLOSE_AFTER_S = 0.5  # a client that was told to reconnect closes by itself, usually
_ACCOUNT_SIGNATURE = b"\x06\x00"

_adv = protobufs.load("waAdv.WAAdv_pb2")


class InvalidCode(Exception):
    """This is no QR code of a client of this sandbox."""


class Pairing:
    """Every client that waits to be linked.

    Attributes:
        codes: How many QR codes the next clients get, 1 to 6.
    """

    def __init__(self, network: Network) -> None:
        self.codes = QR_CODES
        self._network = network
        self._waiting: dict[str, PairingSession] = {}

    def begin(self, link: Link, noise_key: bytes, registration: Any) -> PairingSession:
        """A client without credentials connected: give it codes to show."""
        session = PairingSession(self._network, link, noise_key, registration)
        refs = ["2@" + secrets.token_urlsafe(48) for _ in range(self.codes)]
        self._waiting.update(dict.fromkeys(refs, session))
        session.offer(refs)
        return session

    def forget(self, session: PairingSession) -> None:
        """A client does not wait any more: its codes are void."""
        for ref in [ref for ref, waiting in self._waiting.items() if waiting is session]:
            del self._waiting[ref]

    def expire(self, *, close: bool) -> int:
        """Make all codes void and, if asked, close the connections that wait; returns how many."""
        sessions = set(self._waiting.values())
        self._waiting.clear()
        for session in sessions if close else ():
            session.link.close("qr expired")
        return len(sessions)

    def scan(
        self, code: str, phone: str | None, *, wrong_hmac: bool = False
    ) -> tuple[Device, asyncio.Future[str]]:
        """A phone scans a code.

        Returns:
            The device that is being linked, and what becomes of it: `paired`, `refused: ...` or
            `connection lost`.

        Raises:
            InvalidCode: Not a code as neonize gives it, or not of that client.
            UnknownTarget: The code is void: expired, used, or from another network.
        """
        ref, noise_key, identity, secret = parse_code(code)
        session = self._waiting.get(ref)
        if session is None:
            raise UnknownTarget("this code is void: expired, used, or from another network")
        if (noise_key, identity) != (session.noise_key, session.identity):
            raise InvalidCode("the keys in this code are not those of the client that shows it")
        return session.link_to(phone or self._network.free_phone(), secret, wrong_hmac=wrong_hmac)


def parse_code(code: str) -> tuple[str, bytes, bytes, bytes]:
    """Reference, noise key, identity key and ADV secret of a QR code.

    Raises:
        InvalidCode: It is not one.
    """
    parts = code.strip().rpartition("#")[2].split(",")
    if len(parts) < 4:
        raise InvalidCode("no QR code of WhatsApp: less than four parts")
    try:
        noise_key, identity, secret = (base64.b64decode(p, validate=True) for p in parts[1:4])
    except (binascii.Error, ValueError) as error:
        raise InvalidCode("no QR code of WhatsApp: keys are not base64") from error
    return parts[0], noise_key, identity, secret


class PairingSession:
    """One client that waits to be linked."""

    def __init__(self, network: Network, link: Link, noise_key: bytes, registration: Any) -> None:
        self.link = link
        self.noise_key = noise_key
        self.identity = bytes(registration.eIdent)
        self._network = network
        self._registration = registration
        self._device: Device | None = None
        self._outcome: asyncio.Future[str] | None = None
        self._request_id = ""

    def offer(self, refs: list[str]) -> None:
        """Send the codes' references to the client."""
        children = [Node("ref", {}, ref.encode()) for ref in refs]
        self._request(Node("pair-device", {}, children))

    def link_to(
        self, phone: str, secret: bytes, *, wrong_hmac: bool
    ) -> tuple[Device, asyncio.Future[str]]:
        """The phone agrees: tell the client who it is now."""
        self._network.pairing.forget(self)
        number = self._network.next_number(phone)
        device = self._device = self._make_device(phone, number)
        self._outcome = asyncio.get_running_loop().create_future()
        identity = self._signed_identity(phone, number)
        key = bytes(32) if wrong_hmac else secret
        signed = _adv.ADVSignedDeviceIdentityHMAC(
            details=identity, HMAC=hmac.digest(key, identity, hashlib.sha256)
        )
        children = [
            Node("device-identity", {}, signed.SerializeToString()),
            Node("device", {"jid": device.jid, "lid": self._network.lid(phone, number)}),
            Node("platform", {"name": "android"}),
        ]
        self.link.attempt.phone = phone
        self._request(Node("pair-success", {}, children))
        return device, self._outcome

    def handle(self, node: Node) -> None:
        """Take a stanza that the client sent."""
        kind = node.text("type")
        if node.tag != "iq":
            return
        if kind in ("get", "set"):
            self.link.send(result(node, []))
        elif node.text("id") == self._request_id and self._device is not None:
            self._finish(node, kind)

    def lost(self) -> None:
        """The connection is gone."""
        self._network.pairing.forget(self)
        self._settle("connection lost")

    def _finish(self, node: Node, kind: str) -> None:
        device, self._device = self._device, None
        assert device is not None
        if kind == "result" and node.child("pair-device-sign") is not None:
            self._network.add_device(device)
            self._settle("paired")
            log.info("sandbox.device_linked", extra={"device": device.number})
            self.link.send(Node("stream:error", {"code": "515"}))
            self.link.attempt.end("stream error 515")
            self._network.later(CLOSE_AFTER_S, lambda: self.link.close("stream error 515"))
        else:
            error = node.child("error")
            self._settle(f"refused: {error.text('text') if error else kind}")

    def _settle(self, outcome: str) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def _make_device(self, phone: str, number: int) -> Device:
        data = self._registration
        return Device(
            phone=phone,
            number=number,
            noise_key=self.noise_key,
            identity=self.identity,
            registration_id=int.from_bytes(data.eRegid, "big"),
            signed_id=int.from_bytes(data.eSkeyID, "big"),
            signed_key=bytes(data.eSkeyVal),
            signature=bytes(data.eSkeySig),
        )

    def _signed_identity(self, phone: str, number: int) -> bytes:
        pair = self._network.contacts.identity_pair(phone)
        details = _adv.ADVDeviceIdentity(
            rawID=secrets.randbits(31), timestamp=int(time.time()), keyIndex=number
        ).SerializeToString()
        signed = _adv.ADVSignedDeviceIdentity(
            details=details,
            accountSignatureKey=pair.public,
            accountSignature=sign(pair.private, _ACCOUNT_SIGNATURE + details + self.identity),
        )
        return bytes(signed.SerializeToString())

    def _request(self, content: Node) -> None:
        self._request_id = secrets.token_hex(8)
        attrs: Attrs = {
            "from": SERVER,
            "type": "set",
            "id": self._request_id,
            "xmlns": "md",
            "t": unix_time(),
        }
        self.link.send(Node("iq", attrs, [content]))
