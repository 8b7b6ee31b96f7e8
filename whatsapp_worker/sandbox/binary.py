"""WhatsApp's binary XML: nodes to bytes and back. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from whatsapp_worker.sandbox.tokens import Tokens

MAX_DEPTH = 32
MAX_INFLATED_BYTES = 1 << 24

_LIST_EMPTY = 0
_DICTIONARY_0 = 236
_DICTIONARY_3 = 239
_INTEROP_JID = 245
_FB_JID = 246
_AD_JID = 247
_LIST_8 = 248
_LIST_16 = 249
_JID_PAIR = 250
_HEX_8 = 251
_BINARY_8 = 252
_BINARY_20 = 253
_BINARY_32 = 254
_NIBBLE_8 = 255

_AD_SERVERS = {0: "s.whatsapp.net", 1: "lid", 128: "hosted", 129: "hosted.lid"}
_AD_DOMAINS = {server: domain for domain, server in _AD_SERVERS.items()}
_NIBBLES = tuple(a + b for a in "0123456789-.\0\0\0\0" for b in "0123456789-.\0\0\0\0")
_HEX = tuple(a + b for a in "0123456789ABCDEF" for b in "0123456789ABCDEF")


class MalformedNode(ValueError):
    """These bytes are no node."""


class Jid(NamedTuple):
    """An address on the network; `user` is "" for a server itself."""

    user: str
    server: str
    device: int = 0

    def __str__(self) -> str:
        device = f":{self.device}" if self.device else ""
        return f"{self.user}{device}@{self.server}" if self.user else self.server

    @property
    def account(self) -> Jid:
        """The same address without a device."""
        return Jid(self.user, self.server)


SERVER = Jid("", "s.whatsapp.net")


def phone_jid(phone: str, device: int = 0) -> Jid:
    """The address of a phone number or of one of its devices."""
    return Jid(phone, "s.whatsapp.net", device)


def lid_jid(lid: str, device: int = 0) -> Jid:
    """The address of a hidden user number (LID) or of one of its devices."""
    return Jid(lid, "lid", device)


Value = str | Jid
Attrs = dict[str, Value]


@dataclass(slots=True)
class Node:
    """One element: JIDs in `attrs` stay JIDs, `content` is bytes, children or nothing."""

    tag: str
    attrs: Attrs = field(default_factory=dict)
    content: bytes | list[Node] | None = None

    @property
    def children(self) -> list[Node]:
        """The child nodes; empty when the content is something else."""
        return self.content if isinstance(self.content, list) else []

    @property
    def data(self) -> bytes:
        """The content bytes; empty when the content is something else."""
        return self.content if isinstance(self.content, bytes) else b""

    def child(self, tag: str) -> Node | None:
        """The first child of that tag."""
        return next((child for child in self.children if child.tag == tag), None)

    def all(self, tag: str) -> Iterator[Node]:
        """Every child of that tag."""
        return (child for child in self.children if child.tag == tag)

    def text(self, name: str) -> str:
        """An attribute as text; "" when missing."""
        return str(self.attrs.get(name, ""))

    def jid(self, name: str) -> Jid | None:
        """An attribute that is a JID; None when missing or something else."""
        value = self.attrs.get(name)
        return value if isinstance(value, Jid) else None


class Codec:
    """Nodes to frames and back, with one token dictionary.

    A codec without tokens reads and writes the same format with every string spelled out; that
    is what is stored on disk, since a dictionary belongs to one version of neonize.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._encoded = tokens.encoded

    def encode(self, node: Node) -> bytes:
        """One frame's content.

        Raises:
            ValueError: A string or list is too long for the format.
        """
        out = bytearray(1)  # flags: not compressed
        self._write_node(out, node)
        return bytes(out)

    def decode(self, frame: bytes) -> Node:
        """Read one frame's content; whatever follows the node is ignored, as whatsmeow does.

        Raises:
            MalformedNode: Damaged, too deep, or larger than 16 MiB inflated.
        """
        if not frame:
            raise MalformedNode("empty frame")
        body = frame[1:]
        if frame[0] & 2:
            body = _inflate(body)
        try:
            return _Reader(body, self._tokens).node(0)
        except (IndexError, UnicodeDecodeError) as error:
            raise MalformedNode("damaged node") from error

    def _write_node(self, out: bytearray, node: Node) -> None:
        content = node.content if node.content != [] else None
        _write_list(out, 1 + 2 * len(node.attrs) + (content is not None))
        self._write_string(out, node.tag)
        for name, value in node.attrs.items():
            self._write_string(out, name)
            if isinstance(value, Jid):
                self._write_jid(out, value)
            else:
                self._write_string(out, value)
        if isinstance(content, bytes):
            _write_bytes(out, content)
        elif content is not None:
            _write_list(out, len(content))
            for child in content:
                self._write_node(out, child)

    def _write_string(self, out: bytearray, text: str) -> None:
        token = self._encoded.get(text)
        if token is not None:
            out += token
        else:
            _write_bytes(out, text.encode())

    def _write_jid(self, out: bytearray, jid: Jid) -> None:
        domain = _AD_DOMAINS.get(jid.server)
        if domain is not None and (jid.device or domain >= 128):
            out += bytes((_AD_JID, domain, jid.device))
            self._write_string(out, jid.user)
            return
        out.append(_JID_PAIR)
        if jid.user:
            self._write_string(out, jid.user)
        else:
            out.append(_LIST_EMPTY)
        self._write_string(out, jid.server)


