"""The post office: messages and receipts, between devices and simulated contacts."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from whatsapp_worker.sandbox.binary import Attrs, Jid, Node, phone_jid
from whatsapp_worker.sandbox.faults import How
from whatsapp_worker.sandbox.model import (
    MAX_IN_FLIGHT,
    Device,
    Link,
    Row,
    Rows,
    UnknownTarget,
    unix_time,
)
from whatsapp_worker.sandbox.signal import SignalError

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.groups import Group
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)

RECEIPT_STEPS: dict[str, tuple[str, ...]] = {
    "none": (),
    "delivered": ("delivered",),
    "read": ("delivered", "read"),
    "played": ("delivered", "read", "played"),
}
MAX_CONFIGURED = 100_000  # contacts with manners of their own
_CONTENTS = ("device-identity", "meta")  # passed on beside the encrypted part


@dataclass(frozen=True)
class Manners:
    """How a contact answers what it gets; `delay_s` lies before each of the steps."""

    steps: tuple[str, ...] = ("delivered",)
    delay_s: float = 0.0


class Post:
    """Takes stanzas from devices and delivers them; keeps the lists that tests read."""

    def __init__(self, network: Network) -> None:
        self.messages: Rows[Row] = Rows()
        self.receipts: Rows[dict[str, Any]] = Rows()
        self.chat_states: Rows[dict[str, Any]] = Rows()
        self.lookups: Rows[dict[str, Any]] = Rows()
        self.manners: dict[str, Manners] = {}
        self._network = network
        self._rows: dict[tuple[str, int, str], Row] = {}

    def clear(self) -> None:
        """Forget what arrived and how contacts answer; what waits for a device stays."""
        self.messages.clear()
        self.receipts.clear()
        self.chat_states.clear()
        self.lookups.clear()
        self.manners.clear()
        self._rows.clear()

    # From devices

    def take_message(self, device: Device, link: Link, node: Node) -> None:
        """A device hands over a message."""
        to, message_id = node.jid("to"), node.text("id")
        if to is None or not message_id:
            return
        name = self._network.phone(to) or str(to)
        fault = self._network.faults.send(device.phone, name, time.monotonic())
        how = fault.how if fault is not None else None
        if how is How.DROP_BEFORE:
            link.reset("drop_before")
            return
        if node.text("category") == "peer":  # to its own phone, about itself
            self._acknowledge(device, link, node, None)
            return
        row, is_new = self._note(device, node, to, name)
        if fault is not None and how is How.REFUSE:
            row.refused = fault.code
            self._acknowledge(device, link, node, row)
            return
        is_taken = row.refused is None and not is_new
        row.refused = None
        if fault is None:  # before decrypting, which then costs the sender no time
            self._acknowledge(device, link, node, row)
        if not is_taken:
            self._distribute(device, node, row)
        if how is How.DROP_AFTER:
            link.reset("drop_after")
        elif fault is not None and how is How.SLOW:
            self._network.later(fault.delay_s, lambda: self._acknowledge(device, link, node, row))
        if not is_taken:
            self._answer(row)

    def take_ack(self, device: Device, node: Node) -> None:
        """A device got something: it need not be kept any more."""
        kind = node.text("class")
        detail = "" if kind == "message" else node.text("type")
        device.in_flight.pop((kind, node.text("id"), node.text("to"), detail), None)

    def take_receipt(self, device: Device, link: Link, node: Node) -> None:
        """A device says that it got or read messages."""
        to = node.jid("to")
        if to is None:
            return
        attrs: Attrs = {"class": "receipt", "id": node.text("id"), "from": to}
        if "type" in node.attrs:
            attrs["type"] = node.attrs["type"]
        link.send(Node("ack", attrs))
        device.in_flight.pop(("message", node.text("id"), str(to), ""), None)
        self._note_receipt(device, to, node)
        self._forward_receipt(device, to, node)

    def take_chat_state(self, device: Device, node: Node) -> None:
        """A device shows its contact that something is being typed, or is not any more."""
        to, state = node.jid("to"), next(iter(node.children), None)
        if to is None or state is None:
            return
        self.chat_states.add(
            {
                "seq": self.chat_states.next_seq(),
                "from": device.phone,
                "to": self._network.phone(to) or str(to),
                "state": state.tag,
                "at": time.time(),
            }
        )

    def note_lookup(self, device: Device, dialled: str) -> None:
        """A device asks whether a number is a contact."""
        seq = self.lookups.next_seq()
        row = {"seq": seq, "from": device.phone, "phone": dialled, "at": time.time()}
        self.lookups.add(row)

    # To devices

    def deliver(self, device: Device, node: Node) -> None:
        """Send a stanza to a device, now or when it is back; kept until it says that it got it."""
        if device.link is None:
            self._network.store.add_waiting(device, [node])
            return
        detail = "" if node.tag == "message" else node.text("type")
        if len(device.in_flight) >= MAX_IN_FLIGHT:
            device.in_flight.pop(next(iter(device.in_flight)))
        device.in_flight[node.tag, node.text("id"), node.text("from"), detail] = node
        device.link.send(node)

    def hand_out(self, device: Device) -> int:
        """Deliver what was kept for a device that has just come back; returns how much it was."""
        waiting = self._network.store.take_waiting(device)
        for node in waiting:
            self.deliver(device, node)
        return len(waiting)

    def park(self, device: Device) -> None:
        """Keep what a device that is gone never acknowledged."""
        if device.in_flight:
            self._network.store.add_waiting(device, device.in_flight.values())
            device.in_flight.clear()

    def write(self, sender: str, to: str, text: str) -> str:
        """A contact writes to all devices of a number.

        Returns:
            The message id.

        Raises:
            UnknownTarget: That number has no linked device.
        """
        devices = self._network.devices_of(to)
        if not devices:
            raise UnknownTarget(f"{to} has no linked device")
        message_id = "3EB0" + secrets.token_hex(9).upper()
        for device in devices:
            self.deliver(device, self._encrypted(sender, device, text, message_id))
        return message_id

    def receipt(self, message_id: str, step: str) -> int:
        """The contact that a message went to sends a receipt; returns to how many devices.

        Raises:
            UnknownTarget: No message of that id is in the list.
        """
        rows = [row for row in self.messages if row.id == message_id]
        if not rows:
            raise UnknownTarget(f"no message {message_id} arrived")
        for row in rows:
            for reader in self._readers(row):
                self._send_receipt(row, step, reader)
        return len(rows)

    def tell_devices(self, phone: str) -> None:
        """Tell the devices of a number that there is one more or less of them."""
        attrs: Attrs = {
            "from": self._network.lid(phone),
            "type": "devices",
            "id": secrets.token_hex(8),
            "t": unix_time(),
        }
        for device in self._network.devices_of(phone):
            self.deliver(device, Node("notification", dict(attrs), [Node("update")]))

    # Inside

    def _note(self, device: Device, node: Node, to: Jid, name: str) -> tuple[Row, bool]:
        key = (*device.key, node.text("id"))
        row = self._rows.get(key)
        if row is not None:
            row.times += 1
            return row, False
        row = Row(self.messages.next_seq(), device, name, to.account, node.text("id"), time.time())
        row.bot = node.child("bot") is not None
        oldest = self.messages.add(row)
        if oldest is not None:
            self._rows.pop((*oldest.sender.key, oldest.id), None)
        self._rows[key] = row
        return row, True

    def _distribute(self, device: Device, node: Node, row: Row) -> None:
        group = self._network.groups.find(row.to_lid)
        if group is not None:
            self._distribute_in_group(device, node, row, group)
            return
        participants = node.child("participants")
        targets = [
            (jid, enc)
            for to in (participants.all("to") if participants else ())
            if (jid := to.jid("jid")) is not None and (enc := to.child("enc")) is not None
        ]
        direct, to = node.child("enc"), node.jid("to")
        if direct is not None and to is not None:
            targets.append((to, direct))
        for jid, enc in targets:
            if jid.device:
                self._forward(device, node, jid, enc)
            elif self._network.phone(jid) == row.to:
                self._open(device, row, enc)

    def _distribute_in_group(self, device: Device, node: Node, row: Row, group: Group) -> None:
        """Everybody gets the part for all, and before it the part for himself with the key."""
        participants = node.child("participants")
        own = {
            jid: list(to.all("enc"))
            for to in (participants.all("to") if participants else ())
            if (jid := to.jid("jid")) is not None
        }
        for_all = list(node.all("enc"))
        for phone in group.members:
            for enc in own.get(self._network.lid(phone), []) + for_all:
                if phone != device.phone:
                    self._open(device, row, enc, reader=phone)
            for target in self._network.devices_of(phone):
                if target is not device:
                    mine = own.get(self._network.lid(phone, target.number), [])
                    self.deliver(target, self._in_group(device, node, group, mine + for_all))

    def _in_group(self, sender: Device, node: Node, group: Group, encs: list[Node]) -> Node:
        attrs: Attrs = {
            "from": group.jid,
            "participant": self._network.lid(sender.phone, sender.number),
            "participant_pn": phone_jid(sender.phone),
            "id": node.text("id"),
            "type": node.text("type") or "text",
            "t": unix_time(),
            "addressing_mode": "lid",
        }
        if "edit" in node.attrs:
            attrs["edit"] = node.attrs["edit"]
        passed_on = [child for child in node.children if child.tag in _CONTENTS]
        return Node("message", attrs, [*encs, *passed_on])

    def _open(self, device: Device, row: Row, enc: Node, reader: str | None = None) -> None:
        try:
            row.received = self._network.contacts.receive(
                sender=device.address,
                phone=reader or row.to,
                enc_type=enc.text("type"),
                ciphertext=enc.data,
                group=row.to if reader else None,
            )
        except SignalError as error:
            row.undecryptable = str(error) or type(error).__name__
            log.warning("sandbox.message_undecryptable", extra={"error": type(error).__name__})

    def _forward(self, sender: Device, node: Node, jid: Jid, enc: Node) -> None:
        target = self._network.device_of(jid)
        if target is None or target is sender:
            return
        attrs: Attrs = {
            "from": self._network.lid(sender.phone, sender.number),
            "id": node.text("id"),
            "type": node.text("type") or "text",
            "t": unix_time(),
            "addressing_mode": "lid",
        }
        if target.phone == sender.phone:
            attrs["recipient"] = node.attrs["to"]
            if "peer_recipient_pn" in node.attrs:
                attrs["peer_recipient_pn"] = node.attrs["peer_recipient_pn"]
        else:
            attrs["sender_pn"] = phone_jid(sender.phone)
        if "edit" in node.attrs:
            attrs["edit"] = node.attrs["edit"]
        content = [enc, *(child for child in node.children if child.tag in _CONTENTS)]
        self.deliver(target, Node("message", attrs, content))

    def _encrypted(self, sender: str, device: Device, text: str, message_id: str) -> Node:
        contacts = self._network.contacts
        is_known = contacts.has_session(phone=sender, to=device.address, identity=device.identity)
        kind, ciphertext = contacts.encrypt_text(
            phone=sender,
            to=device.address,
            bundle=None if is_known else self._network.device_bundle(device),
            text=text,
        )
        attrs: Attrs = {
            "from": self._network.lid(sender),
            "id": message_id,
            "type": "text",
            "t": unix_time(),
            "addressing_mode": "lid",
            "sender_pn": phone_jid(sender),
            "notify": f"Contact {sender[-4:]}",
        }
        return Node("message", attrs, [Node("enc", {"v": "2", "type": kind}, ciphertext)])

    def _acknowledge(self, device: Device, link: Link, node: Node, row: Row | None) -> None:
        attrs: Attrs = {
            "class": "message",
            "id": node.text("id"),
            "from": node.attrs["to"],
            "t": unix_time(),
        }
        if row is not None and row.refused is not None:
            attrs["error"] = str(row.refused)
        elif row is not None:
            row.acked = True
            if self._is_stale(device, node, row):
                attrs["phash"] = "2:stale"
        link.send(Node("ack", attrs))

    def _is_stale(self, device: Device, node: Node, row: Row) -> bool:
        """Whether the recipient has devices that the sender does not know; it then asks anew."""
        devices = self._network.devices.get(row.to)
        participants = node.child("participants")
        if not devices or participants is None:
            return False
        reached = {jid for to in participants.all("to") if (jid := to.jid("jid")) is not None}
        mine = device.key
        return any(
            self._network.lid(row.to, number) not in reached
            for number in devices
            if (row.to, number) != mine
        )

    def _answer(self, row: Row) -> None:
        """The contacts' receipts; a phone that links devices leaves them to those."""
        if row.received is None:
            return
        for reader in self._readers(row):
            manners = self.manners.get(reader)
            if manners is None and self._network.devices.get(reader):
                continue
            manners = manners or Manners()
            for count, step in enumerate(manners.steps, 1):
                if manners.delay_s > 0:
                    send = partial(self._send_receipt, row, step, reader)
                    self._network.later(manners.delay_s * count, send)
                else:
                    self._send_receipt(row, step, reader)

    def _readers(self, row: Row) -> list[str]:
        """The numbers whose phones read a message."""
        group = self._network.groups.find(row.to_lid)
        if group is None:
            return [row.to]
        return [phone for phone in group.members if phone != row.sender.phone]

    def _send_receipt(self, row: Row, step: str, reader: str) -> None:
        attrs: Attrs = {"from": row.to_lid, "id": row.id, "t": unix_time()}
        if reader != row.to:
            attrs["participant"] = self._network.lid(reader)
        if step != "delivered":
            attrs["type"] = step
        row.receipts.append(step)
        if row.sender.number in self._network.devices.get(row.sender.phone, {}):
            self.deliver(row.sender, Node("receipt", attrs))

    def _note_receipt(self, device: Device, to: Jid, node: Node) -> None:
        listed = node.child("list")
        more = [item.text("id") for item in listed.all("item")] if listed else []
        self.receipts.add(
            {
                "seq": self.receipts.next_seq(),
                "from": device.phone,
                "to": self._network.phone(to) or str(to),
                "author": self._network.phone(node.jid("participant")),
                "ids": [node.text("id"), *more],
                "type": node.text("type") or "delivered",
                "at": time.time(),
            }
        )

    def _forward_receipt(self, device: Device, to: Jid, node: Node) -> None:
        phone = self._network.phone(to)
        if phone is None or phone == device.phone:
            return
        attrs: Attrs = {
            "from": self._network.lid(device.phone, device.number),
            "id": node.text("id"),
            "t": unix_time(),
        }
        if "type" in node.attrs:
            attrs["type"] = node.attrs["type"]
        one = self._network.device_of(to) if to.device else None
        for target in [one] if one else self._network.devices_of(phone):
            self.deliver(target, Node("receipt", dict(attrs), node.content))
