"""One logged-in connection: each stanza goes to the part of the network that it is for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from whatsapp_worker.sandbox.binary import SERVER, Node
from whatsapp_worker.sandbox.model import Device, Link

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.network import Network

log = logging.getLogger(__name__)


class DeviceSession:
    """What the network does with the stanzas of a logged-in device."""

    def __init__(self, network: Network, device: Device, link: Link) -> None:
        self._network = network
        self._device = device
        self._link = link

    def handle(self, node: Node) -> None:
        """Take a stanza that the client sent."""
        if self._device.link is not self._link:
            return  # replaced by a newer connection, and not closed yet
        post = self._network.post
        match node.tag:
            case "message":
                post.take_message(self._device, self._link, node)
            case "ack":
                post.take_ack(self._device, node)
            case "receipt":
                post.take_receipt(self._device, self._link, node)
            case "chatstate":
                post.take_chat_state(self._device, node)
            case "iq":
                self._query(node)
            case _:
                log.debug("sandbox.stanza_ignored", extra={"tag": node.tag})

    def lost(self) -> None:
        """The connection is gone."""
        self._network.disconnected(self._device, self._link)

    def _query(self, node: Node) -> None:
        answer = self._network.queries.answer(self._device, node)
        if answer is not None:
            self._link.send(answer)
        if node.text("xmlns") == "passive" and node.child("active") is not None:
            count = self._network.post.hand_out(self._device)
            offline = Node("offline", {"count": str(count)})
            self._link.send(Node("ib", {"from": SERVER}, [offline]))
        if node.text("xmlns") == "md" and node.child("remove-companion-device") is not None:
            self._network.remove_device(self._device)
            self._network.farewell(self._link, "logged out")
