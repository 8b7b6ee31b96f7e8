"""Groups of the sandbox: who is in them, and what a client learns of them."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whatsapp_worker.sandbox.binary import Jid, Node, phone_jid
from whatsapp_worker.sandbox.model import Device

if TYPE_CHECKING:
    from whatsapp_worker.sandbox.network import Network

MAX_MEMBERS = 1024
MAX_GROUPS = 10_000
GROUP_SERVER = "g.us"


@dataclass(frozen=True)
class Group:
    """A group; `members` are phone numbers, the first made it."""

    id: str
    subject: str
    members: tuple[str, ...]
    created_at: int

    @property
    def jid(self) -> Jid:
        """Its address."""
        return Jid(self.id, GROUP_SERVER)


class Groups:
    """All groups; they outlive a restart."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._groups = {group.id: group for group in network.store.groups()}

    def create(self, subject: str, members: list[str]) -> Group:
        """Make a group of phone numbers, of contacts and devices alike.

        Raises:
            ValueError: Fewer than two members, or more than 1,024; too many groups.
        """
        phones = tuple(dict.fromkeys(members))
        if not 2 <= len(phones) <= MAX_MEMBERS:
            raise ValueError(f"members: 2 to {MAX_MEMBERS} different ones")
        if len(self._groups) >= MAX_GROUPS:
            raise ValueError(f"there are {MAX_GROUPS} groups already")
        group_id = f"1203630{secrets.randbelow(10**11):011d}"
        group = Group(group_id, subject, phones, int(time.time()))
        self._network.store.save_group(group)
        self._groups[group.id] = group
        return group

    def find(self, jid: Jid | None) -> Group | None:
        """The group with that address."""
        return self._groups.get(jid.user) if jid and jid.server == GROUP_SERVER else None

    def answer(self, device: Device, node: Node) -> list[Node] | None:
        """Answer a `w:g2` query: about one group, or all that the device's number is in.

        None when there is no such group, or the number is not in it.
        """
        if node.child("participating") is not None:
            mine = (group for group in self._groups.values() if device.phone in group.members)
            return [Node("groups", {}, [self._node(group) for group in mine])]
        group = self.find(node.jid("to"))
        if group is None or device.phone not in group.members:
            return None
        return [self._node(group)]

    def _node(self, group: Group) -> Node:
        made_by = self._network.lid(group.members[0])
        created = str(group.created_at)
        return Node(
            "group",
            {
                "id": group.id,
                "subject": group.subject,
                "creator": made_by,
                "creation": created,
                "s_o": made_by,
                "s_t": created,
                "addressing_mode": "lid",
            },
            [
                Node(
                    "participant",
                    {"jid": self._network.lid(phone), "phone_number": phone_jid(phone)},
                )
                for phone in group.members
            ],
        )
