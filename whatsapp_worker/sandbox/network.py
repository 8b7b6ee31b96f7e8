"""The WhatsApp server that the sandbox plays: who is linked, who is connected, what goes where.

Everything happens on one thread, the event loop; nothing here waits.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from whatsapp_worker.sandbox import protobufs
from whatsapp_worker.sandbox.binary import Jid, Node, lid_jid
from whatsapp_worker.sandbox.contacts import Contacts
from whatsapp_worker.sandbox.faults import FOREVER, Faults, Rule
from whatsapp_worker.sandbox.groups import Groups
from whatsapp_worker.sandbox.model import (
    Attempt,
    Device,
    Later,
    Link,
    Rows,
    Session,
    UnknownTarget,
    unix_time,
)
from whatsapp_worker.sandbox.pairing import Pairing
from whatsapp_worker.sandbox.post import Post
from whatsapp_worker.sandbox.queries import Queries
from whatsapp_worker.sandbox.session import DeviceSession
from whatsapp_worker.sandbox.signal import Bundle
from whatsapp_worker.sandbox.store import Store

log = logging.getLogger(__name__)

FAREWELL_S = 0.25
FIRST_PHONE = 5511900000001  # numbers made up for scans that name none

_wa6 = protobufs.load("waWa6.WAWebProtobufsWa6_pb2")


class Network:
    """All state of the sandbox network.

    Args:
        state_dir: Existing private folder.
        later: Calls a function after so many seconds, on this thread.
    """

    def __init__(self, *, state_dir: Path, later: Later) -> None:
        self.later = later
        self.store = Store(state_dir / "network.db")
        self.contacts = Contacts(state_dir)
        self.faults = Faults()
        self.attempts: Rows[Attempt] = Rows()
        self.unknown_numbers: set[str] = set()
        self.aliases: dict[str, str] = {}  # number as dialled to the one that WhatsApp knows
        self.accounts = self.store.accounts()
        self.devices: dict[str, dict[int, Device]] = {}
        for device in self.store.devices():
            self.devices.setdefault(device.phone, {})[device.number] = device
        self.pairing = Pairing(self)
        self.queries = Queries(self)
        self.groups = Groups(self)
        self.post = Post(self)
        self._links: set[Link] = set()

    def close(self) -> None:
        """Put what is not acknowledged on disk, and close the files."""
        for device in self.all_devices():
            self.post.park(device)
        self.store.close()
        self.contacts.close()

    # Connections

    def opened(self, link: Link) -> bool:
        """A client connected; False when it has to be refused. `link` gets its attempt here."""
        now = time.monotonic()
        link.attempt = Attempt(self.attempts.next_seq())
        self.attempts.add(link.attempt)
        if self.faults.refuses(None, now):
            link.attempt.end("refused")
            return False
        self._links.add(link)
        if self.faults.stalled(None, now):
            link.stall(True)
        return True

    def closed(self, link: Link) -> None:
        """The connection is gone."""
        self._links.discard(link)

    def admit(self, link: Link, noise_key: bytes, payload: bytes) -> Session | None:
        """A client finished its handshake; None when it was turned away."""
        hello = _wa6.ClientPayload.FromString(payload)
        if not hello.username:
            link.attempt.reached = "pairing"
            return self.pairing.begin(link, noise_key, hello.devicePairingData)
        return self._login(link, noise_key, str(hello.username), int(hello.device))

    def _login(self, link: Link, noise_key: bytes, phone: str, number: int) -> Session | None:
        now = time.monotonic()
        link.attempt.phone = phone
        if self.faults.refuses(phone, now):
            # whatsmeow says who hears of an end only after its last word of the handshake. A reset
            # quicker than any real network's may come first: then no Disconnected follows, and no
            # further dial.
            link.attempt.end("refused")
            self.later(FAREWELL_S, lambda: link.reset("refused"))
            return None
        if self.faults.stalled(phone, now):
            link.stall(True)
        failure = self.faults.failure(phone, now)
        if failure is not None:
            link.send(failure.node())
            self.farewell(link, f"failure {failure.reason}")
            return None
        device = self.devices.get(phone, {}).get(number)
        if device is None or device.noise_key != noise_key:
            link.send(Node("failure", {"reason": "401", "location": "sandbox"}))
            self.farewell(link, "failure 401")
            return None
        return self._connected(link, device)

    def _connected(self, link: Link, device: Device) -> Session:
        if device.link is not None:
            self.stream_error(device, "409", conflict="replaced")
        link.attempt.reached = "connected"
        device.link, device.connected_at = link, time.time()
        device.logins += 1
        self.store.save_device(device)
        link.send(
            Node(
                "success",
                {
                    "t": unix_time(),
                    "lid": self.lid(device.phone, device.number),
                    "companion_enc_static": "",
                    "creation": unix_time(),
                },
            )
        )
        log.info("sandbox.device_connected", extra={"device": device.number})
        return DeviceSession(self, device, link)

    def disconnected(self, device: Device, link: Link) -> None:
        """A device's connection is gone; an older one of the same device changes nothing."""
        if device.link is link:
            device.link = device.connected_at = None
            self.post.park(device)
            log.info("sandbox.device_disconnected", extra={"device": device.number})

    def stall(self, phone: str | None, seconds: float | None) -> None:
        """Be silent to one number or to all, until `unstall` or for so many seconds."""
        until = FOREVER if seconds is None else time.monotonic() + seconds
        self.faults.stalls.append(Rule(phone, until))
        self.apply_stalls()
        if seconds is not None:
            self.later(seconds, self.apply_stalls)

    def apply_stalls(self) -> None:
        """Begin and end silence as the rules of this moment say."""
        now = time.monotonic()
        for link in list(self._links):
            link.stall(self.faults.stalled(link.attempt.phone, now))

    def drop(self, phone: str | None, *, reset: bool) -> int:
        """End the connections of one number, or of all; returns how many."""
        links = [link for link in self._links if phone in (None, link.attempt.phone)]
        for link in links:
            if reset:
                link.reset("reset")
            else:
                link.close("closed")
        return len(links)

    def farewell(self, link: Link, why: str) -> None:
        """Close a connection a moment after its last word was sent."""
        # whatsmeow reads the close while it still handles the word, and then dials again, even
        # when the word was that it shall not.
        link.attempt.end(why)
        self.later(FAREWELL_S, lambda: link.close(why))

    # Addresses

    def lid(self, phone: str, number: int = 0) -> Jid:
        """The hidden address of a number or one of its devices."""
        return lid_jid(self.contacts.lid_of(phone), number)

    def phone(self, jid: Jid | None) -> str | None:
        """The phone number behind an address of a person; None for groups and the like."""
        if jid is None or not jid.user:
            return None
        if jid.server == "lid":
            return self.contacts.phone_of(jid.user)
        return jid.user if jid.server in ("s.whatsapp.net", "c.us") else None

    def exists(self, phone: str | None) -> bool:
        """Whether that number is on WhatsApp: every one is, unless told otherwise."""
        if phone is None or phone in self.aliases or phone in self.unknown_numbers:
            return False
        return phone.isdigit()

    def all_devices(self) -> list[Device]:
        """Every linked device."""
        return [device for devices in self.devices.values() for device in devices.values()]

    def devices_of(self, phone: str) -> list[Device]:
        """The linked devices of a number."""
        return list(self.devices.get(phone, {}).values())

    def device_of(self, jid: Jid) -> Device | None:
        """The linked device with that address."""
        phone = self.phone(jid)
        return None if phone is None else self.devices.get(phone, {}).get(jid.device)

    def bundle(self, jid: Jid) -> Bundle | None:
        """Keys to write to a device or phone with; uses up a one-time prekey."""
        phone = self.phone(jid)
        if phone is None or not self.exists(phone):
            return None
        if jid.device == 0:
            return self.contacts.bundle(phone)
        device = self.device_of(jid)
        return None if device is None else self.device_bundle(device)

    def device_bundle(self, device: Device) -> Bundle:
        """Keys to write to a linked device with; uses up a one-time prekey."""
        prekey = self.store.take_prekey(device)
        return Bundle(
            registration_id=device.registration_id,
            identity=device.identity,
            signed_prekey_id=device.signed_id,
            signed_prekey=device.signed_key,
            signature=device.signature,
            prekey_id=prekey.id if prekey else None,
            prekey=prekey.key if prekey else None,
        )

    # Linking and unlinking

    def free_phone(self) -> str:
        """A number that never linked a device."""
        number = FIRST_PHONE
        while str(number) in self.accounts:
            number += 1
        return str(number)

    def next_number(self, phone: str) -> int:
        """The number of the next device that a phone links."""
        return self.accounts.get(phone, 0) + 1

    def add_device(self, device: Device) -> None:
        """A phone linked a device."""
        self.accounts[device.phone] = device.number
        self.unknown_numbers.discard(device.phone)
        self.post.tell_devices(device.phone)
        self.devices.setdefault(device.phone, {})[device.number] = device
        self.store.save_device(device)

    def remove_device(self, device: Device) -> None:
        """A device is no longer linked; its credentials are dead from now on."""
        self.devices.get(device.phone, {}).pop(device.number, None)
        self.store.delete_device(device)
        self.post.tell_devices(device.phone)

    def stream_error(self, device: Device, code: str, conflict: str | None = None) -> None:
        """End a device's connection with a stream error.

        Raises:
            UnknownTarget: It is not connected.
        """
        link = device.link
        if link is None:
            raise UnknownTarget(f"{device.phone} is not connected")
        children = [Node("conflict", {"type": conflict})] if conflict else None
        link.send(Node("stream:error", {"code": code}, children))
        self.farewell(link, f"stream error {conflict or code}")
        self.disconnected(device, link)
