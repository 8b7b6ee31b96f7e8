"""Answers to what a client asks (`<iq>`). Whatever is not known here gets an empty result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from whatsapp_worker.sandbox.binary import SERVER, Attrs, MalformedNode, Node, phone_jid
from whatsapp_worker.sandbox.model import Device, PreKey
from whatsapp_worker.sandbox.signal import Bundle

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)

MEDIA_HOST = "mmg.whatsapp.net"
_CURVE_TYPE = b"\x05"
_MAX_PREKEYS = 2000
_ID_BYTES, _KEY_BYTES = 3, 32

Answer = list[Node]


_BEFORE_A_MESSAGE = ("usync", "w:m")  # what a fault of questions hits


class Queries:
    """Answers by namespace (`xmlns`)."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._answers: dict[str, Callable[[Device, Node], Answer | None]] = {
            "encrypt": self._encrypt,
            "usync": self._usync,
            "w:m": self._media,
            "w:g2": lambda device, node: self._network.groups.answer(device, node),
            "blocklist": lambda device, node: [Node("list")],
            "privacy": lambda device, node: [Node("privacy")],
            "status": lambda device, node: [],
            "passive": lambda device, node: [],
            "w:p": lambda device, node: [],
            "md": lambda device, node: [],
        }

    def answer(self, device: Device, node: Node) -> Node | None:
        """The stanza to answer with; None for what is itself an answer."""
        if node.text("type") not in ("get", "set"):
            return None
        xmlns = node.text("xmlns")
        answer = self._answers.get(xmlns)
        if answer is None:
            log.debug("sandbox.query_unknown", extra={"xmlns": xmlns, "asked": node})
        children = answer(device, node) if answer else []
        if xmlns in _BEFORE_A_MESSAGE:
            fault = self._network.faults.query(device.phone, time.monotonic())
            if fault is not None:
                return _refusal(node, fault.code, "refused")
        return _refusal(node, 404, "item-not-found") if children is None else result(node, children)

    def _encrypt(self, device: Device, node: Node) -> Answer:
        if node.text("type") == "set":
            return self._take_keys(device, node)
        if node.child("count") is not None:
            count = self._network.store.count_prekeys(device)
            return [Node("count", {"value": str(count)})]
        wanted = node.child("key")
        if wanted is None:
            return []
        return [Node("list", {}, [self._keys(user) for user in wanted.all("user")])]

    def _take_keys(self, device: Device, node: Node) -> Answer:
        keys = node.child("list")
        if keys is not None:
            prekeys = [_prekey(key) for key in list(keys.all("key"))[:_MAX_PREKEYS]]
            self._network.store.add_prekeys(device, prekeys)
        signed = node.child("skey") or next(
            (child.child("skey") for child in node.all("rotate")), None
        )
        if signed is not None:
            device.signed_id, device.signed_key = _prekey(signed)
            device.signature = _data(signed, "signature")
            self._network.store.save_device(device)
        return []

    def _keys(self, user: Node) -> Node:
        jid = user.jid("jid")
        bundle = self._network.bundle(jid) if jid is not None else None
        if jid is None or bundle is None:
            error = Node("error", {"code": "404", "text": "item-not-found"})
            return Node("user", {"jid": jid or SERVER}, [error])
        return Node("user", {"jid": jid}, _bundle_nodes(bundle))

    def _usync(self, device: Device, node: Node) -> Answer:
        usync = node.child("usync")
        query = usync.child("query") if usync else None
        users = usync.child("list") if usync else None
        if usync is None or query is None or users is None:
            return []
        asked = {child.tag for child in query.children}
        answered = [self._user(device, user, asked) for user in users.all("user")]
        attrs = {
            name: usync.attrs[name] for name in ("sid", "mode", "context") if name in usync.attrs
        }
        return [Node("usync", attrs | {"index": "0", "last": "true"}, [Node("list", {}, answered)])]

    def _user(self, device: Device, user: Node, asked: set[str]) -> Node:
        contact = user.child("contact")
        if contact is not None:
            return self._contact(device, contact)
        jid = user.jid("jid") or SERVER
        phone = self._network.phone(jid)
        if phone is None or not self._network.exists(phone):
            return Node("user", {"jid": jid})
        children = []
        if "lid" in asked:
            children.append(Node("lid", {"val": self._network.lid(phone)}))
        if "devices" in asked:
            numbers = [other.number for other in self._network.devices_of(phone)]
            if phone != device.phone:  # nobody would read the copies for its own phone
                numbers.insert(0, 0)
            devices = [Node("device", {"id": str(number)}) for number in numbers]
            children.append(Node("devices", {}, [Node("device-list", {}, devices)]))
        return Node("user", {"jid": jid}, children)

    def _contact(self, device: Device, contact: Node) -> Node:
        asked = contact.data
        dialled = asked.split(b"@")[0].lstrip(b"+").decode("ascii", "replace")
        self._network.post.note_lookup(device, dialled)
        phone = self._network.aliases.get(dialled, dialled)
        known = self._network.exists(phone)
        attrs: Attrs = {"pn_jid": phone_jid(phone)}
        if known:
            attrs["jid"] = self._network.lid(phone)
        return Node("user", attrs, [Node("contact", {"type": "in" if known else "out"}, asked)])

    def _media(self, device: Device, node: Node) -> Answer:
        attrs: Attrs = {
            "auth": "sandbox",
            "ttl": "3600",
            "auth_ttl": "21600",
            "max_buckets": "12",
        }
        return [Node("media_conn", attrs, [Node("host", {"hostname": MEDIA_HOST})])]


def result(asked: Node, children: Answer) -> Node:
    """The answer to a query."""
    attrs: Attrs = {"type": "result", "id": asked.text("id"), "from": asked.jid("to") or SERVER}
    return Node("iq", attrs, children)


def _refusal(asked: Node, code: int, text: str) -> Node:
    attrs: Attrs = {"type": "error", "id": asked.text("id"), "from": asked.jid("to") or SERVER}
    return Node("iq", attrs, [Node("error", {"code": str(code), "text": text})])


def _prekey(node: Node) -> PreKey:
    """A key as a client uploads it.

    Raises:
        MalformedNode: It is none, and nobody could use it.
    """
    id, key = _data(node, "id"), _data(node, "value")
    if len(id) != _ID_BYTES or len(key) != _KEY_BYTES:
        raise MalformedNode("no prekey")
    return PreKey(int.from_bytes(id, "big"), key)


def _data(node: Node, tag: str) -> bytes:
    child = node.child(tag)
    return child.data if child else b""


def _bundle_nodes(bundle: Bundle) -> Answer:
    signed = [
        Node("id", {}, bundle.signed_prekey_id.to_bytes(3, "big")),
        Node("value", {}, bundle.signed_prekey),
        Node("signature", {}, bundle.signature),
    ]
    nodes = [
        Node("registration", {}, bundle.registration_id.to_bytes(4, "big")),
        Node("type", {}, _CURVE_TYPE),
        Node("identity", {}, bundle.identity),
        Node("skey", {}, signed),
    ]
    if bundle.prekey_id is not None and bundle.prekey is not None:
        key = [
            Node("id", {}, bundle.prekey_id.to_bytes(3, "big")),
            Node("value", {}, bundle.prekey),
        ]
        nodes.append(Node("key", {}, key))
    return nodes