def _write_bytes(out: bytearray, content: bytes) -> None:
    size = len(content)
    if size < 1 << 8:
        out += bytes((_BINARY_8, size))
    elif size < 1 << 20:
        out.append(_BINARY_20)
        out += size.to_bytes(3, "big")
    else:
        out.append(_BINARY_32)
        out += size.to_bytes(4, "big")
    out += content


def _write_list(out: bytearray, size: int) -> None:
    if size < 1 << 8:
        out += bytes((_LIST_8, size))
    elif size < 1 << 16:
        out.append(_LIST_16)
        out += size.to_bytes(2, "big")
    else:
        raise ValueError("more than 65,535 children")


def _inflate(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(body, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise MalformedNode("damaged compression") from error
    if inflater.unconsumed_tail:
        raise MalformedNode("more than 16 MiB inflated")
    return inflated


class _Reader:
    """Reads one body front to back; running past its end raises IndexError."""

    __slots__ = ("at", "body", "double", "single")

    def __init__(self, body: bytes, tokens: Tokens) -> None:
        self.body = body
        self.at = 0
        self.single = tokens.single
        self.double = tokens.double

    def node(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise MalformedNode("too deep")
        size = self._list_size(self._byte())
        if size == 0:
            raise MalformedNode("empty node")
        tag = self._string()
        if not tag:
            raise MalformedNode("node without a tag")
        attrs = {self._string(): self._value() for _ in range((size - 1) >> 1)}
        return Node(tag, attrs, None if size % 2 else self._content(depth))

    def _content(self, depth: int) -> bytes | list[Node] | None:
        kind = self.body[self.at]
        if kind == _LIST_EMPTY:
            self.at += 1
            return None
        if kind in (_LIST_8, _LIST_16):
            self.at += 1
            return [self.node(depth + 1) for _ in range(self._list_size(kind))] or None
        if _BINARY_8 <= kind <= _BINARY_32:
            self.at += 1
            return self._bytes(kind)
        return str(self._value()).encode()

    def _value(self) -> Value:
        kind = self._byte()
        if kind == _JID_PAIR:
            return self._jid_pair()
        if kind == _AD_JID:
            domain, device = self._byte(), self._byte()
            return Jid(self._string(), _AD_SERVERS.get(domain, "s.whatsapp.net"), device)
        if kind in (_FB_JID, _INTEROP_JID):
            return self._foreign_jid(kind)
        return self._text(kind)

    def _string(self) -> str:
        return self._text(self._byte())

    def _text(self, kind: int) -> str:
        if _BINARY_8 <= kind <= _BINARY_32:
            return self._bytes(kind).decode()
        if kind == _LIST_EMPTY:
            return ""
        if kind < len(self.single):
            return self.single[kind]
        if _DICTIONARY_0 <= kind <= _DICTIONARY_3:
            return self.double[kind - _DICTIONARY_0][self._byte()]
        if kind in (_NIBBLE_8, _HEX_8):
            return self._packed(_NIBBLES if kind == _NIBBLE_8 else _HEX)
        raise MalformedNode(f"unknown token {kind}")

    def _jid_pair(self) -> Jid:
        user = self._string()
        return Jid(user, self._string())

    def _foreign_jid(self, kind: int) -> Jid:
        user = self._string()
        device = self._number(2)
        if kind == _INTEROP_JID:
            self._number(2)  # the integrator, of no use here
        return Jid(user, self._string(), device)

    def _packed(self, alphabet: tuple[str, ...]) -> str:
        start = self._byte()
        packed = self._take(start & 127)
        text = "".join([alphabet[byte] for byte in packed])
        return text[:-1] if start & 128 else text

    def _bytes(self, kind: int) -> bytes:
        if kind == _BINARY_8:
            return self._take(self._byte())
        if kind == _BINARY_20:
            return self._take(self._number(3) & 0xFFFFF)
        return self._take(self._number(4))

    def _list_size(self, kind: int) -> int:
        if kind == _LIST_8:
            return self._byte()
        if kind == _LIST_16:
            return self._number(2)
        if kind == _LIST_EMPTY:
            return 0
        raise MalformedNode("no list where one must be")

    def _byte(self) -> int:
        byte = self.body[self.at]
        self.at += 1
        return byte

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.body):
            raise MalformedNode("cut off")
        taken = self.body[self.at : end]
        self.at = end
        return taken
