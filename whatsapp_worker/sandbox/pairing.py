"""Linking a device: QR and pairing codes, and the simulated phone that reads them."""

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
from whatsapp_worker.sandbox.binary import SERVER, Attrs, MalformedNode, Node
from whatsapp_worker.sandbox.link_code import PhoneSide, WrongCode
from whatsapp_worker.sandbox.model import Device, Link, UnknownTarget, unix_time
from whatsapp_worker.sandbox.queries import result
from whatsapp_worker.sandbox.signal import sign

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)

QR_CODES = 6
LINK_CODE_LENGTH = 8
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

    def scan(self, code: str, phone: str | None, *, wrong_hmac: bool = False) -> PairingSession:
        """A phone scans a code; the session tells what becomes of it.

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
        session.link_to(phone or self._network.free_phone(), secret, wrong_hmac=wrong_hmac)
        return session

    def enter(self, code: str, phone: str) -> PairingSession:
        """A code is typed into a phone; the session tells what becomes of it.

        Raises:
            InvalidCode: Not eight characters.
            UnknownTarget: No client that waits shows a code for that phone.
        """
        typed = code.replace("-", "").strip().upper()
        if len(typed) != LINK_CODE_LENGTH or not typed.isascii():
            raise InvalidCode("a pairing code has eight characters")
        waiting = dict.fromkeys(self._waiting.values())
        session = next((s for s in reversed(waiting) if s.code_phone == phone), None)
        if session is None:
            raise UnknownTarget(f"no client shows a pairing code for {phone}")
        session.enter(typed)
        return session


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


# Of what a client registers with: a device that nobody can write to is not linked.
_LENGTHS = {"eIdent": 32, "eRegid": 4, "eSkeyID": 3, "eSkeyVal": 32, "eSkeySig": 64}


class PairingSession:
    """One client that waits to be linked.

    Raises:
        MalformedNode: It registers with keys that are none.

    Attributes:
        outcome: `paired`, `refused: ...` or `connection lost`, once that is known.
        device: What is being linked, once a phone agreed.
        code_phone: The phone that a pairing code is shown for.
    """

    def __init__(self, network: Network, link: Link, noise_key: bytes, registration: Any) -> None:
        if any(len(getattr(registration, name)) != size for name, size in _LENGTHS.items()):
            raise MalformedNode("no keys to register with")
        self.link = link
        self.noise_key = noise_key
        self.identity = bytes(registration.eIdent)
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.device: Device | None = None
        self.code_phone: str | None = None
        self._network = network
        self._registration = registration
        self._request_id = ""
        self._wrapped_key = b""
        self._code_ref = b""
        self._phone_side: PhoneSide | None = None

    def offer(self, refs: list[str]) -> None:
        """Send the codes' references to the client."""
        children = [Node("ref", {}, ref.encode()) for ref in refs]
        self._request(Node("pair-device", {}, children))

    def link_to(self, phone: str, secret: bytes, *, wrong_hmac: bool = False) -> None:
        """The phone agrees: tell the client who it is now."""
        self._network.pairing.forget(self)
        number = self._network.next_number(phone)
        device = self.device = self._make_device(phone, number)
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

    def enter(self, code: str) -> None:
        """The phone got a pairing code typed in: greet the client that shows it."""
        assert self.code_phone is not None
        if self.outcome.done():  # a wrong code was typed before
            self.outcome = asyncio.get_running_loop().create_future()
        identity = self._network.contacts.identity_pair(self.code_phone)
        try:
            side = PhoneSide(code=code, wrapped=self._wrapped_key, identity=identity)
        except WrongCode as error:
            self._settle(f"refused: {error}")
            return
        self._phone_side = side
        children = [
            Node("link_code_pairing_wrapped_primary_ephemeral_pub", {}, side.wrapped),
            Node("primary_identity_pub", {}, identity.public),
            Node("link_code_pairing_ref", {}, self._code_ref),
        ]
        hello = Node("link_code_companion_reg", {"stage": "primary_hello"}, children)
        attrs: Attrs = {
            "from": SERVER,
            "type": "link_code_companion_reg",
            "id": secrets.token_hex(8),
            "t": unix_time(),
        }
        self.link.send(Node("notification", attrs, [hello]))

    def handle(self, node: Node) -> None:
        """Take a stanza that the client sent."""
        kind = node.text("type")
        if node.tag != "iq":
            return
        if kind in ("get", "set"):
            registration = node.child("link_code_companion_reg")
            self.link.send(result(node, self._register(registration) if registration else []))
            if registration and registration.text("stage") == "companion_finish":
                self._open_bundle(registration)
        elif node.text("id") == self._request_id and self.device is not None:
            self._finish(self.device, node, kind)

    def lost(self) -> None:
        """The connection is gone."""
        self._network.pairing.forget(self)
        self._settle("connection lost")

    def _register(self, registration: Node) -> list[Node]:
        """A client wants to show a pairing code: remember its key, give it a reference."""
        if registration.text("stage") != "companion_hello":
            return []
        wrapped = registration.child("link_code_pairing_wrapped_companion_ephemeral_pub")
        self.code_phone = self._network.phone(registration.jid("jid"))
        self._wrapped_key = wrapped.data if wrapped else b""
        self._code_ref = secrets.token_urlsafe(24).encode()
        answer = [Node("link_code_pairing_ref", {}, self._code_ref)]
        return [Node("link_code_companion_reg", {"stage": "companion_hello"}, answer)]

    def _open_bundle(self, registration: Node) -> None:
        bundle = registration.child("link_code_pairing_wrapped_key_bundle")
        if self._phone_side is None or self.code_phone is None or bundle is None:
            return
        try:
            identity, secret = self._phone_side.secret(bundle.data)
        except WrongCode as error:
            self._settle(f"refused: {error}")
            return
        if identity == self.identity:
            self.link_to(self.code_phone, secret)
        else:
            self._settle("refused: another client's identity")

    def _finish(self, device: Device, node: Node, kind: str) -> None:
        self._request_id = ""
        if kind == "result" and node.child("pair-device-sign") is not None:
            self._network.add_device(device)
            self._settle("paired")
            log.info("sandbox.device_linked", extra={"device": device.number})
            self.link.send(Node("stream:error", {"code": "515"}))
            self._network.farewell(self.link, "stream error 515")
        else:
            error = node.child("error")
            self._settle(f"refused: {error.text('text') if error else kind}")

    def _settle(self, outcome: str) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

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
